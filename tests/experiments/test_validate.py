"""Importing timings and validating against runs, as from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import import_timings, validate
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES
from sim.profiles.chips import load_profile
from sim.profiles.llmservingsim import read_profile
from sim.vllm_run import read_run, simulate_run
from specdec.config_calibration import TIMING_SOURCES
from specdec.tracking import Run
from tests.helpers.operator_profiles import write_profile, write_run
from tests.test_configs import build


def run_of(folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, Console(quiet=True))


def requests(count: int) -> list[dict[str, Any]]:
    return [
        {
            "input_toks": 40 + 10 * (index % 5),
            "output_toks": 8 + index % 3,
            "arrival_time": 0.02 * index,
            "queued_ts": 0.02 * index,
            "first_token_ts": 0.02 * index + 0.05,
            "last_token_ts": 0.02 * index + 0.5,
        }
        for index in range(count)
    ]


def recorded_by_the_simulator(folder: Path, profile: Path) -> Path:
    """A bench run whose times are what the simulator itself says."""
    first = write_run(folder / "first", requests(20))
    recorded = read_run(first)
    simulated = simulate_run(recorded, read_profile(profile).cost_model(32), 200)
    rows = requests(20)
    for index, row in enumerate(rows):
        row["queued_ts"] = float(simulated.seen_s[index])
        row["first_token_ts"] = float(simulated.first_token_s[index])
        row["last_token_ts"] = float(simulated.last_token_s[index])
    return write_run(folder / "second", rows)


def test_a_run_that_the_simulator_made_has_no_error(tmp_path: Path):
    profile = write_profile(tmp_path / "profile")
    bench = recorded_by_the_simulator(tmp_path, profile)
    (bench / "summary.txt").write_text("TTFT Mean 100.0 101.0 +1.0%\n")
    config = build(f"validate.run={bench}", f"validate.profile={profile}", experiment="validate")
    summary = validate.run(config, run_of(tmp_path / "out"))
    kinds, figures = ("ttft", "tpot", "e2e"), ("mean", "p50", "p90", "p99")
    assert set(summary["errors_pct"]) >= {f"{kind}_{figure}" for kind in kinds for figure in figures}
    assert all(abs(error) < 1e-6 for error in summary["errors_pct"].values())
    assert summary["throughput_errors_pct"]["output_tokens_per_s"] == pytest.approx(0.0, abs=1e-6)
    assert summary["expected_blocks"]["num_blocks"] > 200
    json.dumps(summary)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| ttft mean |" in page and "+1.0" in page
    assert {path.name for path in (tmp_path / "out" / "plots").glob("*.png")} == {"scatter.png", "cdf.png"}


def test_a_workload_tells_what_the_prompts_of_the_run_share(tmp_path: Path):
    profile = write_profile(tmp_path / "profile")
    bench = recorded_by_the_simulator(tmp_path, profile)
    workload = tmp_path / "workload.jsonl"
    lines = [
        {"input_tok_ids": list(range(row["input_toks"])), "output_toks": row["output_toks"]}
        for row in requests(20)
    ]
    workload.write_text("\n".join(json.dumps(line) for line in lines))
    words = (f"validate.run={bench}", f"validate.profile={profile}", f"validate.workload={workload}")
    summary = validate.run(build(*words, experiment="validate"), run_of(tmp_path / "out"))
    shared = summary["shared_prompts"]
    assert shared["num_requests"] == 19
    # The run was recorded without sharing, so lengths alone are right, and sharing computes too little.
    assert all(abs(error) < 1e-6 for error in shared["lengths_alone"]["errors_pct"].values())
    assert summary["errors_pct"]["ttft_mean"] < -1.0
    assert "lengths alone %" in (tmp_path / "out" / "report.md").read_text()
    longer = [*lines, {"input_tok_ids": [1], "output_toks": 1}]  # the run is of the first requests only
    workload.write_text("\n".join(json.dumps(line) for line in longer))
    again = validate.run(build(*words, experiment="validate"), run_of(tmp_path / "longer"))
    assert again["errors_pct"] == summary["errors_pct"]
    workload.write_text("\n".join(json.dumps(line) for line in lines[:-1]))
    with pytest.raises(ValueError, match="is not what the run was fed with"):
        validate.run(build(*words, experiment="validate"), run_of(tmp_path / "again"))


def test_a_slower_card_shows_as_signed_errors(tmp_path: Path):
    profile = write_profile(tmp_path / "profile")
    bench = recorded_by_the_simulator(tmp_path, profile)
    slow = tmp_path / "slow"
    slow.mkdir()
    for name in ("meta.json",):
        (slow / name).write_text((bench / name).read_text())
    rows = [json.loads(line) for line in (bench / "requests.jsonl").read_text().splitlines()]
    for row in rows:
        row["last_token_ts"] = row["first_token_ts"] + 2.0 * (row["last_token_ts"] - row["first_token_ts"])
    (slow / "requests.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = build(f"validate.run={slow}", f"validate.profile={profile}", experiment="validate")
    summary = validate.run(config, run_of(tmp_path / "out"))
    assert summary["errors_pct"]["tpot_mean"] == pytest.approx(-50.0, abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to validate"),
        (("validate.run=somewhere",), "come together"),
        (("validate.model=llama-3.1-8b",), "is for validate.run"),
        (("validate.workload=somewhere",), "is for validate.run"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, words: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        validate.run(build(*words, experiment="validate"), run_of(tmp_path))


def test_validation_options_are_refused_elsewhere():
    with pytest.raises(ValueError, match=r"for \+experiment=validate"):
        build("validate.published=true", experiment="quickstart")


def test_sources_are_those_of_the_code():
    assert set(TIMING_SOURCES) == {*import_timings.IMPORTERS, "splitwise"}


def test_imported_timings_are_usable_at_once(tmp_path: Path):
    write_profile(tmp_path / "perf" / "model" / "bf16")
    config = build(
        "experiment.source=llmservingsim", f"experiment.path={tmp_path / 'perf'}", experiment="import_timings"
    )
    summary = import_timings.run(config, run_of(tmp_path / "out"))
    (path,) = summary["files"]
    assert load_profile(path).name == "rtx_4090"
    assert summary["licences"]["rtx_4090"].startswith("MIT")
    used = build(f"hardware.timings={path}", "hardware=rtx_4090", experiment="simulate")
    from experiments import simulations

    cluster = simulations.cluster(used)
    assert "LLMServingSim" in cluster.pools["main"].replica.cost_model.metadata["origin"]


def test_simulations_use_fitted_curves_unless_told_otherwise():
    from experiments import simulations

    for timings, origin in (("auto", "fitted"), ("roofline", "roofline")):
        config = build(f"hardware.timings={timings}", experiment="simulate")
        model = simulations.cluster(config).pools["main"].replica.cost_model
        assert model.metadata["origin"].startswith(origin)
    assert load_hardware("h100").timings == "auto"
    assert MODEL_SHAPES["llama-3.1-8b"].num_layers == 32
