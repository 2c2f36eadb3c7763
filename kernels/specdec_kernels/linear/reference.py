"""Dense linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; Triton's gives every row the same bits whatever the number of rows.

    Args:
        x: [..., K].
        weight: [N, K], in the dtype of ``x``.
        bias: [N].

    Returns:
        [..., N], in the dtype of ``x``.
    """
    return F.linear(x, weight, bias)
