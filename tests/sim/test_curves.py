"""Curves between, below and beyond their points, and fitting them to noisy, falling and broken measurements."""

from __future__ import annotations

import numpy as np
import pytest

from sim.curves import Curve, fit_curve


def made_of(*points: tuple[float, float]) -> Curve:
    x, seconds = zip(*points, strict=True)
    return Curve(x=x, seconds=seconds, relative_std=0.0, source="made up")


def test_a_curve_between_and_beyond_its_points():
    line = made_of((2, 1.0), (4, 2.0), (8, 2.0), (16, 6.0))
    assert line([0, 1, 2, 3, 6, 8, 12, 16]).tolist() == [0.0, 1.0, 1.0, 1.5, 2.0, 2.0, 4.0, 6.0]
    assert line(24) == 6.0 + 8 * (6.0 - 2.0) / 8  # the slope of the last half, from 8 to 16
    assert made_of((5, 2.0))([1, 5, 10]).tolist() == [2.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(2, 1.0), (1, 2.0)], "must be finite, > 0 and increasing"),
        ([(0, 1.0), (1, 2.0)], "must be finite, > 0 and increasing"),
        ([(1, 2.0), (2, 1.0)], "must be finite, > 0 and not decreasing"),
        ([(1, float("nan"))], "must be finite, > 0 and not decreasing"),
    ],
)
def test_what_is_not_a_curve(points: list[tuple[float, float]], message: str):
    with pytest.raises(ValueError, match=message):
        made_of(*points)


@pytest.mark.parametrize("repeats", [1, 7])
def test_fitting_finds_the_curve_and_the_spread(repeats: int):
    rng = np.random.default_rng(1)
    sizes = np.repeat(np.unique(np.geomspace(1, 4_096, 400).round()), repeats)
    truth = np.maximum(1e-3, 4e-6 * sizes)
    fitted = fit_curve(sizes, truth * np.exp(0.05 * rng.standard_normal(sizes.size)), source="synthetic")
    assert (fitted.x[0], fitted.x[-1], len(fitted.x)) == (1.0, 4_096.0, pytest.approx(32, abs=3))
    inner = sizes[(sizes > 1) & (sizes < 4_096)]
    np.testing.assert_allclose(fitted(inner), np.maximum(1e-3, 4e-6 * inner), rtol=0.1)
    assert fitted.relative_std == pytest.approx(0.05, rel=0.15)


def test_fitting_clean_points_keeps_them():
    fitted = fit_curve([4, 1, 2, 2], [3.0, 1.0, 2.0, 2.0], source="clean")
    assert (fitted.x, fitted.relative_std) == ((1.0, 2.0, 4.0), pytest.approx(0.0, abs=1e-12))
    np.testing.assert_allclose(fitted.seconds, [1.0, 2.0, 3.0], rtol=1e-12)


def test_fitting_makes_a_dip_flat():
    fitted = fit_curve([1, 2, 3, 4], [1.0, 4.0, 2.0, 8.0], source="dip")
    np.testing.assert_allclose(fitted.seconds, [1.0, np.sqrt(8.0), np.sqrt(8.0), 8.0], rtol=1e-12)
    assert fitted.relative_std == pytest.approx(np.sqrt(2 * np.log(np.sqrt(2.0)) ** 2 / 4), rel=1e-12)


@pytest.mark.parametrize(
    ("x", "seconds", "message"),
    [
        ([], [], "at least one"),
        ([1.0], [1.0, 2.0], "as many sizes as seconds"),
        ([1.0, 0.0], [1.0, 1.0], "x has 0.0"),
        ([1.0, 2.0], [1.0, float("nan")], "seconds has nan"),
    ],
)
def test_points_that_cannot_be_fitted(x: list[float], seconds: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        fit_curve(x, seconds, source="broken")
    with pytest.raises(ValueError, match="max_points=2 must be >= 3"):
        fit_curve([1.0], [1.0], source="few", max_points=2)
