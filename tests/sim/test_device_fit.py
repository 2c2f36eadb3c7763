"""Fitting timed passes: curves that are known come back, and what the fit did not see is judged honestly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sim.cost_model import CostModel
from sim.curves import Curve, Operators
from sim.device_fit import achieved_rates, fit_device, fit_drafts, read_passes, whole_error
from sim.device_points import points_of, rising
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES
from sim.profiles.chips import chip_cost_model, draft_cost_model
from sim.step_features import StepFeatures

LAYERS = 30
NOISE = 0.01
TOLERANCE = 0.05
"""Of whole passes, from measurements with one per cent of noise and five rounds."""


def line(floor_s: float, each_s: float, most: float) -> Curve:
    sizes = (1.0, *(2.0**power for power in range(1, 30) if 2.0**power <= most))
    seconds = tuple(max(floor_s, each_s * size) for size in sizes)
    return Curve(x=sizes, seconds=seconds, relative_std=0.0, source="known")


TRUTH = Operators(
    dense=line(2e-4, 1e-5, 1024),
    decode_attention=line(1e-9, 2e-8, 2**20),
    prefill_attention=line(1e-9, 8e-9, 2**22),
    lm_head=line(3e-4, 4e-5, 1024),
    sampling=line(2e-5, 1e-5, 256),
    verify_pair_s=1.5e-8,
    overhead_s=2e-4,
    overhead_row_s=1e-5,
)
DENSE = [2.0**power for power in range(11)]


def seconds_of(kind: str, rows: float, tokens: float, context: float) -> float:
    """A pass of known operators, as a device that computes all alone would take it."""
    total, entries = rows * tokens, rows * (context + tokens)
    taken = LAYERS * TRUTH.dense(total).item()
    if kind == "head":
        taken += TRUTH.lm_head(total).item()
    if kind in ("decode", "verify", "tree"):
        read_s = TRUTH.decode_attention(entries).item()
        taken += LAYERS * max(read_s, TRUTH.verify_pair_s * tokens * entries if kind != "decode" else 0.0)
    if kind == "prefill":
        taken += LAYERS * TRUTH.prefill_attention(tokens * (context + 0.5 * (tokens + 1.0))).item()
    return taken


def measured(
    law: Callable[[str, float, float, float], float] = seconds_of, *, rounds: int = 5, noise: float = NOISE
) -> list[dict[str, Any]]:
    sizes = [("dense", total, 1.0, 0.0) for total in DENSE]
    sizes += [("head", total, 1.0, 0.0) for total in DENSE[:9]]
    contexts = (64.0, 256.0, 1024.0, 2048.0)
    sizes += [("decode", rows, 1.0, context) for rows in DENSE[:8] for context in contexts]
    sizes += [
        ("verify", rows, q, context)
        for rows in DENSE[:5]
        for q in (2.0, 4.0, 8.0, 16.0)
        for context in contexts
    ]
    sizes += [("tree", rows, nodes, 256.0) for rows in DENSE[:5] for nodes in (4.0, 16.0, 64.0)]
    sizes += [("prefill", 1.0, chunk, context) for chunk in DENSE[3:] for context in (0.0, *contexts)]
    rng = np.random.default_rng(0)
    return [
        {
            "kind": kind,
            "round": number,
            "rows": rows,
            "tokens": tokens,
            "context": context,
            "seconds": law(kind, rows, tokens, context) * float(np.exp(noise * rng.standard_normal())),
        }
        for number in range(rounds)
        for kind, rows, tokens, context in sizes
    ]


HOST = pl.DataFrame(
    [
        {
            "rows": rows,
            "sample_s": TRUTH.sampling(rows).item(),
            "overhead_s": TRUTH.overhead_s + TRUTH.overhead_row_s * rows,
            "verify_s": 0.0,
            "mean_context": 10.0,
        }
        for rows in DENSE[:7]
        for _ in range(3)
    ]
)
STEPS = [
    StepFeatures(
        rows * q + chunk, rows * q + 1.0, rows, rows * q, rows * context, chunk, chunk * 200.0, 0.0, 0.0, 0.0
    )
    for rows, q, context, chunk in (
        (3.0, 1.0, 300.0, 100.0),
        (11.0, 3.0, 500.0, 250.0),
        (40.0, 2.0, 90.0, 60.0),
    )
]


def steps(scale: float = 1.0) -> list[dict[str, Any]]:
    known = CostModel(TRUTH, num_layers=LAYERS)
    return [
        {"index": index, "seconds": scale * known.predict_scalar(step).verify_s, **step._asdict()}
        for index, step in enumerate(STEPS)
    ]


@pytest.fixture(scope="module")
def fit():
    return fit_device(read_passes(measured()), HOST, num_layers=LAYERS, source="known", mixed=steps())


def test_known_curves_come_back(fit):
    found = fit.operators
    sizes = np.array([1.0, 3.0, 20.0, 100.0, 700.0])
    np.testing.assert_allclose(found.dense(sizes), TRUTH.dense(sizes), rtol=TOLERANCE)
    rows = np.array([1.0, 5.0, 50.0, 200.0])
    near = 2 * NOISE * seconds_of("head", 1.0, 1.0, 0.0)  # of a small difference no more can be known
    np.testing.assert_allclose(found.lm_head(rows), TRUTH.lm_head(rows), rtol=2 * TOLERANCE, atol=near)
    np.testing.assert_allclose(found.sampling(rows[:3]), TRUTH.sampling(rows[:3]), rtol=0.15)
    entries = np.array([16_000.0, 60_000.0, 250_000.0])
    np.testing.assert_allclose(
        found.decode_attention(entries), TRUTH.decode_attention(entries), rtol=2 * TOLERANCE
    )
    pairs = np.array([2e5, 6e5, 2e6])
    shifted = found.prefill_attention(pairs + found.prefill_token_pairs * 512.0)
    np.testing.assert_allclose(shifted, TRUTH.prefill_attention(pairs), rtol=3 * TOLERANCE)
    assert found.verify_pair_s == pytest.approx(TRUTH.verify_pair_s, rel=2 * TOLERANCE)
    assert found.overhead_s == pytest.approx(TRUTH.overhead_s, rel=0.01)
    assert found.overhead_row_s == pytest.approx(TRUTH.overhead_row_s, rel=0.01)


def test_whole_steps_that_were_never_fitted_are_predicted(fit):
    assert fit.whole_error["median"] < TOLERANCE and fit.whole_error["num_points"] == 3
    wrong = fit_device(read_passes(measured()), HOST, num_layers=LAYERS, source="known", mixed=steps(1.5))
    assert wrong.whole_error["median"] > 0.2, "a device whose whole steps take longer must show"
    assert wrong.whole_error["bias"] == pytest.approx(fit.whole_error["bias"] - np.log(1.5), abs=1e-3)


def test_held_out_errors_are_small_where_the_form_is_right(fit):
    operators = {"dense", "lm_head", "decode_attention", "verification", "prefill_attention"}
    assert set(fit.held_out) == {*operators, "tree_verification"}
    for name, error in fit.held_out.items():
        assert error["pass_median"] < TOLERANCE, name
        assert 0.0 < error["spread"] < 3 * NOISE
    assert fit.held_out["decode_attention"]["median"] < 2 * TOLERANCE
    assert {row["operator"] for row in fit.table} == set(fit.held_out)


def test_a_device_of_another_form_is_found_out():
    """The time of decoding rows depends on what no curve of KV entries knows: how even their number is."""

    def odd(kind: str, rows: float, tokens: float, context: float) -> float:
        slow = 3.0 if kind == "decode" and np.log2(rows) % 2 == 1 else 1.0
        base = seconds_of("dense", rows, tokens, 0.0)
        return base + slow * (seconds_of(kind, rows, tokens, context) - base)

    bad = fit_device(read_passes(measured(odd)), HOST, num_layers=LAYERS, source="odd")
    assert bad.held_out["decode_attention"]["median"] > 0.2
    assert bad.operators.decode_attention.relative_std > 0.2
    assert bad.held_out["dense"]["pass_median"] < TOLERANCE, "the others are as good as before"


def test_noise_shows_as_spread():
    noisy = fit_device(read_passes(measured(noise=0.2)), HOST, num_layers=LAYERS, source="noisy")
    assert noisy.held_out["dense"]["spread"] > 0.1


def test_differences_are_taken_within_a_round():
    """A machine that is twice as slow in some rounds: the pairs keep the head's share."""
    rows = measured(noise=0.0, rounds=4)
    slowed = [row | {"seconds": row["seconds"] * (1.0 + row["round"] % 2)} for row in rows]
    points = points_of(read_passes(slowed), "head")
    np.testing.assert_allclose(points.added_s, 1.5 * TRUTH.lm_head(points.totals), rtol=1e-9)


def test_a_rising_curve_through_noise_around_zero():
    curve = rising(np.array([1.0, 2.0, 4.0, 8.0]), np.array([-1e-5, 1e-5, -2e-5, 1e-3]), np.ones(4), "noise")
    assert curve.seconds[0] == 1e-9 and curve.seconds[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("kind", "message"), [("dense", "'dense' was measured"), ("verify", "'verify' was measured")]
)
def test_what_was_not_measured_is_named(kind: str, message: str):
    rows = [row for row in measured(rounds=1) if row["kind"] != kind]
    with pytest.raises(ValueError, match=message):
        fit_device(read_passes(rows), HOST, num_layers=LAYERS, source="known")


def test_a_device_that_works_beside_the_host():
    """Only the sum of pass and sampling is known: the fitted pass is taken off."""
    model = CostModel(TRUTH, num_layers=LAYERS)
    waits = []
    for row in HOST.to_dicts():
        n = row["rows"]
        pass_s = model.predict_scalar(StepFeatures(n, n, n, n, n * 10.0, 0, 0, 0, 0, 0)).verify_s
        waits.append(row | {"sample_s": row["sample_s"] + 0.9 * pass_s + 1e-3, "verify_s": 0.1 * pass_s})
    passes = read_passes(measured(noise=0.0))
    found = fit_device(passes, pl.DataFrame(waits), num_layers=LAYERS, source="gpu", is_asynchronous=True)
    assert found.operators.sampling(64.0).item() == pytest.approx(TRUTH.sampling(64.0).item() + 1e-3, rel=0.1)


def test_what_drafting_takes():
    lookups = [{"rows": rows, "draft_s": 2e-6 * rows, "levels": 4, "is_model": False} for rows in (1, 8)]
    assert fit_drafts(lookups, "known") == {"draft_row_s": pytest.approx(2e-6)}
    passes = [{"rows": rows, "draft_s": 4e-3 * rows, "levels": 4, "is_model": True} for rows in (1, 8)]
    found = fit_drafts([*passes, {"prompt_tokens": 64, "seconds": 0.5}], "known")
    assert found["draft_step"](8.0).item() == pytest.approx(8e-3)
    assert found["draft_prefill"](64.0).item() == 0.5
    assert fit_drafts([], "known") == {}


def test_rates_are_read_off_the_curves(fit):
    rates = achieved_rates(fit.operators, layer_params=1e6, layer_bytes=2e6, kv_entry_bytes=768.0)
    assert rates["weight_bytes_per_s"] == pytest.approx(2e6 / 2e-4, rel=TOLERANCE)
    assert rates["flops_per_s"] == pytest.approx(2e6 / 1e-5, rel=TOLERANCE)
    assert rates["kv_bytes_per_s"] == pytest.approx(768.0 / 2e-8, rel=2 * TOLERANCE)
    assert whole_error([]) is None


def saved(folder: Path, **metadata: Any) -> Path:
    known = {"model": "smollm2-135m", "dtype": "bfloat16", "draft": None, "origin": "fitted: known"}
    CostModel(TRUTH, num_layers=LAYERS, metadata=known | metadata).save(folder)
    return folder


def test_a_saved_cost_model_is_the_timings_of_its_model(tmp_path):
    sheet = replace(load_hardware("h100"), timings=str(saved(tmp_path / "here")))
    model = chip_cost_model(sheet, MODEL_SHAPES["smollm2-135m"])
    step = STEPS[0]
    assert model.predict_scalar(step) == CostModel(TRUTH, num_layers=LAYERS).predict_scalar(step)
    assert model.metadata["origin"] == "fitted: known"
    for shape, options, message in (
        ("llama-3.2-1b", {}, "is of model 'smollm2-135m', not of 'llama-3.2-1b'"),
        ("smollm2-135m", {"tensor_parallel": 3}, "measured on one device, not on 3"),
        ("smollm2-135m", {"draft": MODEL_SHAPES["smollm2-135m"]}, "no times of the draft model"),
        ("smollm2-135m", {"dtype": "fp8"}, "measured in bfloat16, not in fp8"),
    ):
        with pytest.raises(ValueError, match=message):
            chip_cost_model(sheet, MODEL_SHAPES[shape], **options)
    with pytest.raises(ValueError, match="not of a draft model by itself"):
        draft_cost_model(sheet, MODEL_SHAPES["smollm2-135m"])
    with pytest.raises(ValueError, match=r"cost_model\.yaml as calibrate writes it"):
        replace(sheet, timings=str(tmp_path))
    with pytest.raises(ValueError, match="30 decoder layers"):
        chip_cost_model(
            replace(sheet, timings=str(saved(tmp_path / "other", model="llama-3.2-1b"))),
            MODEL_SHAPES["llama-3.2-1b"],
        )


def test_a_draft_models_curves_are_used_only_with_it(tmp_path):
    drafting = replace(TRUTH, draft_step=line(1e-3, 1e-4, 64), draft_prefill=line(1e-3, 1e-5, 1024))
    known = {"model": "smollm2-135m", "draft": "smollm2-135m"}
    CostModel(drafting, num_layers=LAYERS, metadata=known).save(tmp_path)
    sheet, shape = replace(load_hardware("h100"), timings=str(tmp_path)), MODEL_SHAPES["smollm2-135m"]
    assert chip_cost_model(sheet, shape, draft=shape).operators.draft_step is not None
    assert chip_cost_model(sheet, shape).operators.draft_step is None
