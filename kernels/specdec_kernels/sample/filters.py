"""What top-k, top-p and min-p leave of a row of logits, in Triton, without sorting it.

A row is seen as gaps: how far each logit lies below the row's peak, at least 0. The bits of such floats, read as
integers, are in the same order, so the gap of the last token kept is found by search over integers, each step a pass
over the row. Masses are summed as integers, in units of 2**-44. Such sums do not depend on the order of adding: a
larger set of tokens never has a smaller mass, and no token of probability zero can be drawn.
"""

# pyright: reportArgumentType=false
# Constants of kernels are plain numbers where they are called.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_logits(logits_ptr, first, vocab_size, BLOCK: tl.constexpr):
    """Logits ``first`` and on, float32 [BLOCK]; -inf beyond the row, +inf for NaN."""
    column = first + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def find_peak(logits_ptr, vocab_size, BLOCK: tl.constexpr):
    """The largest logit and the lowest token that has it."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), 0, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        x = load_logits(logits_ptr, first, vocab_size, BLOCK)
        token = tl.where(x > best, first + tl.arange(0, BLOCK), token)
        best = tl.maximum(best, x)
    peak = tl.max(best, axis=0)
    return peak, tl.min(tl.where(best == peak, token, vocab_size), axis=0)


@triton.jit
def distance(x, peak, temperature):
    """Gaps over the temperature, exactly as ``reference`` divides."""
    return tl.div_rn(peak - x, temperature)


@triton.jit
def fixed(weight):
    """Weights in [0, 1] in units of 2**-44, int64.

    Shifts, since conversions to integers of 64 bits are slow on GPUs that are made for graphics.
    """
    bits = weight.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64) << 21
    return mantissa >> tl.minimum(127 - (bits >> 23), 63).to(tl.int64)


@triton.jit
def kept_weights(x, peak, temperature, limit):
    """Weights of tokens, ``fixed``; 0 for those at more than ``limit`` from the peak."""
    d = distance(x, peak, temperature)
    return tl.where(d <= limit, fixed(tl.exp(-d)), 0)


@triton.jit
def kept_mass(logits_ptr, peak, temperature, limit, vocab_size, BLOCK: tl.constexpr):
    """The sum of ``kept_weights``."""
    mass = tl.full((BLOCK,), 0, tl.int64)
    for first in range(0, vocab_size, BLOCK):
        x = load_logits(logits_ptr, first, vocab_size, BLOCK)
        mass += kept_weights(x, peak, temperature, limit)
    return tl.sum(mass, axis=0)


@triton.jit
def _least_gap(logits_ptr, peak, rate, needed, vocab_size, BLOCK: tl.constexpr, IS_MASS: tl.constexpr):
    """The least gap within which there are ``needed`` (float64) tokens, or that mass of them.

    Each pass over the row divides what is left of the range of gaps, as integers, by four.
    """
    low = tl.full((), -1, tl.int32)  # too few
    high = tl.full((), 0x7F800000, tl.int32)  # enough: all are within infinity
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        near, middle, far = low + step, low + 2 * step, low + 3 * step
        in_near = tl.full((BLOCK,), 0, tl.int64 if IS_MASS else tl.int32)
        in_middle, in_far = in_near, in_near
        for first in range(0, vocab_size, BLOCK):
            x = load_logits(logits_ptr, first, vocab_size, BLOCK)
            gap = (peak - x).to(tl.int32, bitcast=True)
            # exp2 of a product: a search takes too many passes to divide in each.
            amount = fixed(tl.exp2((x - peak) * rate)) if IS_MASS else tl.full((BLOCK,), 1, tl.int32)
            in_near += tl.where(gap <= near, amount, 0)
            in_middle += tl.where(gap <= middle, amount, 0)
            in_far += tl.where(gap <= far, amount, 0)
        if tl.sum(in_near, axis=0).to(tl.float64) >= needed:
            high = near
        elif tl.sum(in_middle, axis=0).to(tl.float64) >= needed:
            low, high = near, middle
        elif tl.sum(in_far, axis=0).to(tl.float64) >= needed:
            low, high = middle, far
        else:
            low = far
    return high.to(tl.float32, bitcast=True)


@triton.jit
def _mass_within(logits_ptr, peak, temperature, rate, limit, vocab_size, BLOCK: tl.constexpr):
    """The mass, as ``_least_gap`` counts it, of tokens at no more than ``limit`` from the peak."""
    mass = tl.full((BLOCK,), 0, tl.int64)
    for first in range(0, vocab_size, BLOCK):
        x = load_logits(logits_ptr, first, vocab_size, BLOCK)
        mass += tl.where(distance(x, peak, temperature) <= limit, fixed(tl.exp2((x - peak) * rate)), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def find_limit(
    logits_ptr, peak, temperature, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, BLOCK: tl.constexpr
):
    """The largest ``distance`` of a token that all filters keep, infinity without any; nothing for greedy rows."""
    limit = tl.full((), float("inf"), tl.float32)
    rate = tl.minimum(1.4426950408889634 / temperature, 1e38)  # finite, so that a gap of 0 has a weight of 1
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
        if (temperature > 0) & (top_k > 0) & (top_k < vocab_size):
            needed = top_k.to(tl.float64)
            gap = _least_gap(logits_ptr, peak, rate, needed, vocab_size, BLOCK, False)
            limit = tl.div_rn(gap, temperature)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
        if (temperature > 0) & (top_p < 1):
            mass = _mass_within(logits_ptr, peak, temperature, rate, limit, vocab_size, BLOCK)
            needed = top_p.to(tl.float64) * mass.to(tl.float64)
            gap = _least_gap(logits_ptr, peak, rate, needed, vocab_size, BLOCK, True)
            limit = tl.minimum(limit, tl.div_rn(gap, temperature))
    if min_p_ptr is not None:
        # In float64, since the logarithm of float32 is only approximate on a GPU.
        least = tl.log(tl.load(min_p_ptr + row).to(tl.float64))
        limit = tl.minimum(limit, -least.to(tl.float32))
    return limit


@triton.jit
def is_filtered(temperature, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size):
    """Whether a filter may drop any token of the row."""
    is_on = tl.full((), 0, tl.int1)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
        is_on |= (top_k > 0) & (top_k < vocab_size)
    if top_p_ptr is not None:
        is_on |= tl.load(top_p_ptr + row) < 1
    if min_p_ptr is not None:
        is_on |= tl.load(min_p_ptr + row) > 0
    return is_on & (temperature > 0)
