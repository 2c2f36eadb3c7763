"""Seconds by two sizes: exact where measured, monotone everywhere, the same for one step and for many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost_model import CostModel, roofline_cost_model, stack_features
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES
from sim.perturbation import perturbed
from sim.step_features import StepFeatures
from sim.surface import Surface

ROWS, CONTEXTS = (1.0, 4.0, 16.0), (16.0, 256.0, 1024.0)


def law(rows: float, context: float) -> float:
    """Bilinear, so that a surface has it exactly."""
    return 1e-5 + 1e-7 * rows + 2e-8 * context + 3e-9 * rows * context


def surface() -> Surface:
    points = [(rows, context, law(rows, context)) for rows in ROWS for context in CONTEXTS]
    return Surface.of(*np.array(points).T, source="test")


def model() -> CostModel:
    plain = roofline_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
    return CostModel(replace(plain.operators, decode_surface=surface()), num_layers=plain.num_layers)


def decoding(rows: int, context: int, chunk: int = 0) -> StepFeatures[float]:
    pairs = 0.5 * chunk * (chunk + 1.0)
    return StepFeatures(rows + chunk, rows, rows, rows, rows * context, chunk, pairs, 0, 0, 0)


@pytest.mark.parametrize(
    ("rows", "context"), [(1, 16), (4, 256), (2, 100), (10, 640), (16, 1024), (30, 2000)]
)
def test_a_bilinear_law_is_met_on_the_grid_between_and_beyond(rows: float, context: float):
    assert surface().at(rows, context) == pytest.approx(law(rows, context))


def test_below_the_grid_the_time_stays():
    assert surface().at(0.5, 3.0) == pytest.approx(law(1.0, 16.0))


@given(st.lists(st.floats(1e-6, 1.0), min_size=12, max_size=12))
def test_measured_points_become_a_surface_that_never_falls(seconds: list[float]):
    grid = [(rows, context) for rows in (1.0, 2.0, 8.0) for context in (1.0, 10.0, 11.0, 500.0)]
    found = Surface.of(*np.array(grid).T, seconds, source="test")
    values = np.array(found.seconds)
    assert (np.diff(values, axis=0) >= 0.0).all() and (np.diff(values, axis=1) >= 0.0).all()
    assert min(seconds) <= values.min() and values.max() <= max(seconds)


@pytest.mark.parametrize("missing", [(16.0, 1024.0), (4.0, 256.0), (1.0, 16.0)])
def test_a_point_that_is_missing_goes_on_as_its_neighbours_do(missing: tuple[float, float]):
    points = [(rows, context) for rows in ROWS for context in CONTEXTS if (rows, context) != missing]
    found = Surface.of(*np.array(points).T, [law(*point) for point in points], source="test")
    expected = law(4.0, 16.0) if missing == (1.0, 16.0) else law(*missing)
    assert found.at(*missing) == pytest.approx(expected)


def test_contexts_of_one_number_of_rows_are_left_out():
    points = [(rows, context) for rows in ROWS for context in CONTEXTS if rows == 1.0 or context < 1024.0]
    found = Surface.of(*np.array(points).T, np.full(len(points), 1e-3), source="test")
    assert found.rows == ROWS and found.contexts == CONTEXTS[:2]
    with pytest.raises(ValueError, match="measure more sizes"):
        Surface.of([1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [1e-3, 1e-3, 1e-3], source="test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (4.0, 1.0, 16.0)}, "increasing"),
        ({"contexts": (16.0, 256.0)}, "the grid is 3 × 2"),
        ({"seconds": ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 2.5))}, "decrease neither"),
        ({"seconds": ((0.0, 2.0, 3.0),) * 3}, "finite and > 0"),
    ],
)
def test_what_is_no_surface_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        replace(surface(), **changes)


def test_one_step_costs_what_it_does_among_many():
    cost_model = model()
    steps = [
        decoding(1, 20),
        decoding(7, 300),
        decoding(16, 900),
        decoding(12, 100, chunk=64),
        decoding(0, 0, chunk=64),
    ]
    together = cost_model.predict(stack_features(steps)).total_s
    np.testing.assert_allclose(
        together, [cost_model.predict_scalar(step).total_s for step in steps], rtol=1e-12
    )
    assert not cost_model.extrapolated


def test_far_beyond_the_grid_is_told_once_and_computed(caplog: pytest.LogCaptureFixture):
    cost_model = model()
    far = decoding(40, 900)
    alone = cost_model.predict_scalar(far).total_s
    assert cost_model.extrapolated == {"decode_surface": 40 * 901.0}
    assert (
        cost_model.predict_scalar(far).total_s
        == alone
        == cost_model.predict(stack_features([far])).total_s[0]
    )
    assert len([line for line in caplog.messages if "decode_surface" in line]) == 1


def test_attention_of_decoding_rows_is_the_surface():
    with_grid, without = model(), roofline_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
    step = decoding(7, 300)
    curve_s = float(without.operators.decode_attention([7 * 301.0])[0])
    added_s = with_grid.predict_scalar(step).total_s - without.predict_scalar(step).total_s
    assert added_s == pytest.approx(32 * (law(7, 301) - curve_s), rel=1e-6)


def test_a_saved_model_has_its_surface(tmp_path: Path):
    cost_model = model()
    cost_model.save(tmp_path)
    assert CostModel.load(tmp_path).operators == cost_model.operators


def test_another_cost_model_has_another_surface():
    cost_model = model()
    other = perturbed(cost_model, np.random.default_rng(0)).operators
    assert other.decode_surface and cost_model.operators.decode_surface
    factor = other.decode_attention.seconds[0] / cost_model.operators.decode_attention.seconds[0]
    assert factor != 1.0
    np.testing.assert_allclose(other.decode_surface.seconds, factor * np.array(surface().seconds))
