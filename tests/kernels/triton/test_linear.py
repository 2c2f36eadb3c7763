"""``linear``: every shape and dtype against float64, and the same bits for a row whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.linear.reference import linear as reference
from specdec_kernels.tuning import architecture, config_for

from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken

from specdec_kernels.linear import tiles, triton as op  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# M, N, K: about the edges of tiles of 32 or 64 rows, 64 or 128 features, 32 or 64 columns.
SHAPES = (
    (0, 64, 32),
    (1, 1, 1),
    (2, 130, 200),
    (15, 64, 63),
    (16, 63, 65),
    (17, 128, 96),
    (33, 70, 130),
    (130, 5, 64),
)
SPLIT = (17, 70, 600)


def _inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_features, num_columns = shape
    sizes = ((num_rows, num_columns), (num_features, num_columns), (num_features,))
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def _error(linear, x, weight, bias=None):
    expected = reference(x.double(), weight.double(), None if bias is None else bias.double())
    return tolerances.op_error(linear(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", (False, True), ids=("", "bias"))
def test_agrees_with_float64(shape, dtype, has_bias, device):
    x, weight, bias = _inputs(shape, dtype, device)
    out = op.linear(x, weight, bias if has_bias else None)
    assert out.dtype == dtype and out.shape == shape[:2]
    if out.numel() > 1:
        assert _error(op.linear, x, weight, bias if has_bias else None) < tolerances.OPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", (False, True), ids=("", "bias"))
def test_k_is_split_and_rows_taken_in_pieces(dtype, has_bias, device, monkeypatch):
    x, weight, bias = _inputs(SPLIT, dtype, device)
    config = config_for(op.CONFIGS, architecture(device))
    tile = config.single if dtype == torch.float32 else config.half
    num_splits, blocks_per_split = tile.cut(*SPLIT[1:], config.programs)
    assert num_splits > 1 and (num_splits - 1) * blocks_per_split * tile.columns < SPLIT[2]
    monkeypatch.setattr(tiles, "ROWS_AT_ONCE", 16)
    assert _error(op.linear, x, weight, bias if has_bias else None) < tolerances.OPS[dtype]


def test_takes_any_leading_dimensions_and_strides(device):
    x, weight, bias = _inputs((12, 40, 64), torch.float32, device)
    spread = torch.stack((x, x.new_full(x.shape, torch.nan)), dim=-1)[..., 0].view(3, 4, 64)
    out = op.linear(spread, weight.T.contiguous().T, bias)
    assert out.shape == (3, 4, 40)
    assert torch.equal(out.view(12, 40), op.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype, device):
    x, weight, bias = _inputs((70, 40, 520), dtype, device)
    assert _rows_that_depend_on_the_batch(op, x, weight, bias) == []


def test_a_cut_of_k_that_depends_on_the_batch_is_noticed(device):
    x, weight, bias = _inputs((70, 40, 520), torch.float32, device)
    changed = broken(op, "num_columns, config.programs)", "num_columns, config.programs // len(flat))")
    assert _rows_that_depend_on_the_batch(changed, x, weight, bias)


def _rows_that_depend_on_the_batch(module, x, weight, bias):
    together = module.linear(x, weight, bias)
    parts = [(0, 1), (0, 2), (0, 33), (64, 70)]
    if not runtime.IS_INTERPRETED:  # numpy's products depend on the place in a tile, to the last bit
        parts += [(69, 70), (5, 7), (1, 16), (3, 20), (30, 63)]
    return [
        part
        for part in parts
        if not torch.equal(module.linear(x[slice(*part)], weight, bias), together[slice(*part)])
    ]


def test_the_cut_of_k_covers_it_once():
    for num_columns in (1, 64, 576, 1536, 4096, 14336):
        for num_features in (1, 576, 4096, 6144, 128256):
            tile = op.CONFIGS["default"].half
            num_splits, blocks = tile.cut(num_features, num_columns, 264)
            num_blocks = -(-num_columns // tile.columns)
            assert (num_splits - 1) * blocks < num_blocks <= num_splits * blocks
            assert num_splits == 1 or blocks >= tiles.MIN_BLOCKS


@pytest.mark.parametrize("change", ("shape", "dtype"))
def test_what_does_not_fit_is_refused(change, device):
    x, weight, _ = _inputs((2, 3, 64), torch.float32, device)
    x = x[:, :32] if change == "shape" else x.half()
    with pytest.raises(ValueError, match="must be the same"):
        op.linear(x, weight)


@pytest.mark.parametrize(
    "change",
    [
        ("column < num_columns", "column < num_columns + 1"),
        ("block * COLUMNS", "first * COLUMNS"),
        ("first + blocks_per_split", "first + blocks_per_split - 1"),
        ("feature.to(tl.int64)[:, None]", "(feature.to(tl.int64) % (FEATURES - 1))[:, None]"),
    ],
    ids=("mask", "block", "last", "feature"),
)
def test_a_broken_copy_is_noticed(change, device):
    x, weight, bias = _inputs(SPLIT, torch.float32, device)
    assert not _error(broken(op, *change).linear, x, weight, bias) < tolerances.OPS[torch.float32]


@pytest.mark.skipif(not runtime.IS_INTERPRETED, reason="compiled kernels keep the functions that they call")
@pytest.mark.parametrize(
    "change",
    [
        ("split * num_rows + row", "split * num_rows + row % 8"),
        ("tl.program_id(2).to(tl.int64) * num_rows", "tl.program_id(2).to(tl.int64) * (num_rows - 1)"),
        ("if HAS_BIAS:", "if False:"),
        ("launch(partial, first, first + len(piece)", "launch(partial, 0, len(piece)"),
    ],
    ids=("partial sums", "store", "bias", "pieces"),
)
def test_broken_partial_sums_are_noticed(change, device, monkeypatch):
    x, weight, bias = _inputs(SPLIT, torch.float32, device)
    changed = broken(tiles, *change)
    monkeypatch.setattr(changed, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(op, "tiles", changed)
    monkeypatch.setattr(op, "store_tile", changed.store_tile)
    assert not _error(op.linear, x, weight, bias) < tolerances.OPS[torch.float32]
