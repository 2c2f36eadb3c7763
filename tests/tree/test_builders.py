"""Static and dynamic trees, and the registry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.tree import Tree, grow, k_ary, make_tree, pack_trees, rerank, static_tree


def rank_paths(tree: Tree) -> list[list[int]]:
    return [[int(tree.ranks[i]) for i in tree.path(node)] for node in range(len(tree))]


def test_static_paths_in_any_order():
    paths = [[0, 1], [1], [0], [0, 0], [0, 0, 0]]
    tree = static_tree(paths)
    assert tree.parents == (-1, -1, 0, 0, 2)
    assert rank_paths(tree) == sorted(paths, key=lambda path: (len(path), path))
    assert static_tree([]) == Tree([])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], r"path \[1, 0\] needs path \[1\]"),
        ([[0], [2]], r"path \[2\] needs path \[1\]"),
        ([[0], [0, 1]], r"path \[0, 1\] needs path \[0, 0\]"),
        ([[0], [0]], r"path \[0\] is repeated"),
        ([[]], r"path \[\] is empty"),
        ([[-1]], r"path \[-1\] has a negative rank"),
    ],
)
def test_bad_paths_are_named(paths, message):
    with pytest.raises(ValueError, match=message):
        static_tree(paths)


def test_k_ary():
    tree = k_ary([3, 2, 1])
    assert np.bincount(tree.depths).tolist() == [0, 3, 6, 6]
    assert [len(c) for c in tree.children] == [3] + [2] * 3 + [1] * 6 + [0] * 6
    assert k_ary([1] * 5) == Tree.chain(5) and k_ary([]) == Tree([])
    with pytest.raises(ValueError, match=r"branching=\[2, 0\]"):
        k_ary([2, 0])


def test_the_registry():
    assert make_tree({"name": "static", "paths": [[0], [0, 0], [1]]}) == Tree([-1, -1, 0])
    assert make_tree({"name": "k_ary", "branching": [2, 1]}) == Tree([-1, -1, 0, 1])
    assert make_tree({"name": "chain", "length": 3}) == Tree([-1, 0, 1])
    assert len(make_tree({"name": "sequoia", "rates": [0.6, 0.2], "size": 7, "max_depth": 3})) == 7
    with pytest.raises(ValueError, match="unknown tree 'kary': did you mean k_ary"):
        make_tree({"name": "kary"})
    for spec in ({"name": "chain", "depth": 3}, {"name": "k_ary", "branching": 3}, "chain"):
        with pytest.raises(ValueError, match="does not take these options"):
            make_tree(spec)


def random_levels(seed: int, num_rows: int, depth: int, k: int, width: int, ties: bool):
    """Candidates with random children; with ``ties``, log-probabilities from {0, −1, −2}, else some are −inf."""
    rng = np.random.default_rng(seed)
    levels = []
    for _ in range(depth):
        num_parents = levels[-1].beam.shape[1] if levels else 1
        logprobs = -rng.exponential(size=(num_rows, num_parents, k))
        logprobs = np.ceil(logprobs).clip(-2) if ties else np.where(logprobs < -2.5, -np.inf, logprobs)
        tokens = rng.permuted(np.broadcast_to(np.arange(50), (num_rows, num_parents, 50)), axis=-1)[..., :k]
        levels.append(grow(levels[-1] if levels else None, tokens, np.sort(logprobs)[..., ::-1], width))
    return levels


def candidates(
    levels, row: int
) -> dict[tuple[int, int], tuple[float, tuple[int, ...], tuple[int, int] | None]]:
    """(level, place) to score, tokens of the path, and parent, for candidates that exist."""
    found = {}
    for depth, level in enumerate(levels):
        for place, (token, score, parent) in enumerate(
            zip(level.tokens[row], level.scores[row], level.parents[row], strict=True)
        ):
            above = None if depth == 0 else (depth - 1, int(parent))
            if score > -np.inf:
                path = () if above is None else found[above][1]
                found[depth, place] = (float(score), (*path, int(token)), above)
    return found


LEVELS = given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(1, 3),
    depth=st.integers(1, 4),
    k=st.integers(1, 4),
    width=st.integers(1, 5),
    ties=st.booleans(),
    size=st.integers(0, 30),
)


@settings(max_examples=150, deadline=None)
@LEVELS
def test_the_best_candidates_stay_with_their_ancestors(seed, num_rows, depth, k, width, ties, size):
    levels = random_levels(seed, num_rows, depth, k, width, ties)
    trees = rerank(levels, size)
    assert trees.parents.shape == trees.tokens.shape == (num_rows, size)
    pack_trees(trees.parents, trees.counts)  # valid topologies
    for row in range(num_rows):
        known = candidates(levels, row)
        # Best score first, ties by depth, then by place: the definition, by sorting.
        best = sorted(known, key=lambda key: (-known[key][0], key))[:size]
        count = int(trees.counts[row])
        kept = list(zip(trees.level[row, :count].tolist(), trees.place[row, :count].tolist(), strict=True))
        assert kept == sorted(best)
        assert all(known[key][2] in {None, *best} for key in best)
        tree = Tree(trees.parents[row, :count])
        assert (tree.depths == trees.level[row, :count] + 1).all()
        for node, key in enumerate(kept):
            assert tuple(trees.tokens[row, tree.path(node)]) == known[key][1]


@settings(max_examples=100, deadline=None)
@LEVELS
def test_each_level_expands_its_global_best(seed, num_rows, depth, k, width, ties, size):
    levels = random_levels(seed, num_rows, depth, k, width, ties)
    for depth, level in enumerate(levels):
        for row in range(num_rows):
            best = np.argsort(-level.scores[row], kind="stable")[:width]
            assert level.beam[row].tolist() == best.tolist()
            assert (level.beam_tokens[row] == level.tokens[row, best]).all()
        if depth:
            beam = levels[depth - 1].beam
            assert (level.parents == np.repeat(beam, k, axis=1)).all()


def test_a_worked_dynamic_tree():
    """Root children 0.6 and 0.3; below them 0.5, 0.4 and 0.9, 0.1: the scores are 0.3, 0.24, 0.27 and 0.03."""
    first = grow(None, np.array([[[7, 8]]]), np.log([[[0.6, 0.3]]]), width=2)
    second = grow(first, np.array([[[1, 2], [3, 4]]]), np.log([[[0.5, 0.4], [0.9, 0.1]]]), width=2)
    assert second.beam_tokens.tolist() == [[1, 3]]
    trees = rerank([first, second], 4)
    assert trees.parents.tolist() == [[-1, -1, 0, 1]] and trees.tokens.tolist() == [[7, 8, 1, 3]]
    wider = rerank([first, second], 8)
    assert wider.counts.tolist() == [6] and wider.tokens[0, :6].tolist() == [7, 8, 1, 2, 3, 4]


def test_ties_go_to_the_smaller_depth():
    """A child of log-probability 0 has its parent's score: it must not displace an uncle of the same score."""
    first = grow(None, np.array([[[0, 1, 2]]]), np.full((1, 1, 3), -1.0), width=1)
    second = grow(first, np.array([[[5]]]), np.zeros((1, 1, 1)), width=1)
    assert rerank([first, second], 3).tokens.tolist() == [[0, 1, 2]]


def test_bad_candidates_are_named():
    tokens = np.zeros((2, 1, 3), np.int64)
    with pytest.raises(ValueError, match=r"tokens \(2, 1, 3\) and logprobs \(2, 1, 2\)"):
        grow(None, tokens, np.zeros((2, 1, 2)), 1)
    for wrong in (np.nan, 0.5):
        with pytest.raises(ValueError, match="NaN or above 0"):
            grow(None, tokens, np.full(tokens.shape, wrong), 1)
    with pytest.raises(ValueError, match="width=0"):
        grow(None, tokens, np.zeros(tokens.shape), 0)
    with pytest.raises(ValueError, match="0 levels"):
        rerank([], 3)
