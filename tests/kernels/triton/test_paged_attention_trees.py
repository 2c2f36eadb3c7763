"""``paged_attention`` for token trees of up to 127 nodes, beside causal rows, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.paged_attention.reference import paged_attention as reference

from tests.kernels.trees import Tree, chain, random_tree
from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.ragged import Batch, Shape, make_batch, split_contexts, tree_batch

from specdec_kernels.paged_attention import plan  # isort: skip
from specdec_kernels.paged_attention import triton as op  # isort: skip


def check(batch: Batch, **more) -> None:
    q = batch.tensors["q"]
    error = tolerances.op_error(batch.run(op.paged_attention, **more), batch.in_float64(reference))
    assert error < tolerances.OPS[q.dtype]


@pytest.mark.parametrize("is_invariant", (False, True), ids=("free", "invariant"))
@pytest.mark.parametrize("window", (None, 5, 40))
def test_random_trees_beside_causal_rows(window, is_invariant, device):
    rng = np.random.default_rng(0)
    trees = {row: random_tree(rng, size) for row, size in enumerate((1, 2, 17, 33, 64))}
    rows = [(context, len(tree)) for context, tree in zip((3, 0, 31, 70, 12), trees.values(), strict=True)]
    rows += [(40, 1), (0, 9), (6, 0)]
    batch = make_batch(rows, Shape(group=2), device, trees, sliding_window=window)
    check(batch, batch_invariant=is_invariant)


@pytest.mark.parametrize(
    ("tree", "is_invariant"), (("wide", False), ("deep", False), ("random", False), ("random", True))
)
def test_the_largest_tree(tree, is_invariant, device):
    """The root and 127 nodes: all bits of both words."""
    tree = {"wide": Tree([-1] + [0] * 127), "deep": chain(128)}.get(tree) or random_tree(
        np.random.default_rng(1), 128
    )
    check(
        tree_batch([tree], Shape(group=1, dtype=torch.float16), device, (37,)), batch_invariant=is_invariant
    )


@pytest.mark.parametrize("cache_dtype", (None, torch.int8, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_dtypes_and_soft_cap(dtype, cache_dtype, device):
    rng = np.random.default_rng(2)
    trees = [random_tree(rng, size) for size in (5, 12, 40)]
    shape = Shape(2, 4, 64, 16, dtype, cache_dtype)
    check(tree_batch(trees, shape, device, (30, 70, 3), softcap=4.0))


@pytest.mark.parametrize("is_invariant", (False, True), ids=("free", "invariant"))
@pytest.mark.parametrize("window", (None, 20))
def test_split_contexts(window, is_invariant, device, monkeypatch):
    """A split begins within a tree."""
    split_contexts(monkeypatch, plan, 32)
    rng = np.random.default_rng(3)
    trees = [random_tree(rng, size) for size in (9, 24, 1)]
    check(
        tree_batch(trees, Shape(), device, (60, 25, 90), sliding_window=window), batch_invariant=is_invariant
    )


def test_causal_tokens_within_a_row_of_masks(device):
    """Which no tree has, but masks of zero may stand anywhere."""
    batch = tree_batch([random_tree(np.random.default_rng(4), 30)], Shape(), device, (11,))
    batch.tensors["tree_mask"][3::4] = 0
    for is_invariant in (False, True):
        check(batch, batch_invariant=is_invariant)


def test_masks_that_are_no_trees(device):
    """Any bits, those of later tokens among them, as the reference takes them."""
    batch = tree_batch([chain(20), chain(64), chain(70)], Shape(), device, (11, 0, 33))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**63), 2**63 - 1, (154, 2), generator=generator)
    own = torch.cat([torch.arange(count) for count in (20, 64, 70)])
    words[torch.arange(154), own // 64] |= 1 << own % 64
    words[:20, 0] &= (1 << 20) - 1
    words[84:, 1] &= (1 << 6) - 1
    words[:84, 1] = 0
    check(batch.with_tensors(tree_mask=words.to(device)))
