"""Rotary position embedding, Su et al., arXiv 2104.09864, in the half-split layout of Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, computed in float32.

    Dimension i is paired with i + D / 2 and turned by ``position * inv_freq[i]``.

    Args:
        q, k: [T, num_heads, D] and [T, num_kv_heads, D].
        positions: int64 [T].
        inv_freq: float32 [D / 2], radians per position.

    Returns:
        The rotated queries and keys, in the dtype of each.
    """
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
