"""Clusters: nobody is lost by limits, failures or escalation; KV moves, replicas come and go, drafts contend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.books import Backlog, Books
from sim.cluster import (
    Autoscaling,
    Cluster,
    ClusterSpec,
    Disaggregation,
    Failures,
    Limits,
    PoolSpec,
    ReplicaSpec,
)
from sim.pool import Member
from sim.replica import Process, SimRequest
from sim.simulation import simulate
from specdec.trace import read_steps
from specdec.workload import FixedLengths, Poisson, Requests, SessionShape, SessionSource, SyntheticSource
from tests.sim.clusters import (
    DRAFTS,
    CountingTimes,
    LinearTimes,
    ListSource,
    one,
    run_cluster,
    small_replica,
    some_requests,
)

REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=25)
FAILURES = Failures(mean_time_to_failure_s=0.8, mean_repair_s=0.3, max_retries=1)


def two_models(escalation: dict[str, float] | None = None, **pool: Any) -> ClusterSpec:
    small, large = small_replica(LinearTimes(0.01)), small_replica(LinearTimes(0.03), chips=4)
    routing: dict[str, Any] = dict(pools={"hard": "large"}, default="small")
    if escalation:
        routing |= dict(escalation=escalation, escalate_to="large")
    pools = {"small": PoolSpec(replica=small, **pool), "large": PoolSpec(replica=large, **pool)}
    return ClusterSpec(pools=pools, model_routing=routing)


def prefill_decode(num_prefill: int = 1, latency_s: float = 0.5, **decode: Any) -> ClusterSpec:
    """Steps of 10 ms; one prompt token takes 10 ms on the link."""
    link = Disaggregation(kv_bytes_per_token=100.0, link_bytes_per_s=10_000.0, link_latency_s=latency_s)
    pools = {
        "prefill": PoolSpec(replica=small_replica(), num_replicas=num_prefill),
        "decode": PoolSpec(replica=small_replica(**decode)),
    }
    return ClusterSpec(pools=pools, disaggregation=link)


def conserved(summary: dict[str, Any]) -> None:
    ended = summary["num_finished"] + summary["num_rejected"] + summary["num_failed"]
    assert summary["num_submitted"] == ended + summary["num_in_flight"]
    assert summary["num_requests"] == summary["num_finished"]


@REPEATABLE
@given(
    seed=st.integers(0, 2**32),
    router=st.sampled_from(["round_robin", "power_of_two", "central_queue"]),
    max_retries=st.integers(0, 2),
    until_s=st.sampled_from([math.inf, 1.3]),
)
def test_no_request_is_lost_under_failures_and_limits(
    seed: int, router: str, max_retries: int, until_s: float
):
    spec = ClusterSpec.of(
        small_replica(**DRAFTS),
        2,
        router=router,
        failures=Failures(mean_time_to_failure_s=0.4, mean_repair_s=0.2, max_retries=max_retries),
        limits=Limits(max_outstanding=14),
        autoscaling=Autoscaling(
            target_outstanding=3, min_replicas=1, max_replicas=4, interval_s=0.3, cold_start_s=0.1
        ),
    )
    summary = simulate(some_requests(60, 40.0, seed), spec, seed=seed, until_s=until_s).summary
    conserved(summary)
    if until_s == math.inf:
        assert summary["num_submitted"] == 60 and summary["num_in_flight"] == 0


@REPEATABLE
@given(seed=st.integers(0, 2**32), chance=st.floats(0.0, 1.0))
def test_no_request_is_lost_under_escalation_and_failures(seed: int, chance: float):
    spec = two_models({"easy": chance}, failures=FAILURES)
    summary = simulate(some_requests(40, 30.0, seed, ("easy", "hard")), spec, seed=seed).summary
    conserved(summary)
    assert summary["num_escalated"] <= 20 + summary["num_retried"]


@REPEATABLE
@given(seed=st.integers(0, 2**32))
def test_no_request_is_lost_between_prefill_and_decode(seed: int):
    spec = prefill_decode(2, num_blocks=40, preemption="swap", num_swap_blocks=20)
    pools = {
        name: PoolSpec(replica=pool.replica, num_replicas=2, failures=FAILURES)
        for name, pool in spec.pools.items()
    }
    spec = ClusterSpec(pools=pools, disaggregation=spec.disaggregation)
    conserved(simulate(some_requests(40, 30.0, seed), spec, seed=seed).summary)


def test_lost_and_doubled_requests_are_noticed():
    books = Books(None)
    books.num_submitted = 2
    books.little.change(0.0, 2)
    with pytest.raises(AssertionError, match="the sum is wrong"):
        books.close(1.0, [one()])
    with pytest.raises(AssertionError, match="Little's law"):
        books.close(1.0, [one(), one(1, arrival_s=0.5)])


def test_failures_cost_retries_and_in_the_end_the_request():
    source = some_requests(80, 40.0, 1)
    spec = {
        tries: ClusterSpec.of(
            small_replica(),
            2,
            failures=Failures(mean_time_to_failure_s=0.5, mean_repair_s=0.2, max_retries=tries),
        )
        for tries in (0, 50)
    }
    patient, strict = simulate(source, spec[50]).summary, simulate(source, spec[0]).summary
    assert patient["num_failed"] == 0 < patient["num_retried"]
    assert strict["num_retried"] == 0 < strict["num_failed"]
    assert sum(row["num_failures"] for row in patient["replicas"]) > 2
    calm = simulate(source, ClusterSpec.of(small_replica(), 2)).summary
    assert patient["latency"]["e2e_s"]["mean"] > calm["latency"]["e2e_s"]["mean"]


def test_a_retry_starts_anew_but_keeps_its_arrival():
    spec = ClusterSpec.of(
        small_replica(), 2, failures=Failures(mean_time_to_failure_s=1e9, mean_repair_s=1e9)
    )

    def strike(cluster: Cluster) -> Process:
        yield cluster.env.timeout(0.055)
        pool = cluster.pools["main"]
        for request in pool.members[0].fail():
            cluster.retry(pool, request)

    (request,), figures = run_cluster(
        spec, [one(output_len=10)], lambda cluster: cluster.env.process(strike(cluster))
    )
    assert request.arrival_s == 0.0
    assert request.finish_s == pytest.approx(0.055 + 10 * 0.01)
    assert figures.replicas[1].num_steps == 10
    assert figures.replicas[0].busy_s == pytest.approx(0.055), "the step that was cut short counts"


@pytest.mark.parametrize(
    ("limits", "num_rejected"),
    [
        (Limits(max_outstanding=5), 7),
        (Limits(max_outstanding_tokens=5 * 12), 7),
        (Limits(max_outstanding_per_replica=2), 8),
        (Limits(max_outstanding_tokens_per_replica=35), 8),
        (Limits(max_waiting_per_replica=3), 6),  # no step has begun, so all of them wait
        (None, 0),
    ],
)
def test_what_exceeds_a_limit_is_rejected_and_counted(limits: Limits | None, num_rejected: int):
    requests = ListSource(Requests.build([0.0] * 12, 8, 4))
    summary = simulate(requests, ClusterSpec.of(small_replica(), 2, limits=limits)).summary
    assert summary["num_rejected"] == num_rejected
    assert summary["num_finished"] == 12 - num_rejected


def test_autoscaling_follows_the_load_after_the_cold_start(monkeypatch: pytest.MonkeyPatch):
    accepted: list[tuple[str, float]] = []
    accept = Member.accept

    def record(member: Member, request: SimRequest) -> None:
        accepted.append((member.name, member.pool.owner.env.now))
        accept(member, request)

    monkeypatch.setattr(Member, "accept", record)
    scaling = Autoscaling(
        target_outstanding=6, min_replicas=1, max_replicas=3, interval_s=1.0, cold_start_s=2.5
    )
    times = np.concatenate([np.arange(0.0, 6.0, 0.01), np.arange(6.0, 16.0, 0.5)])
    source = ListSource(Requests.build(times, 20, 20))
    spec = ClusterSpec.of(small_replica(), router="least_outstanding", autoscaling=scaling)
    summary = simulate(source, spec).summary
    fixed = simulate(source, ClusterSpec.of(small_replica(), router="least_outstanding")).summary
    rows = summary["replicas"]
    assert len(rows) == 3, "the load wants more than one, and no more than the maximum"
    first = {name: min(now_s for other, now_s in accepted if other == name) for name in ("main-1", "main-2")}
    assert min(first.values()) == pytest.approx(3.5, abs=0.02), "a second to decide, 2.5 to start"
    assert rows[2]["paid_s"] < rows[0]["paid_s"] - 3.0, "the youngest leaves when the load is gone"
    assert summary["chip_s"] == pytest.approx(sum(row["paid_s"] for row in rows))
    assert summary["latency"]["ttft_s"]["p99"] < 0.7 * fixed["latency"]["ttft_s"]["p99"]


def test_a_class_of_queries_has_its_model():
    assert two_models().coupling() is None, "then the replicas are independent"
    summary = simulate(
        ListSource(Requests.build([0.0, 0.0], 8, 4, task=[0, 1], tasks=("easy", "hard"))), two_models()
    ).summary
    assert summary["tasks"]["easy"]["latency"]["e2e_s"]["mean"] == pytest.approx(4 * 0.01)
    assert summary["tasks"]["hard"]["latency"]["e2e_s"]["mean"] == pytest.approx(4 * 0.03)


def test_an_escalated_request_takes_the_time_and_the_work_of_both_models():
    source = ListSource(Requests.build([0.0], 8, 4, tasks=("easy",)))
    summary = simulate(source, two_models({"easy": 1.0})).summary
    assert summary["num_escalated"] == 1 and summary["discarded_tokens"] == 12
    assert summary["latency"]["e2e_s"]["mean"] == pytest.approx(4 * 0.01 + 4 * 0.03)
    assert summary["latency"]["ttft_s"]["mean"] == pytest.approx(4 * 0.01 + 0.03)
    assert [row["num_steps"] for row in summary["replicas"]] == [4, 4]
    assert summary["chip_s"] == pytest.approx((1 + 4) * summary["simulated_s"])


def test_escalation_happens_to_its_share():
    source = some_requests(300, 30.0, 0, ("easy", "hard"))
    summary = simulate(source, two_models({"easy": 0.3})).summary
    assert abs(summary["num_escalated"] - 45) < 5 * math.sqrt(150 * 0.3 * 0.7)
    assert summary["num_finished"] == 300


def test_the_second_token_waits_for_the_kv():
    source = ListSource(Requests.build([0.0], 8, 2))
    summary = simulate(source, prefill_decode()).summary
    assert summary["latency"]["ttft_s"]["mean"] == pytest.approx(0.01), (
        "the first comes from the prefill pool"
    )
    moved_s = 8 * 100.0 / 10_000.0 + 0.5
    assert summary["latency"]["tpot_s"]["mean"] == pytest.approx(moved_s + 0.01)
    assert summary["kv_transfers"] == {"num": 1, "bytes": 800.0, "mean_s": pytest.approx(moved_s)}


def test_transfers_of_one_source_follow_one_another():
    source = ListSource(Requests.build([0.0, 0.0], 8, 2))
    shared = simulate(source, prefill_decode(1)).summary["kv_transfers"]
    apart = simulate(source, prefill_decode(2)).summary["kv_transfers"]
    assert apart["mean_s"] == pytest.approx(0.58)
    assert shared["mean_s"] == pytest.approx((0.58 + 0.66) / 2)


def test_one_token_needs_no_decode_pool_and_decoding_computes_no_prompt(tmp_path: Path):
    source = ListSource(Requests.build([0.0, 0.0, 0.1], [8, 30, 50], [1, 9, 9]))
    summary = simulate(source, prefill_decode(), trace=tmp_path).summary
    assert summary["num_finished"] == 3 and summary["kv_transfers"]["num"] == 2
    assert summary["num_generated"] == 19
    steps = read_steps(tmp_path, "decode-0")
    assert steps["num_prefill_tokens"].sum() == 0 and steps["num_emitted"].sum() == 16
    assert read_steps(tmp_path, "prefill-0")["num_prefill_tokens"].sum() == 88


def test_kv_that_arrives_is_counted_as_swapped_out_until_it_is_loaded():
    loop = small_replica().make_loop()
    arrived = one(prompt_len=20, output_len=5)
    arrived.num_generated, arrived.num_swapped = 1, 20
    loop.submit(arrived)
    plan = loop.begin(0.0)
    assert plan.swapped_in.tolist() == [0] and plan.num_new.tolist() == [1] and plan.context.tolist() == [20]
    assert loop.num_swapped_blocks == 0


def test_prefix_affinity_computes_fewer_prompt_tokens():
    def prefill_tokens(router: str) -> float:
        times = CountingTimes()
        source = SessionSource(
            Poisson(2.0),
            FixedLengths(40, 8),
            60,
            seed=0,
            shape=SessionShape(turn_weights=(0.0, 0.0, 1.0), think_time_s=3.0, hash_block_size=4),
        )
        spec = ClusterSpec.of(small_replica(times, num_blocks=2000, policy="chunked"), 4, router=router)
        assert simulate(source, spec).summary["num_finished"] == 180
        return times.prefill_tokens

    needed = 60 * (40 * 3 + 8 * 2)  # each token once, by sessions of three turns
    affine = prefill_tokens("prefix_affinity")
    assert affine < 1.2 * needed < 1.4 * needed < prefill_tokens("round_robin")


def test_growth_of_a_queue_needs_more_than_noise():
    rng = np.random.default_rng(0)

    def growth(drift: float, num: int = 3000) -> float:
        backlog, length = Backlog(), 0
        for number in range(num):
            length = max(0, length + int(rng.integers(-2, 3)) + (rng.random() < drift))
            backlog.num_seen += 1
            if backlog.num_seen == backlog.due:
                backlog.sample(length, number)
        return backlog.growth()

    assert growth(0.5) == pytest.approx(0.5, rel=0.15)
    assert growth(-1.0) == growth(-1.0, num=20) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_replica(policy="chunkd"), "did you mean chunked"),
        (lambda: small_replica(policy={"name": "chunked", "window_s": 0.1}), "'chunked' has no such option"),
        (lambda: small_replica(speculation="fixed"), "needs an acceptance model"),
        (lambda: small_replica(speculation={"max_drafts": 3}), "has no name"),
        (lambda: small_replica(draft_cost_model=LinearTimes()), "speculation='off' never drafts"),
        (lambda: small_replica(draft_round_trip_s=0.1), "without a draft_cost_model"),
        (lambda: small_replica(tensor_parallel=4, chips=2), "tensor_parallel=4 <= chips=2"),
        (lambda: ClusterSpec.of(small_replica(swap_block_s=0.1)), "preemption='recompute' never swaps"),
        (lambda: ClusterSpec.of(small_replica(), 0), "num_replicas=0"),
        (
            lambda: ClusterSpec.of(small_replica(), router="least_outstandin"),
            "did you mean least_outstanding",
        ),
        (
            lambda: ClusterSpec.of(small_replica(prefix_caching=False), router="prefix_affinity"),
            "'prefix_affinity' needs prefix_caching",
        ),
        (lambda: Limits(max_outstanding=0), "max_outstanding=0"),
        (lambda: Failures(mean_time_to_failure_s=-1.0, mean_repair_s=1.0), "mean_time_to_failure_s=-1.0"),
        (lambda: Autoscaling(target_outstanding=1, min_replicas=3, max_replicas=2), "min_replicas=3"),
        (lambda: Disaggregation(kv_bytes_per_token=1.0, link_bytes_per_s=0.0), "link_bytes_per_s=0.0"),
        (
            lambda: ClusterSpec(
                pools={"a": PoolSpec(replica=small_replica()), "b": PoolSpec(replica=small_replica())}
            ),
            "uses the pools",
        ),
        (
            lambda: ClusterSpec(
                pools={
                    "prefill": PoolSpec(replica=small_replica(**DRAFTS)),
                    "decode": PoolSpec(replica=small_replica()),
                },
                disaggregation=Disaggregation(kv_bytes_per_token=1.0, link_bytes_per_s=1.0),
            ),
            "emits first tokens only",
        ),
        (
            lambda: ClusterSpec(
                pools={"main": PoolSpec(replica=small_replica())}, model_routing={"defualt": "main"}
            ),
            "does not take these options",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_tracing_a_changing_cluster_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="trace a fixed cluster"):
        simulate(some_requests(3, 9.0), ClusterSpec.of(small_replica(), failures=FAILURES), trace=tmp_path)


def test_pools_that_share_prefixes_need_one_block_size():
    pools = {
        "small": PoolSpec(replica=small_replica(block_size=4)),
        "large": PoolSpec(replica=small_replica(block_size=8)),
    }
    spec = ClusterSpec(pools=pools, model_routing=dict(pools={"hard": "large"}, default="small"))
    with pytest.raises(ValueError, match=r"block_size \[4, 8\]"):
        simulate(some_requests(3, 9.0), spec)


def test_the_cost_model_must_be_made_for_the_same_parallelism():
    times = LinearTimes()
    object.__setattr__(times, "metadata", {"tensor_parallel": 2})
    with pytest.raises(ValueError, match="made for 2 devices"):
        ReplicaSpec(small_replica().scheduler, times)


def test_the_same_seed_gives_the_same_run():
    source = SyntheticSource(Poisson(40.0), FixedLengths(20, 10), 80, seed=0)
    spec = ClusterSpec.of(small_replica(**DRAFTS), 3, router="power_of_two", failures=FAILURES)
    first, again, other = (simulate(source, spec, seed=seed).summary for seed in (1, 1, 2))
    assert first == again != other
