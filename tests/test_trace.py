"""Traces survive a round trip and a kill, and hold enough for an exact replay."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.trace import STEP_SCHEMA, TraceWriter, iter_steps, read_requests, read_steps
from tests.helpers.traced_run import make_loop, make_requests, record_of, traced_run


def assert_same(first: Any, second: Any) -> None:
    """Two plans or outcomes are equal, array for array, dtypes included."""
    for name in first._fields:
        a, b = getattr(first, name), getattr(second, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, name
            assert np.array_equal(a, b), name
        else:
            assert a == b, name


@pytest.mark.parametrize("flush_every", [1, 7, 1000])
def test_round_trip_keeps_every_plan_and_outcome(tmp_path: Path, flush_every: int):
    with TraceWriter(tmp_path, flush_every=flush_every) as trace:
        done = traced_run(trace)
    steps = read_steps(tmp_path)
    assert dict(steps.schema) == STEP_SCHEMA
    for (plan, outcome), (plan_read, outcome_read) in zip(done, iter_steps(steps), strict=True):
        assert_same(plan, plan_read)
        assert_same(outcome, outcome_read)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.requests.parquet", "run.steps.parquet"]


def test_totals_agree_with_the_arrays(tmp_path: Path):
    with TraceWriter(tmp_path) as trace:
        done = traced_run(trace)
    assert any(plan.preempted.size for plan, _ in done), "the run should exercise preemption"
    for (plan, outcome), row in zip(done, read_steps(tmp_path).iter_rows(named=True), strict=True):
        prefill = [new > 1 or not emits for new, emits in zip(plan.num_new, plan.emits, strict=True)]
        assert row["num_rows"] == plan.rows.size
        assert row["num_prefill_rows"] == sum(prefill)
        assert row["num_prefill_tokens"] == plan.num_new[prefill].sum()
        assert row["num_draft_tokens"] == outcome.num_drafted.sum()
        assert row["num_accepted"] == outcome.num_accepted.sum()
        assert row["num_emitted"] == outcome.num_emitted.sum()
        assert row["num_preempted"] == plan.preempted.size
        assert row["end_s"] - row["start_s"] == pytest.approx(outcome.step_s)


def replayed_plans(directory: Path, num_drafts: int) -> list[Any]:
    """Plans of a fresh loop that is given the recorded outcomes."""
    loop, waiting, plans = make_loop(num_drafts, num_blocks=36), make_requests(6), []
    for row, (recorded, outcome) in zip(
        (steps := read_steps(directory)).iter_rows(named=True), iter_steps(steps), strict=True
    ):
        while waiting and waiting[0].arrival_s <= recorded.now_s:
            loop.submit(waiting.pop(0))
        plan = loop.begin(recorded.now_s)
        plans.append(plan)
        if not np.array_equal(plan.num_drafts, recorded.num_drafts):
            break
        loop.commit(plan, outcome, row["end_s"])
    return plans


def test_a_trace_replays_to_the_same_plans(tmp_path: Path):
    with TraceWriter(tmp_path) as trace:
        done = traced_run(trace, num_drafts=4)
    plans = replayed_plans(tmp_path, num_drafts=4)
    assert len(plans) == len(done)
    for plan, (recorded, _) in zip(plans, done, strict=True):
        assert_same(plan, recorded)
    # The control: another draft length plans differently.
    assert len(replayed_plans(tmp_path, num_drafts=3)) < len(done)


def test_requests_round_trip(tmp_path: Path):
    request = make_requests(1)[0]
    with TraceWriter(tmp_path, name="mine") as trace:
        trace.request(record_of(request))
    (row,) = read_requests(tmp_path, "mine").to_dicts()
    expected = asdict(record_of(request))
    np.testing.assert_equal(row, expected)  # nan equals nan here


def test_a_killed_process_leaves_what_was_flushed(tmp_path: Path):
    script = (
        "import os, sys; from pathlib import Path; from specdec.trace import TraceWriter\n"
        "from tests.helpers.traced_run import traced_run\n"
        "trace = TraceWriter(Path(sys.argv[1]), flush_every=8)\n"
        "done = traced_run(trace); print(len(done), flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[1]
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -9, killed.stderr
    num_steps = int(killed.stdout)
    assert num_steps > 16
    assert read_steps(tmp_path)["step"].to_list() == list(range(num_steps // 8 * 8))


def test_a_merge_that_was_cut_short_reads_the_whole_table(tmp_path: Path):
    with TraceWriter(tmp_path, flush_every=4) as trace:
        done = traced_run(trace)
    read_steps(tmp_path).tail(4).write_parquet(tmp_path / "run.steps.part000009.parquet")
    assert read_steps(tmp_path).height == len(done)


def test_an_empty_trace_has_empty_tables(tmp_path: Path):
    trace = TraceWriter(tmp_path)
    trace.close()
    trace.close()
    assert read_steps(tmp_path).height == 0
    assert read_requests(tmp_path).height == 0


def test_a_trace_is_not_overwritten(tmp_path: Path):
    TraceWriter(tmp_path).close()
    with pytest.raises(ValueError, match="already holds a trace named 'run'"):
        TraceWriter(tmp_path)
    TraceWriter(tmp_path, name="other").close()


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="flush_every=0"):
        TraceWriter(tmp_path, flush_every=0)
    with pytest.raises(FileNotFoundError, match=r"run\.steps\.parquet"):
        read_steps(tmp_path)
