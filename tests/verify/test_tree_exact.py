"""Exact enumeration with rationals over all trees of up to five nodes: the joint law equals the target's.

The drafts of a rule are what it is made for: siblings drawn without replacement, or the draft's likeliest tokens for
"one_hot". The functions that decide are those of the engine, on object arrays of ``Fraction``.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from specdec.tree import Tree
from specdec.verify import CHAIN_RULES, TREE_RULES, verify_greedy_tree, verify_tree, verify_trees
from specdec.verify.base import Chains
from tests.verify.tree_laws import (
    ONE,
    SHAPES,
    all_shapes,
    build,
    draft_law,
    post_order,
    prefix_of,
    random_instance,
    step_law,
    target_law,
    top_children,
    vocabulary,
)

RULES = pytest.mark.parametrize("rule", TREE_RULES)


def drafts_of(rule: str, tree: Tree, instance) -> dict[tuple[int, ...], Fraction]:
    """Law of the drafts that ``rule`` is made for."""
    return {top_children(tree, instance): ONE} if rule == "one_hot" else draft_law(tree, instance)


def test_all_shapes_are_there():
    """Catalan numbers 1, 1, 2, 5, 14, 42, less those with a node of four or five children."""
    assert np.bincount([len(tree) for tree in SHAPES]).tolist() == [1, 1, 2, 5, 14 - 1, 42 - 6]
    assert np.bincount([len(tree) for tree in all_shapes(5, 5)]).tolist() == [1, 1, 2, 5, 14, 42]


@RULES
@pytest.mark.parametrize("size", range(6))
def test_joint_law_equals_the_target(rule, size):
    for seed, tree in itertools.product(range(2), [tree for tree in SHAPES if len(tree) == size]):
        for vocab_size in {2, vocabulary(tree)} if max(map(len, tree.children)) < 3 else {3}:
            instance = random_instance(1000 * seed + size, tree, vocab_size)
            law = step_law(TREE_RULES[rule], tree, instance, drafts_of(rule, tree, instance))
            assert law.emitted == target_law(instance, tree.max_depth + 1), (tree, seed, vocab_size)


def test_greedy_is_the_targets_own_continuation():
    for seed, tree in enumerate(SHAPES):
        instance = random_instance(seed, tree, 3)
        for tokens in list(draft_law(tree, instance))[:20]:
            prefixes = [prefix_of(tree, tokens, node) for node in range(-1, len(tree))]
            argmax = np.array([int(np.argmax(instance.target[prefix])) for prefix in prefixes])
            path, next_token = verify_greedy_tree(tree, np.array(tokens, np.int64), argmax)
            emitted = [*(tokens[node] for node in path), next_token]
            for place, token in enumerate(emitted):
                assert token == np.argmax(instance.target[tuple(emitted[:place])])
            # Nothing longer was on offer.
            last = path[-1] if path else -1
            assert all(tokens[child] != next_token for child in tree.children_of(last))


@pytest.mark.parametrize(("tree_rule", "chain_rule"), [("recursive", "token"), ("traversal", "block")])
def test_on_a_chain_tree_rules_are_the_chain_rules(tree_rule, chain_rule):
    rng = np.random.default_rng(0)
    for length, seed in itertools.product(range(1, 5), range(4)):
        tree = Tree.chain(length)
        instance = random_instance(seed, tree, 3)
        rows = list(draft_law(tree, instance))
        drafts = build(tree, instance, rows)
        num_drafts = np.full(len(rows), length)
        chains = Chains.build(drafts.target_probs, drafts.draft_probs[:, :-1], drafts.tokens, num_drafts)
        assert (TREE_RULES[tree_rule].thresholds(drafts) == CHAIN_RULES[chain_rule].thresholds(chains)).all()
        noise = rng.integers(0, 997, (len(rows), length + 1))
        uniforms = np.array([[Fraction(int(u), 997) for u in row] for row in noise], object)
        arguments = (tree, drafts.tokens, drafts.target_probs, drafts.draft_probs, uniforms)
        by_tree, by_chain = (verify_trees(rule, *arguments) for rule in (tree_rule, chain_rule))
        assert (by_tree[0] == by_chain[0]).all() and (by_tree[1] == by_chain[1]).all()


@RULES
def test_accept_is_defined_by_the_thresholds(rule):
    """Traversal: the first node in post-order with u < h. Else: step into the first child with u < h."""
    rng = np.random.default_rng(2)
    for seed, tree in enumerate(SHAPES):
        instance = random_instance(seed, tree, 3)
        rows = list(drafts_of(rule, tree, instance))[:10]
        drafts = build(tree, instance, rows)
        noise = rng.integers(0, 97, (len(rows), len(tree)))
        uniforms = np.array([Fraction(int(u), 97) for u in noise.ravel()], object).reshape(noise.shape)
        passed = uniforms < TREE_RULES[rule].thresholds(drafts)
        last = np.full(len(rows), -9)
        for stop in TREE_RULES[rule].accept(drafts, uniforms):
            last[stop.rows] = stop.node
        for row in range(len(rows)):
            if rule == "traversal":
                expected = next((node for node in post_order(tree) if passed[row, node]), -1)
            else:
                expected = walk_down(tree, passed[row])
            assert last[row] == expected


def walk_down(tree: Tree, passed: np.ndarray) -> int:
    node = -1
    while any(passed[child] for child in tree.children_of(node)):
        node = next(child for child in tree.children_of(node) if passed[child])
    return node


@RULES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_decisions_equal_exact_decisions(rule, dtype):
    """Away from the boundaries, float arrays and fractions accept the same path and draw the same token."""
    rng = np.random.default_rng(1)
    for seed, tree in enumerate(SHAPES[::2]):
        instance = random_instance(seed, tree, 3)
        rows = list(drafts_of(rule, tree, instance))
        for tokens in [rows[i] for i in rng.integers(0, len(rows), 4)]:
            drafts = build(tree, instance, [tokens])
            target, draft = drafts.target_probs[0], drafts.draft_probs[0]
            noise = rng.integers(0, 2**20, len(tree) + 1)
            uniforms = np.array([Fraction(2 * int(u) + 1, 2**21) for u in noise], object)
            exact = verify_tree(rule, tree, tokens, target, draft, uniforms)
            floats = verify_tree(
                rule, tree, tokens, target.astype(dtype), draft.astype(dtype), uniforms.astype(np.float64)
            )
            assert exact == floats
