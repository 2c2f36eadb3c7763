"""Streaming metrics against the same figures from tables, exact sketches against numpy, and the books."""

from __future__ import annotations

import heapq
import pickle

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.streaming import FIELDS, LittlesLaw, QuantileSketch, RunMetrics
from specdec.metrics import (
    Slo,
    acceptance_rate,
    decode_rows,
    goodput,
    latency_table,
    percentiles,
    throughput,
    tokens_per_step,
)

SLO = Slo(ttft_s=1.0, tpot_s=0.03)
TASKS = ("chat", "code", "never seen")


def make_block(num_requests: int, seed: int = 0, num_tasks: int = 2) -> np.ndarray:
    """Requests of chains of k = 4, float64 [N, len(FIELDS)]; every seventh generates one token."""
    rng = np.random.default_rng(seed)
    verifications = rng.integers(1, 60, num_requests)
    verifications[::7] = 0
    accepted = rng.binomial(4 * verifications, 0.6)
    generated = 1 + verifications + accepted
    arrival_s = np.cumsum(rng.exponential(0.02, num_requests))
    scheduled_s = arrival_s + rng.exponential(0.5, num_requests)
    first_token_s = scheduled_s + rng.lognormal(-2.0, 1.0, num_requests)
    finish_s = first_token_s + (generated - 1) * rng.lognormal(-4.0, 0.5, num_requests)
    columns = [arrival_s, scheduled_s, first_token_s, finish_s]
    columns += [rng.integers(1, 2000, num_requests), generated, verifications + 1, 4 * verifications]
    columns += [accepted, np.minimum(verifications, 4 * verifications - accepted)]
    columns += [rng.integers(0, 2, num_requests), rng.integers(0, num_tasks, num_requests)]
    return np.stack(columns, axis=1).astype(np.float64)


def as_table(block: np.ndarray) -> pl.DataFrame:
    ids = pl.Series("request_id", np.arange(len(block)))
    names = pl.Series("task", [TASKS[int(code)] for code in block[:, -1]])
    table = pl.DataFrame(block, schema=list(FIELDS)).drop("task").with_columns(ids, names)
    return table.with_columns(pl.col("num_generated", "num_steps", "num_preemptions").cast(pl.Int64))


def assert_same_figures(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=1e-12), name


def test_summary_is_that_of_the_tables():
    block = make_block(700)
    metrics = RunMetrics(SLO, tasks=TASKS, capacity=64)
    for row in block[:500].tolist():
        metrics.add(tuple(row))
    metrics.extend(block[500:])
    summary, table = metrics.summary(), as_table(block)
    assert_same_figures(summary["latency"], latency_table(table))
    assert summary["throughput"] == pytest.approx(throughput(table), rel=1e-12)
    assert summary["goodput"] == pytest.approx(goodput(table, SLO), rel=1e-12)
    assert 0.1 < summary["goodput"]["share"] < 0.9, "the objective must separate requests"
    generated, steps, accepted, rejected = (
        block[:, FIELDS.index(f"num_{name}")].sum() for name in ("generated", "steps", "accepted", "rejected")
    )
    assert summary["tau"] == pytest.approx((generated - 700) / (steps - 700))
    assert summary["alpha"] == pytest.approx(accepted / (accepted + rejected))
    assert summary["num_requests"] == metrics.num_requests == 700
    assert summary["num_generated"] == generated
    assert summary["num_preemptions"] == block[:, FIELDS.index("num_preemptions")].sum()
    assert summary["exact_quantiles"]
    assert metrics.total_sojourn_s == pytest.approx((block[:, 3] - block[:, 0]).sum(), rel=1e-13)


def test_tasks_have_their_own_figures_over_the_whole_time():
    block = make_block(400)
    metrics = RunMetrics(SLO, tasks=TASKS)
    metrics.extend(block)
    summary, table = metrics.summary(), as_table(block)
    assert list(summary["tasks"]) == ["chat", "code"], "a task without requests has no figures"
    for name, figures in summary["tasks"].items():
        mine = table.filter(pl.col("task") == name)
        assert_same_figures(figures["latency"], latency_table(mine))
        assert figures["goodput"]["share"] == pytest.approx(goodput(mine, SLO)["share"])
        assert figures["num_requests"] == mine.height
    rates = [figures["throughput"]["tokens_per_s"] for figures in summary["tasks"].values()]
    assert sum(rates) == pytest.approx(summary["throughput"]["tokens_per_s"])


def test_tau_and_alpha_are_those_of_the_steps_table():
    # Two requests, k = 2: a prompt's end emits one token, then drafts 2, 2 and 1 are accepted (0 rejects).
    steps = pl.DataFrame(
        {
            "step": [0, 1, 2],
            "num_rows": [2, 2, 1],
            "request_ids": [[0, 1], [0, 1], [0]],
            "num_new": [[9, 5], [1, 1], [1]],
            "emits": [[True, True], [True, True], [True]],
            "num_drafted": [[0, 0], [2, 2], [2]],
            "draft_depths": [[0, 0], [2, 2], [2]],
            "row_accepted": [[0, 0], [2, 1], [0]],
            "row_emitted": [[1, 1], [3, 2], [1]],
        }
    )
    metrics = RunMetrics(tasks=("",))
    metrics.add((0.0, 0.0, 1.0, 3.0, 9, 5, 3, 4, 2, 1, 0, 0))
    metrics.add((0.0, 0.0, 1.0, 2.0, 5, 3, 2, 2, 1, 1, 0, 0))
    summary, rows = metrics.summary(), decode_rows(steps)
    assert summary["tau"] == tokens_per_step(rows) == 2.0
    assert summary["alpha"] == acceptance_rate(rows) == 0.6
    assert "goodput" not in summary


def test_one_token_answers_have_no_time_per_token():
    metrics = RunMetrics(SLO)
    task = metrics.task_code("classify")
    metrics.add((0.0, 0.25, 0.5, 0.75, 10, 1, 1, 0, 0, 0, 0, task))
    summary = metrics.summary()
    for ratio in (summary["latency"]["tpot_s"]["p99"], summary["tau"], summary["alpha"]):
        assert np.isnan(ratio)
    assert summary["goodput"]["share"] == 1.0
    assert metrics.task_code("classify") == task


def test_merged_replicas_are_one_run():
    block = make_block(3_000)
    whole = RunMetrics(SLO, tasks=TASKS, exact_limit=100)
    whole.extend(block)
    first = RunMetrics(SLO, tasks=TASKS, exact_limit=100)
    second = RunMetrics(SLO, tasks=TASKS[::-1], exact_limit=100)  # the same names under other codes
    first.extend(block[::2])
    other = block[1::2].copy()
    other[:, -1] = len(TASKS) - 1 - other[:, -1]
    for row in other.tolist():
        second.add(tuple(row))
    first.merge(pickle.loads(pickle.dumps(second)))
    merged, expected = first.summary(), whole.summary()
    assert not expected["exact_quantiles"]
    assert second.num_requests == 1_500, "the other stays as it is"
    assert merged["tau"] == expected["tau"]
    assert merged["throughput"] == expected["throughput"]
    assert merged["goodput"] == expected["goodput"]
    assert_same_figures(merged["latency"], expected["latency"])
    assert list(merged["tasks"]) == list(expected["tasks"])


def test_summary_of_many_requests_is_close_to_the_tables():
    block = make_block(60_000)
    metrics = RunMetrics(SLO, tasks=TASKS, exact_limit=5_000)
    metrics.extend(block)
    for name, row in latency_table(as_table(block)).items():
        assert metrics.summary()["latency"][name] == pytest.approx(row, rel=2e-3), name


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("finish_s", 0.0, "ordered, arrival_s <= first_scheduled_s"),
        ("first_token_s", float("nan"), "finite"),
        ("num_generated", 0, "num_generated >= num_steps >= 1"),
        ("num_steps", 1e6, "num_generated >= num_steps >= 1"),
        ("task", 3, "a code that task_code gave, below 3"),
        ("task", 0.5, "a code that task_code gave, below 3"),
    ],
)
def test_impossible_requests_are_named(column: str, value: float, message: str):
    block = make_block(5)
    block[3, FIELDS.index(column)] = value
    with pytest.raises(ValueError, match=rf"{message}.*{column}={value:g}".replace("+", r"\+")):
        RunMetrics(tasks=TASKS).extend(block)


def test_run_metrics_bad_input():
    with pytest.raises(ValueError, match="no request finished"):
        RunMetrics(tasks=TASKS).summary()
    with pytest.raises(ValueError, match=r"block has shape \(5, 3\)"):
        RunMetrics().extend(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="capacity=0"):
        RunMetrics(capacity=0)
    with pytest.raises(ValueError, match="use one SLO"):
        RunMetrics(SLO).merge(RunMetrics())


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_few_values_have_exact_quantiles(values: list[float], q: float):
    sketch = QuantileSketch(exact_limit=50)
    for start in range(0, len(values), 7):
        sketch.extend(values[start : start + 7])
    assert sketch.is_exact
    assert sketch.quantile(q) == np.quantile(values, q)
    assert sketch.percentiles() == pytest.approx(percentiles(values), rel=1e-12)
    assert (sketch.count, sketch.max) == (len(values), max(values))


@pytest.mark.parametrize("name", ["lognormal", "rising", "few distinct", "mostly zero", "heavy tail"])
def test_sketched_quantiles_keep_their_error(name: str):
    rng, size = np.random.default_rng(1), 50_000
    values = {
        "lognormal": rng.lognormal(0.0, 1.5, size),
        "rising": np.arange(size) * 1e-3 + rng.exponential(1.0, size),
        "few distinct": rng.integers(1, 20, size).astype(np.float64),
        "mostly zero": np.where(rng.random(size) < 0.9, 0.0, rng.exponential(1.0, size)),
        "heavy tail": rng.pareto(0.5, size),
    }[name]
    sketch = QuantileSketch(exact_limit=3_000)
    for part in np.array_split(values, 13):
        sketch.extend(part)
    levels = (0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
    assert not sketch.is_exact
    found = [sketch.quantile(q) for q in levels]
    # "lower": the promise is about an order statistic; between two of them there may be a gap.
    np.testing.assert_allclose(found, np.quantile(values, levels, method="lower"), rtol=1.001e-3, atol=1e-9)
    assert sketch.mean == pytest.approx(values.mean(), rel=1e-12)
    assert sketch.max == values.max()
    assert sketch.quantile(1.0) <= sketch.max


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30))
def test_merging_is_extending(num_first: int, num_second: int, exact_limit: int):
    values = np.random.default_rng(num_first).exponential(1.0, num_first + num_second)
    whole, first, second = (QuantileSketch(exact_limit) for _ in range(3))
    whole.extend(values)
    first.extend(values[:num_first])
    second.extend(values[num_first:])
    first.merge(second)
    assert first.count == whole.count == values.size
    assert first.is_exact == whole.is_exact == (values.size <= exact_limit)
    assert second.count == num_second
    for q in (0.0, 0.3, 0.99):
        assert first.quantile(q) == pytest.approx(whole.quantile(q), rel=1e-12, nan_ok=True)


def test_sketch_leaves_out_nan_and_bounds_its_memory():
    sketch = QuantileSketch(exact_limit=2_000)
    assert np.isnan([sketch.mean, sketch.max, sketch.quantile(0.5)]).all()
    sketch.extend([np.nan, 2.0, np.nan])
    assert (sketch.count, sketch.mean, sketch.quantile(0.5)) == (1, 2.0, 2.0)
    rng = np.random.default_rng(2)
    for _ in range(10):
        sketch.extend(rng.lognormal(0.0, 2.0, 10_000))
    assert sketch.count == 100_001
    assert len(pickle.dumps(sketch)) < 200_000


def test_sketch_bad_input():
    with pytest.raises(ValueError, match="no durations"):
        QuantileSketch().extend([1.0, -1.0])
    with pytest.raises(ValueError, match="no durations"):
        QuantileSketch().extend([float("inf")])
    with pytest.raises(ValueError, match=r"q=99 must be in \[0, 1\]"):
        QuantileSketch().quantile(99)
    with pytest.raises(ValueError, match="exact_limit=0"):
        QuantileSketch(exact_limit=0)
    with pytest.raises(ValueError, match=r"relative errors 0\.001 and 0\.01 differ"):
        QuantileSketch().merge(QuantileSketch(relative_error=0.01))


def drive(law: LittlesLaw, num_requests: int, offset_s: float) -> float:
    """A queue of one server, event by event; the sum of the sojourn times."""
    rng = np.random.default_rng(4)
    arrivals_s = offset_s + np.cumsum(rng.exponential(1.0, num_requests))
    events: list[tuple[float, int]] = [(float(arrival_s), 1) for arrival_s in arrivals_s]
    free_s, total_s = offset_s, 0.0
    for arrival_s, service_s in zip(arrivals_s.tolist(), rng.exponential(0.9, num_requests), strict=True):
        free_s = max(free_s, arrival_s) + float(service_s)
        total_s += free_s - arrival_s
        events.append((free_s, -1))
    heapq.heapify(events)
    while events:
        law.change(*heapq.heappop(events))
    return total_s


@pytest.mark.parametrize("offset_s", [0.0, 1e6])
def test_littles_law_holds_of_a_queue(offset_s: float):
    law = LittlesLaw(start_s=offset_s)
    total_s = drive(law, 20_000, offset_s)
    law.check(total_s)
    assert law.num_in_system == 0
    assert law.area_s == pytest.approx(total_s, rel=1e-11)


def test_littles_law_names_both_figures():
    law = LittlesLaw()
    law.change(1.0, 2)
    law.change(3.0, -1)
    law.change(4.0, -1)
    assert (law.area_s, law.mean_in_system) == (5.0, 1.25)
    law.check(5.0)
    with pytest.raises(AssertionError, match=r"integrates to 5\.0 .* sum to 5\.00001 s"):
        law.check(5.00001)


def test_littles_law_loses_no_short_spans():
    law = LittlesLaw()
    law.change(0.0, 2**30)
    law.change(2.0**30, 1 - 2**30)
    for second in range(1, 1025):  # each adds 1 to 2⁶⁰, whose neighbours are 256 away
        law.change(2.0**30 + second, 0)
    assert abs(int(law.area_s) - (2**60 + 1024)) <= 128


def test_littles_law_counts_those_still_inside():
    law = LittlesLaw()
    law.change(0.0, 3)
    law.change(2.0, -1)
    law.change(10.0, 0)
    law.check(2.0 + 10.0 + 10.0)
    with pytest.raises(AssertionError, match=r"2 requests are still inside"):
        law.check(2.0)


def test_littles_law_refuses_impossible_events():
    law = LittlesLaw()
    assert np.isnan(law.mean_in_system)
    law.change(1.0, 1)
    with pytest.raises(AssertionError, match=r"time ran backwards, from 1\.0 to 0\.5"):
        law.change(0.5, 1)
    with pytest.raises(AssertionError, match="more requests have left than entered"):
        law.change(2.0, -2)
