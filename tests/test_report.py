"""Plots draw what they are given and leave no global state; the Perfetto file has the structure the viewer needs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from rich.console import Console

from specdec import metrics, plots, report
from specdec.perfetto import ENGINE_PID, REQUESTS_PID, trace_events, write_perfetto
from specdec.trace import STEP_SCHEMA, TraceWriter, read_requests, read_steps
from tests.helpers.traced_run import traced_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace")
    for name, num_drafts in (("plain", 0), ("ngram", 4)):
        with TraceWriter(directory, name) as trace:
            traced_run(trace, num_drafts=num_drafts)
    return directory


def draw(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_speedup_bars_have_heights_and_labels(tmp_path: Path):
    figure = plots.speedup_by_task({"ngram": {"chat": 1.25, "code": 0.9}, "layer_skip": {"chat": 2.0}})
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_equal(heights, [1.25, 0.9, 2.0, math.nan])
    assert [text.get_text() for text in axes.texts] == ["1.25", "0.90", "2.00", ""]
    draw(figure, tmp_path / "x.png")


def test_acceptance_leaves_out_who_drafts_nothing(run_dir: Path, tmp_path: Path):
    names = ("plain", "ngram")
    rows = {name: metrics.decode_rows(read_steps(run_dir, name)) for name in names}
    figure = plots.acceptance_by_position(
        {name: metrics.acceptance_by_position(rows[name]) for name in names}
    )
    for axes, column in zip(figure.axes, ("conditional_rate", "survival"), strict=True):
        (line,) = axes.lines
        assert line.get_label() == "ngram"
        expected = metrics.acceptance_by_position(rows["ngram"])[column].to_list()
        assert list(line.get_ydata()) == expected
    draw(figure, tmp_path / "x.png")


def test_latency_cdf_ends_at_one(run_dir: Path, tmp_path: Path):
    runs = {name: read_requests(run_dir, name) for name in ("plain", "ngram")}
    figure = plots.latency_cdf(runs, slo_s={"ttft_s": 0.1})
    for axes in figure.axes:
        for line in axes.lines[:2]:
            assert line.get_ydata()[-1] == 1.0
            assert (np.diff(line.get_xdata()) >= 0).all()
    draw(figure, tmp_path / "x.png")


def test_latency_cdf_of_one_token_answers(run_dir: Path, tmp_path: Path):
    requests = read_requests(run_dir, "plain").with_columns(num_generated=pl.lit(1))
    draw(plots.latency_cdf({"plain": requests}), tmp_path / "x.png")


@pytest.mark.parametrize(("max_steps", "max_requests"), [(500, 200), (5, 200), (500, 2), (1, 1)])
def test_gantt_draws_every_row_of_its_window(
    run_dir: Path, tmp_path: Path, max_steps: int, max_requests: int
):
    steps = read_steps(run_dir, "ngram")
    figure = plots.step_gantt(steps, max_steps=max_steps, max_requests=max_requests)
    phases, requests = figure.axes
    num_boxes = [sum(len(c.get_paths()) for c in axes.collections) for axes in (phases, requests)]
    num_steps = num_boxes[0] // 4
    assert 1 <= num_steps <= max_steps
    assert all(isinstance(c, PolyCollection) for c in requests.collections)
    assert num_boxes[1] == steps["num_rows"].head(num_steps).sum()
    heading = phases.get_title(loc="left")
    assert ("first" in heading) == (num_steps < steps.height)
    draw(figure, tmp_path / "x.png")


def test_speedup_by_acceptance_has_points_and_lines(tmp_path: Path):
    points = pl.DataFrame({"k": [2, 2, 4], "alpha": [0.5, 0.9, 0.5], "speedup": [1.2, 2.0, 1.1]})
    figure = plots.speedup_by_acceptance(
        points.with_columns(low=pl.col("speedup") - 0.1, high=pl.col("speedup") + 0.1), points
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["k = 2", "k = 4"]
    draw(figure, tmp_path / "x.png")
    draw(plots.speedup_by_acceptance(points), tmp_path / "y.png")


def test_predicted_against_measured_states_its_error(tmp_path: Path):
    figure = plots.predicted_against_measured(
        [1.0, 2.0, 40.0], [1.1, 1.8, 40.0], label="ms", groups=["a", "b", "a"]
    )
    assert figure.axes[0].get_title(loc="left") == "Mean error 6.7%"
    draw(figure, tmp_path / "x.png")


def test_ratio_bars(tmp_path: Path):
    figure = plots.ratio_bars({"a": 2.5, "b": 0.5}, {"a": 2.0}, title="t", intervals={"b": (0.4, 0.6)})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.5, 0.5]
    draw(figure, tmp_path / "x.png")


def test_nothing_to_draw_is_an_error():
    empty_steps = pl.DataFrame(schema=STEP_SCHEMA)
    for plot, data in (
        (plots.speedup_by_task, {}),
        (plots.acceptance_by_position, {"plain": pl.DataFrame({"position": []})}),
        (plots.latency_cdf, {}),
        (plots.speedup_by_acceptance, pl.DataFrame({"k": []})),
    ):
        with pytest.raises(ValueError, match="to draw"):
            plot(data)
    for reader in (plots.step_gantt, trace_events):
        with pytest.raises(ValueError, match="steps table is empty"):
            reader(empty_steps)


def test_importing_plots_leaves_matplotlib_alone():
    code = "import specdec.plots, sys; assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def printed(table: Any) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_summary_table_formats_values():
    rows = [
        {"drafter": "plain", "alpha": math.nan, "tok_s": 71.234, "tokens": 12345},
        {"drafter": "ngram", "alpha": 0.5678, "tok_s": 1283.4, "tokens": 8},
    ]
    text = printed(
        report.summary_table(rows, {"drafter": "drafter", "alpha": "α", "tok_s": "tok/s", "tokens": "n"})
    )
    for expected in ("plain", "–", "0.568", "71.2", "1,283", "12,345", "tok/s"):
        assert expected in text
    with pytest.raises(ValueError, match="column 'beta' is in no row"):
        report.summary_table(rows, ["beta"])
    with pytest.raises(ValueError, match="no rows"):
        report.summary_table([])


def test_latency_rows_are_milliseconds(run_dir: Path):
    table = metrics.latency_table(read_requests(run_dir, "plain"))
    rows = report.latency_rows(table)
    assert [row["latency (ms)"] for row in rows] == ["queue", "ttft", "tpot", "e2e"]
    assert rows[1]["p50"] == table["ttft_s"]["p50"] * 1e3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001234, "0.00123"), (0.0, "0"), (999.96, "1,000"), (True, "yes"), (None, "–"), (math.inf, "inf")],
)
def test_format_value(value: Any, text: str):
    assert report.format_value(value) == text


def test_perfetto_has_every_step_in_order(run_dir: Path, tmp_path: Path):
    steps = read_steps(run_dir, "ngram")
    events = json.loads(write_perfetto(steps, tmp_path / "x.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    times_us = [event["ts"] for event in events]
    assert times_us == sorted(times_us)
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in slices)
    named = [event["name"] for event in slices if event["name"].startswith("step ")]
    assert named == [f"step {step}" for step in steps["step"].to_list()]
    work = [event for event in slices if event["pid"] == REQUESTS_PID]
    assert len(work) == steps["num_rows"].sum()
    assert sum(event["name"] == "prefill" for event in work) == steps["num_prefill_rows"].sum()
    tracks = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in slices} <= tracks
    running = [event["args"]["value"] for event in events if event["name"] == "num_running"]
    assert running == steps["num_running"].to_list()


def test_perfetto_slices_of_a_track_do_not_overlap(run_dir: Path):
    ends: dict[tuple[int, int], float] = {}
    for event in trace_events(read_steps(run_dir, "ngram")):
        if event["ph"] == "X":
            track = (event["pid"], event["tid"])
            assert event["ts"] >= ends.get(track, 0.0) - 1e-6
            ends[track] = event["ts"] + event["dur"]
    assert {pid for pid, _ in ends} == {ENGINE_PID, REQUESTS_PID}
