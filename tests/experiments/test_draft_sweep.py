"""The draft sweep on a tiny model: real runs, rows as they come, resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import draft_sweep
from experiments.rows_file import read_rows
from tests.experiments.tiny import run_tiny
from tests.test_configs import build

SMALL = (
    "sampling.max_tokens=24",
    "experiment.only=[ngram,recycling]",
    "experiment.num_drafts=[3]",
    "experiment.temperatures=[0.0,1.0]",
)


def sweep(model: Path, directory: Path, *overrides: str) -> dict:
    return run_tiny("draft_sweep", model, directory, *SMALL, *overrides)


def test_cells_hold_what_the_formula_needs(tiny_llama_dir, tmp_path):
    summary = sweep(tiny_llama_dir, tmp_path / "run")
    cells = summary["cells"]
    assert [(cell["drafter"], cell["temperature"]) for cell in cells] == [
        ("ngram", 0.0),
        ("recycling", 0.0),
        ("ngram", 1.0),
        ("recycling", 1.0),
    ]
    for cell in cells:
        assert cell["tau"] == pytest.approx(1.0 + sum(cell["survival"]))
        assert cell["predicted_speedup"] == pytest.approx(cell["tau"] / cell["step_ratio"])
        assert cell["speedup"] > 0.0 and cell["verify_ms"] > 0.0
    assert max(cell["tau"] for cell in cells) > 1.0
    assert summary["best"]["speedup"] == max(cell["speedup"] for cell in cells)
    lines = (tmp_path / "run" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == cells
    plots = {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert plots >= {"tau_against_cost", "survival", "predicted_against_measured"}


def test_a_stopped_sweep_measures_only_what_is_missing(tiny_llama_dir, tmp_path, monkeypatch):
    first = sweep(tiny_llama_dir, tmp_path / "run")
    path = tmp_path / "run" / "cells.jsonl"
    kept = path.read_text().splitlines()[:3]
    path.write_text("\n".join(kept) + '\n{"drafter": "recy')
    (tmp_path / "run" / "summary.json").unlink()
    measured = []
    original = draft_sweep._Sweep._measure

    def counting(self, name, k, items, params):
        measured.append((name, k, params.temperature))
        return original(self, name, k, items, params)

    monkeypatch.setattr(draft_sweep._Sweep, "_measure", counting)
    second = sweep(tiny_llama_dir, tmp_path / "run")
    assert measured == [("recycling", 3, 1.0)]
    measured.clear()
    sweep(tiny_llama_dir, tmp_path / "run", "sampling.max_tokens=20", "experiment.only=[ngram]")
    assert measured == [("ngram", 3, 0.0), ("ngram", 3, 1.0)], "other options, other results"
    sweep(tiny_llama_dir, tmp_path / "run")
    assert second["cells"][:3] == first["cells"][:3]
    rows = read_rows(path, second["cells"][0]["config_hash"])
    assert rows == second["cells"], "the new row is not glued to the half line"


def test_unknown_drafters_fail_before_anything_runs(tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match="unknown drafter 'ngramm': did you mean ngram"):
        sweep(
            tiny_llama_dir, tmp_path / "run", "+experiment.drafters.x={name: ngramm}", "experiment.only=[x]"
        )
    with pytest.raises(ValueError, match=r"experiment.only.*recyclin"):
        build("experiment.only=[recyclin]", experiment="draft_sweep")
