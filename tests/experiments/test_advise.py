"""The answer agrees with the phase diagram, its intervals hold the point, and what is assumed is said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.advise import best_option, interval, verdict
from experiments.assumed_acceptance import TASKS, assumed_alpha, assumed_survival, rate_of
from experiments.devices import device_of, mix_of
from experiments.measured_acceptance import acceptance_of, from_run
from sim.closed_form import expected_tokens
from sim.speculative_step import Drafts, step_seconds
from specdec.config import Config
from specdec.run import execute
from tests.test_configs import build

SMALL = (
    "tracking=disabled",
    "experiment.num_draws=5",
    "experiment.lengths=fixed",
    "experiment.prompt_len=200",
    "experiment.output_len=64",
    "experiment.drafts=[eagle]",
)


def configured(*overrides: str) -> Config:
    return build(*SMALL, *overrides, experiment="advise")


def option(*overrides: str, rate: float = 4.0) -> Any:
    options = configured(*overrides).experiment
    draft = options.drafts[0]
    plain, fast = (device_of(options, "h100", options.model, name) for name in ("lookup", draft))
    return best_option(options, plain, fast, acceptance_of(options, draft), mix_of("fixed", 200, 64), rate)


def test_yes_with_a_good_draft_and_everything_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = execute(configured("experiment.alpha=0.8"), tmp_path, None)
    best = found["best"]
    assert found["speculate"] == "yes"
    assert best["gain_low"] <= best["gain"] <= best["gain_high"]
    assert best["break_even_low_per_s"] <= best["break_even_per_s"] <= best["break_even_high_per_s"]
    assert best["simulated"]["gain"] == pytest.approx(best["gain"], rel=0.15)
    page = (tmp_path / "advice.md").read_text()
    assert page.startswith("# Speculate? Yes: EAGLE-like head")
    for words in ("α = 0.8, given without a measurement", "+experiment=control", "modelled, not measured"):
        assert words in page
    assert "Speculate" in capsys.readouterr().out
    assert (tmp_path / "plots" / "load.png").exists()


def test_no_where_the_phase_diagram_is_below_one(tmp_path: Path):
    found = execute(configured("experiment.alpha=0.02"), tmp_path, None)
    assert found["speculate"] == "no"
    assert (tmp_path / "advice.md").read_text().startswith("# Speculate? No")
    options = configured().experiment
    device = device_of(options, "h100", options.model, "eagle")
    batch = max(1.0, round(found["plain"]["batch"]))
    ratios = [
        float(expected_tokens(0.02, k))
        * float(step_seconds(device.model, batch, 232))
        / float(step_seconds(device.model, batch, 232, Drafts.chain(k)))
        for k in range(1, 9)
    ]
    assert max(ratios) < 1.0


def test_gain_rises_with_acceptance_and_a_longer_draft_is_chosen():
    low, high = option("experiment.alpha=0.4"), option("experiment.alpha=0.9")
    assert low.gain < high.gain
    assert low.drafts.depth < high.drafts.depth


def test_a_load_above_the_capacity_is_no_gain():
    assert math.isnan(option("experiment.alpha=0.8", rate=1e5).gain)
    assert verdict(math.nan, math.nan, math.nan) == "overloaded"


def test_a_tree_is_chosen_where_second_candidates_are_good():
    ranks = "experiment.rank_rates=[0.4,0.25,0.15,0.1]"
    tree = option("experiment.alpha=0.4", ranks, rate=1.0)
    assert tree.is_tree and tree.drafts.nodes > tree.drafts.depth
    assert tree.gain > option("experiment.alpha=0.4", rate=1.0).gain


def test_verdicts_and_intervals():
    assert verdict(1.4, 1.1, 1.6) == "yes"
    assert verdict(1.1, 0.9, 1.4) == "measure first"
    assert verdict(0.9, 0.8, 1.1) == "no"
    low, high = interval(np.linspace(1.0, 2.0, 41), 1.5)
    assert (low, high) == (pytest.approx(1.05), pytest.approx(1.95))
    assert interval(np.array([1.0, 2.0]), 5.0) == (1.0, 5.0)


def test_more_judged_drafts_are_a_narrower_interval():
    rates = "experiment.rates=[0.8,0.7]"
    few, many = (
        acceptance_of(configured(rates, f"experiment.num_judged={num}").experiment, "eagle")
        for num in (20, 20_000)
    )
    assert few.tokens(2) == many.tokens(2) == pytest.approx(1 + 0.8 + 0.56)
    spreads = [
        np.std([each.drawn(np.random.default_rng(seed))[1] for seed in range(50)]) for each in (few, many)
    ]
    assert spreads[0] > 5 * spreads[1]


def test_a_recorded_run_gives_its_own_acceptance(tmp_path: Path):
    simulated = build(
        "tracking=disabled",
        "experiment.lengths=fixed",
        "experiment.prompt_len=20",
        "experiment.output_len=64",
        "experiment.num_requests=60",
        "experiment.trace_steps=true",
        "acceptance.alpha=0.6",
        "speculation.num_drafts=3",
        experiment="simulate",
    )
    execute(simulated, tmp_path / "run", None)
    found = from_run(tmp_path / "run", None, 4)
    assert not found.is_assumed
    assert found.survival[:2] == pytest.approx([0.6, 0.36], abs=0.05)
    assert "no position beyond 3 was measured" in found.notes[0]
    with pytest.raises(ValueError, match="has no traces"):
        from_run(tmp_path, None, 4)
    with pytest.raises(ValueError, match=r"experiment\.acceptance_name"):
        from_run(tmp_path / "run", "runn", 4)


def test_assumed_rates_are_those_of_the_published_tokens():
    assert float(expected_tokens(assumed_alpha("eagle", "maths"), 7)) == pytest.approx(5.30)
    assert assumed_alpha("lookup", "extraction") > assumed_alpha("lookup", "writing")
    mixed = assumed_survival("lookup", {"extraction": 1.0, "writing": 1.0}, 3)
    assert mixed[2] > mixed[0] ** 3  # easy tasks get farther
    assert assumed_survival("eagle", {}, 1)[0] == assumed_alpha("eagle", TASKS[0])
    with pytest.raises(ValueError, match="must be in"):
        rate_of(5.0, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("experiment.alpha=0.5", "experiment.drafts=[eagle,lookup]"), "acceptance of one way to draft"),
        (("experiment.alpha=0.5", "experiment.rates=[0.5]"), "comes from one of them"),
        (("experiment.lengths=code",), "needed with experiment.lengths=fixed"),
        (("+experiment.tasks={chta: 1}",), "did you mean chat"),
        (("experiment.rank_rates=[0.8,0.4]",), "sum to at most 1"),
        (("experiment.num_judged=5",), "is of experiment.rates"),
    ],
)
def test_wrong_options_name_value_and_remedy(overrides: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        configured(*overrides)


def test_a_profile_of_another_model_or_without_a_drafter_is_refused(tmp_path: Path):
    options = configured().experiment
    device_of(options, "h100", "llama-3.1-8b", "lookup").model.save(tmp_path / "profile")
    with pytest.raises(ValueError, match="has no times of a drafter"):
        execute(configured(f"experiment.profile={tmp_path / 'profile'}"), tmp_path / "a", None)
    other = (f"experiment.profile={tmp_path / 'profile'}", "experiment.model=llama-3.2-1b")
    with pytest.raises(ValueError, match=r"is of llama-3\.1-8b, not of"):
        execute(configured(*other), tmp_path / "b", None)
    ratio = (f"experiment.profile={tmp_path / 'profile'}", "experiment.draft_cost_ratio=0.05")
    sheet = (Path("conf/hardware") / "h100.yaml").read_text().replace("name: h100", "name: mine", 1)
    (tmp_path / "profile" / "hardware.yaml").write_text(sheet)
    found = execute(configured(*ratio), tmp_path / "c", None)
    assert (found["speculate"], found["chip"]) == ("yes", "mine")
