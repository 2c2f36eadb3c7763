"""Predictions of our own engine: short runs of a tiny model, simulated again from as much of them as is wanted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments import own_runs
from experiments.own_report import parts_of
from experiments.run_errors import NAMES, THROUGHPUT, errors, statistics, summarised
from sim.recorded_run import Pace, RecordedRun, RecordedSeconds, RunTimes, lent_verifications, simulate_run
from sim.replay import replay
from sim.step_features import StepFeatures
from sim.step_fit import AtPace, LaggedDrafting, fit_steps, step_table
from specdec.scheduler import SchedulerConfig
from specdec.trace import read_requests, read_steps
from specdec.tracking import Run
from tests.experiments.tiny import LIMITS, run_tiny
from tests.test_configs import build

SMALL = (
    "validate.own=true",
    "validate.drafters=[none,ngram,synthetic]",
    "validate.whole_prompts=[none]",
    "validate.alphas=[0.7]",
    "validate.loads=[0.5,1.2]",
    "validate.num_requests=8",
    "validate.output_lens=[6,12]",
    "validate.chunk_tokens=24",
    "validate.num_simulations=2",
    "engine.max_num_seqs=4",
    "engine.threads=1",
)
RUNS = (
    "none_chunked_load0.5",
    "ngram_chunked_load1.2",
    "synthetic_0.7_chunked_load1.2",
    "none_whole_load0.5",
)


@pytest.fixture(scope="module")
def validated(tiny_llama_dir, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    directory = tmp_path_factory.mktemp("validated") / "run"
    return run_tiny("validate", tiny_llama_dir, directory, *SMALL), directory


def recorded(directory: Path, name: str) -> RecordedRun:
    folder = directory / "trace"
    about = json.loads((folder / f"{name}.json").read_text())
    return RecordedRun(
        read_steps(folder, name),
        read_requests(folder, name),
        SchedulerConfig(**about["limits"]),
        about["policy"],
        about["max_drafts"],
    )


def test_every_configuration_is_predicted_at_every_load(validated):
    summary, directory = validated
    own = summary["own"]
    assert len(own["errors_pct"]) == 4 * 2 and not own["not_measured"]
    assert all(set(found) == set(NAMES) for found in own["errors_pct"].values())
    assert set(own["modes"]) == {"predicted", "paced", "acceptance", "plans", "positions"}
    assert all(math.isfinite(value) for found in own["modes"].values() for value in found.values())
    assert set(own["repeat_pct"]) == set(NAMES)
    for mode, reached in own["reached"].items():
        assert reached == {
            goal: own["modes"][mode][goal] <= limit for goal, limit in own["goals_pct"].items()
        }
    missed = sum(not each for reached in own["reached"].values() for each in reached.values())
    assert own["verdict"].count("MISSED") == missed
    assert all(math.isfinite(pace) for paces in own["paces_pct"].values() for pace in paces)
    rows = json.loads((directory / "tables" / "own_intervals.json").read_text())
    assert len(rows) == 4 * 2 * len(NAMES)
    assert all(row["low_pct"] <= row["high_pct"] for row in rows)


def test_the_page_says_what_is_wrong_and_why(validated):
    _, directory = validated
    page = (directory / "report.md").read_text()
    for part in (
        "| plain, chunked | 0.5 |",
        "synthetic α 0.7, chunked",
        "plain, chunked at 1.2 measured again",
        "why",
    ):
        assert part in page
    shown = [line.split("(")[1].split(")")[0] for line in page.splitlines() if line.startswith("![")]
    assert shown and all((directory / path).is_file() for path in shown)


@pytest.mark.parametrize("name", RUNS)
def test_plans_replayed_are_the_run(validated, name: str):
    run = recorded(validated[1], name)
    assert replay(run.steps, run.requests, run.loop()) == run.steps.height
    seconds = RecordedSeconds(run)
    times = simulate_run(run, seconds, run.verifications, seen_s=run.seen_s)
    assert seconds.num_different == 0
    np.testing.assert_array_equal(times.num_tokens, run.times.num_tokens)
    np.testing.assert_array_equal(times.num_steps, run.times.num_steps)
    # What lies between a step's commit and the next one's start counts for the step: less than one step.
    assert np.abs(times.e2e_s - run.times.e2e_s).max() < run.seconds.max()
    assert times.duration_s == pytest.approx(run.times.duration_s, rel=0.02)


@pytest.mark.parametrize("name", RUNS)
def test_busy_steps_hold_all_of_the_time(validated, name: str):
    run = recorded(validated[1], name)
    phases = sum(run.steps[f"{phase}_s"].to_numpy() for phase in ("draft", "verify", "sample"))
    assert (run.seconds >= phases - 1e-6).all()
    whole = float(run.steps["end_s"].to_numpy()[-1])
    assert run.seconds.sum() <= whole + 1e-6


def test_a_saturated_run_is_busy_from_start_to_end(validated):
    run = recorded(validated[1], "none_chunked_capacity")
    whole = run.steps["end_s"].to_numpy()[-1] - run.steps["start_s"].to_numpy()[0]
    assert run.seconds.sum() == pytest.approx(whole, rel=1e-6)
    assert (run.seen_s[1:] >= run.seen_s[:-1]).all() and (run.seen_s >= 0.0).all()


def test_a_run_that_the_simulator_made_is_predicted_without_error(validated):
    run = recorded(validated[1], "synthetic_0.7_chunked_load1.2")
    model = fit_steps([step_table(run)], has_draft_model=False, source="test")
    times, again = (simulate_run(run, model, run.verifications) for _ in range(2))
    found = errors(times, [again], np.random.default_rng(0))
    assert all(error.error_pct == error.low_pct == error.high_pct == 0.0 for error in found.values())


def test_fitted_seconds_rise_with_every_size_and_add_up(validated):
    run = recorded(validated[1], "ngram_chunked_capacity")
    table = step_table(run)
    model = fit_steps([table], has_draft_model=False, source="test")
    predicted_s = model.predict(table.features).total_s
    assert predicted_s.sum() == pytest.approx(table.seconds.sum(), rel=0.25)
    one, more = StepFeatures(1, 1, 1, 1, 20, 0, 0, 0, 0, 0), StepFeatures(4, 4, 4, 4, 80, 0, 0, 0, 0, 0)
    assert 0.0 < model.predict_scalar(one).total_s <= model.predict_scalar(more).total_s


def test_a_machine_that_slows_down_as_its_passes_do_is_predicted_at_its_pace(validated):
    """The same run, once as it was and once on a machine that takes 1.3 times as long for everything."""
    run = recorded(validated[1], "ngram_chunked_capacity")
    slow = step_table(run, Pace(1.0 / 1.3, 1.0 / 1.3))
    np.testing.assert_allclose(slow.seconds, 1.3 * run.seconds)
    model = fit_steps([step_table(run)], has_draft_model=False, source="test")
    again = fit_steps([slow], has_draft_model=False, source="test")
    for features in run.features[:20]:
        at_pace = AtPace(model, Pace(1.3, 1.3)).predict_scalar(features)
        assert at_pace.total_s == pytest.approx(again.predict_scalar(features).total_s, rel=1e-3)


def test_steps_with_prompts_go_at_the_pace_of_prompts(validated):
    run = recorded(validated[1], "none_chunked_capacity")
    table = step_table(run, Pace(0.5, 2.0))
    shares = np.where(table.features.prefill_tokens > 0, 2.0, 0.5)
    assert set(shares.tolist()) == {0.5, 2.0}
    np.testing.assert_allclose(table.seconds * shares, run.seconds)
    model = fit_steps([step_table(run)], has_draft_model=False, source="test")
    for features, share in zip(run.features, shares.tolist(), strict=True):
        paced = AtPace(model, Pace(0.5, 2.0)).predict_scalar(features)
        assert paced.total_s == pytest.approx(share * model.predict_scalar(features).total_s)


def test_a_run_during_which_the_machine_changed_is_measured_again(tiny_llama_dir, tmp_path, monkeypatch):
    """Passes take twice as long at the end of the first attempt."""
    paces = iter([Pace(1.0, 1.0), Pace(1.0, 2.0), *[Pace(1.0, 1.0)] * 100])
    monkeypatch.setattr(own_runs, "measured_pace", lambda _: next(paces))
    only = ("validate.drafters=[none]", "validate.whole_prompts=[]", "validate.loads=[0.5]")
    words = [
        word
        for word in SMALL
        if not word.startswith(("validate.drafters", "validate.whole", "validate.loads"))
    ]
    run_tiny("validate", tiny_llama_dir, tmp_path / "run", *words, *only)
    attempts = {
        path.stem: json.loads(path.read_text())["num_attempts"]
        for path in (tmp_path / "run" / "trace").glob("*.json")
    }
    assert attempts.pop("none_chunked_capacity") == 2 and set(attempts.values()) == {1}


def test_a_draft_model_computes_prompts_one_step_late(validated):
    run = recorded(validated[1], "synthetic_0.7_chunked_load1.2")
    table = step_table(run)
    late = replace(table, draft_s=0.01 * table.features.draft_steps + 0.002 * table.prefill_before)
    model = fit_steps([late], has_draft_model=True, source="test")
    lagged = LaggedDrafting(model)
    draft_s = np.array([lagged.predict_scalar(step).draft_s for step in run.features])
    np.testing.assert_allclose(draft_s, late.draft_s, rtol=1e-3, atol=1e-5)
    at_once_s = model.predict(table.features).draft_s
    assert at_once_s.sum() == pytest.approx(draft_s.sum(), rel=1e-3)
    assert not np.allclose(at_once_s, draft_s, rtol=1e-3)


def test_lent_acceptance_is_like_that_of_the_lenders(validated):
    directory = validated[1]
    run, lender = (recorded(directory, f"synthetic_0.7_chunked_{role}") for role in ("load1.2", "capacity"))
    lent = lent_verifications([lender], run, np.random.default_rng(0))
    assert set(lent) == set(run.requests["request_id"].to_list())
    every = np.concatenate(lender.full_verifications)
    known = {tuple(row) for row in every.tolist()} | {(0, 0)}
    for request_id, rows in lent.items():
        assert {tuple(row) for row in rows.tolist()} <= known
        assert rows.shape[0] >= run.times.num_tokens[request_id]


def test_lookup_that_finds_nothing_is_cheap_in_the_simulation(validated):
    run = recorded(validated[1], "ngram_chunked_load1.2")
    drafted = np.concatenate(list(run.verifications.values()))[:, 0]
    proposed = sum(features.draft_tokens for features in run.features)
    assert proposed == drafted.sum() < 4 * drafted.size


def drawn_times(rng: np.random.Generator, count: int, factor: float = 1.0) -> RunTimes:
    arrival_s, tokens = np.sort(rng.uniform(0.0, 10.0, count)), rng.integers(5, 20, count)
    first_s = arrival_s + factor * rng.exponential(0.3, count)
    return RunTimes.of(
        arrival_s, first_s, first_s + factor * 0.05 * tokens * rng.uniform(0.8, 1.2, count), tokens, tokens
    )


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_error_and_shrink_with_requests(seed: int):
    widths: list[float] = []
    for count in (20, 320):
        rng = np.random.default_rng(seed)
        real, ours = drawn_times(rng, count), drawn_times(rng, count)
        found = errors(real, [ours], np.random.default_rng(0))
        for name in ("ttft_mean", "tpot_mean", "e2e_mean", "e2e_p50", "tau"):
            assert found[name].low_pct <= found[name].error_pct <= found[name].high_pct
        widths.append(found["ttft_mean"].high_pct - found["ttft_mean"].low_pct)
        assert found["ttft_mean"].low_pct <= 0.0 <= found["ttft_mean"].high_pct, "the same law"
    assert widths[1] < widths[0]


def test_pairs_make_a_constant_factor_certain():
    times = drawn_times(np.random.default_rng(1), 50)
    slower = replace(times, ttft_s=1.1 * times.ttft_s, duration_s=times.duration_s / 1.02)
    found = errors(times, [slower, slower], np.random.default_rng(0))
    for name in ("ttft_mean", "ttft_p99"):
        assert found[name].low_pct == pytest.approx(10.0) == found[name].high_pct
    assert found[THROUGHPUT].error_pct == pytest.approx(2.0)
    assert summarised([("ttft_p99", -9.0), (THROUGHPUT, 2.0)]) == {
        "median": 5.5,
        "worst": 9.0,
        "throughput": 2.0,
    }
    assert statistics([times, slower])["tau"] == pytest.approx(1.0)


def test_runs_of_other_requests_are_not_compared():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="simulate the measured requests"):
        errors(drawn_times(rng, 5), [drawn_times(rng, 6)], rng)


def test_parts_of_an_error_add_up_to_it(validated):
    _, directory = validated
    rows = json.loads((directory / "tables" / "own_intervals.json").read_text())

    class Known:
        def __init__(self, row: dict[str, Any]) -> None:
            self.errors = {
                mode: {row["statistic"]: type("E", (), {"error_pct": row[key]})}
                for mode, key in (
                    ("predicted", "error_pct"),
                    ("paced", "paced_pct"),
                    ("acceptance", "acceptance_replayed_pct"),
                    ("plans", "plans_replayed_pct"),
                )
            }

    for row in rows:
        parts = parts_of(Known(row), row["statistic"])  # pyright: ignore[reportArgumentType]
        assert sum(parts.values()) == pytest.approx(row["error_pct"])


def test_a_stopped_experiment_skips_runs_that_are_there(validated, tiny_llama_dir, monkeypatch):
    summary, directory = validated
    made: list[str] = []
    original = own_runs._Recorder._make
    (given,) = directory.parent.glob("run.jsonl")
    config = build(
        f"model.name={tiny_llama_dir}", f"workload.prompts={given}", *LIMITS, *SMALL, experiment="validate"
    )

    def noted(self: Any, setup: Any, name: str, *rest: Any) -> None:
        made.append(name)
        original(self, setup, name, *rest)

    monkeypatch.setattr(own_runs._Recorder, "_make", noted)
    (directory / "trace" / "ngram_chunked_load0.5.json").unlink()
    run = Run(directory, Console(quiet=True))
    measured = own_runs.measure(config, run)
    assert made == ["ngram_chunked_load0.5"]
    assert {one.setup.slug: one.capacity_per_s for one in measured} == summary["own"]["capacity_per_s"]
    monkeypatch.setattr(own_runs.common, "build_llm", lambda _: pytest.fail("nothing is to be measured"))
    own_runs.measure(replace(config, validate=replace(config.validate, num_simulations=3)), run)
    with pytest.raises(pytest.fail.Exception, match="nothing is to be measured"):
        own_runs.measure(replace(config, seed=1), run)


def test_a_budget_leaves_configurations_out_and_says_so(validated, tiny_llama_dir):
    _, directory = validated
    (directory / "summary.json").unlink(missing_ok=True)
    summary = run_tiny("validate", tiny_llama_dir, directory, *SMALL, "validate.budget_s=1e-6")
    assert len(summary["own"]["errors_pct"]) == 2
    assert summary["own"]["not_measured"][0] == "n-gram, chunked"
    assert "Not measured within the budget: n-gram, chunked" in (directory / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("validate.loads=[0.5]",), r"validate\.loads=\[0\.5\] was given, but it is for validate\.own=true"),
        (("validate.own=true", "validate.loads=[]"), r"validate\.loads is empty"),
        (("validate.own=true", "validate.loads=[0.5,-1]"), r"validate\.loads=-1\.0 must be"),
        (("validate.own=true", "validate.drafters=[ngrams]"), r"validate\.drafters.*did you mean ngram"),
        (("validate.own=true", "validate.drafters=[none,none]"), r"names a drafter twice"),
        (
            ("validate.own=true", "validate.drafters=[]", "validate.whole_prompts=[]"),
            r"are empty: name some of",
        ),
        (("validate.own=true", "validate.alphas=[1.5]"), r"validate\.alphas: acceptance rate 1\.5"),
        (("validate.own=true", "validate.output_lens=[9,3]"), r"validate\.output_lens=\[9, 3\] must be"),
        (("validate.own=true", "validate.num_requests=2"), r"validate\.num_requests=2 must be >= 4"),
        (("validate.own=true", "validate.chunk_tokens=0"), r"validate\.chunk_tokens=0 must be >= 1"),
        (("validate.own=true", "validate.budget_s=0"), r"validate\.budget_s=0\.0 must be"),
    ],
)
def test_options_that_do_not_fit_are_named(words: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        build(*words, experiment="validate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speculation=adaptive",), "choose speculation=fixed"),
        (("speculation.num_drafts=0",), "speculation.num_drafts=0 drafts nothing"),
        (("validate.output_lens=[127,127]",), "raise engine.max_model_len"),
    ],
)
def test_configurations_that_cannot_be_measured_are_refused(
    tiny_llama_dir, tmp_path, words: tuple[str, ...], message: str
):
    with pytest.raises(ValueError, match=message):
        run_tiny("validate", tiny_llama_dir, tmp_path / "run", *SMALL, *words)
