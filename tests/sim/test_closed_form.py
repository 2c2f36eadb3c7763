"""The formulas against exact rationals, each other and hand-computed values."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.closed_form import best_k, expected_tokens, expected_tokens_from_rates, speedup


@given(st.integers(0, 99), st.integers(0, 12))
def test_expected_tokens_is_the_fraction(percent: int, k: int):
    alpha = Fraction(percent, 100)
    exact = (1 - alpha ** (k + 1)) / (1 - alpha)
    assert expected_tokens(percent / 100, k) == pytest.approx(float(exact), rel=1e-12)


def test_expected_tokens_at_the_ends():
    assert expected_tokens(1.0, 7) == 8.0
    assert expected_tokens(0.0, 7) == 1.0
    assert expected_tokens(1.0 - 1e-12, 7) == pytest.approx(8.0, rel=1e-11)


def test_expected_tokens_broadcasts():
    table = expected_tokens([[0.5], [1.0]], [0, 1, 2])
    np.testing.assert_allclose(table, [[1.0, 1.5, 1.75], [1.0, 2.0, 3.0]])


@given(st.floats(0.0, 1.0), st.integers(0, 10))
def test_equal_rates_give_the_same(alpha: float, k: int):
    assert expected_tokens_from_rates([alpha] * k) == pytest.approx(float(expected_tokens(alpha, k)))


def test_expected_tokens_from_rates_by_hand():
    assert expected_tokens_from_rates([0.5, 0.8]) == pytest.approx(1 + 0.5 + 0.4)
    np.testing.assert_allclose(expected_tokens_from_rates([[0.5, 0.8], [1.0, 0.0]]), [1.9, 2.0])


def test_expected_tokens_matches_simulated_drafts():
    rng = np.random.default_rng(3)
    accepted = np.cumprod(rng.random((200_000, 5)) < 0.7, axis=1).sum(axis=1)
    assert expected_tokens(0.7, 5) == pytest.approx((accepted + 1).mean(), rel=5e-3)


def test_speedup_is_leviathans_theorem():
    alpha, k, cost = 0.8, 5, 0.05
    paper = (1 - alpha ** (k + 1)) / ((1 - alpha) * (k * cost + 1))
    ours = speedup(
        expected_tokens(alpha, k), t_ar_s=2.0, t_draft_s=0.1, t_verify_s=2.0, t_overhead_s=0.0, k=k
    )
    assert ours == pytest.approx(paper)


def test_best_k_finds_the_maximum_behind_a_plateau():
    # Up to k = 2 verifying is as slow as for k = 6: a search that stops at the first fall would say 0.
    verify_s = [0.010, 0.030, 0.030, 0.030, 0.030, 0.030, 0.030, 0.060]
    k, gain = best_k([0.0, 0.95, 1.0], t_ar_s=0.010, t_draft_s=0.0, t_verify_s=verify_s)
    assert k.tolist() == [0, 6, 6]
    np.testing.assert_allclose(gain, [1.0, expected_tokens(0.95, 6) / 3, 7 / 3])


def test_best_k_of_a_scalar():
    k, gain = best_k(0.8, t_ar_s=0.02, t_draft_s=0.001, t_verify_s=[0.02, 0.021, 0.021, 0.022, 0.03])
    assert (int(k), float(gain)) == (3, pytest.approx(2.952 * 0.02 / 0.025))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_the_unit_interval(alpha: float):
    with pytest.raises(ValueError, match=r"alpha=.* must be in \[0, 1\]"):
        expected_tokens(alpha, 4)
    with pytest.raises(ValueError, match=r"conditional_rates=.* must be in \[0, 1\]"):
        expected_tokens_from_rates([0.5, alpha])


@pytest.mark.parametrize("k", [-1, 2.5, float("inf")])
def test_k_must_count(k: float):
    with pytest.raises(ValueError, match=r"k=.* must be an integer >= 0"):
        expected_tokens(0.5, k)


def test_speedup_bad_input():
    with pytest.raises(ValueError, match=r"expected_tokens=0\.5"):
        speedup(0.5, 1.0, 0.0, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"t_draft_s=-0\.1"):
        speedup(2.0, 1.0, -0.1, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="give measured times"):
        speedup(2.0, 0.0, 0.1, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="t_verify_s has shape"):
        best_k(0.5, t_ar_s=1.0, t_draft_s=0.1, t_verify_s=[])
