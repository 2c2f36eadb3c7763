"""Root-mean-square normalisation, Zhang & Sennrich, arXiv 1910.07467, equation 4."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / rms(x) * (weight + offset)`` over the last dimension, computed in float32.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
        offset: added to the weight (1.0 for Gemma).
        residual: [..., D]; when given, ``x + residual`` is normalised.

    Returns:
        The normalised tensor, in the dtype of ``x``; with ``residual`` also the sum that was normalised.
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * (weight.float() + offset)).to(x.dtype)
    return normed if residual is None else (normed, x)
