"""The simulator against queueing theory, overload, closed loops, both cores, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.cluster import Autoscaling, ClusterSpec, Failures, Limits
from sim.queueing import QueueMeans, md1, mm1, mmc
from sim.simulation import SimulationResult, simulate
from specdec.metrics import Slo
from specdec.trace import read_requests, read_steps
from specdec.workload import (
    AllAtOnce,
    ClosedLoop,
    FixedLengths,
    Poisson,
    Requests,
    SyntheticSource,
    TaskMix,
    Uniform,
)
from tests.sim.clusters import LinearTimes, ListSource, ServiceLengths, server, small_replica, some_requests


def queue_means(
    rate_per_s: float, num_servers: int, *, is_exponential: bool, num_requests: int = 800
) -> tuple[np.ndarray, np.ndarray]:
    """Mean wait and mean number in system of eight runs; servers take 1 s on average."""
    spec = ClusterSpec.of(server(), num_servers, router="central_queue")
    waits, numbers = [], []
    for seed in range(8):
        source = SyntheticSource(Poisson(rate_per_s), ServiceLengths(is_exponential), num_requests, seed=seed)
        summary = simulate(source, spec).summary
        waits.append(summary["latency"]["queue_s"]["mean"])
        numbers.append(summary["mean_in_system"])
    return np.array(waits), np.array(numbers)


@pytest.mark.parametrize(
    ("truth", "rate_per_s", "num_servers", "is_exponential"),
    [
        (mm1(0.6, 1.0), 0.6, 1, True),
        (md1(0.6, 1.0), 0.6, 1, False),
        (mmc(2.1, 1.0, 3), 2.1, 3, True),
    ],
    ids=["M/M/1", "M/D/1", "M/M/3"],
)
def test_waits_are_those_of_queueing_theory(
    truth: QueueMeans, rate_per_s: float, num_servers: int, is_exponential: bool
):
    waits, numbers = queue_means(rate_per_s, num_servers, is_exponential=is_exponential)
    for found, expected in ((waits, truth.wait_s), (numbers, truth.num_in_system)):
        error = found.std(ddof=1) / math.sqrt(found.size)
        assert error < 0.12 * expected, "too wide to tell anything"
        assert abs(found.mean() - expected) < 4.5 * error  # two-sided 99.7 % of Student's t with 7 degrees


def test_one_server_never_idles_while_somebody_waits(tmp_path: Path):
    source = SyntheticSource(Poisson(0.9), ServiceLengths(True), 200, seed=0)
    simulate(source, ClusterSpec.of(server()), trace=tmp_path)
    table = read_requests(tmp_path).sort("request_id")
    free_s = 0.0
    for arrival_s, start_s, finish_s in table.select(
        "arrival_s", "first_scheduled_s", "finish_s"
    ).iter_rows():
        assert start_s == pytest.approx(max(arrival_s, free_s), abs=1e-9)  # Lindley's recursion
        free_s = finish_s


def test_a_batch_never_idles_while_somebody_waits(tmp_path: Path):
    replica = small_replica(
        speculation={"name": "fixed", "max_drafts": 2}, acceptance={"name": "constant", "alpha": 0.5}
    )
    result = simulate(some_requests(150, 12.0), ClusterSpec.of(replica), trace=tmp_path)
    steps = read_steps(tmp_path).sort("step")
    idle_s = (steps["start_s"] - steps["end_s"].shift(1)).to_numpy()[1:]
    idle = np.flatnonzero(idle_s > 1e-9)
    assert idle.size > 3, "the load must leave gaps"
    assert (steps["num_running"].to_numpy() + steps["num_waiting"].to_numpy())[idle].max() == 0
    arrivals = set(np.round(read_requests(tmp_path)["arrival_s"].to_numpy(), 9))
    assert {round(start, 9) for start in steps["start_s"].to_numpy()[idle + 1]} <= arrivals
    busy_s = float((steps["end_s"] - steps["start_s"]).sum())
    assert result.summary["utilisation"] == pytest.approx(busy_s / result.summary["simulated_s"])


def test_overload_runs_at_capacity_and_the_queue_grows_by_the_excess():
    source = SyntheticSource(Poisson(1.5), ServiceLengths(False), 10_000, seed=0)
    result = simulate(source, ClusterSpec.of(server()), until_s=2000.0)
    summary = result.summary
    assert not result.stable and result.reason and "above the capacity" in result.reason
    assert summary["simulated_s"] == 2000.0
    assert abs(summary["num_finished"] - 2000) <= 3, "capacity is one per second"
    excess = summary["num_in_flight"] - 0.5 * 2000.0
    assert abs(excess) < 5 * math.sqrt(1.5 * 2000.0), "the excess is 0.5 per second"
    growth = summary["replicas"][0]["queue_growth"]
    assert growth == pytest.approx(0.5 / 1.5, rel=0.15), "a third of the arrivals stays"


def test_overload_ends_the_run_at_max_outstanding():
    source = SyntheticSource(Poisson(3.0), ServiceLengths(False), 10_000_000, seed=0)
    result = simulate(source, ClusterSpec.of(server()), max_outstanding=200)
    assert not result.stable and result.reason and "max_outstanding=200" in result.reason
    assert result.summary["num_in_flight"] == 201
    assert 60.0 < result.summary["simulated_s"] < 140.0


@pytest.mark.parametrize("seed", range(6))
def test_a_busy_queue_and_a_burst_are_stable(seed: int):
    source = SyntheticSource(Poisson(0.9), ServiceLengths(True), 1500, seed=seed)
    assert simulate(source, ClusterSpec.of(server())).stable
    assert simulate(
        SyntheticSource(AllAtOnce(), FixedLengths(9, 9), 300, seed=seed), ClusterSpec.of(small_replica())
    ).stable


def test_too_few_servers_behind_a_central_queue_are_unstable():
    source = SyntheticSource(Poisson(3.0), ServiceLengths(True), 1500, seed=0)
    result = simulate(source, ClusterSpec.of(server(), 2, router="central_queue"))
    assert not result.stable and result.reason and "too few replicas" in result.reason


def test_users_obey_the_interactive_response_time_law():
    source = ClosedLoop(
        num_users=12, think_time_s=4.0, lengths=ServiceLengths(True), num_requests=3000, seed=0
    )
    summary = simulate(source, ClusterSpec.of(server(), 2, router="central_queue")).summary
    rate_per_s = summary["num_finished"] / summary["simulated_s"]
    response_s = summary["latency"]["e2e_s"]["mean"]
    assert rate_per_s * (response_s + 4.0) == pytest.approx(12.0, rel=0.03)
    assert summary["num_submitted"] == summary["num_finished"] == 3000


def test_without_thought_users_keep_the_number_in_system():
    source = ClosedLoop(num_users=5, think_time_s=0.0, lengths=FixedLengths(20, 10), num_requests=400, seed=0)
    summary = simulate(source, ClusterSpec.of(small_replica())).summary
    assert summary["mean_in_system"] == pytest.approx(5.0, rel=0.02)
    assert summary["utilisation"] == pytest.approx(1.0)


def comparable(result: SimulationResult) -> str:
    return json.dumps(result.summary, sort_keys=True)


@pytest.mark.parametrize("router", ["round_robin", "random"])
def test_two_processes_find_what_one_finds(router: str):
    mix = TaskMix({"chat": (2.0, FixedLengths(30, 20)), "code": (1.0, FixedLengths(60, 5))})
    replica = small_replica(
        speculation={"name": "fixed", "max_drafts": 3},
        acceptance={"name": "beta", "mean": 0.6, "concentration": 3.0},
    )
    overloads = router == "random"  # then both stop when the first replica is overloaded
    limits = Limits(max_waiting_per_replica=9 if overloads else 1)
    spec = ClusterSpec.of(replica, 3, router=router, limits=limits)
    source = SyntheticSource(Poisson(250.0), mix, 600, seed=4)
    options: dict[str, Any] = dict(seed=2, slo=Slo(ttft_s=0.5, tpot_s=0.02))
    if overloads:
        options["max_outstanding"] = 11
    alone = simulate(source, spec, **options)
    assert not alone.stable if overloads else alone.summary["num_rejected"] > 5
    assert comparable(simulate(source, spec, workers=2, **options)) == comparable(alone)
    assert comparable(simulate(source, spec, **(options | {"seed": 3}))) != comparable(alone)


def test_more_processes_need_independent_replicas():
    source, replica = some_requests(10, 10.0), small_replica()
    two = {"num_replicas": 2}
    coupled = {
        "looks at the state": ClusterSpec.of(replica, **two, router="least_outstanding"),
        "counts them together": ClusterSpec.of(replica, **two, limits=Limits(max_outstanding=9)),
        "autoscaling": ClusterSpec.of(
            replica, **two, autoscaling=Autoscaling(target_outstanding=4, min_replicas=1, max_replicas=3)
        ),
        "after a failure": ClusterSpec.of(
            replica, **two, failures=Failures(mean_time_to_failure_s=9.0, mean_repair_s=1.0)
        ),
    }
    for reason, spec in coupled.items():
        with pytest.raises(ValueError, match=reason):
            simulate(source, spec, workers=2)
    users = ClosedLoop(num_users=2, think_time_s=1.0, lengths=FixedLengths(9, 9), num_requests=4, seed=0)
    with pytest.raises(ValueError, match="users wait"):
        simulate(users, ClusterSpec.of(replica, 2), workers=2)
    with pytest.raises(ValueError, match="progress was given"):
        simulate(source, ClusterSpec.of(replica, 2), workers=2, progress=lambda number, now_s: None)


def test_a_request_that_never_fits_is_refused_by_number():
    source = some_requests(10, 5.0)
    source.requests.prompt_len[7] = 250
    with pytest.raises(ValueError, match=r"request 7: prompt of 250 tokens .* exceeds max_model_len=256"):
        simulate(source, ClusterSpec.of(small_replica()))
    with pytest.raises(ValueError, match=r"request 7 needs 68 KV blocks .* num_blocks=20"):
        simulate(source, ClusterSpec.of(small_replica(max_model_len=512, num_blocks=20)))
    with pytest.raises(ValueError, match=r"request 0: .* max_num_batched_tokens=10"):
        simulate(source, ClusterSpec.of(small_replica(max_num_batched_tokens=10, policy="continuous")))


@dataclass(frozen=True)
class Endless:
    """Requests without end, one per second; from ``late`` on one arrives a second too early."""

    late: float = math.inf

    def chunks(self, size: int) -> Iterator[Requests]:
        start = 0
        while True:
            yield Requests.build(
                np.arange(start, start + 10) - (3.0 if start >= self.late else 0.0), 5, [3] * 10
            )
            start += 10


def test_an_endless_source_is_read_as_time_goes_by():
    calls: list[tuple[int, float]] = []
    result = simulate(
        Endless(),
        ClusterSpec.of(small_replica()),
        until_s=1100.5,
        progress=lambda number, now_s: calls.append((number, now_s)),
    )
    assert result.summary["num_submitted"] == 1101 and result.stable
    assert calls == [(1024, 1023.0)]


def test_bad_input_is_refused():
    replica, source = small_replica(), some_requests(3, 5.0)
    with pytest.raises(ValueError, match=r"request 20 arrives at 17.0 s, before its predecessor"):
        simulate(Endless(late=20.0), ClusterSpec.of(replica))
    with pytest.raises(ValueError, match="rate"):
        Poisson(-1.0)
    for options, message in (
        ({"until_s": -1.0}, "until_s=-1.0"),
        ({"workers": 0}, "workers=0"),
        ({"max_outstanding": 0}, "max_outstanding=0"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(source, ClusterSpec.of(replica), **options)


def test_static_batches_end_with_the_arrivals_and_must_not_wait_for_ever():
    static = ClusterSpec.of(small_replica(policy="static", max_num_batched_tokens=99))
    assert simulate(some_requests(21, 50.0), static).summary["num_finished"] == 21
    users = ClosedLoop(num_users=7, think_time_s=1.0, lengths=FixedLengths(9, 9), num_requests=40, seed=0)
    with pytest.raises(ValueError, match="num_users=7 may all wait for each other"):
        simulate(users, static)
    assert simulate(replace(users, num_users=8), static).summary["num_finished"] == 40


def test_the_summary_says_what_happened(tmp_path: Path):
    source = SyntheticSource(Uniform(10.0), FixedLengths(40, 10), 50, seed=0)
    spec = ClusterSpec.of(small_replica(LinearTimes(1e-3)), 2)
    result = simulate(source, spec, slo=Slo(ttft_s=1.0, tpot_s=1.0), trace=tmp_path)
    summary = result.summary
    assert result.stable and result.wall_s > 0.0 and summary["reason"] is None
    assert summary["goodput"]["share"] == 1.0 and summary["extrapolated"] == []
    assert [row["num_submitted"] for row in summary["replicas"]] == [25, 25]
    assert summary["num_steps"] == sum(row["num_steps"] for row in summary["replicas"]) == 50 * 10
    assert summary["chip_s"] == pytest.approx(2 * summary["simulated_s"])
    assert sum(len(read_requests(tmp_path, name)) for name in ("main-0", "main-1")) == 50


def test_shortest_jobs_first_is_as_good_as_its_predictions():
    """A burst of answers whose lengths the scheduler does not see: the better they are foretold, the sooner."""
    rng = np.random.default_rng(0)
    burst = Requests.build(np.zeros(80), 4, rng.integers(1, 61, 80), max_tokens=60)
    waits_s = {}
    for order, error in (("sjf", 0.0), ("sjf", 1.5), ("fcfs", None)):
        spec = ClusterSpec.of(small_replica(max_num_seqs=2, order=order))
        summary = simulate(ListSource(burst), spec, prediction_error=error).summary
        waits_s[order, error] = summary["latency"]["e2e_s"]["mean"]
    assert waits_s["sjf", 0.0] < 0.95 * waits_s["sjf", 1.5] < 0.95 * waits_s["fcfs", None]
    unseen = ClusterSpec.of(small_replica(max_num_seqs=2, order="sjf"))
    assert simulate(ListSource(burst), unseen).summary["latency"]["e2e_s"]["mean"] == waits_s["fcfs", None]


@pytest.mark.parametrize("error", [-0.1, math.inf, math.nan])
def test_a_prediction_error_out_of_range(error: float):
    with pytest.raises(ValueError, match="prediction_error="):
        simulate(some_requests(2, 1.0), ClusterSpec.of(small_replica()), prediction_error=error)


def test_nothing_finished_is_no_error():
    requests = Requests.build([0.0], 60, 20)
    result = simulate(ListSource(requests), ClusterSpec.of(small_replica()), until_s=0.05)
    assert result.summary["num_requests"] == 0 and result.summary["num_in_flight"] == 1
    assert result.summary["mean_in_system"] == pytest.approx(1.0)
