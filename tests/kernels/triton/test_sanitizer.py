"""The check of addresses notices reads and writes beyond a tensor, and nothing else."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.triton import runtime

pytestmark = pytest.mark.skipif(not runtime.IS_INTERPRETED, reason="addresses are checked by the interpreter")


@triton.jit
def _copy(x_ptr, y_ptr, num_read, num_written, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + place * stride, mask=place < num_read, other=0.0)
    tl.store(y_ptr + place, values, mask=place < num_written)


def launch(num_read: int, num_written: int, stride: int = 1) -> torch.Tensor:
    whole = torch.arange(300.0)
    x, y = whole[100 : 100 + 30 * stride : stride], torch.empty(30)
    _copy[(2,)](x, y, num_read, num_written, stride, BLOCK=16)
    return y


@pytest.mark.parametrize("stride", (1, 3))
def test_what_lies_within_passes(stride: int):
    assert torch.equal(launch(30, 30, stride), torch.arange(30.0) * stride + 100)


@pytest.mark.parametrize("stride", (1, 3))
def test_a_read_of_one_element_too_many(stride: int):
    """It would find memory: the tensor is a view into a larger one."""
    with pytest.raises(Exception, match="load outside every tensor of the launch: 1 elements"):
        launch(31, 30, stride)


def test_a_write_of_two_elements_too_many():
    with pytest.raises(Exception, match="store outside every tensor of the launch: 2 elements"):
        launch(30, 32)
