"""From a configuration to a simulated cluster, its workload and what a run of it costs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.options import controller_options, policy_options
from sim.cluster_spec import ClusterSpec, ReplicaSpec
from sim.cost_model import CostModel, StepFeatures, roofline_cost_model
from sim.economics import ChipPrice, cost_per_million_tokens_usd
from sim.hardware import Hardware, hardware_from_mapping, kv_blocks
from sim.model_shape import MODEL_SHAPES, ModelShape
from specdec.metrics import Slo
from specdec.scheduler import SchedulerConfig, make_policy
from specdec.workload import (
    ArrivalProcess,
    ClosedLoop,
    EmpiricalLengths,
    FixedLengths,
    LengthDistribution,
    Requests,
    RequestSource,
    SessionShape,
    SessionSource,
    SyntheticSource,
    TraceSource,
    azure_like,
    collect,
    load_trace,
    make_process,
)

if TYPE_CHECKING:
    from specdec.config import Config  # a worker process that only simulates does without Hydra

DEFAULT_BATCHED_TOKENS = 8192
SMALL_RUN = 2000
"""Requests up to which every step is recorded without being asked."""


def hardware(config: Config) -> Hardware:
    """The configured chip."""
    try:
        return hardware_from_mapping(asdict(config.hardware))
    except ValueError as error:
        raise ValueError(f"hardware: {error}") from error


def slo(config: Config) -> Slo:
    return Slo(ttft_s=config.experiment.slo_ttft_s, tpot_s=config.experiment.slo_tpot_s)


def cluster(config: Config, policy: Any = None, speculation: Any = None) -> ClusterSpec:
    """The configured replicas; ``policy`` and ``speculation`` are schemas to take instead of the configured ones.

    Raises:
        ValueError: what does not fit: into the memory, to the policy, or to each other.
    """
    options, chip = config.experiment, hardware(config)
    target = _shape(options.model, options.dtype)
    controller = controller_options(speculation or config.speculation)
    draft = _shape(options.draft, options.dtype) if options.draft and controller.get("max_drafts") else None
    scheduling = policy_options(policy or config.policy)
    cost_model = roofline_cost_model(
        chip, target, tensor_parallel=options.tensor_parallel, draft=draft, dtype=options.dtype
    )
    if controller["name"] == "goodput":
        controller = with_step_times(controller, cost_model)
    swaps = options.num_swap_blocks > 0
    block_bytes = target.kv_bytes_per_token * options.block_size / options.tensor_parallel
    replica = ReplicaSpec(
        _limits(config, chip, target, draft, scheduling),
        cost_model,
        policy=scheduling["policy"],
        speculation=controller,
        acceptance=asdict(config.acceptance),
        swap_block_s=block_bytes / options.host_link_bytes_per_s if swaps else 0.0,
        tensor_parallel=options.tensor_parallel,
    )
    return ClusterSpec.of(replica, options.num_replicas, router=options.router)


def _shape(name: str, dtype: str) -> ModelShape:
    return MODEL_SHAPES[name].stored_as(dtype)


def _limits(
    config: Config, chip: Hardware, target: ModelShape, draft: ModelShape | None, scheduling: dict[str, Any]
) -> SchedulerConfig:
    options = config.experiment
    budget, num_blocks = options.max_num_batched_tokens, options.num_blocks
    if budget is None:
        # A policy that computes prompts whole must be able to compute the longest one.
        chunked = make_policy(**scheduling["policy"]).chunked_prefill
        budget = DEFAULT_BATCHED_TOKENS if chunked else max(DEFAULT_BATCHED_TOKENS, options.max_model_len)
    if num_blocks is None:
        num_blocks = kv_blocks(
            chip,
            target,
            options.tensor_parallel,
            options.block_size,
            options.memory_utilisation,
            draft=draft,
        )
    return SchedulerConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=budget,
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        prefix_caching=options.prefix_caching,
        watermark=options.watermark,
        order=scheduling["order"],
        ageing_s=scheduling["ageing_s"],
        preemption="swap" if options.num_swap_blocks else "recompute",
        num_swap_blocks=options.num_swap_blocks,
        num_scheduler_steps=options.num_scheduler_steps,
    )


def with_step_times(controller: dict[str, Any], cost_model: CostModel) -> dict[str, Any]:
    """What the goodput controller must know of its device, where it was not given: the cost model's own times.

    They are those of rows without context: reading it takes the same time whatever is drafted.
    """
    filled = dict(controller)
    if not filled["step_tokens"]:
        tokens: NDArray[np.float64] = np.asarray(2.0 ** np.arange(14), np.float64)
        nothing = np.zeros_like(tokens)
        features = StepFeatures(tokens, tokens, tokens, tokens, *[nothing] * 6)
        filled["step_tokens"] = tuple(tokens.tolist())
        filled["step_s"] = tuple(np.maximum.accumulate(cost_model.predict(features).total_s).tolist())
    if "draft_step_s" not in filled:
        one_draft = StepFeatures(2.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
        filled["draft_step_s"] = cost_model.predict(one_draft).draft_s
    return filled


def source(config: Config, rate_per_s: float | None = None) -> RequestSource | ClosedLoop:
    """The configured workload; with ``rate_per_s``, at that rate.

    Raises:
        ValueError: a broken trace (with the line), or options that the process does not take.
        FileNotFoundError: no such trace.
    """
    options, seed = config.experiment, config.seed
    trace = _trace(config) if options.trace else None
    if options.arrivals == "trace":
        assert trace is not None
        factor = rate_per_s / trace.mean_rate_per_s if rate_per_s else options.rate_factor or 1.0
        return TraceSource(trace, options.num_requests, factor)
    lengths = _lengths(config, trace)
    if options.arrivals == "closed_loop":
        return ClosedLoop(
            options.num_users,
            options.think_time_s,
            lengths,
            options.num_requests,
            seed,
            max_tokens=options.max_tokens,
        )
    process = _process(options, rate_per_s)
    if not options.multi_turn:
        return SyntheticSource(process, lengths, options.num_requests, seed, options.max_tokens)
    if options.max_tokens is not None:
        raise ValueError(
            f"experiment.max_tokens={options.max_tokens} does not go with multi_turn=true: drop one"
        )
    shape = SessionShape(
        think_time_s=30.0 if options.think_time_s is None else options.think_time_s,
        max_context_len=options.max_model_len,
        hash_block_size=options.block_size,
    )
    return sessions(process, lengths, options.num_requests, seed, shape)


def sessions(
    process: ArrivalProcess, lengths: LengthDistribution, num_requests: int, seed: int, shape: SessionShape
) -> SessionSource:
    """About ``num_requests`` turns of sessions that share prefixes; ``process`` is that of sessions."""
    return SessionSource(process, lengths, max(1, round(num_requests / mean_turns(shape))), seed, shape)


def mean_turns(shape: SessionShape | None = None) -> float:
    """Turns of a session on average, if none is cut short."""
    weights = np.array((shape or SessionShape()).turn_weights)
    return float(np.arange(1, weights.size + 1) @ weights / weights.sum())


def _trace(config: Config) -> Requests:
    options = config.experiment
    trace = load_trace(options.trace)
    return trace if options.max_tokens is None else trace.with_max_tokens(options.max_tokens)


def _lengths(config: Config, trace: Requests | None) -> LengthDistribution:
    options = config.experiment
    if options.length_law == "trace":
        assert trace is not None
        return EmpiricalLengths.fit(trace)
    if options.length_law == "fixed":
        return FixedLengths(options.prompt_len, options.output_len)
    return azure_like(options.length_law)


def _process(options: Any, rate_per_s: float | None) -> ArrivalProcess:
    """The configured process; at ``rate_per_s`` requests per second, if given. Of sessions, their starts."""
    name, turns = options.arrivals, mean_turns() if options.multi_turn else 1.0
    rate = (options.rate_per_s if rate_per_s is None else rate_per_s) / turns
    if name == "all_at_once":
        return make_process(name)
    if name == "gamma":
        return make_process(name, rate_per_s=rate, cv=options.cv)
    if name == "diurnal":
        return make_process(name, rate_per_s=rate, amplitude=options.amplitude, period_s=options.period_s)
    if name == "mmpp":
        given = make_process(name, rates_per_s=tuple(options.rates_per_s), dwell_s=tuple(options.dwell_s))
        scale = (rate_per_s / given.mean_rate_per_s if rate_per_s else 1.0) / turns
        rates = tuple(scale * each for each in options.rates_per_s)
        return make_process(name, rates_per_s=rates, dwell_s=tuple(options.dwell_s))
    return make_process(name, rate_per_s=rate)


def costs(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """Dollars per million output tokens, of all requests and of those within the SLO, or the reason why not."""
    chip, span_s = config.hardware, summary["simulated_s"]
    if chip.price_per_hour_usd is None:
        reason = f"hardware.price_per_hour_usd of {chip.name} is null: give it"
        return {"per_million_tokens_usd": None, "per_million_good_tokens_usd": None, "reason": reason}
    if not summary["num_requests"] or not span_s:
        reason = "no request finished"
        return {"per_million_tokens_usd": None, "per_million_good_tokens_usd": None, "reason": reason}
    price = ChipPrice(chip.price_per_hour_usd, chip.tdp_w, chip.idle_w)
    good_tokens = summary["goodput"]["tokens_per_s"] * summary["throughput"]["duration_s"]
    return {
        name: float(cost_per_million_tokens_usd(price, summary["chip_s"] / span_s, tokens / span_s))
        for name, tokens in (
            ("per_million_tokens_usd", summary["num_generated"]),
            ("per_million_good_tokens_usd", good_tokens if math.isfinite(good_tokens) else 0.0),
        )
    } | {"reason": None}


def at_once(source: RequestSource) -> TraceSource:
    """The same requests, all arriving at time 0."""
    requests = collect(source)
    return TraceSource(requests.with_arrivals(np.zeros(len(requests))))
