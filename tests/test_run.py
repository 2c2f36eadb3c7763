"""The entry point, with a stand-in for the experiment so that no model is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.config import Config
from specdec.run import descriptions, execute, help_text
from specdec.tracking import Run
from tests.test_configs import EXPERIMENTS, build

STAND_IN = """
import sys, types
import specdec.run

def run(config, run):
    run.log_metrics({"tau": 2.0})
    if config.seed == 13:
        raise ValueError("seed=13 brings bad luck: take another")
    if config.seed == 14:
        raise RuntimeError("a bug")
    print("ran", config.policy.name)
    return {"tau": 2.0, "policy": config.policy.name}

def start_run(directory, config, tracking, job_type, group):
    print("group", group)
    return original(directory, config, tracking, job_type, group)

original, specdec.run.start_run = specdec.run.start_run, start_run
sys.modules["experiments.quickstart"] = types.ModuleType("experiments.quickstart")
sys.modules["experiments.quickstart"].run = run
specdec.run.main()
"""


def command(folder: Path, *words: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    start = ["-m", "specdec.run"] if module else ["-c", STAND_IN]
    return subprocess.run(
        [sys.executable, *start, *words], cwd=folder, capture_output=True, text=True, timeout=120
    )


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("summary.json"))]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replaces the quickstart; the list gets the configurations that it ran with."""
    calls: list[Config] = []

    def run(config: Config, run: Run) -> dict[str, Any]:
        calls.append(config)
        if config.seed == 13:
            raise ValueError("seed=13 brings bad luck: take another")
        return {"tau": 2.0}

    module = types.ModuleType("experiments.quickstart")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "experiments.quickstart", module)
    return calls


def test_help_lists_every_experiment_with_a_line():
    assert sorted(descriptions()) == EXPERIMENTS
    for name, line in descriptions().items():
        assert len(line) > 20, name
        assert f"{name} " in help_text() and line in help_text()


def test_without_experiment_the_help_is_shown_anywhere(tmp_path: Path):
    done = command(tmp_path, module=True)
    assert done.returncode == 0
    assert done.stdout.strip() == help_text().strip()
    assert list(tmp_path.iterdir()) == [], "nothing is run or written"
    done = command(tmp_path, "seed=1", module=True)
    assert done.returncode == 1
    assert "no experiment chosen" in done.stderr


def test_the_configuration_is_found_from_anywhere(tmp_path: Path):
    done = command(tmp_path, "+experiment=serve", "policy=dynamic", "--cfg", "job", module=True)
    assert done.returncode == 0, done.stderr
    assert "window_s: 0.05" in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["policy.ordr=sjf"], "error: unknown key 'policy.ordr': did you mean policy.order"),
        (["engine.threads=x"], "error: engine.threads: Value 'x'"),
        (["policy=chunkd"], "error: unknown policy 'chunkd': did you mean chunked?"),
        (["tracking.mode=onlin"], "error: unknown tracking.mode 'onlin': did you mean online"),
        (["seed=x,1", "--multirun"], "error: seed: Value 'x'"),
        (["seed=[="], "error: "),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, words: list[str], line: str):
    done = command(tmp_path, "+experiment=quickstart", "tracking=disabled", *words)
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_run_directory_holds_everything(tmp_path: Path):
    done = command(tmp_path, "experiment=quickstart", "tracking=disabled", "seed=5")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    (summary,) = summaries(tmp_path)
    assert summary["status"] == "ok"
    assert summary["experiment"] == "quickstart"
    assert summary["tau"] == 2.0
    assert summary["wall_s"] > 0
    assert "seed: 5" in (folder / "config.yaml").read_text()
    assert {"git", "software", "hardware"} == set(json.loads((folder / "stamp.json").read_text()))
    log = (folder / "run.log").read_text()
    assert summary["config_hash"] in log
    assert "ok after" in log
    assert "group None" in done.stdout
    assert str(folder) in done.stdout


def test_failures_leave_a_summary_and_a_traceback_in_the_log(tmp_path: Path):
    done = command(tmp_path, "+experiment=quickstart", "tracking=disabled", "seed=13")
    assert done.returncode == 1
    assert done.stderr == "error: seed=13 brings bad luck: take another\n"
    (summary,) = summaries(tmp_path)
    assert summary["status"] == "failed"
    assert summary["error"] == "ValueError: seed=13 brings bad luck: take another"
    assert "Traceback" in next(tmp_path.rglob("run.log")).read_text()


def test_a_bug_shows_its_traceback(tmp_path: Path):
    done = command(tmp_path, "+experiment=quickstart", "tracking=disabled", "seed=14")
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr and "Traceback" in done.stderr
    assert summaries(tmp_path)[0]["error"] == "RuntimeError: a bug"


def test_a_stopped_sweep_resumes_in_its_group(tmp_path: Path):
    words = ["--multirun", "+experiment=quickstart", "tracking=disabled", "hydra.sweep.dir=sweeps/orders"]
    first = command(tmp_path, *words, "policy=static,continuous")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("group orders") == 2
    assert [summary["policy"] for summary in summaries(tmp_path / "sweeps/orders")] == [
        "static",
        "continuous",
    ]
    again = command(tmp_path, *words, "policy=static,continuous,chunked")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("ran ") == 1
    assert "ran chunked" in again.stdout
    assert again.stderr.count("is finished already, skipped") == 2


def test_a_sweep_goes_on_after_a_failed_run(tmp_path: Path):
    done = command(tmp_path, "--multirun", "+experiment=quickstart", "tracking=disabled", "seed=13,1")
    assert done.returncode == 1
    assert "error: seed=13 brings bad luck" in done.stderr
    assert "Traceback" not in done.stderr
    assert [summary["status"] for summary in summaries(tmp_path)] == ["failed", "ok"]


def test_only_finished_runs_of_the_same_configuration_are_skipped(tmp_path: Path, stand_in: list[Config]):
    config = build("tracking=disabled")
    assert execute(config, tmp_path, None)["status"] == "ok"
    execute(config, tmp_path, None)
    assert len(stand_in) == 1
    execute(replace(config, seed=1), tmp_path, None)
    assert len(stand_in) == 2
    unlucky = replace(config, seed=13)
    for _ in range(2):
        with pytest.raises(ValueError, match="bad luck"):
            execute(unlucky, tmp_path, None)
    assert len(stand_in) == 4
    (tmp_path / "summary.json").write_text('{"status": "o')
    execute(config, tmp_path, None)
    assert len(stand_in) == 5


def test_global_generators_are_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import random

    import numpy as np
    import torch

    draws: list[tuple[float, float, float]] = []

    def run(config: Config, run: Run) -> dict[str, Any]:
        draws.append((random.random(), float(np.random.rand()), torch.rand(1).item()))
        return {}

    module = types.ModuleType("experiments.quickstart")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "experiments.quickstart", module)
    for index, seed in enumerate([3, 3, 4]):
        execute(build("tracking=disabled", f"seed={seed}"), tmp_path / str(index), None)
    assert draws[0] == draws[1] != draws[2]
