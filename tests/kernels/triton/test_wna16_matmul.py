"""``wna16_matmul``: the formats, the rounding of weights, and products against float64 on every tile."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specdec_kernels import tolerances
from specdec_kernels.tuning import architecture, config_for
from specdec_kernels.wna16_matmul import QuantizedWeight, dequantize, from_codes, quantize, weights
from specdec_kernels.wna16_matmul.reference import wna16_matmul as reference

from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken

from specdec_kernels.wna16_matmul import triton as op  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# M, N, K and group: about the edges of tiles of 16, 64 or 128 rows, 128 features and 64 or 128 columns.
SHAPES = (
    (0, 64, 32, 32),
    (1, 1, 32, 32),
    (1, 130, 96, 32),
    (2, 5, 192, 64),
    (15, 70, 256, 128),
    (16, 63, 160, 160),
    (17, 129, 128, 32),
    (33, 40, 576, 64),
    (130, 7, 256, 128),
)


HALF = 0.5 + 2**-14  # of a scale, and what float32 rounds away in counting up to 255 of them


def _weight(num_rows, num_columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    return weight + torch.randn(num_rows, 1, generator=generator)


def _inputs(shape, bits, symmetric, dtype, device):
    num_rows, num_features, num_columns, group_size = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, num_columns, generator=generator).to(device, dtype)
    weight = quantize(_weight(num_features, num_columns), bits, group_size, symmetric)
    return x, weight.to(device), torch.randn(num_features, generator=generator).to(device, dtype)


def _error(module, x, weight, bias=None, **options):
    out = module.wna16_matmul(x, weight, bias, **options)
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], weight.shape[0])
    expected = reference(x.double(), weight, None if bias is None else bias.double())
    return tolerances.op_error(out, expected) if out.numel() > 1 else 0.0


def _configure(module, device, monkeypatch, **changes):
    arch = architecture(device)
    monkeypatch.setitem(module.CONFIGS, arch, replace(config_for(module.CONFIGS, arch), **changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", (False, True), ids=("asymmetric", "symmetric"))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, bits, symmetric, dtype, device):
    x, weight, bias = _inputs(shape, bits, symmetric, dtype, device)
    assert _error(op, x, weight, None if symmetric else bias) < tolerances.OPS[dtype]


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("tile", ("few", "some", "many"))
@pytest.mark.parametrize("group_size", (32, 64, 128))
def test_every_tile_is_exact_in_float32(tile, bits, group_size, device, monkeypatch):
    _configure(op, device, monkeypatch, single=getattr(config_for(op.CONFIGS, architecture(device)), tile))
    x, weight, bias = _inputs((19, 9, 1152, group_size), bits, False, torch.float32, device)
    assert _error(op, x, weight, bias) < tolerances.OPS[torch.float32]


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("num_rows", (5, 40, 70))
def test_rows_choose_the_tile(num_rows, bits, device, monkeypatch):
    _configure(op, device, monkeypatch, max_some=64)
    config = config_for(op.CONFIGS, architecture(device))
    expected = config.few if num_rows < 16 else config.some if num_rows <= 64 else config.many
    assert config.choose(num_rows, batch_invariant=False)[0] == expected
    assert config.choose(num_rows, batch_invariant=True)[0] == config.some
    x, weight, bias = _inputs((num_rows, 20, 256, 32), bits, False, torch.bfloat16, device)
    assert _error(op, x, weight, bias) < tolerances.OPS[torch.bfloat16]


def test_takes_any_leading_dimensions_strides_and_float32_scales(device):
    x, weight, bias = _inputs((12, 20, 64, 32), 4, False, torch.float32, device)
    assert weight.minimums is not None
    weight = replace(weight, scales=weight.scales.float() * 1.001, minimums=weight.minimums.bfloat16())
    spread = torch.stack((x, x.new_full(x.shape, torch.nan)), dim=-1)[..., 0].view(3, 4, 64)
    assert _error(op, spread, weight, bias) < tolerances.OPS[torch.float32]


@pytest.mark.parametrize("bits", (4, 8))
def test_a_row_has_the_same_bits_in_any_batch(bits, device):
    x, weight, bias = _inputs((70, 20, 1152, 32), bits, False, torch.bfloat16, device)
    together = op.wna16_matmul(x, weight, bias, batch_invariant=True)
    parts = [(0, 1), (0, 33), (64, 70)]
    if not runtime.IS_INTERPRETED:  # numpy's products depend on the place in a tile, to the last bit
        parts += [(69, 70), (5, 21), (3, 36)]
    for part in (slice(*ends) for ends in parts):
        assert torch.equal(op.wna16_matmul(x[part], weight, bias, batch_invariant=True), together[part])


def test_what_does_not_fit_is_refused(device):
    x, weight, _ = _inputs((2, 3, 64, 32), 4, False, torch.float32, device)
    with pytest.raises(ValueError, match="must be the same"):
        op.wna16_matmul(x[:, :32], weight)
    for bits, group_size, shape in ((3, 32, (2, 64)), (4, 48, (2, 96)), (4, 128, (2, 192)), (8, 40, (2, 40))):
        with pytest.raises(ValueError, match=r"choose|multiple"):
            quantize(torch.zeros(shape), bits, group_size)
    with pytest.raises(ValueError, match="float16"):
        quantize(torch.linspace(-1e6, 1e6, 32)[None], 4, 32)
    with pytest.raises(ValueError, match="below 16"):
        from_codes(torch.full((1, 32), 16, dtype=torch.uint8), torch.ones(1, 1), None, 4)
    with pytest.raises(ValueError, match="scales and minimums"):
        from_codes(torch.zeros((2, 64), dtype=torch.uint8), torch.ones(1, 2), None, 4)


@pytest.mark.parametrize(
    "change",
    [
        ("field * APART", "(FIELDS - 1 - field) * APART"),
        ("word % APART", "word % (APART // 2)"),
        ("- factor", "- 2.0 * factor"),
        ("block * COLUMNS // GROUP", "block * COLUMNS // GROUP // 2"),
        ("group[:, None] * num_features", "group[:, None] * (num_features - 1)"),
        ("1 << BITS) - 1", "1 << (BITS - 1)) - 1"),
        ("columns = tl.trans(values)", "columns = tl.trans(tl.flip(values, 0))"),
        ("is_row & (column < num_columns)", "is_row & (column < num_columns - 1)"),
    ],
    ids=("order", "word", "offset", "group", "scales", "mask", "expansion", "last column"),
)
def test_a_broken_copy_is_noticed(change, device):
    x, weight, bias = _inputs((3, 9, 576, 32), 4, False, torch.float32, device)
    assert not _error(broken(op, *change), x, weight, bias) < tolerances.OPS[torch.float32]


def test_a_broken_symmetric_copy_is_noticed(device):
    x, weight, bias = _inputs((3, 9, 64, 32), 8, True, torch.float32, device)
    changed = broken(op, "-1.5 * factor", "-1.49 * factor")
    assert not _error(changed, x, weight, bias) < tolerances.OPS[torch.float32]


def test_the_order_of_codes_is_the_one_described():
    codes = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    words = from_codes(codes, torch.ones(2, 1), None, 4).codes.view(torch.int16).int() & 0xFFFF
    for row in range(2):
        for word in range(8):
            fields = [int(words[row, word]) >> (4 * i) & 15 for i in range(4)]
            assert fields == codes[row, word : word + 25 : 8].tolist()
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64)
    words = from_codes(codes, torch.ones(1, 2), None, 8).codes.view(torch.int16)
    for word in range(32):
        column = word // 16 * 32 + word % 16
        assert int(words[0, word]) == column + (column + 16) * 256


GROUPS = st.sampled_from(((32, 96), (64, 128), (128, 256), (160, 160)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from((4, 8)),
    sizes=GROUPS,
    symmetric=st.booleans(),
    seed=st.integers(0, 2**20),
    magnitude=st.floats(-20, 12),
    offset=st.floats(-100, 100),
)
def test_no_weight_moves_by_more_than_half_a_scale(bits, sizes, symmetric, seed, magnitude, offset):
    group_size, num_columns = sizes
    weight = (
        torch.randn(3, num_columns, generator=torch.Generator().manual_seed(seed)) + offset
    ) * 2**magnitude
    quantized = quantize(weight, bits, group_size, symmetric)
    assert _largest_step(weights, quantized, weight) <= HALF


def _largest_step(module, quantized, weight):
    """How far any weight moved, in scales, less what rounding it to float32 explains."""
    step = quantized.scales.t().double().repeat_interleave(quantized.group_size, dim=1)
    moved = (module.dequantize(quantized).double() - weight.double()).abs()
    return float(((moved - weight.double().abs() * 2**-23) / step).max())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from((4, 8)),
    sizes=GROUPS,
    symmetric=st.booleans(),
    seed=st.integers(0, 2**20),
    exponent=st.integers(-12, 0),
)
def test_weights_on_a_grid_are_reproduced(bits, sizes, symmetric, seed, exponent):
    group_size, num_columns = sizes
    generator = torch.Generator().manual_seed(seed)
    least = 1 if symmetric else 0
    groups = torch.randint(least, 2**bits, (3, num_columns // group_size, group_size), generator=generator)
    groups[..., 0], groups[..., 1] = least, 2**bits - 1
    codes = groups.view(3, num_columns).to(torch.uint8)
    scales = ((torch.rand(groups.shape[:2], generator=generator) + 0.5) * 2.0**exponent).half()
    minimums = (
        None if symmetric else -(scales * 2**bits * torch.rand(scales.shape, generator=generator)).half()
    )
    given_weight = from_codes(codes, scales, minimums, bits)
    weight = dequantize(given_weight)
    found = quantize(weight, bits, group_size, symmetric)
    assert torch.equal(dequantize(found), weight)
    assert torch.equal(found.scales, given_weight.scales) and torch.equal(found.codes, given_weight.codes)


def test_groups_of_one_value_are_reproduced():
    weight = torch.tensor([0.0, 1.5, -3.0]).repeat_interleave(32).view(1, 96)
    assert torch.equal(dequantize(quantize(weight, 4, 32)), weight)
    assert torch.equal(dequantize(quantize(torch.zeros(2, 32), 8, 32, symmetric=True)), torch.zeros(2, 32))


@pytest.mark.parametrize("kind", ("Q4_1", "Q8_0"))
def test_blocks_of_gguf_are_represented_exactly(kind, device):
    quantization = gguf.GGMLQuantizationType[kind]
    rows = gguf.quants.quantize(_weight(5, 192).numpy(), quantization)
    expected = torch.from_numpy(gguf.quants.dequantize(rows, quantization))
    weight = _from_gguf(rows, kind)
    assert torch.equal(dequantize(weight), expected)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(2))
    out = op.wna16_matmul(x.to(device), weight.to(device))
    assert tolerances.op_error(out.cpu(), x.double() @ expected.double().T) < tolerances.OPS[torch.float32]


def _from_gguf(rows: np.ndarray, kind: str) -> QuantizedWeight:
    blocks = torch.from_numpy(rows.copy()).view(len(rows), -1, 20 if kind == "Q4_1" else 34)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if kind == "Q8_0":
        codes = blocks[..., 2:].view(torch.int8).to(torch.int16) + 128
        return from_codes(codes.to(torch.uint8).flatten(1), scales, None, 8)
    minimums = blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    codes = torch.cat((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), dim=-1)
    return from_codes(codes.flatten(1), scales, minimums, 4)


@pytest.mark.parametrize(
    ("change", "factor", "offset"),
    [
        (("nearest.float() > values", "nearest.float() > 2 * values"), 1.0, 100.0),
        (("reached < top", "reached < 0 * top"), 2.0**-18, 0.0),
        (("2 * bits).transpose", "2 * bits).roll(1, 0).transpose"), 1.0, 0.0),
    ],
    ids=("minimum", "scale", "order"),
)
def test_broken_weights_are_noticed(change, factor, offset):
    weight = _weight(40, 128) * factor + offset
    assert _largest_step(weights, quantize(weight, 8, 32), weight) <= HALF
    changed = broken(weights, *change)
    assert not _largest_step(changed, changed.quantize(weight, 8, 32), weight) <= HALF
