"""Weight-only quantised linear layer: weights of 4 or 8 bits, activations as they come."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from specdec_kernels.wna16_matmul.weights import QuantizedWeight, dequantize


def wna16_matmul(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """``x @ dequantize(weight).T + bias`` with the weights rounded to the dtype of ``x``.

    Args:
        x: [..., K].
        weight: of shape [N, K].
        bias: [N].
        batch_invariant: Triton's result for a row has the same bits whatever the number of rows.

    Returns:
        [..., N], in the dtype of ``x``.
    """
    return F.linear(x, dequantize(weight).to(x.dtype), bias)
