"""The dynamic program against brute force over all trees, and the choice of size and depth."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.tree import (
    Tree,
    best_expected_tokens,
    choose_tree,
    expected_tokens,
    k_ary,
    make_tree,
    sequoia_tree,
)


@functools.cache
def trees_of(size: int) -> list[Tree]:
    """One numbering of every ordered tree of ``size`` nodes."""
    found = {}
    for parents in itertools.product(*(range(-1, i) for i in range(size))):
        tree = Tree(parents)
        found.setdefault(frozenset(tuple(tree.ranks[tree.path(n)]) for n in range(size)), tree)
    return list(found.values())


def brute_force(rates, size: int, max_depth: int) -> float:
    trees = [tree for m in range(size + 1) for tree in trees_of(m) if tree.max_depth <= max_depth]
    return max(expected_tokens(tree, rates) for tree in trees)


def test_the_number_of_trees():
    assert [len(trees_of(size)) for size in range(7)] == [1, 1, 2, 5, 14, 42, 132]  # Catalan numbers


@st.composite
def rate_tables(draw):
    """Rates by rank, or by rank and depth; unsorted and sometimes 0."""
    ranks, depths = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    cell = st.one_of(st.just(0.0), st.floats(0.01, 1.0))
    rows = [draw(st.lists(cell, min_size=ranks, max_size=ranks)) for _ in range(max(depths, 1))]
    rows = [[value / max(1.0, sum(row)) for value in row] for row in rows]
    return rows if depths else rows[0]


@settings(max_examples=100, deadline=None)
@given(rates=rate_tables(), size=st.integers(0, 6), max_depth=st.integers(0, 5))
def test_the_program_equals_brute_force_and_its_own_tree(rates, size, max_depth):
    value = best_expected_tokens(rates, size, max_depth)[size]
    assert value == pytest.approx(brute_force(rates, size, max_depth), rel=1e-12)
    tree = sequoia_tree(rates, size, max_depth)
    assert len(tree) <= size and tree.max_depth <= max_depth
    assert expected_tokens(tree, rates) == pytest.approx(value, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(rates=rate_tables(), size=st.integers(0, 100), max_depth=st.integers(0, 8))
def test_large_trees_reach_their_value(rates, size, max_depth):
    values = best_expected_tokens(rates, size, max_depth)
    assert values.shape == (size + 1,) and values[0] == 1 and (np.diff(values) >= 0).all()
    tree = sequoia_tree(rates, size, max_depth)
    assert expected_tokens(tree, rates) == pytest.approx(values[size], rel=1e-12)


def test_expected_tokens_by_simulation():
    """Walk down: at each node at most one child is the accepted one, by rank and depth."""
    rates = np.array([[0.5, 0.3, 0.1], [0.4, 0.2, 0.2]])
    tree = Tree([-1, -1, 0, 0, 1, 2, 0])
    rng = np.random.default_rng(0)
    total, num_trials = 0, 20_000
    for draws in rng.random((num_trials, 2)):
        node = -1
        for depth, draw in enumerate(draws):
            total += 1
            rank = int(np.searchsorted(np.cumsum(rates[depth]), draw, side="right"))
            children = tree.children_of(node)
            if rank >= len(children):
                break
            node = children[rank]
        else:
            total += 1
    assert total / num_trials == pytest.approx(expected_tokens(tree, rates), abs=0.03)


def test_known_values():
    alpha, depth = 0.7, 5
    chain = sum(alpha**i for i in range(depth + 1))
    assert expected_tokens(Tree.chain(depth), [alpha]) == pytest.approx(chain)
    assert sequoia_tree([alpha], 9, depth) == Tree.chain(depth)
    assert expected_tokens(k_ary([2, 2]), [0.5, 0.25]) == pytest.approx(1 + 0.75 + 0.75**2)
    assert sequoia_tree([0.5, 0.0, 0.3], 3, 1) == Tree([-1, -1, -1])  # the way to rank 2 leads past rank 1
    assert sequoia_tree([0.5, 0.0], 5, 1) == Tree([-1])


def objective(rates, draft_s, verify_s, size: int, depth: int) -> float:
    return (depth * draft_s + verify_s(size)) / brute_force(rates, size, depth)


@pytest.mark.parametrize("draft_s", [0.0, 0.2, 1.0, 30.0])
@pytest.mark.parametrize(
    "verify_s", [lambda m: 5.0, lambda m: 5.0 + 0.4 * m, lambda m: 5.0 + 2.0 * (m >= 4), lambda m: 1.0 + m]
)
def test_the_choice_equals_brute_force_over_the_grid(draft_s, verify_s):
    rates, max_size, max_depth = [0.5, 0.2, 0.1], 6, 4
    choice = choose_tree(rates, draft_s, verify_s, max_size, max_depth)
    grid = {
        (m, d): objective(rates, draft_s, verify_s, m, d)
        for m in range(max_size + 1)
        for d in range(max_depth + 1)
    }
    assert choice.step_s / choice.tokens == pytest.approx(min(grid.values()), rel=1e-12)
    assert grid[choice.size, choice.depth] == pytest.approx(min(grid.values()), rel=1e-12)
    assert choice.tree == sequoia_tree(rates, choice.size, choice.depth)
    assert choice.step_s == pytest.approx(choice.depth * draft_s + verify_s(choice.size))
    assert expected_tokens(choice.tree, rates) == pytest.approx(choice.tokens)


def test_times_as_arrays_numbers_and_callables_agree():
    rates, sizes, depths = [0.6, 0.2], np.arange(11), np.arange(5)
    expected = choose_tree(rates, 0.5, lambda m: 3 + 0.1 * m, 10, 4)
    assert choose_tree(rates, 0.5 * depths, 3 + 0.1 * sizes, 10, 4) == expected
    assert choose_tree(rates, lambda d: 0.5 * d, (3 + 0.1 * sizes).tolist(), 10, 4) == expected
    assert choose_tree(rates, 100.0, 3.0, 10, 4).tree == Tree([])  # drafting that dear is not worth it


def test_bad_rates_and_times_are_named():
    for rates in ([0.7, 0.6], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="must be >= 0 and sum to at most 1"):
            make_tree({"name": "sequoia", "rates": rates, "size": 4, "max_depth": 2})
    with pytest.raises(ValueError, match="rates have shape"):
        sequoia_tree([], 4, 2)
    with pytest.raises(ValueError, match="size=-1"):
        sequoia_tree([0.5], -1, 2)
    with pytest.raises(ValueError, match="verify_s has 3 entries: give one for each of 0 to 4"):
        choose_tree([0.5], 1.0, [1, 2, 3], 4, 2)
    with pytest.raises(ValueError, match=r"verify_s=.* > 0"):
        choose_tree([0.5], 1.0, [0, 1, 2], 2, 2)
