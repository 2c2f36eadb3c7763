"""Run directories and their W&B side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.config import TrackingConfig
from specdec.stamp import git_stamp, stamp
from specdec.tracking import environment, start_run, write_json

OFFLINE = """
from pathlib import Path
from matplotlib.figure import Figure
from specdec.config import TrackingConfig
from specdec.tracking import start_run
run = start_run(Path("run"), {"engine": {"block_size": 16}}, TrackingConfig(), "probe", "sweep_77")
for step in (5, 3):
    run.log_metrics({"tokens_per_s": float(step)}, step=step)
run.log_table("by_task", [{"task": "code", "tau": float("nan")}])
run.log_figure("speedup", Figure())
run.trace_directory.mkdir()
(run.trace_directory / "run.steps.parquet").write_bytes(b"PAR1")
run.log_trace([run.trace_directory / "run.steps.parquet"])
run.finish({"status": "ok", "tau": {"ngram": 1.5}})
"""


def test_offline_keeps_everything_in_the_run_directory(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    variables |= {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", "W&B should be silent"
    assert not [path for path in home.rglob("*") if "wandb" in path.name]

    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == {"status": "ok", "tau": {"ngram": 1.5}}
    assert json.loads((run / "tables" / "by_task.json").read_text()) == [{"task": "code", "tau": None}]
    assert (run / "plots" / "speedup.png").read_bytes().startswith(b"\x89PNG")
    records = next(run.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    for logged in (
        "sweep_77",
        "block_size",
        "tokens_per_s",
        "by_task",
        "speedup",
        "run.steps.parquet",
        "tau.ngram",
    ):
        assert logged.encode() in records, logged


def test_disabled_leaves_wandb_alone(tmp_path: Path):
    code = OFFLINE.replace("TrackingConfig()", "TrackingConfig(mode='disabled')")
    code += "\nimport sys; assert 'wandb' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "wandb").exists()
    assert (tmp_path / "run" / "plots" / "speedup.png").exists()
    assert (tmp_path / "run" / "tables" / "by_task.json").exists()


def test_unknown_mode_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"onlin.*online"):
        start_run(tmp_path / "run", {}, TrackingConfig(mode="onlin"), "probe", None)
    assert not (tmp_path / "run").exists()


def test_json_is_whole_and_finite(tmp_path: Path):
    import numpy as np

    path = tmp_path / "summary.json"
    write_json(path, {"a": float("nan"), "b": np.float32(0.5), "c": (1, np.int64(2)), 3: [float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": 0.5, "c": [1, 2], "3": [None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == 0.5
    assert list(tmp_path.iterdir()) == [path], "no half-written file stays behind"


def test_environment_is_restored():
    os.environ.pop("SPECDEC_TEST", None)
    with pytest.raises(RuntimeError), environment(SPECDEC_TEST="1"):
        assert os.environ["SPECDEC_TEST"] == "1"
        raise RuntimeError
    assert "SPECDEC_TEST" not in os.environ
    with environment(SPECDEC_TEST="outer"):
        with environment(SPECDEC_TEST="inner"):
            assert os.environ["SPECDEC_TEST"] == "inner"
        assert os.environ["SPECDEC_TEST"] == "outer"


def test_stamp_names_software_and_hardware():
    facts = stamp()
    assert facts["software"]["torch"].startswith("2.")
    assert facts["hardware"]["cores"] >= facts["hardware"]["usable_cores"] >= 1
    assert facts["hardware"]["torch_threads"] >= 1
    json.dumps(facts, allow_nan=False)


def test_git_stamp_is_of_our_tree_only(tmp_path: Path):
    def git(*words: str) -> None:
        settings = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    assert git_stamp(package) == {"revision": None, "dirty": None}
    (package / "__init__.py").touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_stamp(package)
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (package / "__init__.py").write_text("changed = True\n")
    assert git_stamp(package) == {"revision": clean["revision"], "dirty": True}
    installed = tmp_path / "site-packages" / "specdec"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert git_stamp(installed) == {"revision": None, "dirty": None}, "somebody else's repository"
