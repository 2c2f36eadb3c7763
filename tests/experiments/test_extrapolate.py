"""Fleets with ranges: every range holds its point, cells are written as they come and not simulated twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import extrapolate
from experiments.extrapolate import METRICS, MODEL, POINT, SEED
from experiments.fleets import fleet, with_other_times
from sim.cost_model import CostModel
from specdec.config import Config
from specdec.run import execute
from tests.test_configs import build

SMALL = (
    "tracking=disabled",
    "experiment.num_requests=40",
    "experiment.mixes=[conversation]",
    "experiment.fleets=[2]",
    "experiment.only=[chunked,chunked_eagle]",
    "experiment.num_perturbed=1",
    "experiment.workers=1",
)


def configured(*overrides: str) -> Config:
    return build(*SMALL, *overrides, experiment="extrapolate")


def test_a_run_resumes_and_its_ranges_hold_the_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    summary = execute(configured(), tmp_path, None)
    assert [row["case"] for row in summary["fleets"]] == ["chunked", "chunked_eagle"]
    for row in summary["fleets"]:
        for metric in METRICS:
            for kind in (SEED, MODEL):
                low, high = row[f"{metric}_{kind}"]
                assert low <= row[metric] <= high
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 2 * 3  # cases × (point, seed, model)
    plain, eagle = (
        next(cell for cell in cells if cell["case"] == name and cell["kind"] == POINT)
        for name in ("chunked", "chunked_eagle")
    )
    assert eagle["tau"] > 1.5 > plain["tau"] == 1.0
    assert eagle["tpot_p99_s"] < plain["tpot_p99_s"]
    assert (tmp_path / "plots" / "fleets.png").exists()

    simulated: list[str] = []
    real = extrapolate.simulate_cell

    def counted(config: Config, cell: extrapolate.Cell) -> dict[str, Any]:
        simulated.append(cell.name)
        return real(config, cell)

    monkeypatch.setattr(extrapolate, "simulate_cell", counted)
    execute(configured("experiment.num_perturbed=2"), tmp_path, None)
    assert [name.split("/")[3:5] for name in simulated] == [["model", "1"], ["model", "1"]]


def test_other_times_are_the_same_for_all_cases_and_differ_by_draw():
    config = configured()
    models: list[CostModel] = []
    for name in ("chunked", "chunked_eagle"):
        cluster = fleet(config, config.experiment.cases[name], 2, name)
        other = with_other_times(cluster, np.random.default_rng(1)).pools["main"].replica.cost_model
        assert isinstance(other, CostModel)
        assert other.operators.dense != cluster.pools["main"].replica.cost_model.operators.dense  # pyright: ignore
        models.append(other)
    assert models[0].operators.dense == models[1].operators.dense
    assert models[0].operators.draft_step is None and models[1].operators.draft_step is not None


def test_a_case_whose_drafter_never_drafts_is_refused():
    with pytest.raises(ValueError, match=r"draft=eagle was given, but its speculation never drafts"):
        fleet(configured(), {"policy": {"name": "chunked"}, "draft": "eagle"}, 1, "experiment.cases.odd")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.only=[chunkd]", "did you mean chunked"),
        ("experiment.mixes=[chat]", "experiment.mixes"),
        ("experiment.workers=0", "must be >= 1, or -1"),
        ("+experiment.cases.mine={polcy: {name: chunked}}", "policy"),
    ],
)
def test_wrong_options_name_value_and_remedy(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        build(override, experiment="extrapolate")


def test_an_slo_that_no_load_keeps_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be kept on 1 × h100 at any load of conversation"):
        execute(configured("experiment.slo_tpot_s=1e-5"), tmp_path, None)
