"""Latencies of an engine that always holds the same number of requests, in closed form.

``concurrency`` users each send a request of ``prompt`` tokens, wait for its ``output`` tokens, and send the next. At
any time B of them are inside (fewer than there are users where the KV memory is short) and decode; in the time that one
request takes, the prompts of all the others are computed too, in chunks beside the decoding rows:

    TPOT = decode step of B rows + (B − 1) · prefill / output
    TTFT = prefill · (1 + share of the others' prompts it waits behind) + half a step + waiting for memory

For sweeps over thousands of operating points; a simulation gives distributions and what happens under bursts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sim.cost_model import CostModel, StepFeatures


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """What is asked of an engine."""

    prompt: int
    output: int
    concurrency: int
    max_running: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOverhead:
    """Seconds that an engine adds to what the kernels take.

    Attributes:
        step_s: per step.
        layer_s: per decoder layer of a step: gaps between kernels, and kernels that no table has.
        row_s: per decoding row of a step.
        request_s: per request, before its first token: network, tokenisation, queueing.
    """

    step_s: float = 0.0
    layer_s: float = 0.0
    row_s: float = 0.0
    request_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSeconds:
    """What the cost model says of one operating point, without the host.

    Attributes:
        decode_s: a step of all running rows, each halfway through its output.
        prefill_s: what one prompt adds to the steps that compute it.
        num_layers: of the model.
        running: rows that are inside.
        waiting: users outside for want of memory.
    """

    decode_s: float
    prefill_s: float
    num_layers: int
    running: float
    waiting: float


def kernel_seconds(model: CostModel, point: OperatingPoint) -> KernelSeconds:
    """The two steps that the closed form needs.

    Raises:
        ValueError: sizes that are not positive.
    """
    if min(point.prompt, point.output, point.concurrency) < 1 or point.max_running < 1.0:
        raise ValueError(f"{point} must have at least one token and one request")
    running = float(math.floor(min(point.concurrency, point.max_running)))
    context = running * (point.prompt + 0.5 * point.output)
    chunk = float(point.prompt)
    pairs = 0.5 * chunk * (chunk + 1.0)
    zero = 0.0
    host_s = model.operators.overhead_s + model.operators.overhead_row_s * running
    decode = model.predict_scalar(
        StepFeatures(running, running, running, running, context, zero, zero, zero, zero, zero)
    )
    alone = model.predict_scalar(StepFeatures(chunk, 1.0, zero, zero, zero, chunk, pairs, zero, zero, zero))
    together = model.predict_scalar(
        StepFeatures(
            running + chunk, running + 1.0, running, running, context, chunk, pairs, zero, zero, zero
        )
    )
    decode_s = decode.total_s - host_s
    added_s = together.total_s - host_s - decode_s
    return KernelSeconds(
        decode_s=decode_s,
        prefill_s=max(added_s, alone.total_s - model.operators.overhead_s - decode_s, 0.0),
        num_layers=model.num_layers,
        running=running,
        waiting=max(0.0, point.concurrency - running),
    )


def latencies(point: OperatingPoint, kernels: KernelSeconds, host: HostOverhead) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds.

    A newcomer finds, of the others' prompts, those that are being computed: as many as the engine spends time on.
    """
    step_s = host.step_s + host.layer_s * kernels.num_layers + host.row_s * kernels.running + kernels.decode_s
    prefill_s = kernels.prefill_s
    tpot_s = step_s + (kernels.running - 1.0) * prefill_s / point.output
    cycle_s = point.output * tpot_s + prefill_s
    busy = min(1.0, kernels.running * prefill_s / cycle_s)
    ahead = busy * (kernels.running - 1.0) * 0.5 * busy
    ttft_s = host.request_s + prefill_s * (1.0 + ahead) + 1.5 * step_s
    return ttft_s + kernels.waiting / kernels.running * cycle_s, tpot_s


def log_errors(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """log(predicted / measured)."""
    return np.log(np.asarray(predicted, np.float64) / np.asarray(measured, np.float64))
