"""``rms_norm``: every shape, dtype and option against float64."""

from __future__ import annotations

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.rms_norm.reference import rms_norm as reference

from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.broken import broken

from specdec_kernels.rms_norm import triton as op  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (3, 63), (7, 576), (2, 5, 128), (4, 500), (0, 64))


def _inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return x, torch.randn(shape[-1], generator=generator).to(device, dtype), residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_agrees_with_float64(shape, dtype, offset, device):
    x, weight, _ = _inputs(shape, dtype, device)
    out = op.rms_norm(x, weight, 1e-5, offset)
    assert out.dtype == dtype and out.shape == x.shape
    if x.numel() > 1:
        expected = reference(x.double(), weight.double(), 1e-5, offset)
        assert tolerances.op_error(out, expected) < tolerances.OPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_is_added_first_and_the_sum_returned(dtype, device):
    x, weight, residual = _inputs((5, 123), dtype, device)
    out, total = op.rms_norm(x, weight, 1e-5, residual=residual)
    assert tolerances.op_error(total, x.double() + residual.double()) < tolerances.OPS[dtype]
    expected = reference(total.double(), weight.double(), 1e-5)
    assert tolerances.op_error(out, expected) < tolerances.OPS[dtype]


@pytest.mark.parametrize(
    "change",
    [("/ num_columns + eps", "+ eps"), ("(weight + offset)", "weight"), ("wide * wide", "wide * wide * 2.0")],
    ids=("mean", "offset", "square"),
)
def test_a_broken_copy_is_noticed(change, device):
    x, weight, _ = _inputs((3, 63), torch.float32, device)
    expected = reference(x.double(), weight.double(), 1e-5, 1.0)
    out = broken(op, *change).rms_norm(x, weight, 1e-5, 1.0)
    assert not tolerances.op_error(out, expected) < tolerances.OPS[torch.float32]
