"""Cost of a token by chip, and what better techniques do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import economics
from experiments.assumed_acceptance import rate_of
from experiments.devices import mix_of
from experiments.economics import BASE, BATCHING, KV, ROUTING, SPECULATION, TECHNIQUES, WEIGHTS
from sim.hardware import load_hardware
from specdec.config import Config
from specdec.run import execute
from tests.test_configs import build

SLO = {"ttft_s": 1.0, "tpot_s": 0.05}


def configured(*overrides: str) -> Config:
    return build("tracking=disabled", "experiment.num_draws=5", *overrides, experiment="economics")


def costs(chip: str, *overrides: str) -> dict[str, float]:
    options: Any = configured(*overrides).experiment
    ways = economics.servings(options, load_hardware(chip), mix_of("conversation"), SLO)
    return {name: way.cost_usd(SLO) for name, way in ways.items()}


def test_every_technique_saves_but_none_more_than_its_own_gain():
    found = costs("h100")
    for name in TECHNIQUES:
        assert 1.0 <= found[BASE] / found[name] < 2.0, name


def test_a_technique_helps_where_its_resource_is_short():
    """The KV cache matters with few weights and many rows; the batch only where it was small."""
    narrow, wide = costs("h100", "experiment.max_rows=8"), costs("h100", "experiment.max_rows=128")
    assert narrow[BASE] / narrow[BATCHING] > wide[BASE] / wide[BATCHING]
    assert wide[BASE] / wide[KV] > narrow[BASE] / narrow[KV]
    assert narrow[BASE] / narrow[WEIGHTS] > wide[BASE] / wide[WEIGHTS]
    assert narrow[BASE] / narrow[SPECULATION] > wide[BASE] / wide[SPECULATION]


def test_routing_saves_less_when_the_small_model_fails_more():
    cheap, dear = costs("l40s", "experiment.escalation=0.0"), costs("l40s", "experiment.escalation=1.0")
    assert cheap[ROUTING] < dear[ROUTING]
    assert dear[ROUTING] > dear[BASE]  # all that the small model answers is asked again


def test_rates_give_the_tokens_that_were_asked_for():
    assert rate_of(2.0, 2) == pytest.approx(0.618, abs=1e-3)  # 1 + a + a² = 2


def test_a_run_leaves_rows_with_intervals_and_a_picture(tmp_path: Path):
    summary = execute(configured("experiment.chips=[h100,l40s]"), tmp_path, None)
    assert len(summary["rows"]) == 2 * len(TECHNIQUES)
    for row in summary["rows"]:
        assert row["cheaper_low"] <= row["cheaper"] <= row["cheaper_high"]
    assert (tmp_path / "plots" / "economics.png").exists()


def test_a_chip_without_a_price_is_refused(tmp_path: Path):
    sheet = tmp_path / "free.yaml"
    text = (Path("conf/hardware") / "h100.yaml").read_text()
    sheet.write_text("\n".join(line for line in text.splitlines() if not line.startswith("price_")))
    with pytest.raises(ValueError, match="price_per_hour_usd of h100 is null: give a copy"):
        execute(configured(f"experiment.chips=['{sheet}']"), tmp_path / "run", None)
