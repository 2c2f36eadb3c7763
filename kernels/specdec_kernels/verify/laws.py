"""Device functions for the law of the next token at an entry whose children were rejected one after another.

Legend: V vocabulary, E entries of a row. A row's links are int32 [3, E]: first child, next sibling and parent of each
entry, 0 for none, since the root, entry 0, is nobody's child. A row's steps are float32 [E, 3]: the rejection of an
entry turns its parent's law into ((high + low) · target − share · draft)⁺. ``high + low`` is a float64 scale as two
float32, so that the difference has float32's relative accuracy however small it is; share is 1, or 0 (and the scale 1)
where the laws agree below the resolution and the target stands in for their difference.
"""

# pyright: reportArgumentType=false
# Inside kernels everything is a tensor or a constant of Triton's, which its own annotations do not show.

from __future__ import annotations

import triton
import triton.language as tl

NO_MASS = tl.constexpr(1e-30)
"""Less mass than this counts as none: a scale by its inverse still fits float32."""


@triton.jit
def entry_of(values, entry, place):
    """``values`` [E] at ``place``."""
    return tl.sum(tl.where(entry == place, values, 0.0), axis=0)


@triton.jit
def residual(weights, draft, high, low, share):
    """((high + low) · weights − share · draft)⁺; NaN stays NaN."""
    difference = tl.fma(weights, low, tl.fma(weights, high, -share * draft))
    return tl.where(difference < 0.0, 0.0, difference)


@triton.jit
def law_tile(
    target_ptr,
    draft_ptr,
    tokens_ptr,
    links_ptr,
    steps_ptr,
    first,
    end,
    column,
    num_columns,
    num_entries,
    HAS_DRAFT: tl.constexpr,
):
    """Unnormalised laws at ``column`` after the siblings from ``first`` up to ``end``, not included, were rejected.

    Args:
        target_ptr, draft_ptr: laws [V] after their parent; the draft's is not read where there is no sibling.
        tokens_ptr: int64, that of entry e at e − 1.
        links_ptr, steps_ptr: of the row.

    Returns:
        The target's law; what stands in for it if it has no mass; the draft's law without the rejected tokens.
    """
    inside = column < num_columns
    weights = tl.load(target_ptr + column, mask=inside, other=0.0)
    before = weights
    draft = weights
    if HAS_DRAFT:
        needed = tl.where(first > 0, num_columns, 0)
        draft = tl.load(draft_ptr + column, mask=column < needed, other=0.0)
    child = first
    while child != end:
        token = tl.load(tokens_ptr + child - 1)
        if HAS_DRAFT:
            step = steps_ptr + 3 * child
            before = weights
            weights = residual(weights, draft, tl.load(step), tl.load(step + 1), tl.load(step + 2))
            draft = tl.where(column == token, 0.0, draft)
        else:
            weights = tl.where(column == token, 0.0, weights)
        child = tl.load(links_ptr + num_entries + child)
    return weights, before, draft


@triton.jit
def reject(
    target_ptr,
    draft_ptr,
    tokens_ptr,
    links_ptr,
    steps_ptr,
    first,
    lost,
    scale,
    is_mass_needed,
    num_columns,
    num_entries,
    BLOCK: tl.constexpr,
):
    """Reject ``lost``, a sibling of ``first``, with a float64 ``scale``, and note its step.

    Returns:
        The masses, float64, of both laws without it; 0 where they are not needed, as the sampling kernels find the
        mass of the last law themselves.
    """
    token = tl.load(tokens_ptr + lost - 1)
    high = scale.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    if is_mass_needed:
        for start in range(0, num_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            weights, _, draft = law_tile(
                target_ptr,
                draft_ptr,
                tokens_ptr,
                links_ptr,
                steps_ptr,
                first,
                lost,
                column,
                num_columns,
                num_entries,
                True,
            )
            mass += residual(weights, draft, high, low, 1.0)
            rest += tl.where(column == token, 0.0, draft)
    target_sum = tl.sum(mass, axis=0)
    agree = is_mass_needed & (target_sum < NO_MASS)
    step = steps_ptr + 3 * lost
    tl.store(step, tl.where(agree, 1.0, high))
    tl.store(step + 1, tl.where(agree, 0.0, low))
    tl.store(step + 2, tl.where(agree, 0.0, 1.0))
    tl.debug_barrier()  # other threads read the step
    return target_sum.to(tl.float64), tl.sum(rest, axis=0).to(tl.float64)
