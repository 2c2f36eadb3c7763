"""Expected accepted drafts by exact enumeration: traversal against recursive verification."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from specdec.tree import Tree
from specdec.verify import TREE_RULES
from tests.verify.tree_laws import (
    ONE,
    SHAPES,
    build,
    draft_law,
    post_order,
    random_instance,
    step_law,
    vocabulary,
)


def expected_by_walk(tree: Tree, thresholds) -> Fraction:
    """Expected accepted drafts when thresholds are chances given the parent and the earlier siblings' rejection."""
    reach, total = {-1: ONE}, Fraction(0)
    for node in range(-1, len(tree)):
        left = reach[node]
        for child in tree.children_of(node):
            reach[child] = left * thresholds[child]
            left -= reach[child]
            total += reach[child]
    return total


def expected_by_post_order(tree: Tree, thresholds) -> Fraction:
    left, total = ONE, Fraction(0)
    for node in post_order(tree):
        total += left * thresholds[node] * int(tree.depths[node])
        left *= 1 - thresholds[node]
    return total


def expected_lengths(tree: Tree, seed: int) -> dict[str, Fraction]:
    """Expected accepted drafts of recursive and traversal verification, from their thresholds."""
    instance = random_instance(seed, tree, vocabulary(tree))
    law = draft_law(tree, instance)
    drafts = build(tree, instance, list(law))
    return {
        rule: sum(
            weight * expected(tree, thresholds)
            for weight, thresholds in zip(law.values(), TREE_RULES[rule].thresholds(drafts), strict=True)
        )
        for rule, expected in (("recursive", expected_by_walk), ("traversal", expected_by_post_order))
    }


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_expected_lengths_from_thresholds(rule):
    for seed, tree in enumerate(SHAPES[4:16]):
        instance = random_instance(seed, tree, vocabulary(tree))
        law = step_law(TREE_RULES[rule], tree, instance, draft_law(tree, instance))
        assert law.num_accepted == expected_lengths(tree, seed)[rule]


def heights(tree: Tree) -> list[int]:
    """Nodes on the longest way from each node to a leaf below it."""
    values = [1] * (len(tree) + 1)
    for node in reversed(range(len(tree))):
        parent = tree.parents[node]
        values[parent] = max(values[parent], values[node] + 1)
    return values[:-1]


def later_sibling_is_deeper(tree: Tree) -> bool:
    """Below a node other than the root, some child has a deeper subtree than an earlier one."""
    height = heights(tree)
    return any(
        height[first] < height[second]
        for children in tree.children[1:]
        for first, second in itertools.pairwise(children)
    )


def test_traversal_accepts_at_least_as_many_as_recursive():
    gains = []
    for seed, tree in enumerate(tree for tree in SHAPES if not later_sibling_is_deeper(tree)):
        lengths = expected_lengths(tree, 500 + seed)
        gains.append(lengths["traversal"] - lengths["recursive"])
    assert min(gains) == 0 < max(gains)


def test_traversal_may_accept_fewer_where_a_later_sibling_is_deeper():
    """Accepting the earlier, shallow child more often leaves less of the target for the later, deep one."""
    shapes = [tree for tree in SHAPES if later_sibling_is_deeper(tree)]
    assert Tree([-1, 0, 0, 2]) in shapes
    gains = [
        lengths["traversal"] - lengths["recursive"]
        for tree in shapes
        for lengths in (expected_lengths(tree, seed) for seed in range(3))
    ]
    assert min(gains) < 0 < max(gains)
