"""From a configuration to the requests of a simulation: when they come, how long they are, which model they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.names import unknown_name
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
    TaskMix,
    TraceSource,
    azure_like,
    collect,
    load_trace,
    make_process,
)

if TYPE_CHECKING:
    from specdec.config import Config  # a worker process that only simulates does without Hydra

SIMPLE, COMPLEX = "simple", "complex"
"""Tasks of requests that are drawn for a small and a large model; a trace has its own."""
SIMPLE_SHARE = 0.7


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
    lengths = _mix(config, _lengths(config, trace))
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
    process: ArrivalProcess,
    lengths: LengthDistribution | TaskMix,
    num_requests: int,
    seed: int,
    shape: SessionShape,
) -> SessionSource:
    """About ``num_requests`` turns of sessions that share prefixes; ``process`` is that of sessions."""
    return SessionSource(process, lengths, max(1, round(num_requests / mean_turns(shape))), seed, shape)


def mean_turns(shape: SessionShape | None = None) -> float:
    """Turns of a session on average, if none is cut short."""
    weights = np.array((shape or SessionShape()).turn_weights)
    return float(np.arange(1, weights.size + 1) @ weights / weights.sum())


def simple_tasks(config: Config) -> tuple[str, ...]:
    """Tasks that the small model of cluster=model_routing answers.

    Raises:
        ValueError: the option that says so is missing, or another one was given.
    """
    options, share = config.cluster, config.cluster.simple_share
    if config.experiment.arrivals == "trace":
        if options.simple_tasks is None:
            raise ValueError(
                "cluster=model_routing with experiment.arrivals=trace needs cluster.simple_tasks: the tasks of the "
                "trace that the small model answers"
            )
        if share is not None:
            raise ValueError(f"cluster.simple_share={share} is not used: a trace has its own tasks, drop it")
        return tuple(options.simple_tasks)
    if options.simple_tasks is not None:
        raise ValueError(
            f"cluster.simple_tasks={options.simple_tasks} is for experiment.arrivals=trace, not "
            f"{config.experiment.arrivals}: give cluster.simple_share"
        )
    return (SIMPLE,)


def _mix(config: Config, lengths: LengthDistribution) -> LengthDistribution | TaskMix:
    """``lengths``, of simple and complex requests alike where the small model answers the simple ones."""
    if config.cluster.name != "model_routing":
        return lengths
    share = config.cluster.simple_share or SIMPLE_SHARE
    return TaskMix({SIMPLE: (share, lengths), COMPLEX: (1.0 - share, lengths)})


def _trace(config: Config) -> Requests:
    options = config.experiment
    trace = load_trace(options.trace)
    if options.arrivals == "trace" and config.cluster.name == "model_routing":
        for task in simple_tasks(config):
            if task not in trace.tasks:
                raise unknown_name("task of cluster.simple_tasks", task, trace.tasks)
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


def at_once(source: RequestSource) -> TraceSource:
    """The same requests, all arriving at time 0."""
    requests = collect(source)
    return TraceSource(requests.with_arrivals(np.zeros(len(requests))))
