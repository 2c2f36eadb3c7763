"""Broken copies of ``paged_attention`` are noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.paged_attention.reference import paged_attention as reference
from torch.nn.functional import pad

from tests.kernels.trees import chain, random_tree
from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.ragged import Batch, Shape, broken_kernels, make_batch, split_contexts, tree_batch

from specdec_kernels.paged_attention import kernels, plan, tiles  # isort: skip
from specdec_kernels.paged_attention import triton as op  # isort: skip

# What is replaced, by what, in which batch.
BREAKS = {
    "rows of tiles": ("start // BLOCK_Q + row <= tile", "start // BLOCK_Q + row < tile", "all"),
    "first query": ("(tile - start // BLOCK_Q - row) * BLOCK_Q", "(tile - start // BLOCK_Q - row)", "all"),
    "padding": (
        "tl.where(row < num_rows, context + row_end - row_start, 0)",
        "row_end - row_start",
        "padded",
    ),
    "fp8 exponent": ("* 256.0", "* 128.0", "all"),
    "block table": ("table_ptr + index // PAGE", "table_ptr + index // PAGE + 1", "all"),
    "offset in block": ("block * PAGE + index % PAGE", "block * PAGE + index % (PAGE - 1)", "all"),
    "unwritten keys": (
        "begin + tl.arange(0, BLOCK_N), num_keys - 1",
        "begin + tl.arange(0, BLOCK_N), FAR",
        "plain",
    ),
    "scale of keys": ("* k_scale[None, :]", "* 1.01", "all"),
    "scale of values": ("weights * v_scale[None, :]", "weights * 1.01", "all"),
    "soft-cap": ("2.0 * LOG2_E * scale / softcap", "1.9 * LOG2_E * scale / softcap", "all"),
    "scale": ("scores * (scale * LOG2_E)", "scores * scale", "plain"),
    "running sum": ("tl.fma(total, shrink,", "tl.fma(total, 1.0,", "all"),
    "running values": ("acc * shrink[:, None]", "acc", "all"),
    "causal": ("index[None, :] <= own[:, None]", "index[None, :] < own[:, None]", "all"),
    "window": ("> (own_position - sliding_window)", ">= (own_position - sliding_window)", "all"),
    "where a window starts": ("- sliding_window + 1", "- sliding_window + 33", "all"),
    "common keys": ("context + first + 1  #", "context + first + 33  #", "plain"),
    "last key": (
        "tl.minimum(context + first + num_queries, num_keys)",
        "tl.minimum(context + first + 1, num_keys)",
        "plain",
    ),
    "head of the group": (
        "tl.program_id(1) * GROUP + line % GROUP",
        "tl.program_id(1) * GROUP + line % 1",
        "all",
    ),
    "end of a split": ("tl.minimum(end, start + num_keys)", "tl.minimum(end, start + num_keys + 1)", "split"),
    "place of a split": (
        "tl.num_programs(2) + tl.program_id(2)) * BLOCK_M",
        "tl.num_programs(2)) * BLOCK_M",
        "split",
    ),
    "empty split": ("weight[:, None], [BLOCK_M", "weight[:, None] + 0.01, [BLOCK_M", "split"),
    "combined maximum": ("tl.load(maximum_ptr + split_part) - origin", "origin - origin", "split"),
    "combined sum": ("tl.fma(weight, split_total, total)", "tl.fma(1.0, split_total, total)", "split"),
}


def broken_batch(kind: str, device) -> Batch:
    """``plain`` and ``split`` ones, one that asks for everything, one with padding."""
    if kind == "all":
        shape, options = Shape(2, 3, cache_dtype=torch.float8_e4m3fn), {"sliding_window": 30, "softcap": 3.0}
        return make_batch(((70, 1), (9, 7), (3, 0), (0, 8)), shape, device, **options)
    batch = make_batch(
        ((70, 1), (9, 7)) if kind == "split" else ((9, 40),), Shape(group=4), device, spare_blocks=8
    )
    if kind == "padded":
        q, tables = batch.tensors["q"], batch.tensors["block_tables"]
        # Behind the tables is one more, so that a broken copy that reads it reads nobody's memory.
        tables = pad(tables, (0, 0, 0, 1))[:-1]
        batch = batch.with_tensors(q=pad(q, (0, 0, 0, 0, 0, 2), value=1.0), block_tables=tables)
    return batch


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_noticed(name, device, monkeypatch):
    old, new, kind = BREAKS[name]
    if kind == "split":
        split_contexts(monkeypatch, plan, 32)
    batch = broken_batch(kind, device)
    monkeypatch.setattr(op, "kernels", broken_kernels(kernels, tiles, old, new))
    out = batch.run(op.paged_attention)
    assert not tolerances.op_error(out, batch.in_float64(reference)) < tolerances.OPS[torch.float32]


@pytest.mark.parametrize("text", ("def attend", "def absorb"))
@pytest.mark.parametrize("kind", ("all", "plain", "split", "padded"))
def test_a_copy_that_is_not_broken_is_right(kind, text, device, monkeypatch):
    if kind == "split":
        split_contexts(monkeypatch, plan, 32)
    monkeypatch.setattr(op, "kernels", broken_kernels(kernels, tiles, text, text))
    batch = broken_batch(kind, device)
    error = tolerances.op_error(batch.run(op.paged_attention), batch.in_float64(reference))
    assert error < tolerances.OPS[torch.float32]


# What is replaced, by what, whether in batch-invariant mode.
TREE_BREAKS = {
    "word of the mask": (">> 5) + 1, is_masked", ">> 5), is_masked", False),
    "bits before the mask": ("tl.where(word < 0, -1,", "tl.where(word < 0, 0,", False),
    "bits behind the mask": ("tl.where(word > 3, 0, loaded)", "loaded", False),
    "shift of the mask": ("<< (31 - shift) << 1", "<< (31 - shift)", False),
    "causal bits": ("tl.minimum(own - begin + 1, 32)", "tl.minimum(own - begin, 32)", False),
    "keys for all": ("tl.where(has_masks, context, common)", "common + BLOCK_N", False),
    "positions": ("tl.where(index < context, index, position)", "index", False),
    "positions of queries": (
        "tl.load(position_ptr + token, mask=valid, other=FAR).to(tl.int32)",
        "own",
        False,
    ),
    "nearest key": ("tl.maximum(tl.minimum(nearest, context), 0)", "tl.maximum(nearest + 40, 0)", False),
    "nodes of a path": (
        "tl.store(path_line_ptr + rank, places,",
        "tl.store(path_line_ptr + rank, 0 * places,",
        True,
    ),
    "end of a path": ("tl.where(length > 0, length, place + 1)", "tl.where(length > 0, length, place)", True),
    "line of a path": ("line // GROUP == place - first", "line // GROUP >= place - first", True),
    "start of paths": ("tl.where(num_paths > 0, tl.minimum(plain_end, end), end)", "end", True),
    "window on a path": ("                if HAS_WINDOW:\n", "                if False:\n", True),
    "end of the last tile": ("(step < path_end)[None, :] &", "(step >= 0)[None, :] &", True),
}


def broken_tree_batch(device, has_window: bool = True) -> Batch:
    """A tree, and one that is causal in part, behind contexts of several tiles; or the largest tree."""
    if not has_window:
        return tree_batch([chain(128)], Shape(group=1), device, (45,))
    trees = [random_tree(np.random.default_rng(5), size) for size in (70, 20)]
    batch = tree_batch(trees, Shape(group=1), device, (45, 70), sliding_window=5)
    batch.tensors["tree_mask"][75::3] = 0
    return batch


@pytest.mark.parametrize("name", TREE_BREAKS)
def test_a_broken_copy_is_noticed_by_trees(name, device, monkeypatch):
    old, new, is_invariant = TREE_BREAKS[name]
    batch = broken_tree_batch(device, name not in ("bits behind the mask", "keys for all"))
    monkeypatch.setattr(op, "kernels", broken_kernels(kernels, tiles, old, new))
    out = batch.run(op.paged_attention, batch_invariant=is_invariant)
    assert not tolerances.op_error(out, batch.in_float64(reference)) < tolerances.OPS[torch.float32]


@pytest.mark.parametrize(("has_window", "is_invariant"), ((False, False), (True, False), (True, True)))
def test_an_unbroken_copy_is_right_with_trees(has_window, is_invariant, device, monkeypatch):
    monkeypatch.setattr(op, "kernels", broken_kernels(kernels, tiles, "def absorb", "def absorb"))
    batch = broken_tree_batch(device, has_window)
    error = tolerances.op_error(
        batch.run(op.paged_attention, batch_invariant=is_invariant), batch.in_float64(reference)
    )
    assert error < tolerances.OPS[torch.float32]
