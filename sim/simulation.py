"""One simulation: a workload, a cluster, and what came of it.

>>> source = SyntheticSource(Poisson(5.0), azure_like("conversation"), num_requests=100_000, seed=0)
>>> result = simulate(source, ClusterSpec.of(replica, num_replicas=8, router="least_outstanding"), seed=0)
>>> result.summary["latency"]["ttft_s"]["p99"], result.stable

Every simulation asserts that no request was lost and that Little's law holds. Replicas that have nothing to do
with each other are simulated by several processes (``workers``), with the same results to the last bit.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import simpy
from simpy.core import EmptySchedule

from sim.arrivals import Progress, RequestReader, Users, arrive
from sim.books import COUNTS, Books
from sim.cluster import MAX_OUTSTANDING, Cluster, ClusterFigures, ClusterSpec
from sim.cluster_spec import named
from sim.pool import ReplicaFigures
from sim.streaming import RunMetrics
from specdec.metrics import Slo
from specdec.trace import TraceWriter
from specdec.workload import ClosedLoop, RequestSource

_BUSY = 0.9
"""Utilisation below which a growing queue is not taken for overload."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What a simulation found.

    Attributes:
        summary: ``RunMetrics.summary()`` (without latencies if no request finished) and: ``stable``, ``reason``,
            ``simulated_s``, ``num_submitted``, ``num_finished``, ``num_rejected``, ``num_failed``, ``num_retried``,
            ``num_escalated``, ``num_in_flight``, ``discarded_tokens``, ``mean_in_system``, ``utilisation``,
            ``num_steps``, ``chip_s`` (devices · seconds to pay for), ``extrapolated`` (operators of the cost models
            that were asked far outside their range), ``timings`` (what the cost models are from: fitted to
            measurements or a roofline), ``replicas`` (figures of each) and, of a disaggregated cluster,
            ``kv_transfers``.
        stable: false if the load was above the capacity; ``reason`` says how that showed.
        wall_s: seconds that the simulation took.
    """

    summary: dict[str, Any]
    stable: bool
    reason: str | None
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A simulation, or the share ``part`` of ``num_parts`` of its replicas."""

    source: RequestSource | ClosedLoop
    cluster: ClusterSpec
    seed: int
    slo: Slo | None
    until_s: float
    max_outstanding: int
    prediction_error: float | None
    part: int = 0
    num_parts: int = 1

    def is_mine(self, number: int) -> bool:
        return number % self.num_parts == self.part


def simulate(
    source: RequestSource | ClosedLoop,
    cluster: ClusterSpec,
    *,
    seed: int = 0,
    slo: Slo | None = None,
    trace: Path | None = None,
    progress: Progress | None = None,
    until_s: float = math.inf,
    max_outstanding: int = MAX_OUTSTANDING,
    prediction_error: float | None = None,
    workers: int = 1,
) -> SimulationResult:
    """Simulate ``source`` on ``cluster`` until every request has ended.

    Args:
        source: requests with times, or users who ask one after the other.
        cluster: what serves them.
        seed: of everything that is drawn, but the source, which has its own.
        slo: that goodput is counted under.
        trace: a folder for the steps and requests of each replica, named after it, or ``run`` of a single one.
        progress: called now and then with the number of arrivals and the time.
        until_s: stop at this time; what is then inside counts as in flight.
        max_outstanding: requests on one replica (or held, per replica) at which the load is too high: the run stops.
        prediction_error: of predicted output lengths, for the order "sjf"; see :class:`RequestReader`.
        workers: processes. More than one need replicas that are independent given the routing, and a script that
            asks for them guards its own work with ``if __name__ == "__main__":``, since they import it.

    Raises:
        ValueError: a request that can never be served, or options that exclude each other or the cluster.
    """
    _check(source, cluster, trace, progress, until_s, workers)
    start_s = time.perf_counter()
    job = _Job(
        source=source,
        cluster=cluster,
        seed=seed,
        slo=slo,
        until_s=until_s,
        max_outstanding=max_outstanding,
        prediction_error=prediction_error,
    )
    if workers == 1:
        with contextlib.ExitStack() as stack:
            traces = {} if trace is None else _open_traces(stack, cluster, trace)
            parts = [_run(job, traces, progress)]
    else:
        parts = _run_apart(job, workers)
    summary = _summary([figures for figures, _ in parts], slo)
    summary["extrapolated"] = sorted({name for _, names in parts for name in names})
    summary["timings"] = _origins(cluster)
    return SimulationResult(summary, summary["stable"], summary["reason"], time.perf_counter() - start_s)


def _check(
    source: RequestSource | ClosedLoop,
    cluster: ClusterSpec,
    trace: Path | None,
    progress: Progress | None,
    until_s: float,
    workers: int,
) -> None:
    if not until_s > 0.0:
        raise ValueError(f"until_s={until_s} must be > 0 seconds (inf: until all requests have ended)")
    if workers < 1:
        raise ValueError(f"workers={workers} must be >= 1")
    if workers > 1:
        reason = "users wait for their answers" if isinstance(source, ClosedLoop) else cluster.coupling()
        if reason is not None:
            raise ValueError(f"workers={workers} needs independent replicas, but {reason}: use workers=1")
        for name, value in (("trace", trace), ("progress", progress)):
            if value is not None:
                raise ValueError(
                    f"{name} was given, but workers={workers} does not support it: use workers=1"
                )
    changing = [name for name, pool in cluster.pools.items() if pool.autoscaling or pool.failures]
    if trace is not None and changing:
        raise ValueError(f"trace was given, but replicas of {changing} come and go: trace a fixed cluster")
    waiting = 0
    for pool in cluster.pools.values():
        if named(pool.replica.policy)["name"] == "static":
            most = pool.autoscaling.max_replicas if pool.autoscaling else pool.num_replicas
            waiting += most * (pool.replica.scheduler.max_num_seqs - 1)
    if isinstance(source, ClosedLoop) and 0 < source.num_users <= waiting:
        raise ValueError(
            f"num_users={source.num_users} may all wait for each other: with the policy 'static' {waiting} fit into "
            "batches that are not full; use more users, a smaller max_num_seqs or the policy 'dynamic'"
        )


def _open_traces(stack: contextlib.ExitStack, cluster: ClusterSpec, folder: Path) -> dict[str, TraceWriter]:
    names = [f"{name}-{index}" for name, pool in cluster.pools.items() for index in range(pool.num_replicas)]
    files = names if len(names) > 1 else ["run"]
    return {
        name: stack.enter_context(TraceWriter(folder, file)) for name, file in zip(names, files, strict=True)
    }


def _run(
    job: _Job, traces: Mapping[str, TraceWriter], progress: Progress | None
) -> tuple[ClusterFigures, list[str]]:
    """Simulate, in this process; also the operators that were extrapolated."""
    env = simpy.Environment()
    users: list[Users] = []
    cluster = Cluster(
        env,
        job.cluster,
        seed=job.seed,
        slo=job.slo,
        on_end=(lambda request: users[0].think(request)) if isinstance(job.source, ClosedLoop) else None,
        until_s=job.until_s,
        max_outstanding=job.max_outstanding,
        traces=traces,
        is_mine=job.is_mine,
    )
    reader = RequestReader(cluster, job.prediction_error, job.seed)
    if isinstance(job.source, ClosedLoop):
        users.append(Users(env, job.source, reader, progress))
        users[0].start(cluster)
    else:
        env.process(arrive(env, cluster, reader.read(job.source), progress))
    step, peek = env.step, env.peek
    try:
        while peek() <= cluster.end_s:
            step()
    except EmptySchedule:
        raise ValueError(
            f"{cluster.num_in_flight} requests wait at {env.now} s and nothing can happen any more: the policies wait "
            "for more requests than there are"
        ) from None
    return cluster.close(), _extrapolated(job.cluster)


def _run_apart(job: _Job, workers: int) -> list[tuple[ClusterFigures, list[str]]]:
    """Simulate shares of the replicas in ``workers`` processes."""
    num_parts = min(workers, sum(pool.num_replicas for pool in job.cluster.pools.values()))
    # Not forked: polars and numpy may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_parts, mp_context=context) as executor:
        while True:
            jobs = [replace(job, part=part, num_parts=num_parts) for part in range(num_parts)]
            parts = list(executor.map(_run_part, jobs))
            stops_s = [figures.end_s for figures, _ in parts if figures.overloaded]
            if not stops_s or min(stops_s) == job.until_s:
                return parts
            # One process would have stopped them all when the first replica was overloaded.
            job = replace(job, until_s=min(stops_s))


def _run_part(job: _Job) -> tuple[ClusterFigures, list[str]]:
    return _run(job, {}, None)


def _extrapolated(cluster: ClusterSpec) -> list[str]:
    names: list[str] = []
    for pool in cluster.pools.values():
        for model in (pool.replica.cost_model, pool.replica.draft_cost_model):
            names += cast("Mapping[str, float]", getattr(model, "extrapolated", {}))
    return names


def _origins(cluster: ClusterSpec) -> list[str]:
    """What the seconds of the cluster's steps are from."""
    models = [
        model
        for pool in cluster.pools.values()
        for model in (pool.replica.cost_model, pool.replica.draft_cost_model)
    ]
    known = (cast("Mapping[str, object]", getattr(model, "metadata", {})).get("origin") for model in models)
    return sorted({str(origin) for origin in known if origin is not None})


def _summary(parts: list[ClusterFigures], slo: Slo | None) -> dict[str, Any]:
    """The parts as one; the order of replicas, not of processes, decides the order of additions."""
    end_s = max(part.end_s for part in parts)
    replicas = sorted((figures for part in parts for figures in part.replicas), key=lambda item: item.number)
    books = [item for part in parts for item in part.books]
    if len(parts) > 1:
        numbers = [figures.number for part in parts for figures in part.replicas]
        books = [item for _, item in sorted(zip(numbers, books, strict=True), key=lambda pair: pair[0])]
    metrics = RunMetrics(slo)
    for item in books:
        metrics.merge(item.metrics)
    rows = [_replica_row(figures, end_s) for figures in replicas]
    busy_s = math.fsum(figures.busy_s for figures in replicas)
    paid_s = math.fsum(_paid_s(figures, end_s) for figures in replicas)
    reason = _overload(parts, rows)
    summary: dict[str, Any] = metrics.summary() if metrics.num_requests else {"num_requests": 0}
    summary |= {name: sum(getattr(item, name) for item in books) for name in (*COUNTS, "discarded_tokens")}
    summary |= {
        "stable": reason is None,
        "reason": reason,
        "simulated_s": end_s,
        "num_in_flight": sum(part.num_in_flight for part in parts),
        "mean_in_system": _mean_in_system(books, end_s),
        "utilisation": busy_s / paid_s if paid_s else math.nan,
        "num_steps": sum(figures.num_steps for figures in replicas),
        "chip_s": math.fsum(figures.num_chips * _paid_s(figures, end_s) for figures in replicas),
        "replicas": rows,
    }
    if parts[0].transfers is not None:
        num, num_bytes, total_s = parts[0].transfers
        mean_s = total_s / num if num else math.nan
        summary["kv_transfers"] = {"num": num, "bytes": num_bytes, "mean_s": mean_s}
    return summary


def _mean_in_system(books: list[Books], end_s: float) -> float:
    return math.fsum(item.little.area_s for item in books) / end_s if end_s else math.nan


def _paid_s(figures: ReplicaFigures, end_s: float) -> float:
    return max(0.0, min(figures.retired_s, end_s) - figures.launched_s)


def _replica_row(figures: ReplicaFigures, end_s: float) -> dict[str, Any]:
    paid_s = _paid_s(figures, end_s)
    return {
        "name": figures.name,
        "utilisation": figures.busy_s / paid_s if paid_s else math.nan,
        "num_submitted": figures.num_submitted,
        "num_finished": figures.num_finished,
        "num_steps": figures.num_steps,
        "num_failures": figures.num_failures,
        "queue_growth": figures.growth,
        "launched_s": figures.launched_s,
        "retired_s": min(figures.retired_s, end_s),
        "paid_s": paid_s,
    }


def _overload(parts: list[ClusterFigures], rows: list[dict[str, Any]]) -> str | None:
    """Why the load is above the capacity, if it is."""
    stopped = [(part.end_s, part.overloaded) for part in parts if part.overloaded]
    if stopped:
        end_s, reason = min(stopped)
        return f"{reason} at {end_s:.6g} s: the load is above the capacity"
    for row in rows:
        if row["queue_growth"] and row["utilisation"] >= _BUSY:
            return (
                f"the queue of {row['name']} grows by {row['queue_growth']:.3g} requests per arrival at utilisation "
                f"{row['utilisation']:.2f}: the load is above the capacity"
            )
    for part in parts:
        for name, growth in part.held_growth.items():
            if growth:
                return f"pool {name!r} holds {growth:.3g} requests more with each one held: too few replicas"
    return None
