"""Norm, rotation and the write to the cache on a GPU, in one launch.

A program takes some query heads of one token, or some key-value heads of one token: it reads each number once and
writes it once. Codes of eight-bit floats are made from the bits of float32, because Triton converts to them on some
architectures only; caches of them are bytes to the kernel.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.rope_store_kv.reference import LARGEST_CODE, SMALLEST_PEAK, require_scales
from specdec_kernels.tuning import CompileCase, architecture, config_for

_SMALLEST_PEAK = tl.constexpr(SMALLEST_PEAK)


@dataclass(frozen=True, slots=True)
class Config:
    """``heads`` a program at most. Eight numbers of 16 bits a thread make loads of 128 bits."""

    heads: int = 8
    elements_per_warp: int = 256


CONFIGS = {
    "default": Config(),
    "gfx942": Config(elements_per_warp=512),  # warps of 64 threads
}


@triton.jit
def _rope_store_kv(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    positions_ptr,
    inv_freq_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_norm_ptr,
    k_norm_ptr,
    norm_eps,
    norm_offset,
    num_heads,
    num_kv_heads,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    num_query_groups = tl.cdiv(num_heads, HEADS)
    column = tl.arange(0, BLOCK)
    angle = tl.load(positions_ptr + token).to(tl.float32) * tl.load(
        inv_freq_ptr + column, mask=column < HALF, other=0.0
    )
    cos, sin = _cos_sin(angle)
    cos, sin = cos[None, :], sin[None, :]
    if group < num_query_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        q_ptr += token * q_stride
        first, second = _load(q_ptr, head, q_head_stride, num_heads, HALF, BLOCK)
        if HAS_NORM:
            first, second = _norm(first, second, q_norm_ptr, norm_eps, norm_offset, HALF, BLOCK)
        first, second = _rotate(first, second, cos, sin)
        _store(first, second, out_ptr, token * num_heads + head, head < num_heads, HALF, BLOCK)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            head = (group - num_query_groups) * HEADS + tl.arange(0, HEADS)
            vector, inside = slot * num_kv_heads + head, head < num_kv_heads
            k_ptr += token * k_stride
            first, second = _load(k_ptr, head, k_head_stride, num_kv_heads, HALF, BLOCK)
            if HAS_NORM:
                first, second = _norm(first, second, k_norm_ptr, norm_eps, norm_offset, HALF, BLOCK)
            first, second = _rotate(first, second, cos, sin)
            _quantise(first, second, k_cache_ptr, k_scale_ptr, vector, inside, HALF, BLOCK, LARGEST)
            v_ptr += token * v_stride
            first, second = _load(v_ptr, head, v_head_stride, num_kv_heads, HALF, BLOCK)
            _quantise(first, second, v_cache_ptr, v_scale_ptr, vector, inside, HALF, BLOCK, LARGEST)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of float32 to 1e-7, without the library's way of large angles through local memory."""
    # The nearest multiple of pi / 2, right below 6e6, is subtracted in three parts, the first two so short that what
    # they leave is exact.
    quarters = (angle * 0.6366197723675814 + 12582912.0) - 12582912.0
    rest = tl.fma(quarters, -1.5703125, angle)
    rest = tl.fma(quarters, -0.0004825592041015625, rest)
    rest = tl.fma(quarters, -1.2675907950567314e-06, rest)
    # Taylor series within pi / 4.
    t = rest * rest
    sin = rest * (1 - t * (1.0 / 6) * (1 - t * (1.0 / 20) * (1 - t * (1.0 / 42) * (1 - t * (1.0 / 72)))))
    cos = 1 - t * 0.5 * (
        1 - t * (1.0 / 12) * (1 - t * (1.0 / 30) * (1 - t * (1.0 / 56) * (1 - t * (1.0 / 90))))
    )
    quadrant = quarters.to(tl.int32)
    is_odd = (quadrant & 1) != 0
    cos, sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    return tl.where(((quadrant + 1) & 2) != 0, -cos, cos), tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def _load(ptr, head, head_stride, num_heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of each head's vector, [HEADS, BLOCK] each."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < num_heads)[:, None] & (column < HALF)
    ptr += head[:, None] * head_stride + column
    return tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + HALF, mask=mask, other=0.0)


@triton.jit
def _store(first, second, ptr, vector, inside, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Write both halves of each head's vector to the vectors of a contiguous tensor with these indices."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (column < HALF)
    ptr += vector[:, None] * (2 * HALF) + column
    tl.store(ptr, first, mask=mask)
    tl.store(ptr + HALF, second, mask=mask)


@triton.jit
def _norm(first, second, weight_ptr, eps, offset, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """As ``rms_norm`` over each vector, in the dtype of the input."""
    column = tl.arange(0, BLOCK)
    first_weight = tl.load(weight_ptr + column, mask=column < HALF, other=0.0).to(tl.float32) + offset
    second_weight = tl.load(weight_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32) + offset
    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(first_wide * first_wide + second_wide * second_wide, axis=1)
    scale = (1.0 / tl.sqrt_rn(squares / (2 * HALF) + eps))[:, None]
    return (
        (first_wide * scale * first_weight[None, :]).to(first.dtype),
        (second_wide * scale * second_weight[None, :]).to(second.dtype),
    )


@triton.jit
def _rotate(first, second, cos, sin):
    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    return (
        (first_wide * cos - second_wide * sin).to(first.dtype),
        (second_wide * cos + first_wide * sin).to(second.dtype),
    )


@triton.jit
def _quantise(
    first,
    second,
    cache_ptr,
    scale_ptr,
    vector,
    inside,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write vectors to the cache, with a scale for each if ``LARGEST`` is not zero."""
    if LARGEST:
        first, second = first.to(tl.float32), second.to(tl.float32)
        peak = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
        scale = tl.maximum(peak, _SMALLEST_PEAK) / LARGEST
        tl.store(scale_ptr + vector, scale, mask=inside)
        first, second = _encode(first / scale[:, None], LARGEST), _encode(second / scale[:, None], LARGEST)
    _store(first, second, cache_ptr, vector, inside, HALF, BLOCK)


@triton.jit
def _encode(x, LARGEST: tl.constexpr):
    """float32 within ±LARGEST to the nearest code, ties to even: an integer, or the bits of a float8_e4m3fn."""
    if LARGEST == 127:
        # float32 of this size have no fraction bits left.
        code = ((x + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Three mantissa bits stay, and the exponent's bias falls from 127 to 7.
        code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 codes are evenly spaced, by 2**-9.
        even = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
        code = tl.minimum(tl.where(size < 0x3C800000, even, code), 0x7F)
        code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


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
    """As ``reference.rope_store_kv``."""
    require_scales(k_cache, k_scale, v_scale)
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "heads' vectors are consecutive in memory"
    assert k_cache.is_contiguous() and v_cache.is_contiguous(), "slots are consecutive in memory"
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not num_tokens:
        return out
    num_kv_heads = k.shape[1]
    is_quantised = k_cache.dtype in LARGEST_CODE
    if k_cache.dtype == torch.float8_e4m3fn:
        caches = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    else:
        caches = k_cache, v_cache
    config = config_for(CONFIGS, architecture(q.device))
    heads, block, num_warps = _launch(num_heads, num_kv_heads, head_dim, config)
    has_norm = q_norm is not None and k_norm is not None
    _rope_store_kv[(num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads))](
        *(q, k, v, out, positions, inv_freq, *caches, slot_mapping),
        *((k_scale, v_scale) if is_quantised else (inv_freq, inv_freq)),
        *((q_norm, k_norm) if has_norm else (q, q)),
        norm_eps,
        norm_offset,
        num_heads,
        num_kv_heads,
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        HALF=head_dim // 2,
        BLOCK=block,
        HEADS=heads,
        HAS_NORM=has_norm,
        LARGEST=int(LARGEST_CODE.get(k_cache.dtype, 0)),
        num_warps=num_warps,
    )
    return out


def _launch(num_heads: int, num_kv_heads: int, head_dim: int, config: Config) -> tuple[int, int, int]:
    """Heads a program, columns of half a head, warps."""
    heads = min(triton.next_power_of_2(max(num_heads, num_kv_heads)), config.heads)
    block = triton.next_power_of_2(head_dim // 2)
    return heads, block, min(max(heads * block // config.elements_per_warp, 1), 8)


_STRIDES = ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride")


def compile_cases(arch: str) -> list[CompileCase]:
    """What decoders launch on ``arch``: heads of 64, 80, 128 (with norms) and 256, caches of 16 and of 8 bits."""
    cases: list[CompileCase] = []
    for num_heads, num_kv_heads, head_dim, has_norm in (
        (9, 3, 64, False),
        (32, 32, 80, False),
        (32, 8, 128, True),
        (16, 8, 256, True),
    ):
        heads, block, num_warps = _launch(num_heads, num_kv_heads, head_dim, config_for(CONFIGS, arch))
        for cache, largest in (("bf16", 0), ("i8", 127), ("u8", 448)):
            signature = _signature(cache)
            cases.append(
                CompileCase(
                    op="rope_store_kv",
                    name=f"{cache}, {num_heads}/{num_kv_heads} x {head_dim}{', norms' if has_norm else ''}",
                    kernel=_rope_store_kv,
                    signature=signature,
                    constants={
                        "HALF": head_dim // 2,
                        "BLOCK": block,
                        "HEADS": heads,
                        "HAS_NORM": has_norm,
                        "LARGEST": largest,
                    },
                    aligned=(
                        *(name for name, kind in signature.items() if kind.startswith("*")),
                        *_STRIDES,
                        *(("num_heads",) if num_heads % 16 == 0 else ()),
                        *(("num_kv_heads",) if num_kv_heads % 16 == 0 else ()),
                    ),
                    num_warps=num_warps,
                    needs_wide_loads=True,
                )
            )
    return cases


def _signature(cache: str) -> dict[str, str]:
    """Types of all arguments with activations in bfloat16 and a cache of this type."""
    return {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
        "positions_ptr": "*i64",
        "inv_freq_ptr": "*fp32",
        "k_cache_ptr": f"*{cache}",
        "v_cache_ptr": f"*{cache}",
        "slots_ptr": "*i64",
        "k_scale_ptr": "*fp32",
        "v_scale_ptr": "*fp32",
        "q_norm_ptr": "*bf16",
        "k_norm_ptr": "*bf16",
        "norm_eps": "fp32",
        "norm_offset": "fp32",
        **dict.fromkeys(("num_heads", "num_kv_heads", *_STRIDES), "i32"),
        **dict.fromkeys(("HALF", "BLOCK", "HEADS", "HAS_NORM", "LARGEST"), "constexpr"),
    }
