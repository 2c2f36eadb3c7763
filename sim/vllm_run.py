"""A recorded run of a real vLLM, and the same run simulated from its arrivals and lengths alone.

The format is that of LLMServingSim 2's benches: ``requests.jsonl`` (request_id, input_toks, output_toks, arrival_time,
queued_ts, scheduled_ts, first_token_ts, last_token_ts; seconds), ``meta.json`` (settings, resolved configuration, KV
block count) and, where there is one, ``summary.txt`` (15 latencies in milliseconds, real and of another simulator).

Latencies count from ``queued_ts``, when the engine first saw the request, as in ``summary.txt``.

>>> recorded = read_run("bench/RTX4090/Llama-3.1-8B")
>>> simulated = simulate_run(recorded, cost_model, recorded.num_blocks)
>>> errors_pct(simulated.latencies, recorded.latencies)["ttft_mean"]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.acceptance import make_acceptance
from sim.hardware import HARDWARE_NAMES
from sim.model_shape import PROFILED_SHAPES, ModelShape
from sim.overlapped import OverlappedReplica
from sim.replica import SimRequest, StepTimes
from sim.shared_prompts import PromptSharing
from specdec.scheduler import SchedulerConfig, StepLoop, make_controller, make_policy

FloatArray = NDArray[np.float64]

LATENCIES = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
_SUMMARY_NAMES = {"TTFT": "ttft", "TPOT": "tpot", "Latency": "e2e"}
_SUMMARY_STATISTICS = {"Mean": "mean", "Median": "p50", "P90": "p90", "P95": "p95", "P99": "p99"}
_LOGIT_BYTES = 26
"""Bytes per logit at the peak of vLLM's profiling run, which samples ``max_num_seqs`` rows with top-k and top-p: the
logits in bfloat16 (2) and float32 (4), sorted values (4) with 64-bit indices (8), probabilities and their sum (8)."""
_RUNTIME_BYTES = 200e6
"""What the profiling run finds beside tensors: the CUDA context's growth and cuBLAS workspaces. An estimate."""
_NULL_BLOCKS = 1  # vLLM keeps one block to point unused table entries at


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the run's vLLM was told, or resolved to."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    prefix_caching: bool
    tensor_parallel: int
    async_scheduling: bool
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmRun:
    """A recorded run.

    Attributes:
        model, device: as vLLM names them.
        version: of vLLM.
        arrival_s: float64 [n], from the first arrival on; what else is of the n requests is in the same order.
        input_tokens, output_tokens: int64 [n].
        queued_s, first_token_s, last_token_s: float64 [n], on the engine's clock.
        num_blocks: KV blocks that the run had; ``None`` where it is not recorded.
        memory_bytes: of one device.
        dataset_hash: SHA-256 of the workload's file, ``None`` where it is not recorded.
    """

    model: str
    device: str
    version: str
    settings: EngineSettings
    arrival_s: FloatArray
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    queued_s: FloatArray
    first_token_s: FloatArray
    last_token_s: FloatArray
    num_blocks: int | None
    memory_bytes: int | None
    dataset_hash: str | None

    @property
    def latencies(self) -> dict[str, FloatArray]:
        return _latencies(self.queued_s, self.first_token_s, self.last_token_s, self.output_tokens)

    @property
    def duration_s(self) -> float:
        return float(self.last_token_s.max() - self.queued_s.min())


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What the simulator says of it: seconds from the first arrival on, in the order of the run's requests."""

    seen_s: FloatArray
    first_token_s: FloatArray
    last_token_s: FloatArray
    output_tokens: NDArray[np.int64]
    num_preemptions: int
    num_steps: int
    busy_s: float

    @property
    def latencies(self) -> dict[str, FloatArray]:
        return _latencies(self.seen_s, self.first_token_s, self.last_token_s, self.output_tokens)

    @property
    def duration_s(self) -> float:
        return float(self.last_token_s.max() - self.seen_s.min())


def _latencies(
    queued_s: FloatArray, first_s: FloatArray, last_s: FloatArray, tokens: NDArray[np.int64]
) -> dict[str, FloatArray]:
    """Seconds; the time per output token of a one-token answer is NaN."""
    gaps = np.where(tokens > 1, tokens - 1.0, np.nan)
    return {"ttft": first_s - queued_s, "tpot": (last_s - first_s) / gaps, "e2e": last_s - queued_s}


def statistics(latencies: Mapping[str, FloatArray]) -> dict[str, float]:
    """``ttft_mean`` … ``e2e_p99`` in seconds."""
    found: dict[str, float] = {}
    for name in LATENCIES:
        values = latencies[name][np.isfinite(latencies[name])]
        found[f"{name}_mean"] = float(values.mean())
        for statistic in STATISTICS[1:]:
            found[f"{name}_{statistic}"] = float(np.percentile(values, float(statistic[1:])))
    return found


def errors_pct(simulated: Mapping[str, FloatArray], measured: Mapping[str, FloatArray]) -> dict[str, float]:
    """Signed errors of :func:`statistics`, per cent of the measured."""
    ours, real = statistics(simulated), statistics(measured)
    return {name: 100.0 * (ours[name] / real[name] - 1.0) for name in real}


def read_run(folder: str | Path) -> VllmRun:
    """Read ``requests.jsonl`` and ``meta.json``.

    Raises:
        ValueError: files or entries that are missing, or requests that never finished.
    """
    folder = Path(folder)
    for name in ("requests.jsonl", "meta.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of one bench run")
    meta = cast("dict[str, Any]", json.loads((folder / "meta.json").read_text()))
    lines = (folder / "requests.jsonl").read_text().splitlines()
    rows = [cast("dict[str, Any]", json.loads(line)) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{folder / 'requests.jsonl'} holds no request")
    columns: dict[str, FloatArray] = {}
    for name in ("arrival_time", "queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks"):
        values = [row.get(name) for row in rows]
        if any(value is None for value in values):
            raise ValueError(f"{folder / 'requests.jsonl'}: a request has no {name}: give a finished run")
        columns[name] = np.array(values, np.float64)
    order = np.argsort(columns["arrival_time"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    cache, hardware = _section(meta, "kv_cache"), _section(meta, "hardware")
    return VllmRun(
        model=str(meta.get("model", "unnamed model")),
        device=str(hardware.get("device_name", "unnamed device")),
        version=str(meta.get("vllm_version", "?")),
        settings=_settings(meta),
        arrival_s=columns["arrival_time"] - columns["arrival_time"][0],
        input_tokens=columns["input_toks"].astype(np.int64),
        output_tokens=columns["output_toks"].astype(np.int64),
        queued_s=columns["queued_ts"],
        first_token_s=columns["first_token_ts"],
        last_token_s=columns["last_token_ts"],
        num_blocks=cache.get("num_gpu_blocks"),
        memory_bytes=hardware.get("device_total_memory_bytes"),
        dataset_hash=meta.get("dataset_hash"),
    )


def _section(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mapping within another; empty where there is none."""
    return cast("dict[str, Any]", meta.get(name) or {})


def _settings(meta: Mapping[str, Any]) -> EngineSettings:
    """From what was resolved, else from what was asked for, else vLLM's defaults."""
    asked, cache = _section(meta, "engine_kwargs"), _section(meta, "kv_cache")
    scheduler = _section(_section(meta, "resolved_config"), "scheduler_config")
    caching = cache.get("enable_prefix_caching")
    ahead = scheduler.get("async_scheduling")
    return EngineSettings(
        max_num_seqs=int(scheduler.get("max_num_seqs") or asked.get("max_num_seqs") or 256),
        max_num_batched_tokens=int(
            scheduler.get("max_num_batched_tokens") or asked.get("max_num_batched_tokens") or 2048
        ),
        max_model_len=int(asked.get("max_model_len") or 32768),
        block_size=int(cache.get("block_size") or 16),
        prefix_caching=True if caching is None else bool(caching),
        tensor_parallel=int(asked.get("tensor_parallel_size") or 1),
        async_scheduling=True if ahead is None else bool(ahead),
        gpu_memory_utilization=float(
            cache.get("gpu_memory_utilization") or asked.get("gpu_memory_utilization") or 0.9
        ),
    )


def shape_named(model: str) -> ModelShape:
    """The shape of a model by vLLM's name for it: ``meta-llama/Llama-3.1-8B`` is ``llama-3.1-8b``, and
    ``Qwen/Qwen3-30B-A3B-Instruct-2507`` is ``qwen3-30b-a3b``.

    Raises:
        ValueError: a model whose shape is not known.
    """
    name = model.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    name = re.sub(r"-instruct(-\d{4})?$", "", name)
    if name not in PROFILED_SHAPES:
        raise ValueError(
            f"the shape of {model!r} is not known: add it to sim.model_shape.MODEL_SHAPES, or name one of "
            f"{', '.join(PROFILED_SHAPES)}"
        )
    return PROFILED_SHAPES[name]


def chip_named(device: str) -> str | None:
    """The name in ``conf/hardware`` of a device as CUDA names it, or ``None``."""
    words = device.lower().replace("-", " ").split()
    for name in HARDWARE_NAMES:
        if all(part in words for part in name.split("_")):
            return name
    return None


def expected_kv_blocks(recorded: VllmRun, shape: ModelShape) -> int:
    """How many KV blocks vLLM finds room for, from the card's memory and the settings alone.

    Of its share of the memory, vLLM takes off the weights and the peak of a profiling run, which is the larger of
    the widest activations of ``max_num_batched_tokens`` tokens and of sampling ``max_num_seqs`` rows, and what the
    runtime holds beside tensors.

    Raises:
        ValueError: a run that does not say how much memory the device has, or too little of it.
    """
    if recorded.memory_bytes is None:
        raise ValueError(
            "meta.json does not say hardware.device_total_memory_bytes: give the run's block count"
        )
    settings, tp = recorded.settings, recorded.settings.tensor_parallel
    tokens, rows = settings.max_num_batched_tokens, settings.max_num_seqs
    widest = 3 * shape.intermediate_size / tp + 3 * shape.hidden_size
    sampling = rows * shape.vocab_size * _LOGIT_BYTES + tokens * 3 * shape.hidden_size * 2
    peak = max(tokens * widest * 2, sampling)
    free = recorded.memory_bytes * settings.gpu_memory_utilization - shape.weight_bytes / tp
    share = shape.kv_heads_per_device(tp) / shape.num_kv_heads
    blocks = math.floor(
        (free - peak - _RUNTIME_BYTES) / (shape.kv_bytes_per_token * share * settings.block_size)
    )
    if blocks < 2:
        raise ValueError(
            f"{shape.name} leaves no room for KV blocks on {recorded.device} with these settings"
        )
    return blocks


def simulate_run(
    recorded: VllmRun, cost_model: StepTimes, num_blocks: int, sharing: PromptSharing | None = None
) -> SimulatedRun:
    """Simulate the run's engine: our scheduler with vLLM's settings, fed with arrivals and lengths.

    Blocks of a preempted request stay in the prefix cache, its output's too, until they are needed.

    Args:
        num_blocks: as vLLM counts them, with its null block.
        sharing: which of the run's prompts begin alike. Without it every request's tokens are its own, as lengths
            do not tell.

    Raises:
        ValueError: a request that can never run with these settings.
    """
    settings = recorded.settings
    loop = StepLoop(
        SchedulerConfig(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            num_blocks=num_blocks - _NULL_BLOCKS,
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
            prefix_caching=settings.prefix_caching,
            watermark=0.0,  # vLLM 0.19 admits to the last block
        ),
        make_policy("chunked"),
        make_controller("off"),
    )
    env = simpy.Environment()
    replica = OverlappedReplica(
        env,
        loop,
        cost_model,
        make_acceptance("constant", alpha=0.0),
        plans_ahead=settings.async_scheduling,
    )
    requests = _requests(recorded, sharing)

    def arrivals() -> Any:
        for request in requests:
            yield env.timeout(max(0.0, request.arrival_s - env.now))
            replica.submit(request)

    env.process(arrivals())
    env.run()
    missing = [request.request_id for request in requests if not math.isfinite(request.finish_s)]
    assert not missing, f"requests {missing[:5]} never finished"
    return SimulatedRun(
        seen_s=np.array([replica.seen_s[request.request_id] for request in requests]),
        first_token_s=np.array([request.first_token_s for request in requests]),
        last_token_s=np.array([request.finish_s for request in requests]),
        output_tokens=recorded.output_tokens,
        num_preemptions=sum(request.num_preemptions for request in requests),
        num_steps=replica.num_steps,
        busy_s=replica.busy_s,
    )


def _requests(recorded: VllmRun, sharing: PromptSharing | None) -> list[SimRequest]:
    size = recorded.settings.block_size
    prompts, outputs = recorded.input_tokens.tolist(), recorded.output_tokens.tolist()
    sharing = sharing or PromptSharing(len(prompts), ())
    hashes = sharing.block_hashes(prompts, size)
    next_hash = 1 + max((max(of_prompt, default=0) for of_prompt in hashes), default=0)
    requests: list[SimRequest] = []
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        num_hashes = (prompt + output) // size
        of_answer = list(range(next_hash, next_hash + num_hashes - len(hashes[index])))
        next_hash += len(of_answer)
        requests.append(
            SimRequest(
                request_id=index,
                prompt_len=prompt,
                max_tokens=output,
                output_len=output,
                arrival_s=float(recorded.arrival_s[index]),
                block_hashes=hashes[index] + of_answer if recorded.settings.prefix_caching else [],
            )
        )
    return requests


def read_summary(folder: str | Path) -> dict[str, tuple[float, float]]:
    """``summary.txt``: name as in :func:`statistics` → milliseconds, (real, the other simulator's); {} without one."""
    path = Path(folder) / "summary.txt"
    found: dict[str, tuple[float, float]] = {}
    if not path.is_file():
        return found
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] in _SUMMARY_NAMES and words[1] in _SUMMARY_STATISTICS:
            found[f"{_SUMMARY_NAMES[words[0]]}_{_SUMMARY_STATISTICS[words[1]]}"] = (
                float(words[2]),
                float(words[3]),
            )
    return found
