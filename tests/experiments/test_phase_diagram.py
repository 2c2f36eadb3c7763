"""Where speculation pays: what must hold on any chip, and what the run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.phase_diagram import Panel, make_panel
from sim.speculative_step import Drafts, step_seconds
from specdec.config_extrapolation import DRAFT_KINDS, MIXES, TASKS
from specdec.run import execute
from tests.test_configs import build

ALPHAS = np.linspace(0.0, 0.95, 12)


def panel(chip: str = "h100", draft: str = "eagle", context: int = 512, **options: Any) -> Panel:
    overrides = [f"experiment.{name}={value}" for name, value in options.items()]
    config = build(*overrides, experiment="phase_diagram")
    return make_panel(config.experiment, chip, "llama-3.1-8b", context, draft)


def test_speedup_rises_with_acceptance_and_falls_with_batch():
    drawn = panel(batches="[1,16,128,256]")
    gains = drawn.best(ALPHAS)[0]
    assert np.all(np.diff(gains, axis=0) > 0.0)
    fixed = drawn.speedups(ALPHAS)[7]  # eight drafts: enough to be bound by computing in large batches
    assert np.all(fixed[:, 0] > fixed[:, 2]) and np.all(fixed[:, 2] > fixed[:, 3])


def test_speedup_is_tokens_times_the_ratio_of_steps():
    drawn = panel(batches="[4,8]")
    model = drawn.device.model
    plain, fast = (float(step_seconds(model, 8, 512, Drafts.chain(k))) for k in (0, 2))
    expected = (1.0 + 0.5 + 0.25) * plain / fast
    assert drawn.speedups(np.array([0.5]))[1, 0, 1] == pytest.approx(expected)


def test_break_even_exists_and_divides_gain_from_loss():
    drawn = panel(batches="[1,8,64]")
    for k, even in ((None, drawn.break_even()), (4, drawn.break_even(4))):
        assert np.all((even > 0.0) & (even < 1.0))
        for index, alpha in enumerate(even):
            around = np.array([max(alpha - 0.02, 0.0), alpha + 0.02])
            gains = drawn.best(around)[0] if k is None else drawn.speedups(around)[k - 1]
            assert gains[0, index] < 1.0 <= gains[1, index]
    assert np.all(drawn.break_even() <= drawn.break_even(4))


def test_a_free_draft_pays_sooner_and_none_at_no_acceptance():
    eagle, lookup = panel(draft="eagle"), panel(draft="lookup")
    both = np.isfinite(eagle.step_s[0])
    assert np.all(lookup.break_even()[both] <= eagle.break_even()[both])
    assert np.nanmax(eagle.best(np.array([0.0]))[0]) < 1.0


def test_what_does_not_fit_is_blank_and_large_chips_hold_more():
    small, large = panel("rtx_4090", context=4096), panel("b200", context=4096)
    assert small.max_batch < large.max_batch
    assert np.isnan(small.step_s[0, small.batches > small.max_batch]).all()
    assert np.isfinite(small.step_s[0, small.batches <= small.max_batch]).all()


def test_a_small_run_leaves_table_picture_and_summary(tmp_path: Path):
    config = build(
        "tracking=disabled",
        "experiment.chips=[h100,rtx_4090]",
        "experiment.models=[llama-3.1-8b]",
        "experiment.contexts=[512]",
        "experiment.batches=[1,8,64]",
        experiment="phase_diagram",
    )
    summary = execute(config, tmp_path, None)
    assert [(row["chip"], row["draft"]) for row in summary["panels"]] == [
        (chip, draft) for chip in ("h100", "rtx_4090") for draft in ("eagle", "lookup")
    ]
    assert (tmp_path / "plots" / "phase_diagram.png").stat().st_size > 10_000
    cells = json.loads((tmp_path / "tables" / "speedups.json").read_text())
    assert {cell["batch"] for cell in cells if cell["chip"] == "h100"} == {1, 8, 64}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.chips=[h101]", "did you mean h100"),
        ("experiment.drafts=[eagel]", "eagle"),
        ("experiment.batches=[8,1]", "must rise"),
        ("experiment.alphas=[0.5,1.5]", "must lie in"),
        ("experiment.models=[]", "is empty"),
    ],
)
def test_wrong_options_name_value_and_remedy(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        build(override, experiment="phase_diagram")


def test_a_model_that_fits_nowhere_is_refused():
    config = build("experiment.tensor_parallel=1", experiment="phase_diagram")
    with pytest.raises(ValueError, match=r"llama-3\.1-70b.* does not run on 1 × rtx_4090"):
        make_panel(config.experiment, "rtx_4090", "llama-3.1-70b", 512, "lookup")


def test_names_are_those_of_the_code():
    from experiments.assumed_acceptance import TASKS as KNOWN
    from sim.speculative_step import DRAFT_KINDS as KINDS
    from specdec.workload import AZURE_SERVICES

    assert set(DRAFT_KINDS) == set(KINDS)
    assert set(TASKS) == set(KNOWN)
    assert set(MIXES) == {*AZURE_SERVICES, "fixed"}
