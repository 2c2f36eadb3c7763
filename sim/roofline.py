"""The fallback when nothing was measured: each operator as max(bytes / bandwidth, operations / rate).

Every figure that is not on a chip's sheet stands in :class:`Efficiencies`, with the published timings that it
is from: aiconfigurator's kernel tables (bfloat16; A100, H100, H200, B200, L40S), LLMServingSim's profile of
vLLM 0.19 on an RTX 4090, and Vidur's table of host overheads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from sim.curves import Curve, Operators
from sim.hardware import Hardware
from sim.model_shape import ModelShape

RELATIVE_STD = {
    "dense": 0.2,
    "lm_head": 0.2,
    "decode_attention": 0.7,
    "prefill_attention": 0.6,
    "all_reduce": 0.5,
    "sampling": 0.5,
    "draft_step": 0.3,
    "draft_prefill": 0.3,
    "overhead": 0.5,
}
"""How far this roofline is off, as the root mean square of log(measured/roofline).

Dense, attention and all-reduce: over aiconfigurator's tables, averaged over the five chips (dense 0.11 to 0.25;
all-reduce over NVLink only: among more than two L40S over PCIe it takes seven times as long). Sampling, drafting
and overhead have no table: assumed.
"""

_ACTIVATION_BYTES = 2.0
_UNBOUNDED = 2.0**40  # a formula has no fitted range: no step is larger than this in tokens, pairs or bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
    """What of a sheet's peaks kernels reach, and the latencies that no sheet has.

    Attributes:
        memory: share of the peak bandwidth; aiconfigurator's sheets say 0.8 (median of its matrix products with at
            most 16 tokens: A100 0.70, H100 0.83, H200 0.77, B200 0.75, L40S 0.81).
        compute: share of the peak operations per second in matrix products; the mean over chips of the median
            where m, n, k >= 2048: A100 0.85, H100 0.79, H200 0.79, B200 0.69, L40S 0.62.
        attention_compute: the same in attention over 1024 to 4095 prompt tokens: 0.33 to 0.43.
        link: share of the link's peak in an all-reduce of 128 MiB over NVLink: 0.31 to 0.48.
        kernel_latency_s: per kernel, beyond its bytes: the constant of aiconfigurator's sheets.
        attention_latency_s: shortest decode attention: mean of 10.5, 11.0, 10.8, 6.1 and 7.5 µs.
        link_latency_s: of an all-reduce, where the chip's sheet has none: aiconfigurator's for all its chips.
        sampling_latency_s: sampler for one row on the RTX 4090.
        sampling_passes: times the sampler reads its float32 logits; from the same profile, 256 rows: 1.8.
        overhead_s: host seconds per step; the intercept of Vidur's scheduling, input preparation and output
            handling over batch sizes (A100, one device).
        overhead_row_s: host seconds per decoding row. Vidur's slope is 37 µs, of an engine that prepares one step
            after the other; engines that overlap the two hide it, hence 0.
        draft_row_s: host seconds per drafting row for a lookup.

    Raises:
        ValueError: a share outside (0, 1], or a negative time.
    """

    memory: float = 0.8
    compute: float = 0.75
    attention_compute: float = 0.4
    link: float = 0.4
    kernel_latency_s: float = 3e-6
    attention_latency_s: float = 9e-6
    link_latency_s: float = 1e-5
    sampling_latency_s: float = 25e-6
    sampling_passes: float = 2.0
    overhead_s: float = 3.5e-4
    overhead_row_s: float = 0.0
    draft_row_s: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("memory", "compute", "attention_compute", "link"):
                if not 0.0 < value <= 1.0:
                    raise ValueError(f"{item.name}={value} must be in (0, 1]: it is a share of a peak")
            elif not 0.0 <= value < math.inf:
                raise ValueError(f"{item.name}={value} must be finite and >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Device:
    """What the kernels of one device reach."""

    flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    efficiencies: Efficiencies
    source: str


def roofline_operators(
    hardware: Hardware,
    model: ModelShape,
    *,
    tensor_parallel: int,
    draft: ModelShape | None,
    dtype: str,
    efficiencies: Efficiencies,
) -> Operators:
    """The operators of ``model`` on one of ``tensor_parallel`` devices; a draft model runs whole on each.

    Attention of a few query tokens over a long context, which verification is, stands in no public table. It is
    modelled as the longer of reading the KV cache once and computing all query-key pairs.

    Args:
        dtype: of the matrix products.

    Raises:
        ValueError: a chip without that data type, heads that do not divide, or devices without a link.
    """
    peak = hardware.peak_flops_per_s(dtype)
    device = _Device(
        flops_per_s=peak * efficiencies.compute,
        attention_flops_per_s=peak * efficiencies.attention_compute,
        bytes_per_s=hardware.memory_bytes_per_s * efficiencies.memory,
        efficiencies=efficiencies,
        source=f"roofline of {hardware.name}, {dtype}",
    )
    kv_bytes = 2 * model.kv_heads_per_device(tensor_parallel) * model.head_dim * model.kv_bytes_per_element
    pair_s = 4 * (model.num_heads // tensor_parallel) * model.head_dim / device.attention_flops_per_s
    latency_s = efficiencies.attention_latency_s
    return Operators(
        dense=_dense(model, device, tensor_parallel),
        decode_attention=_line(latency_s, kv_bytes / device.bytes_per_s, "decode_attention", device),
        prefill_attention=_line(latency_s, pair_s, "prefill_attention", device),
        lm_head=_lm_head(model, device, tensor_parallel),
        sampling=_sampling(model, device),
        all_reduce=_all_reduce(hardware, device, tensor_parallel) if tensor_parallel > 1 else None,
        draft_step=_draft_step(draft, device) if draft else None,
        draft_prefill=_scaled(_dense(draft, device, 1), draft.num_layers, "draft_prefill") if draft else None,
        verify_pair_s=pair_s,
        prefill_context_s=kv_bytes / device.bytes_per_s,
        draft_context_s=draft.kv_bytes_per_token / device.bytes_per_s if draft else 0.0,
        draft_row_s=efficiencies.draft_row_s,
        overhead_s=efficiencies.overhead_s,
        overhead_row_s=efficiencies.overhead_row_s,
        overhead_relative_std=RELATIVE_STD["overhead"],
    )


def _dense(model: ModelShape, device: _Device, tensor_parallel: int) -> Curve:
    """Four matrix products and four elementwise kernels (two norms, rotary embedding, activation)."""
    model.check_dense()
    hidden, ffn = model.hidden_size, model.intermediate_size / tensor_parallel
    queries = model.num_heads // tensor_parallel * model.head_dim
    keys = model.kv_heads_per_device(tensor_parallel) * model.head_dim
    shapes = ((queries + 2 * keys, hidden), (hidden, queries), (2 * ffn, hidden), (hidden, ffn))
    moved = (
        8 * hidden + 2 * (queries + keys) + 3 * ffn
    )  # elements that the elementwise kernels touch per token
    tokens = _breakpoints(_crossing(n, k, model, device) for n, k in shapes)
    seconds = moved * _ACTIVATION_BYTES / device.bytes_per_s * tokens
    for n, k in shapes:
        seconds = seconds + gemm_s(tokens, n, k, model.weight_bytes_per_param, device)
    latency_s = 2 * len(shapes) * device.efficiencies.kernel_latency_s
    return _curve(tokens, seconds + latency_s, "dense", device.source)


def gemm_s(
    tokens: np.ndarray, n: float, k: float, weight_bytes_per_param: float, device: _Device
) -> np.ndarray:
    """Seconds of [tokens, k] @ [k, n], without latency: weights and activations moved once, or 2·m·n·k."""
    moved = n * k * weight_bytes_per_param + (n + k) * _ACTIVATION_BYTES * tokens
    return np.maximum(moved / device.bytes_per_s, 2 * n * k * tokens / device.flops_per_s)


def _crossing(n: float, k: float, model: ModelShape, device: _Device) -> float:
    """Tokens from which the product is bound by computing; inf if it never is."""
    per_token_s = 2 * n * k / device.flops_per_s - (n + k) * _ACTIVATION_BYTES / device.bytes_per_s
    weights_s = n * k * model.weight_bytes_per_param / device.bytes_per_s
    return weights_s / per_token_s if per_token_s > 0.0 else math.inf


def _lm_head(model: ModelShape, device: _Device, tensor_parallel: int) -> Curve:
    """Final norm and output head, whose vocabulary is split."""
    vocab, hidden = model.vocab_size / tensor_parallel, model.hidden_size
    rows = _breakpoints([_crossing(vocab, hidden, model, device)])
    seconds = gemm_s(rows, vocab, hidden, model.weight_bytes_per_param, device)
    seconds = seconds + 2 * device.efficiencies.kernel_latency_s
    return _curve(rows, seconds, "lm_head", device.source)


def _sampling(model: ModelShape, device: _Device) -> Curve:
    row_s = model.vocab_size * 4 * device.efficiencies.sampling_passes / device.bytes_per_s
    return _line(device.efficiencies.sampling_latency_s, row_s, "sampling", device)


def _all_reduce(hardware: Hardware, device: _Device, tensor_parallel: int) -> Curve:
    """A ring: each device sends and receives 2 (n - 1) / n of the message."""
    if hardware.link_bytes_per_s is None:
        raise ValueError(
            f"tensor_parallel={tensor_parallel} needs the link_bytes_per_s of {hardware.name}: its sheet has none"
        )
    latency_s = hardware.link_latency_s or device.efficiencies.link_latency_s
    share = 2 * (tensor_parallel - 1) / tensor_parallel
    byte_s = share / (hardware.link_bytes_per_s * device.efficiencies.link)
    return _line(latency_s, byte_s, "all_reduce", device)


def _draft_step(draft: ModelShape, device: _Device) -> Curve:
    """All layers, head and choice of the token; the attention's latency, but not its bytes."""
    dense, head, sampling = _dense(draft, device, 1), _lm_head(draft, device, 1), _sampling(draft, device)
    rows = np.array(sorted({*dense.x, *head.x, *sampling.x}))
    layers_s = draft.num_layers * (dense(rows) + device.efficiencies.attention_latency_s)
    return _curve(rows, layers_s + head(rows) + sampling(rows), "draft_step", device.source)


def _scaled(curve: Curve, factor: float, name: str) -> Curve:
    return _curve(np.array(curve.x), factor * np.array(curve.seconds), name, curve.source)


def _line(latency_s: float, slope_s: float, name: str, device: _Device) -> Curve:
    sizes = np.array([1.0, _UNBOUNDED])
    return _curve(sizes, latency_s + slope_s * sizes, name, device.source)


def _breakpoints(crossings: Iterable[float]) -> np.ndarray:
    return np.array([1.0, *sorted({size for size in crossings if 1.0 < size < _UNBOUNDED}), _UNBOUNDED])


def _curve(sizes: np.ndarray, seconds: np.ndarray, name: str, source: str) -> Curve:
    return Curve(
        x=tuple(sizes.tolist()),
        seconds=tuple(seconds.tolist()),
        relative_std=RELATIVE_STD[name],
        source=source,
    )
