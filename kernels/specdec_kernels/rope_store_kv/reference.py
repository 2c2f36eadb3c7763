"""Query-key norms, rotary embedding and the write to a paged KV cache, which may be quantised, as one operation.

Norms: Dehghani et al., arXiv 2302.05442, in the RMS form of Qwen3 and Gemma 3. Rotation: see ``rope``. Scales for each
token and head: Hooper et al., arXiv 2401.18079, section 3.1, call this per-token quantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.rms_norm.reference import rms_norm
from specdec_kernels.rope.reference import rope

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes of quantised caches, and the code that a vector's largest component gets."""

SMALLEST_PEAK = 1e-30
"""Vectors whose components are all smaller are scaled as if one had this size, so that zeros stay zeros."""


def rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    """Normalise and rotate queries and keys, and write keys and values to their slots.

    Norm and rotation are computed in float32; between them, and before keys are stored, numbers are rounded to the
    dtype of the inputs.

    Legend: T tokens, G query heads, H key-value heads, D head dimension, even.

    Args:
        q: [T, G, D]. k, v: [T, H, D]. Slices of one fused projection are taken as they are.
        positions: int64 [T].
        inv_freq: float32 [D / 2], radians per position.
        k_cache, v_cache: [num_blocks, block_size, H, D], contiguous, in a floating dtype, int8 or float8_e4m3fn.
        slot_mapping: int64 [T], ``block * block_size + offset``; a token with a negative slot is not stored.
        k_scale, v_scale: float32 [num_blocks, block_size, H], contiguous, which caches in int8 or float8_e4m3fn need:
            a stored number is ``code * scale``.
        q_norm, k_norm: [D], weights of an RMS norm over each head, both or neither; with ``norm_eps`` and
            ``norm_offset`` as in ``rms_norm``.

    Returns:
        The rotated queries, [T, G, D].

    Raises:
        ValueError: a quantised cache without scales.
    """
    require_scales(k_cache, k_scale, v_scale)
    if q_norm is not None and k_norm is not None:
        q, k = (rms_norm(x, weight, norm_eps, norm_offset) for x, weight in ((q, q_norm), (k, k_norm)))  # type: ignore[misc]
    q, k = rope(q, k, positions, inv_freq)
    is_stored = slot_mapping >= 0
    slots = slot_mapping[is_stored]
    for new, cache, scale in ((k[is_stored], k_cache, k_scale), (v[is_stored], v_cache, v_scale)):
        if scale is None:
            codes = new.to(cache.dtype)
        else:
            codes, scales = quantize_kv(new, cache.dtype)
            scale.view(-1, scale.shape[-1]).index_copy_(0, slots, scales)
        # As bytes: not every operation knows every dtype.
        stored = cache.view(-1, *cache.shape[2:]).view(torch.uint8)
        stored.index_copy_(0, slots, codes.view(torch.uint8))
    return q


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of ``dtype``, [..., D], and a float32 scale [...] for each vector of ``x`` [..., D]."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = wide.abs().amax(-1).clamp(min=SMALLEST_PEAK) / LARGEST_CODE[dtype]
    codes = wide / scale[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale.float()


def require_scales(cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise if ``cache`` needs scales that are missing."""
    if cache.dtype in LARGEST_CODE and (k_scale is None or v_scale is None):
        raise ValueError(
            f"a KV cache in {cache.dtype} needs k_scale and v_scale, float32 [num_blocks, block_size, num_kv_heads]"
        )
