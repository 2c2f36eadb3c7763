"""Drafts in a loaded simulation: they take KV blocks, token budget and time, and make latencies vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.cluster import Cluster, ClusterSpec
from sim.replica import SimRequest
from sim.simulation import simulate
from specdec.scheduler import StepLoop
from specdec.trace import read_requests, read_steps
from specdec.workload import Requests
from tests.sim.clusters import DRAFTS, CountingTimes, LinearTimes, ListSource, one, run_cluster, small_replica


def test_a_draft_on_its_own_device_adds_its_steps_and_the_network():
    def total_s(**options: Any) -> float:
        spec = ClusterSpec.of(small_replica(LinearTimes(0.01, draft_s=0.5), **DRAFTS, **options))
        source = ListSource(Requests.build([0.0], 8, 20))
        summary = simulate(source, spec).summary
        steps = summary["num_steps"]
        return (summary["simulated_s"] - steps * 0.01) / (steps - 1)  # the first step computes the prompt

    near = total_s()
    assert near == pytest.approx(total_s(draft_cost_model=LinearTimes(9.0, draft_s=0.5)))
    # Of 20 tokens the last steps draft fewer than four, so the mean is a little less than 4 passes.
    assert 3.0 * 0.5 < near <= 4 * 0.5
    far = total_s(draft_cost_model=LinearTimes(9.0, draft_s=0.01), draft_round_trip_s=0.2)
    assert far == pytest.approx(near * 0.01 / 0.5 + 0.2, rel=0.1)


def kv_watched(times: CountingTimes, spec: ClusterSpec, requests: list[SimRequest]) -> list[SimRequest]:
    """Run with ``BlockPool.check`` at every step."""

    def prepare(cluster: Cluster) -> None:
        loops: list[StepLoop] = []
        for member in cluster.pools["main"].members:
            assert member.replica is not None
            loops.append(member.replica.loop)

        def watch(_: Any) -> None:
            for loop in loops:
                table = loop.table
                loop.pool.check([table.blocks(row) for row in table.active.tolist()])
                assert 0 <= loop.pool.num_free <= loop.config.num_blocks

        times.watch = watch

    return run_cluster(spec, requests, prepare)[0]


@pytest.mark.parametrize(
    "preemption", [{}, {"preemption": "swap", "num_swap_blocks": 30}], ids=["recompute", "swap"]
)
def test_kv_is_never_over_capacity(preemption: dict[str, Any]):
    times = CountingTimes()
    spec = ClusterSpec.of(small_replica(times, num_blocks=30, **preemption, **DRAFTS), 2)
    rng = np.random.default_rng(0)
    requests = [one(i, i * 0.01, int(rng.integers(1, 50)), int(rng.integers(5, 40))) for i in range(60)]
    finished = kv_watched(times, spec, requests)
    assert len(finished) == 60 and times.num_steps > 100
    assert sum(request.num_preemptions for request in finished) > 5, "the pool must be too small for comfort"


def test_drafts_take_token_budget_and_contend_with_prefill(tmp_path: Path):
    requests = ListSource(Requests.build([0.0] * 6 + [0.2], [4] * 6 + [200], [60] * 6 + [4], max_tokens=60))
    ttft_s: dict[int, float] = {}
    for k in (0, 4):
        name = {"name": "fixed", "max_drafts": k}
        replica = small_replica(
            max_model_len=300,
            num_blocks=2000,
            speculation=name,
            acceptance={"name": "constant", "alpha": 0.0},
        )
        simulate(requests, ClusterSpec.of(replica), trace=tmp_path / str(k))
        steps = read_steps(tmp_path / str(k))
        contended = steps.filter((steps["num_prefill_tokens"] > 1) & (steps["num_rows"] == 7))
        used = contended["num_prefill_tokens"] + contended["num_draft_tokens"] + 6
        assert (used <= 64).all() and (used == 64).any()
        assert (contended["num_draft_tokens"] == 6 * k).all()
        late = read_requests(tmp_path / str(k)).filter(prompt_len=200)
        ttft_s[k] = float((late["first_token_s"] - late["arrival_s"])[0])
    # 200 tokens in chunks of 64 − 6 take 4 steps, in chunks of 64 − 6 · 5 take 6.
    assert ttft_s[4] - ttft_s[0] == pytest.approx(2 * 0.01)


def test_drafts_reserve_kv_blocks(tmp_path: Path):
    source = ListSource(Requests.build([0.0], 8, 20))
    replica = small_replica(
        speculation={"name": "fixed", "max_drafts": 7}, acceptance={"name": "constant", "alpha": 0.0}
    )
    simulate(source, ClusterSpec.of(replica), trace=tmp_path)
    steps = read_steps(tmp_path)
    decode = steps[1]  # context 8: the token and seven drafts fill 16 places
    assert (decode["context"][0].to_list(), decode["num_drafts"][0].to_list()) == ([8], [7])
    assert decode["num_free_blocks"][0] == 256 - 4


@pytest.mark.parametrize(("alpha", "varies"), [(0.6, True), (1.0, False), (None, False)])
def test_stochastic_acceptance_gives_inter_token_latency_variance(
    tmp_path: Path, alpha: float | None, varies: bool
):
    options: dict[str, Any] = {}
    if alpha is not None:
        options = dict(DRAFTS, acceptance={"name": "constant", "alpha": alpha})
    source = ListSource(Requests.build([0.0], 8, 101, max_tokens=110))
    simulate(source, ClusterSpec.of(small_replica(**options)), trace=tmp_path)
    steps = read_steps(tmp_path)[1:-1]  # the first computes the prompt, the last is cut by the end
    latency_s = ((steps["end_s"] - steps["start_s"]) / steps["num_emitted"]).to_numpy()
    assert latency_s.size >= 19
    assert bool(latency_s.std() > 1e-9) == varies
