"""The matrix product of training, in shapes that come again.

Packed batches have another number of rows each time, and on a CPU torch's bfloat16 products (oneDNN) compile a kernel
for every new shape: 4 to 15 ms against 1 to 2 ms of computing, in each step, forwards and backwards. Rows of zeros up
to a multiple of 64 leave a few shapes, whose kernels are kept.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS: Final = 64
"""Rows are padded to a multiple of it."""


def padded(count: int) -> int:
    """The number of rows that stands for ``count``."""
    return -count % ROWS + count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of x [N, in], [N, out]; padded where gradients are wanted, else as it stands."""
    if not torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    count = x.shape[0]
    return F.linear(F.pad(x, (0, 0, 0, padded(count) - count)), weight, bias)[:count]


def product_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with ``weight`` are computed in: autocast's choice, where it is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
