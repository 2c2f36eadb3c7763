"""The formulas against exact rationals, each other and hand-computed values."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.closed_form import (
    best_k,
    beta_survival,
    expected_tokens,
    expected_tokens_beta,
    expected_tokens_from_rates,
    expected_tokens_of_tree,
    k_ary_tree,
    speedup,
    tree_from_paths,
    tree_survival,
)


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


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8))
def test_beta_tokens_are_the_fraction(a: int, b: int, k: int):
    terms, exact = [Fraction(1)], Fraction(1)
    for i in range(k):
        terms.append(terms[-1] * Fraction(a + i, a + b + i))
        exact += terms[-1]
    assert expected_tokens_beta(a / (a + b), a + b, k) == pytest.approx(float(exact), rel=1e-12)
    np.testing.assert_allclose(beta_survival(a / (a + b), a + b, k), [float(term) for term in terms[1:]])


def test_beta_survival_is_the_integral():
    alphas = (np.arange(100_000) + 0.5) / 100_000
    density = 12 * alphas**2 * (1 - alphas)  # Beta(3, 2)
    integrals = [(density * alphas**j).mean() for j in range(1, 6)]
    np.testing.assert_allclose(beta_survival(0.6, 5.0, 5), integrals, rtol=1e-8)


def test_beta_broadcasts_and_tends_to_constants():
    table = expected_tokens_beta([[0.5], [0.9]], 2.0, [0, 1, 3])
    assert table.shape == (2, 3)
    assert table[0].tolist() == pytest.approx(
        [1.0, 1.5, 1 + 1 / 2 + 1 / 3 + 1 / 4]
    )  # α uniform: E[α^j] = 1/(j+1)
    assert (table[:, 2] > expected_tokens([0.5, 0.9], 3)).all()
    assert expected_tokens_beta(0.8, 1e12, 4) == pytest.approx(float(expected_tokens(0.8, 4)))
    assert expected_tokens_beta(0.8, 1e-12, 4) == pytest.approx(0.2 * 1 + 0.8 * 5)  # all or nothing
    assert expected_tokens_beta([0.0, 1.0], 3.0, 4).tolist() == [1.0, 5.0]


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(0, 33), min_size=3, max_size=3).map(sorted))
def test_a_k_ary_tree_is_a_chain_of_the_summed_rates(arity: int, depth: int, percents: list[int]):
    rates = [percent / 100 for percent in reversed(percents)]
    tree = k_ary_tree(arity, depth)
    assert len(tree[0]) == sum(arity**level for level in range(1, depth + 1))
    chain = expected_tokens(sum(rates[:arity]), depth)
    assert expected_tokens_of_tree(*tree, rates) == pytest.approx(float(chain), rel=1e-12)


def test_a_tree_by_hand():
    parents, ranks = tree_from_paths([[0], [0, 1], [1], [0, 0], [1, 0], [0, 0, 2]])
    assert list(zip(parents, ranks, strict=True)) == [(-1, 0), (-1, 1), (0, 0), (0, 1), (1, 0), (2, 2)]
    levels = [0.5 + 0.3, 0.25 + 0.15 + 0.15, 0.25 * 0.1]
    np.testing.assert_allclose(tree_survival(parents, ranks, [0.5, 0.3, 0.1]), levels)
    assert expected_tokens_of_tree(parents, ranks, [0.5, 0.3, 0.1]) == pytest.approx(1 + sum(levels))
    assert expected_tokens_of_tree([], [], [0.5]) == 1.0


def test_rates_that_round_above_one_keep_survival_in_order():
    survival = tree_survival(*k_ary_tree(3, 5), [0.7, 0.2, 0.1 + 1e-12])
    assert (survival <= 1.0).all() and (np.diff(survival) <= 0.0).all()


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


def test_beta_bad_input():
    with pytest.raises(ValueError, match=r"mean=1\.5 must be in \[0, 1\]"):
        expected_tokens_beta(1.5, 2.0, 3)
    for concentration in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"concentration=.* must be finite and > 0"):
            beta_survival(0.5, concentration, 3)


@pytest.mark.parametrize(
    ("parents", "ranks", "rates", "message"),
    [
        ([-1, -1], [0, 1], [0.8, 0.3], "sum <= 1"),
        ([-1], [0], [1.2], r"rank_rates=\[1\.2\] must be in"),
        ([-1, 1], [0, 0], [0.5], "node 1 has parent 1"),
        ([-2], [0], [0.5], "node 0 has parent -2"),
        ([-1], [1], [0.5], "node 0 has rank 1, but rank_rates has 1 entries"),
        ([-1, 0, 0], [0, 0, 0], [0.5], "node 2 has the rank 0 of another child of node 0"),
        ([-1, 0], [0], [0.5], "2 parents and 1 ranks"),
    ],
)
def test_broken_trees(parents: list[int], ranks: list[int], rates: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        expected_tokens_of_tree(parents, ranks, rates)


def test_broken_tree_shapes():
    with pytest.raises(ValueError, match="arity=2 and depth=0 must be >= 1"):
        k_ary_tree(2, 0)
    with pytest.raises(ValueError, match="more than 65536 nodes"):
        k_ary_tree(10**9, 10**9)
    for paths in ([[]], [[0], [1, 0]]):
        with pytest.raises(ValueError, match="needs its parent"):
            tree_from_paths(paths)


def test_speedup_bad_input():
    with pytest.raises(ValueError, match=r"expected_tokens=0\.5"):
        speedup(0.5, 1.0, 0.0, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"t_draft_s=-0\.1"):
        speedup(2.0, 1.0, -0.1, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="give measured times"):
        speedup(2.0, 0.0, 0.1, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="t_verify_s has shape"):
        best_k(0.5, t_ar_s=1.0, t_draft_s=0.1, t_verify_s=[])
