"""``paged_attention`` for causal rows: shapes, dtypes, caches, windows, splits and padding against float64."""

from __future__ import annotations

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.paged_attention.reference import paged_attention as reference
from torch.nn.functional import pad

from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.ragged import Batch, Shape, make_batch, split_contexts

from specdec_kernels.paged_attention import plan  # isort: skip
from specdec_kernels.paged_attention import triton as op  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CACHES = (None, torch.int8, torch.float8_e4m3fn)
# Prompts, decodes, drafts, an empty row; in the context and in this step.
ROWS = ((0, 1), (1, 1), (7, 1), (8, 2), (9, 7), (33, 8), (3, 0), (15, 9), (40, 17))


def check(batch: Batch, **more) -> None:
    q = batch.tensors["q"]
    out = batch.run(op.paged_attention, **more)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert tolerances.op_error(out, batch.in_float64(reference)) < tolerances.OPS[q.dtype]


@pytest.mark.parametrize("is_invariant", (False, True), ids=("free", "invariant"))
@pytest.mark.parametrize("block_size", (4, 8, 16, 32))
def test_lengths_around_blocks_and_tiles(block_size, is_invariant, device):
    ends = (0, 1, block_size - 1, block_size, block_size + 1)
    rows = [(context, 1) for context in (*ends, 31, 32, 33, 64)]
    rows += [(context, count) for context, count in zip(ends, reversed(ends), strict=True)]
    batch = make_batch(rows, Shape(block_size=block_size), device)
    check(batch, batch_invariant=is_invariant)


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_queries_and_caches(dtype, cache_dtype, device):
    check(make_batch(ROWS, Shape(2, 2, 32, dtype=dtype, cache_dtype=cache_dtype), device))


@pytest.mark.parametrize("heads", ((3, 1), (2, 3), (1, 4), (2, 8), (1, 20)), ids=str)
def test_groups_of_query_heads(heads, device):
    check(make_batch(ROWS[2:8], Shape(*heads), device))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("head_dim", (8, 64, 80, 96, 128, 256))
def test_head_sizes(head_dim, dtype, device):
    check(make_batch(((70, 1), (0, 3), (33, 5)), Shape(2, 2, head_dim, 16, dtype), device))


@pytest.mark.parametrize("softcap", (None, 2.0, 50.0))
@pytest.mark.parametrize("window", (None, 1, 6, 40))
def test_windows_and_softcaps(window, softcap, device):
    check(make_batch(ROWS[2:], Shape(), device, sliding_window=window, softcap=softcap))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "rows",
    (((70, 1), (130, 2), (5, 0)), ((64, 9), (127, 20)), ((0, 150), (65, 3))),
    ids=("few", "some", "many"),
)
def test_tiles_by_lines_of_a_row(rows, dtype, device):
    check(make_batch(rows, Shape(1, 3, 64, dtype=dtype), device))


@pytest.mark.parametrize("is_invariant", (False, True), ids=("free", "invariant"))
@pytest.mark.parametrize("window", (None, 50))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_split_contexts(dtype, window, is_invariant, device, monkeypatch):
    split_contexts(monkeypatch, plan, 64)
    rows = ((200, 1), (0, 3), (63, 1), (64, 2), (7, 0))
    batch = make_batch(rows, Shape(2, 2, 16, dtype=dtype), device, sliding_window=window)
    check(batch, batch_invariant=is_invariant)


def test_passes_over_a_small_workspace_change_nothing(device, monkeypatch):
    split_contexts(monkeypatch, plan, 32)
    batch = make_batch(((70, 1), (0, 3), (33, 9), (1, 0)), Shape(2), device)
    whole = batch.run(op.paged_attention)
    monkeypatch.setattr(plan, "WORKSPACE_BYTES", 20_000)
    assert torch.equal(batch.run(op.paged_attention), whole)
    check(batch)


@pytest.mark.parametrize("is_split", (False, True), ids=("whole", "split"))
def test_padding_is_zero_and_changes_nothing(is_split, device, monkeypatch):
    """As a captured graph pads: tokens beyond the last row, rows without tokens, tables of no use."""
    if is_split:
        split_contexts(monkeypatch, plan, 32)
    batch = make_batch(ROWS[3:6], Shape(), device)
    expected = batch.in_float64(reference)
    ends = batch.tensors["query_start"]
    padded = batch.with_tensors(
        q=pad(batch.tensors["q"], (0, 0, 0, 0, 0, 7), value=torch.nan),
        query_start=torch.cat((ends, ends[-1:].repeat(5))),
        context_lens=pad(batch.tensors["context_lens"], (0, 5), value=2**30),
        block_tables=pad(batch.tensors["block_tables"], (0, 0, 0, 5), value=2**30),
    )
    out = padded.run(op.paged_attention)
    assert tolerances.op_error(out[:-7], expected) < tolerances.OPS[torch.float32]
    assert not out[-7:].any()


def test_many_rows_of_which_most_are_empty(device):
    """More rows than ``kernels.find_tile`` looks at in one step."""
    rows = [(5, 1 if row in (0, 127, 128, 139) else 0) for row in range(140)]
    check(make_batch(rows, Shape(), device))


def test_no_tokens_and_no_rows(device):
    assert make_batch((), Shape(), device).run(op.paged_attention).shape == (0, 2, 16)
    assert make_batch(((3, 0), (0, 0)), Shape(), device).run(op.paged_attention).shape == (0, 2, 16)
    padding = make_batch((), Shape(), device).with_tensors(q=torch.ones(3, 2, 16, device=device))
    assert not padding.run(op.paged_attention).any()


def test_queries_may_be_slices_of_a_projection(device):
    batch = make_batch(ROWS[2:5], Shape(2, 3), device)
    q = batch.tensors["q"]
    sliced = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)[:, : q.shape[1]]
    assert torch.equal(batch.with_tensors(q=sliced).run(op.paged_attention), batch.run(op.paged_attention))


def test_the_launch_reads_no_tensor(device, monkeypatch):
    batch = make_batch(ROWS, Shape(cache_dtype=torch.int8), device, trees={}, sliding_window=9)
    expected = batch.in_float64(reference)

    def refuse(*_):
        raise AssertionError("the host has read a tensor")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        outs = [batch.run(op.paged_attention, batch_invariant=choice) for choice in (False, True)]
    for out in outs:
        assert tolerances.op_error(out, expected) < tolerances.OPS[torch.float32]
