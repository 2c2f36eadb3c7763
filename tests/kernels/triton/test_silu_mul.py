"""``silu_mul`` and ``gelu_mul``: every shape and dtype against float64."""

from __future__ import annotations

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.silu_mul import reference

from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.broken import broken

from specdec_kernels.silu_mul import triton as op  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 2), (3, 126), (2, 5, 64), (7, 4096), (2, 2500), (1, 1, 6), (0, 64), (3, 0))
NAMES = ("silu_mul", "gelu_mul")


def _gate_up(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype, name, device):
    gate_up = _gate_up(shape, dtype, device)
    out = getattr(op, name)(gate_up)
    assert out.dtype == dtype and out.shape == (*shape[:-1], shape[-1] // 2)
    expected = getattr(reference, name)(gate_up.double())
    if out.numel() > 1:
        assert tolerances.op_error(out, expected) < tolerances.OPS[dtype]
    elif out.numel():
        assert torch.allclose(out.double(), expected, rtol=tolerances.OPS[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_large_gates_give_no_nan(name, device):
    gate = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38], device=device)
    out = getattr(op, name)(torch.cat((gate, torch.ones_like(gate)))[None])
    assert torch.allclose(out[0], gate.clamp(min=0))


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_of_a_larger_tensor(name, device):
    whole = _gate_up((5, 300), torch.float32, device)
    expected = getattr(reference, name)(whole[1:4, 20:120].double())
    assert tolerances.op_error(getattr(op, name)(whole[1:4, 20:120]), expected) < 2e-5


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("silu_mul", "tl.sigmoid(slope)", "tl.sigmoid(-slope)"),
        ("silu_mul", "gate * tl.sigmoid(slope) * up", "tl.sigmoid(slope) * up"),
        ("silu_mul", "gate_ptr + num_columns + column", "gate_ptr + column"),
        ("silu_mul", "tl.program_id(1) * BLOCK + ", ""),
        ("gelu_mul", "0.044715", "0.045"),
        ("gelu_mul", "1.5957691216057308", "1.702"),
        ("gelu_mul", "row * 2 * num_columns", "row * num_columns"),
    ],
)
def test_a_broken_copy_is_noticed(name, old, new, device):
    gate_up = _gate_up((3, 2500), torch.float32, device)
    out = getattr(broken(op, old, new), name)(gate_up)
    assert not tolerances.op_error(out, getattr(reference, name)(gate_up.double())) < 2e-5
