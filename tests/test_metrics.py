"""Metrics against hand-computed numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec import metrics
from specdec.trace import REQUEST_SCHEMA, STEP_SCHEMA, TraceWriter, read_steps
from tests.helpers.traced_run import traced_run


def requests_table() -> pl.DataFrame:
    """Three requests; the last generates one token."""
    return pl.DataFrame(
        {
            "request_id": [0, 1, 2],
            "task": ["chat", "code", "chat"],
            "arrival_s": [0.0, 1.0, 2.0],
            "first_scheduled_s": [0.5, 1.0, 2.25],
            "first_token_s": [1.0, 1.5, 3.0],
            "finish_s": [3.0, 5.5, 3.0],
            "num_generated": [11, 5, 1],
        }
    )


def rows_table(drafted: list[int], accepted: list[int], width: int = 1) -> pl.DataFrame:
    """Verifications of drafts so deep; with a ``width``, of trees with so many nodes at each depth."""
    emitted, nodes = [count + 1 for count in accepted], [width * count for count in drafted]
    columns = {"num_drafted": nodes, "draft_depth": drafted, "num_accepted": accepted, "num_emitted": emitted}
    return pl.DataFrame(columns)


def test_latencies_by_hand():
    table = metrics.latencies(requests_table())
    assert table["queue_s"].to_list() == [0.5, 0.0, 0.25]
    assert table["ttft_s"].to_list() == [1.0, 0.5, 1.0]
    assert table["tpot_s"].to_list()[:2] == [2.0 / 10, 4.0 / 4]
    assert math.isnan(table["tpot_s"][2])
    assert table["e2e_s"].to_list() == [3.0, 4.5, 1.0]


def test_percentiles_skip_nan():
    summary = metrics.percentiles([3.0, math.nan, 1.0, 2.0])
    assert summary["mean"] == 2.0
    assert summary["p50"] == 2.0
    assert summary["p90"] == pytest.approx(2.8)
    assert all(math.isnan(value) for value in metrics.percentiles([math.nan]).values())


def test_throughput_and_goodput_by_hand():
    assert metrics.throughput(requests_table()) == pytest.approx(
        {"tokens_per_s": 17 / 5.5, "requests_per_s": 3 / 5.5, "duration_s": 5.5}
    )
    # Request 1 is too slow per token; request 2 has one token and is judged by its first token alone.
    good = metrics.goodput(requests_table(), metrics.Slo(ttft_s=1.0, tpot_s=0.5))
    assert good == pytest.approx({"share": 2 / 3, "requests_per_s": 2 / 5.5, "tokens_per_s": 12 / 5.5})
    assert metrics.goodput(requests_table(), metrics.Slo(ttft_s=math.inf, tpot_s=math.inf))["share"] == 1.0


def test_slo_must_be_positive():
    with pytest.raises(ValueError, match=r"tpot_s=0\.0"):
        metrics.Slo(ttft_s=1.0, tpot_s=0.0)
    with pytest.raises(ValueError, match="ttft_s=nan"):
        metrics.Slo(ttft_s=math.nan, tpot_s=1.0)


def test_acceptance_by_hand():
    # All four accepted; first rejected; two accepted, third rejected; a draft of one, accepted; no draft.
    rows = rows_table([4, 4, 4, 1, 0], [4, 0, 2, 1, 0])
    assert metrics.tokens_per_step(rows) == 12 / 5
    assert metrics.acceptance_rate(rows) == 7 / 9  # seven accepted, two rejected; not 7 of 13 drafted
    table = metrics.acceptance_by_position(rows)
    assert table["num_reached"].to_list() == [4, 2, 2, 1]
    assert table["num_accepted"].to_list() == [3, 2, 1, 1]
    assert table["conditional_rate"].to_list() == [3 / 4, 1.0, 1 / 2, 1.0]
    assert table["survival"].to_list() == [0.75, 0.75, 0.375, 0.375]


def test_a_tree_accepted_to_its_depth_rejects_nothing():
    chains, trees = (rows_table([4, 4, 1], [4, 1, 0], width) for width in (1, 3))
    assert metrics.acceptance_rate(trees) == metrics.acceptance_rate(chains) == 5 / 7
    assert metrics.acceptance_by_position(trees).equals(metrics.acceptance_by_position(chains))


def test_nothing_drafted():
    rows = rows_table([0, 0], [0, 0])
    assert metrics.tokens_per_step(rows) == 1.0
    assert math.isnan(metrics.acceptance_rate(rows))
    assert metrics.acceptance_by_position(rows).height == 0
    assert math.isnan(metrics.tokens_per_step(rows.clear()))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40))
def test_positions_add_up_to_the_totals(pairs: list[tuple[int, int]]):
    rows = rows_table([max(pair) for pair in pairs], [min(pair) for pair in pairs])
    table = metrics.acceptance_by_position(rows)
    accepted, judged = metrics.judged_drafts(rows)
    assert table["num_accepted"].sum() == accepted.sum()
    assert table["num_reached"].sum() == judged.sum()


def test_decode_rows_of_a_run(tmp_path: Path):
    with TraceWriter(tmp_path) as trace:
        done = traced_run(trace, num_requests=6)
    rows = metrics.decode_rows(read_steps(tmp_path))
    expected = [
        (plan.step, int(request_id), int(outcome.num_accepted[i]))
        for plan, outcome in done
        for i, request_id in enumerate(plan.request_ids)
        if plan.emits[i] and plan.num_new[i] == 1
    ]
    assert list(rows.select("step", "request_id", "num_accepted").iter_rows()) == expected
    assert 0.5 < metrics.acceptance_rate(rows) < 0.9
    assert 1.0 < metrics.tokens_per_step(rows) < 5.0


def test_phase_times_by_hand():
    steps = pl.DataFrame(
        {
            "start_s": [1.0, 3.0],
            "end_s": [2.0, 5.0],
            "draft_s": [0.2, 0.3],
            "verify_s": [0.6, 1.4],
            "sample_s": [0.1, 0.1],
            "overhead_s": [0.1, 0.2],
        }
    )
    table = metrics.phase_times(steps)
    assert table["phase"].to_list() == ["draft", "verify", "sample", "overhead", "idle"]
    assert table["total_s"].to_list() == pytest.approx([0.5, 2.0, 0.2, 0.3, 1.0])
    assert table["share"].to_list() == pytest.approx([0.125, 0.5, 0.05, 0.075, 0.25])
    assert table["mean_s"].to_list() == pytest.approx([0.25, 1.0, 0.1, 0.15, 0.5])


def test_plans_ahead_by_hand():
    steps = pl.DataFrame({"kept_ahead": [None, True, False, True, None]}, schema={"kept_ahead": pl.Boolean})
    assert metrics.plans_ahead(steps) == {"kept": 2, "discarded": 1}


def test_empty_tables_are_errors():
    steps, requests = pl.DataFrame(schema=STEP_SCHEMA), pl.DataFrame(schema=REQUEST_SCHEMA)
    for measure in (metrics.decode_rows, metrics.phase_times, metrics.plans_ahead):
        with pytest.raises(ValueError, match="steps table is empty"):
            measure(steps)
    for measure in (metrics.latencies, metrics.throughput, metrics.latency_table):
        with pytest.raises(ValueError, match="requests table is empty"):
            measure(requests)
    with pytest.raises(ValueError, match="no values"):
        metrics.percentiles([])


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        judged = rng.integers(1, 5, 60)
        accepted = rng.binomial(judged, 0.7)
        interval = metrics.bootstrap_ratio(accepted, judged, rng, level=0.9, num_resamples=300)
        assert interval.low <= interval.estimate <= interval.high
        hits += interval.low <= 0.7 <= interval.high
    assert 0.82 <= hits / 200 <= 0.96


def test_bootstrap_bad_input():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="equally long"):
        metrics.bootstrap_ratio([1, 2], [1], rng)
    with pytest.raises(ValueError, match="equally long, not empty"):
        metrics.bootstrap_ratio([], [], rng)
    with pytest.raises(ValueError, match=r"level=1\.0"):
        metrics.bootstrap_ratio([1], [1], rng, level=1.0)
    assert math.isnan(metrics.bootstrap_ratio([0], [0], rng, num_resamples=3).low)
