"""Trees against brute force over their parents, and the packed masks against the boolean ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.tree import MAX_PACKED_NODES, Tree, pack_trees


@st.composite
def parent_lists(draw, max_nodes: int = MAX_PACKED_NODES):
    """Bushy, chain-like and mixed trees."""
    size = draw(st.integers(0, max_nodes))
    reach = draw(st.sampled_from([1, 2, 8, MAX_PACKED_NODES]))
    return [draw(st.integers(max(-1, i - reach), i - 1)) for i in range(size)]


def ancestors(parents: list[int], node: int) -> list[int]:
    """The node itself, its parent and so on; without the root."""
    found = []
    while node != -1:
        found.append(node)
        node = parents[node]
    return found


def unpack(masks: np.ndarray) -> np.ndarray:
    """int64 [n, 2] to bool [n, 128]."""
    shifts = np.arange(64, dtype=np.uint64)
    bits = (masks.view(np.uint64)[:, :, None] >> shifts) & np.uint64(1)
    return bits.reshape(len(masks), 128).astype(bool)


@settings(max_examples=150, deadline=None)
@given(parents=parent_lists())
def test_relations_follow_from_the_parents(parents):
    tree = Tree(parents)
    size = len(parents)
    assert len(tree) == size
    for node in range(size):
        chain = ancestors(parents, node)
        assert tree.path(node) == chain[::-1]
        assert tree.depths[node] == len(chain)
        assert np.flatnonzero(tree.ancestor_mask[node]).tolist() == sorted(chain)
        siblings = tree.children_of(parents[node])
        assert siblings[tree.ranks[node]] == node and list(siblings) == sorted(siblings)
    assert sum(map(len, tree.children)) == size and len(tree.children) == size + 1
    assert tree.leaves == tuple(i for i in range(size) if i not in parents)
    assert tree.max_depth == max([0, *tree.depths])
    assert tree.is_chain == (parents == list(range(-1, size - 1)))
    assert tree.path(-1) == []


@settings(max_examples=150, deadline=None)
@given(parents=parent_lists())
def test_packed_masks_are_the_ancestor_mask_and_the_root(parents):
    tree = Tree(parents)
    size = len(parents)
    assert tree.packed_masks.shape == (size + 1, 2) and tree.packed_masks.dtype == np.int64
    bits = unpack(tree.packed_masks)
    expected = np.zeros((size + 1, 128), bool)
    expected[:, 0] = True
    expected[1:, 1 : size + 1] = tree.ancestor_mask
    assert (bits == expected).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(parent_lists(max_nodes=40), max_size=6), spare=st.integers(0, 3))
def test_a_batch_equals_its_trees(rows, spare):
    width = max([0, *map(len, rows)]) + spare
    parents = np.full((len(rows), width), 99, np.int32)
    for row, values in enumerate(rows):
        parents[row, : len(values)] = values
    counts = np.array([len(values) for values in rows], np.int32)
    depths, masks = pack_trees(parents, counts)
    assert depths.shape == (len(rows), width) and depths.dtype == np.int32
    assert masks.shape == (len(rows), width + 1, 2) and masks.dtype == np.int64
    for row, values in enumerate(rows):
        tree, size = Tree(values), len(values)
        assert (depths[row, :size] == tree.depths).all() and not depths[row, size:].any()
        assert (masks[row, : size + 1] == tree.packed_masks).all() and not masks[row, size + 1 :].any()


def test_bits_of_a_small_tree():
    """The root is bit 0 and node i is bit i + 1; entry 64 is the second word's first bit, entry 63 the sign."""
    assert Tree([-1, -1, 0]).packed_masks.tolist() == [[0b0001, 0], [0b0011, 0], [0b0101, 0], [0b1011, 0]]
    star = Tree([-1] * MAX_PACKED_NODES).packed_masks
    assert star[63].tolist() == [1 - 2**63, 0] and star[64].tolist() == [1, 1]
    assert Tree.chain(MAX_PACKED_NODES).packed_masks[-1].tolist() == [-1, -1]
    assert Tree([]).packed_masks.tolist() == [[1, 0]]


def test_trees_are_values():
    tree = Tree(np.array([-1, 0], np.int32))
    assert tree == Tree([-1, 0]) == Tree.chain(2) and hash(tree) == hash(Tree.chain(2))
    assert tree != Tree([-1, -1])
    for values in (tree.depths, tree.ancestor_mask, tree.packed_masks, tree.ranks):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0
    with pytest.raises(AttributeError):
        tree.parents = ()


@pytest.mark.parametrize("parents", [[0], [-2], [-1, 1], [-1, 0, 5]])
def test_bad_parents_are_named(parents):
    node = len(parents) - 1
    with pytest.raises(ValueError, match=f"parent {parents[-1]} of node {node} .* parents come before"):
        Tree(parents)
    with pytest.raises(ValueError, match=f"parent {parents[-1]} of node {node} in row 1"):
        pack_trees(np.array([[-1] * len(parents), parents]), np.array([node, node + 1]))
    pack_trees(np.array([parents]), np.array([node]))  # what is past the count is not read


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="must be integers"):
        Tree([-1, 0.5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="length=-1"):
        Tree.chain(-1)
    with pytest.raises(ValueError, match="128 nodes do not fit"):
        _ = Tree.chain(128).packed_masks
    with pytest.raises(ValueError, match=r"counts=\[3\] must lie in \[0, 2\]"):
        pack_trees(np.zeros((1, 2), np.int32), np.array([3]))
