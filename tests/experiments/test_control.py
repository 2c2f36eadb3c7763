"""The control experiment on a tiny model, and the two traps that it replays in the simulator."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from experiments import control
from experiments.control_traps import (
    acceptance_claims,
    acceptance_trap,
    cliff_claims,
    cliff_trap,
    context_claims,
    context_trap,
)
from specdec import step_times
from tests.experiments.tiny import run_tiny
from tests.test_configs import build

SMALL = (
    "sampling.max_tokens=24",
    "speculation.num_drafts=3",
    "experiment.batches=[1,3]",
    "experiment.fixed=[2]",
    "experiment.rounds=2",
    "experiment.traps=false",
)


def measure(model: Path, directory: Path, *overrides: str) -> dict:
    return run_tiny("control", model, directory, *SMALL, *overrides)


@pytest.fixture
def quick(monkeypatch):
    short = functools.partial(step_times.measure_step_times, budget_s=0.2)
    monkeypatch.setattr(step_times, "measure_step_times", short)


def test_the_default_drafter_accepts_seven_of_ten():
    config = build(experiment="control")
    assert (config.drafter.name, config.drafter.alpha) == ("synthetic", 0.7)
    assert list(control.controllers(config)) == [
        "off",
        "fixed 1",
        "fixed 2",
        "fixed 4",
        "fixed 8",
        "adaptive",
        "goodput",
    ]
    assert build("drafter=ngram", experiment="control").drafter.name == "ngram"


def test_every_controller_is_measured_at_every_batch(tiny_llama_dir, tmp_path, quick):
    summary = measure(tiny_llama_dir, tmp_path / "run")
    names = ["off", "fixed 2", "adaptive", "goodput"]
    assert [(row["batch"], row["controller"]) for row in summary["cells"]] == [
        (batch, name) for batch in (1, 3) for name in names
    ]
    by_name = {(row["batch"], row["controller"]): row for row in summary["cells"]}
    for batch in (1, 3):
        assert by_name[batch, "off"]["speedup"] == 1.0 and by_name[batch, "off"]["drafts"] == 0.0
        assert 1.5 < by_name[batch, "fixed 2"]["drafts"] <= 2.0
        assert by_name[batch, "fixed 2"]["tau"] > 1.5
    assert [row["batch"] for row in summary["goals"]] == [1, 3]
    assert summary["step_times"]["max_tokens"] == 12 and summary["step_times"]["measured_s"] > 0
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert [row["controller"] for row in rounds[:4]] == names
    assert [row["controller"] for row in rounds[8:12]] == [*names[1:], "off"], "rounds begin differently"
    assert (tmp_path / "run" / "plots" / "controllers.png").is_file()
    # A stopped run measures what is missing and keeps the rest.
    (tmp_path / "run" / "rounds.jsonl").write_text("\n".join(lines[:-1]) + '\n{"round": 1, "ba')
    (tmp_path / "run" / "summary.json").unlink()
    again = measure(tiny_llama_dir, tmp_path / "run")
    kept = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert kept[: len(lines) - 1] == lines[:-1] and len(kept) == len(lines) + 1
    assert again["cells"][0] == summary["cells"][0]


def test_another_drafter_and_given_times(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(step_times, "measure_step_times", None)
    times = ("speculation.step_tokens=[1,64]", "speculation.step_s=[1.0,1.1]")
    summary = measure(tiny_llama_dir, tmp_path / "run", "drafter=ngram", *times, "experiment.rounds=1")
    assert summary["step_times"] is None and len(summary["cells"]) == 8


def row(number: int, name: str, tok_per_s: float, drafts: float = 0.0) -> dict:
    return {"round": number, "batch": 2, "controller": name, "tok_per_s": tok_per_s, "drafts": drafts}


def test_the_goal_is_judged_within_rounds():
    rates = {"off": 10.0, "fixed 1": 12.0, "fixed 4": 11.0, "adaptive": 20.0, "goodput": 11.8}
    cells = [
        row(number, name, speed * rate, 1.5 if name == "goodput" else 0.0)
        for number, speed in enumerate((1.0, 3.0, 0.5))
        for name, rate in rates.items()
    ]
    assert control.goals(cells) == [
        {
            "batch": 2,
            "best": "fixed 1",
            "to_best": pytest.approx(11.8 / 12.0),
            "to_plain": pytest.approx(1.18),
            "drafts": 1.5,
            "goal": "met",
        }
    ]
    slower = [one | {"tok_per_s": 11.0} if one["controller"] == "goodput" else one for one in cells[:5]]
    assert control.goals(slower)[0]["goal"] == "missed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("drafter=none", "drafter=none drafts nothing to control"),
        ("speculation=adaptive", "speculation=adaptive is compared anyway"),
    ],
)
def test_what_cannot_be_compared_is_refused(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        control.controllers(build(override, experiment="control"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.batches=[0]", r"experiment\.batches=0"),
        ("experiment.fixed=[]", r"experiment\.fixed is empty"),
        ("experiment.rounds=0", r"experiment\.rounds=0"),
    ],
)
def test_options_out_of_range(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        build(override, experiment="control")


def with_goodput_of(name: str, rows: list[dict]) -> list[dict]:
    """The rows as if goodput had done what another controller did."""
    others = [one for one in rows if one["controller"] != "goodput"]
    return others + [one | {"controller": "goodput"} for one in others if one["controller"] == name]


def test_control_by_acceptance_drafts_into_the_loss_and_goodput_does_not():
    rows = acceptance_trap(users=(1, 128))
    claims = acceptance_claims(rows)
    assert len(claims) == 4 and all(claims.values())
    for name in ("adaptive", "off"):
        assert not all(acceptance_claims(with_goodput_of(name, rows)).values())


def test_a_count_says_nothing_of_contexts():
    rows = context_trap()
    claims = context_claims(rows)
    assert len(claims) == 4 and all(claims.values())
    for name in ("threshold above", "threshold below"):
        assert not all(context_claims(with_goodput_of(name, rows)).values())


def test_a_threshold_is_a_cliff():
    rows = cliff_trap(users=(32, 34))
    claims = cliff_claims(rows)
    assert len(claims) == 3 and all(claims.values())
    assert not all(cliff_claims(with_goodput_of("threshold 32", rows)).values())
