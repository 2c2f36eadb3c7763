"""``verify``, ``verify_tree`` and ``verify_trees``: guards, invariants, and agreement between rules in floats."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.tree import Tree
from specdec.verify import (
    RULES,
    TREE_RULES,
    descend,
    verify,
    verify_chains,
    verify_greedy_tree,
    verify_greedy_trees,
    verify_tree,
    verify_trees,
)

SAMPLED = ["recursive", "traversal"]
NEEDS_NO_CHAIN = ["greedy", *TREE_RULES]


def random_drafts(seed: int, tree: Tree, vocab_size: int, num_rows: int = 1, sparsity: float = 0.3):
    """Tokens drawn without replacement, float32 laws with zeros, and uniforms [num_rows, n + 1]."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, len(tree) + 1, vocab_size)

    def laws(least: int) -> np.ndarray:
        weights = rng.exponential(size=shape) ** 2
        weights *= rng.random(shape) > sparsity
        kept = rng.permuted(np.broadcast_to(np.arange(vocab_size), shape), axis=-1)[..., :least]
        np.put_along_axis(weights, kept, 0.2, axis=-1)
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    target, draft = laws(1), laws(max(1, *map(len, tree.children)))
    order = np.argsort(-np.where(draft > 0, rng.random(shape), -1.0), axis=-1)
    tokens = order[:, np.array(tree.parents, int) + 1, tree.ranks]
    return tokens, target, draft, rng.random((num_rows, len(tree) + 1))


@st.composite
def trees(draw):
    size = draw(st.integers(0, 9))
    return Tree([draw(st.integers(max(-1, i - 4), i - 1)) for i in range(size)])


@settings(max_examples=150, deadline=None)
@given(
    tree=trees(),
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([10, 300]),
    sparsity=st.sampled_from([0.3, 0.97]),
    exact=st.booleans(),
)
def test_descending_is_one_hot_verification_and_looks_at_visited_nodes_only(
    tree, seed, vocab_size, sparsity, exact
):
    tokens, target, _, uniforms = (
        values[0] for values in random_drafts(seed, tree, vocab_size, sparsity=sparsity)
    )
    if exact:
        target = np.array(
            [[Fraction(int(p * 2**12)) + (i == 0) for i, p in enumerate(law)] for law in target]
        )
        target = np.array([law / sum(law) for law in target])
    seen: list[int] = []

    def law_at(entry: int) -> np.ndarray:
        seen.append(entry)
        return target[entry]

    path, next_token = descend(tree.parents, tokens.tolist(), law_at, uniforms)
    assert (path, next_token) == verify_tree("one_hot", tree, tokens, target, None, uniforms)
    assert seen == [0, *(node + 1 for node in path)]


def test_descending_refuses_twins_and_nan():
    law = np.full((3, 4), 0.25, np.float32)
    with pytest.raises(ValueError, match="node 1 repeats token 2"):
        descend([-1, -1], [2, 2], law.__getitem__, np.array([0.9, 0.9, 0.5]))
    law[0, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        descend([-1], [1], law.__getitem__, np.array([0.9, 0.5]))


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(NEEDS_NO_CHAIN),
    tree=trees(),
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([10, 17, 300]),
)
def test_invariants(rule, tree, seed, vocab_size):
    tokens, target, draft, uniforms = (values[0] for values in random_drafts(seed, tree, vocab_size))
    draft[[leaf + 1 for leaf in tree.leaves]] = np.nan  # never read
    path, next_token = verify_tree(rule, tree, tokens, target, draft, uniforms)
    assert isinstance(path, list) and isinstance(next_token, int)
    assert path == tree.path(path[-1] if path else -1)
    entries = [0, *(node + 1 for node in path)]
    for entry, token in zip(entries, [*tokens[path], next_token], strict=True):
        assert target[entry, token] > 0
        if rule == "greedy":
            assert token == target[entry].argmax()
    if rule in ("one_hot", "greedy"):
        children = tree.children_of(path[-1] if path else -1)
        assert next_token not in tokens[list(children)]


@pytest.mark.parametrize("rule", TREE_RULES)
def test_rows_do_not_depend_on_the_batch(rule):
    tree = Tree([-1, -1, 0, 0, 1, 2, 2, -1])
    arrays = random_drafts(3, tree, 9, num_rows=40)
    last, next_token = verify_trees(rule, tree, *arrays)
    assert last.dtype == next_token.dtype == np.int64 and np.unique(last).size > 3
    for row in range(40):
        alone = verify_tree(rule, tree, *(values[row] for values in arrays))
        assert alone == (tree.path(last[row]), next_token[row])


@pytest.mark.parametrize("rule", TREE_RULES)
def test_no_rows(rule):
    tree = Tree([-1, -1, 0])
    last, next_token = verify_trees(rule, tree, *(values[:0] for values in random_drafts(0, tree, 9, 2)))
    assert last.shape == next_token.shape == (0,)


def test_a_tree_without_nodes_samples_from_the_target():
    for rule in RULES:
        probs = np.array([[0.0, 0.25, 0.75]])
        assert verify_tree(rule, Tree([]), [], probs, probs, np.array([0.5])) == ([], 2)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_modified(rule):
    tree = Tree.chain(4) if rule in ("token", "block") else Tree([-1, -1, 0, 0])
    for seed in range(20):
        arrays = [values[0] for values in random_drafts(seed, tree, 30)]
        copies = [values.copy() for values in arrays]
        verify_tree(rule, tree, *arrays)
        assert all((a == b).all() for a, b in zip(arrays, copies, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_noise_comes_from_the_generator(rule):
    """n + 1 uniforms whatever the rule, so that steps stay aligned."""
    tree = Tree.chain(3)
    tokens, target, draft, _ = (values[0] for values in random_drafts(0, tree, 30))
    generator, same = np.random.default_rng(5), np.random.default_rng(5)
    result = verify(rule, tree, tokens.tolist(), target, draft, generator)
    assert result == verify_tree(rule, tree, tokens, target, draft, same.random(4))
    assert generator.random() == same.random()


@pytest.mark.parametrize("rule", ["greedy", "one_hot"])
def test_draft_probs_are_ignored_where_children_are_deterministic(rule):
    tree = Tree([-1, -1, 0])
    for seed in range(20):
        tokens, target, draft, uniforms = (values[0] for values in random_drafts(seed, tree, 12))
        for other in (None, np.full_like(draft, np.nan)):
            assert verify_tree(rule, tree, tokens, target, other, uniforms) == verify_tree(
                rule, tree, tokens, target, draft, uniforms
            )


@pytest.mark.parametrize(("tree_rule", "chain_rule"), [("recursive", "token"), ("traversal", "block")])
def test_chains_agree_in_floats(tree_rule, chain_rule):
    tree = Tree.chain(5)
    tokens, target, draft, uniforms = random_drafts(1, tree, 200, num_rows=500)
    by_tree = verify_trees(tree_rule, tree, tokens, target, draft, uniforms)
    by_chain = verify_trees(chain_rule, tree, tokens, target, draft, uniforms)
    assert (by_tree[0] == by_chain[0]).mean() > 0.99  # roundings differ: a boundary may move
    num_accepted, next_token = verify_chains(
        chain_rule, target, draft[:, :-1], tokens, np.full(500, 5), uniforms[:, :-1], uniforms[:, -1]
    )
    assert (by_chain[0] + 1 == num_accepted).all() and (by_chain[1] == next_token).all()


@pytest.mark.parametrize("chain_rule", ["token", "block"])
def test_one_hot_on_a_chain_is_the_chain_rule_of_deterministic_drafts(chain_rule):
    tree = Tree.chain(3)
    tokens, target, _, uniforms = random_drafts(2, tree, 9, num_rows=300)
    chain = verify_trees(chain_rule, tree, tokens, target, None, uniforms)
    one_hot = verify_trees("one_hot", tree, tokens, target, None, uniforms)
    if chain_rule == "token":
        assert (chain[0] == one_hot[0]).all() and (chain[1] == one_hot[1]).all()
    else:
        assert chain[0].mean() > one_hot[0].mean() - 0.1


@pytest.mark.parametrize("rule", SAMPLED)
def test_equal_distributions_accept_to_a_leaf(rule):
    tree = Tree([-1, -1, 0, 0, 2])
    tokens, target, _, uniforms = random_drafts(7, tree, 50, num_rows=100)
    tokens, *_ = random_drafts(7, tree, 50, num_rows=100)
    draft = target
    order = np.argsort(-draft, axis=-1)
    tokens = order[:, np.array(tree.parents) + 1, tree.ranks]
    last, _ = verify_trees(rule, tree, tokens, target, draft, uniforms)
    assert (last == 4).all()


@pytest.mark.parametrize("rule", SAMPLED)
def test_children_may_use_up_the_draft(rule):
    """The draft's support is two tokens, both drawn; the target holds them and a third."""
    target, draft = np.array([[0.2, 0.2, 0.6]] * 3), np.array([[0.7, 0.3, 0.0]] * 3)
    tree = Tree([-1, -1])
    assert verify_tree(rule, tree, [0, 1], target, draft, np.array([0.9, 0.9, 0.1])) == ([], 2)
    assert verify_tree(rule, tree, [0, 1], target, draft, np.array([0.1, 0.9, 0.5]))[0] == [0]


@pytest.mark.parametrize("rule", SAMPLED)
def test_distributions_that_differ_by_rounding_still_give_a_token(rule):
    """The target is below the draft everywhere by one rounding step, so a rejection leaves no residual mass."""
    draft = np.full((4, 4), 0.25, np.float32)
    target = np.full((4, 4), np.nextafter(np.float32(0.25), np.float32(0)), np.float32)
    almost_one = 1 - 2.0**-24
    uniforms = np.array([almost_one, almost_one, almost_one, 0.9])
    path, token = verify_tree(rule, Tree([-1, -1, 0]), [2, 1, 0], target, draft, uniforms)
    assert path in ([], [1]) and token in range(4)
    assert verify_tree(rule, Tree([-1]), [2], target[:2], draft[:2], uniforms[2:]) == ([], 3)


@pytest.mark.parametrize("rule", ["token", "block", *SAMPLED, "one_hot", "greedy"])
def test_one_hot_targets_reproduce_greedy(rule):
    rng = np.random.default_rng(8)
    tree = Tree.chain(3)
    for seed in range(50):
        tokens, _, draft, uniforms = (values[0] for values in random_drafts(seed, tree, 3, sparsity=0.0))
        target = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 4)]
        expected = verify_tree("greedy", tree, tokens, target, None, uniforms)
        assert verify_tree(rule, tree, tokens, target, draft, uniforms) == expected


@pytest.mark.parametrize("rule", ["token", "block"])
def test_chain_rules_refuse_branches(rule):
    tree = Tree([-1, -1])
    tokens, target, draft, uniforms = (values[0] for values in random_drafts(0, tree, 9))
    with pytest.raises(
        ValueError, match=rf"rule '{rule}' verifies chains.*\[-1, -1\] branches: use 'recursive'"
    ):
        verify_tree(rule, tree, tokens, target, draft, uniforms)


@pytest.mark.parametrize("rule", SAMPLED)
def test_sampled_children_need_their_distribution(rule):
    tree = Tree([-1, -1])
    tokens, target, draft, uniforms = (values[0] for values in random_drafts(0, tree, 9))
    with pytest.raises(ValueError, match=f"rule '{rule}' needs draft_probs.*'one_hot'"):
        verify_tree(rule, tree, tokens, target, None, uniforms)
    draft[0, tokens[1]] = 0
    with pytest.raises(ValueError, match=r"nodes \[1\] in rows \[0\] have draft probability 0.*'one_hot'"):
        verify_tree(rule, tree, tokens, target, draft, uniforms)


@pytest.mark.parametrize("rule", NEEDS_NO_CHAIN)
def test_bad_arguments_are_named(rule):
    tree = Tree([-1, -1, 0])
    tokens, target, draft, uniforms = (values[0] for values in random_drafts(0, tree, 9))
    with pytest.raises(ValueError, match="node 1 in row 0 repeats token 4 of its sibling 0"):
        verify_tree(rule, tree, [4, 4, 4], target, draft, uniforms)
    with pytest.raises(ValueError, match="token 9 of node 2 in row 0 lies outside the vocabulary of 9"):
        verify_tree(rule, tree, [3, 4, 9], target, draft, uniforms)
    with pytest.raises(ValueError, match=r"tokens have shape .*a tree of 3 nodes needs"):
        verify_tree(rule, tree, tokens[:2], target, draft, uniforms)
    with pytest.raises(ValueError, match="target_probs has shape"):
        verify_tree(rule, tree, tokens, target[:3], draft, uniforms)
    with pytest.raises(ValueError, match="uniforms have shape"):
        verify_tree(rule, tree, tokens, target, draft, uniforms[:3])
    target[:] = np.nan
    with pytest.raises(ValueError, match=r"rows \[0\] are NaN"):
        verify_tree(rule, tree, tokens, target, draft, uniforms)


def test_other_bad_arguments_are_named():
    tree = Tree([-1, -1])
    tokens, target, draft, uniforms = (values[0] for values in random_drafts(0, tree, 9))
    with pytest.raises(ValueError, match="unknown verification rule 'recursiv': did you mean recursive"):
        verify_tree("recursiv", tree, tokens, target, draft, uniforms)
    for rule in SAMPLED:
        with pytest.raises(ValueError, match="draft_probs has shape"):
            verify_tree(rule, tree, tokens, target, draft[:, :8], uniforms)


@pytest.mark.parametrize("rule", SAMPLED)
def test_nan_in_a_residual_row_is_named(rule):
    """A NaN beside the drafted token is seen by the sum over the vocabulary."""
    target = np.array([[0.1, 0.5, np.nan]] * 2)
    draft = np.array([[0.9, 0.05, 0.05]] * 2)
    with pytest.raises(ValueError, match=r"rows \[0\] are NaN"):
        verify_tree(rule, Tree([-1]), [0], target, draft, np.array([0.5, 0.5]))


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(trees(), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_greedy_rows_of_different_trees_are_those_of_each_alone(shapes, seed):
    rng = np.random.default_rng(seed)
    width = max(map(len, shapes))
    parents, tokens = np.full((2, len(shapes), width), 7)
    argmax = rng.integers(0, 12, (len(shapes), width + 1))
    for row, tree in enumerate(shapes):
        parents[row, : len(tree)] = tree.parents
        tokens[row, : len(tree)] = random_drafts(seed + row, tree, 12)[0][0]
    counts = np.array([len(tree) for tree in shapes])
    paths, num_accepted, next_tokens = verify_greedy_trees(argmax, tokens, parents, counts)
    for row, tree in enumerate(shapes):
        path, next_token = verify_greedy_tree(tree, tokens[row, : len(tree)], argmax[row, : len(tree) + 1])
        assert paths[row, : num_accepted[row]].tolist() == path
        assert next_tokens[row] == next_token
