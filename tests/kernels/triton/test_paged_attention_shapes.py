"""``paged_attention`` for all small token trees."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.paged_attention.reference import paged_attention as reference

from tests.kernels.trees import Tree, rooted_trees
from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.ragged import Shape, tree_batch

from specdec_kernels.paged_attention import triton as op  # isort: skip

TOLERANCE = tolerances.OPS[torch.float32]


def by_level(tree: Tree) -> Tree:
    """The same shape with its tokens in the order of their depth."""
    order = sorted(range(len(tree)), key=tree.depths.__getitem__)
    place = {token: index for index, token in enumerate(order)}
    return Tree([-1, *(place[tree.parents[token]] for token in order[1:])])


@pytest.mark.parametrize("num_nodes", range(9))
def test_every_shape(num_nodes, device):
    """The root and up to eight nodes, numbered depth first and, if they are fewer, also by level."""
    shapes = list(rooted_trees(num_nodes + 1))
    if num_nodes < 8:
        shapes += [tree for tree in map(by_level, shapes) if tree not in shapes]
    assert len(shapes) >= (1, 1, 2, 4, 9, 20, 48, 115, 286)[num_nodes]
    batch = tree_batch(shapes, Shape(group=1), device)
    assert tolerances.op_error(batch.run(op.paged_attention), batch.in_float64(reference)) < TOLERANCE


def test_every_numbering_of_small_trees(device):
    """All that have each parent before its children."""
    trees = [Tree([-1, *parents]) for size in range(1, 5) for parents in product(*map(range, range(1, size)))]
    batch = tree_batch(trees, Shape(group=3), device, sliding_window=3)
    assert tolerances.op_error(batch.run(op.paged_attention), batch.in_float64(reference)) < TOLERANCE
