"""Linear layer on float8 (e4m3fn, Micikevicius et al., arXiv 2209.05433) with a scale for each row of both operands."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest e4m3fn number."""


def fp8_matmul(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> Tensor:
    """``(x * x_scale) @ (weight * weight_scale).T + bias``, summed in float32 (float64 if that is ``dtype``).

    Args:
        x: float8_e4m3fn [M, K].
        x_scale: float32 [M], of each token.
        weight: float8_e4m3fn [N, K].
        weight_scale: float32 [N], of each output channel.
        bias: [N].
        dtype: of the result.
        batch_invariant: Triton's result for a row has the same bits whatever the number of rows.

    Returns:
        [M, N].
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = x.to(wide) @ weight.to(wide).T * weight_scale * x_scale[:, None]
    return (out if bias is None else out + bias).to(dtype)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every row such that its largest magnitude becomes 448, and round to float8.

    Args:
        x: [M, K], K > 0: activations, or weights with an output channel in each row.

    Returns:
        Codes, float8_e4m3fn [M, K], and scales, float32 [M]: ``x`` is near ``codes * scales[:, None]``. A row of zeros
        has scale 1; one with a number that is not finite has at least one NaN.
    """
    x = x.float()
    scale = x.abs().amax(-1) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale[:, None]).to(torch.float8_e4m3fn), scale
