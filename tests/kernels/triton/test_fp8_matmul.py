"""``fp8_matmul`` and ``quantize_fp8``: codes bit for bit, products against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.fp8_matmul import reference
from specdec_kernels.tuning import architecture, config_for

from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken

from specdec_kernels.fp8_matmul import triton as op  # isort: skip

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((0, 64, 32), (1, 130, 200), (2, 3, 32), (15, 64, 63), (16, 63, 65), (17, 128, 96), (33, 70, 1100))


@pytest.fixture(params=(False, True), ids=("native", "widened"))
def widen(request, device, monkeypatch):
    """Both ways to multiply, where the GPU has both."""
    configure(op, device, monkeypatch, widen=request.param)
    if not request.param and device.type == "cuda" and architecture(device) in ("sm_80", "gfx942"):
        pytest.skip("this GPU has no units for e4m3fn")
    return request.param


def configure(module, device, monkeypatch, **changes):
    arch = architecture(device)
    monkeypatch.setitem(module.CONFIGS, arch, replace(config_for(module.CONFIGS, arch), **changes))


def _inputs(shape, device, seed=0):
    """Codes and scales of activations and weights, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_features, num_columns = shape
    x, weight = (torch.randn(size, num_columns, generator=generator) for size in (num_rows, num_features))
    parts = (*reference.quantize_fp8(x), *reference.quantize_fp8(weight))
    return [part.to(device) for part in (*parts, torch.randn(num_features, generator=generator))]


def _error(module, inputs, dtype, **options):
    x, x_scale, weight, weight_scale, bias = inputs
    out = module.fp8_matmul(x, x_scale, weight, weight_scale, bias.to(dtype), dtype, **options)
    assert out.dtype == dtype and out.shape == (len(x), len(weight))
    wide = (x, x_scale.double(), weight, weight_scale.double(), bias.to(dtype).double())
    return tolerances.op_error(out, reference.fp8_matmul(*wide, torch.float64)) if out.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype, widen, device):
    assert _error(op, _inputs(shape, device), dtype) < tolerances.OPS[dtype]


@pytest.mark.parametrize("num_rows", (16, 40, 70))
@pytest.mark.parametrize("batch_invariant", (False, True))
def test_every_tile_agrees_with_float64(num_rows, batch_invariant, widen, device, monkeypatch):
    configure(op, device, monkeypatch, max_some=64)
    error = _error(op, _inputs((num_rows, 70, 300), device), torch.float32, batch_invariant=batch_invariant)
    assert error < tolerances.OPS[torch.float32]


def test_without_bias_in_bfloat16(device):
    x, x_scale, weight, weight_scale, _ = _inputs((3, 40, 64), device)
    out = op.fp8_matmul(x, x_scale, weight, weight_scale)
    expected = reference.fp8_matmul(x, x_scale.double(), weight, weight_scale.double(), dtype=torch.float64)
    assert out.dtype == torch.bfloat16
    assert tolerances.op_error(out, expected) < tolerances.OPS[torch.bfloat16]


def test_every_code_is_multiplied_exactly(widen, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[(codes & 0x7F) != 0x7F].view(E4M3)[None]
    one = torch.ones(1, device=device)
    identity = torch.eye(codes.shape[1], device=device).to(E4M3)
    out = op.fp8_matmul(codes, one, identity, one.expand(len(identity)).contiguous(), dtype=torch.float32)
    assert torch.equal(out, codes.float())


def test_nan_stays_nan_where_codes_are_widened(device, monkeypatch):
    configure(op, device, monkeypatch, widen=True)
    x, x_scale, weight, weight_scale, bias = _inputs((3, 40, 64), device)
    x.view(torch.uint8)[1, 5] = 0x7F
    out = op.fp8_matmul(x, x_scale, weight, weight_scale, bias)
    assert out.isnan().any(1).tolist() == [False, True, False] and out[1].isnan().all()


def test_a_row_has_the_same_bits_in_any_batch(device):
    x, x_scale, weight, weight_scale, bias = _inputs((70, 40, 1100), device)

    def multiply(part):
        codes, scale = x[part], x_scale[part]
        return op.fp8_matmul(codes, scale, weight, weight_scale, bias, torch.float32, batch_invariant=True)

    together = multiply(slice(None))
    parts = [(0, 1), (0, 16), (0, 33), (64, 70)]
    if not runtime.IS_INTERPRETED:  # numpy's products depend on the place in a tile, to the last bit
        parts += [(69, 70), (5, 21), (3, 36)]
    for part in (slice(*ends) for ends in parts):
        assert torch.equal(multiply(part), together[part])


def test_what_does_not_fit_is_refused(device):
    x, x_scale, weight, weight_scale, _ = _inputs((2, 3, 64), device)
    for wrong in (x[:, :32], x.float()):
        with pytest.raises(ValueError, match="quantize_fp8"):
            op.fp8_matmul(wrong, x_scale, weight, weight_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 64), (1, 1), (5, 63), (7, 576), (2, 3000)), ids=str)
def test_rows_are_quantised_to_the_bits_of_torch(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(3 * torch.randn(shape, generator=generator))
    _assert_quantised_alike(op, (torch.randn(shape, generator=generator) * size).to(device, dtype))


def test_ties_subnormals_zeros_and_what_is_not_finite(device):
    unit = 2.0**-9
    rows = torch.tensor(
        [
            [448.0, 0.5 * unit, 1.5 * unit, 2.5 * unit, -7.5 * unit, 7.4 * unit, 1e-30, -0.0],
            [448.0, 17.0, 19.0, -21.0, 447.0, 432.0, 431.9, 0.03125 * 1.0625],
            [0.0] * 8,
            [1e-38, -1e-39, 0, 0, 0, 0, 0, 0],
            [torch.nan, 1.0, -2.0, 0, 0, 0, 0, 0],
            [-torch.inf, 1.0, -2.0, 0, 0, 0, 0, 0],
        ],
        device=device,
    )
    _assert_quantised_alike(op, rows)


def _assert_quantised_alike(module, x):
    codes, scale = module.quantize_fp8(x)
    expected, expected_scale = reference.quantize_fp8(x)
    assert codes.shape == x.shape and codes.dtype == E4M3
    assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
    wide = codes.float().nan_to_num(999.0), expected.float().nan_to_num(999.0)
    assert torch.equal(*wide) and torch.equal(*(part.signbit() for part in wide))


@pytest.mark.parametrize(
    "change",
    [
        ("column < num_columns", "column <= num_columns"),
        ("sums *= tl.load(x_scale_ptr + row", "sums *= tl.load(x_scale_ptr + row // 2"),
        ("tl.load(weight_scale_ptr + feature", "tl.load(weight_scale_ptr + feature // 2"),
        ("65536.0", "256.0"),
        ("(codes & 0x80).to(tl.uint16) << 8", "(codes & 0x80).to(tl.uint16) << 7"),
    ],
    ids=("mask", "token's scale", "channel's scale", "two biases", "sign"),
)
def test_a_broken_product_is_noticed(change, device, monkeypatch):
    changed = broken(op, *change)
    configure(changed, device, monkeypatch, widen=True)
    error = _error(changed, _inputs((5, 9, 63), device), torch.float32)
    assert not error < tolerances.OPS[torch.float32]


@pytest.mark.parametrize(
    "change",
    [
        ("0x7FFFF + ((magnitude >> 20) & 1)", "0x7FFFF"),
        ("0x3C800000", "0x3C000000"),
        ("tl.minimum(normal, 0x7E)", "tl.minimum(normal, 0x7D)"),
        ("scale == 0.0, 1.0", "scale == 0.0, 2.0"),
        ("magnitude > 0x7F800000", "magnitude > 0x7FFFFFFF"),
    ],
    ids=("ties", "subnormals", "largest", "zeros", "nan"),
)
def test_a_broken_rounding_is_noticed(change, device):
    with pytest.raises(AssertionError):
        _assert_quantised_alike(broken(op, *change), _every_half(device))


def _every_half(device):
    """All float16 of one sign up to 448, under a scale of 1, one row of zeros, one with NaN."""
    values = torch.arange(0x5F01, dtype=torch.int16).view(torch.float16)[-16384:]
    rows = torch.zeros(3, len(values) + 1)
    rows[0, 1:], rows[0, 0] = values.float(), -448.0
    rows[2, 1] = torch.nan
    return rows.to(device)


def test_every_half_is_rounded_as_torch_does(device):
    _assert_quantised_alike(op, _every_half(device))
