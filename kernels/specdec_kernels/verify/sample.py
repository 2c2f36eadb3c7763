"""Kernels that draw the token after the last accepted entry, all of whose children have been rejected."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# Inside kernels everything is a tensor or a constant of Triton's, which its own annotations do not show.

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.verify.laws import NO_MASS, law_tile


@triton.jit(do_not_specialize=["num_entries"])
def tile_sums(
    tokens_ptr,
    logit_start_ptr,
    draft_start_ptr,
    target_ptr,
    draft_ptr,
    links_ptr,
    steps_ptr,
    last_ptr,
    sums_ptr,
    num_columns,
    num_entries,
    TILE: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
):
    """Mass of one tile of a row's vocabulary: of the next token's law, and of what stands in if that is empty."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    last = tl.load(last_ptr + row)
    if last >= 0:
        links_ptr += row * 3 * num_entries
        draft_row = 0
        if HAS_DRAFT:
            draft_row = tl.load(draft_start_ptr + row) + last
        weights, before, _ = law_tile(
            target_ptr + (tl.load(logit_start_ptr + row) + last) * num_columns,
            draft_ptr + draft_row * num_columns,
            tokens_ptr + row * (num_entries - 1),
            links_ptr,
            steps_ptr + row * 3 * num_entries,
            tl.load(links_ptr + last),
            0,
            tile * TILE + tl.arange(0, TILE),
            num_columns,
            num_entries,
            HAS_DRAFT,
        )
        place = 2 * (row * tl.num_programs(1) + tile)
        tl.store(sums_ptr + place, tl.sum(weights, axis=0))
        tl.store(sums_ptr + place + 1, tl.sum(before, axis=0))


@triton.jit(do_not_specialize=["num_entries", "num_tiles"])
def pick(
    tokens_ptr,
    logit_start_ptr,
    draft_start_ptr,
    target_ptr,
    draft_ptr,
    uniforms_ptr,
    links_ptr,
    steps_ptr,
    last_ptr,
    sums_ptr,
    next_ptr,
    num_columns,
    num_entries,
    num_tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
):
    """Inverse CDF, first over the tiles' masses and then inside one tile, in float64; −1 if there is no law.

    Parallel sums need not grow from one token to the next, so a token must also have mass of its own: a token of
    probability 0 is never drawn.
    """
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(last_ptr + row)
    token = tl.full([], -1, tl.int32)
    if last >= 0:
        tile = tl.arange(0, TILES)
        place = sums_ptr + 2 * (row * num_tiles + tile)
        masses = tl.load(place, mask=tile < num_tiles, other=0.0).to(tl.float64)
        stand_in = tl.sum(masses, axis=0) < NO_MASS
        if stand_in:
            masses = tl.load(place + 1, mask=tile < num_tiles, other=0.0).to(tl.float64)
        total = tl.sum(masses, axis=0)
        if (total > 0.0) & (total < float("inf")):
            goal = tl.load(uniforms_ptr + row).to(tl.float64) * total
            chosen, below = first_above(masses, tile, goal)
            links_ptr += row * 3 * num_entries
            draft_row = 0
            if HAS_DRAFT:
                draft_row = tl.load(draft_start_ptr + row) + last
            column = chosen * TILE + tl.arange(0, TILE)
            weights, before, _ = law_tile(
                target_ptr + (tl.load(logit_start_ptr + row) + last) * num_columns,
                draft_ptr + draft_row * num_columns,
                tokens_ptr + row * (num_entries - 1),
                links_ptr,
                steps_ptr + row * 3 * num_entries,
                tl.load(links_ptr + last),
                0,
                column,
                num_columns,
                num_entries,
                HAS_DRAFT,
            )
            weights = tl.where(stand_in, before, weights).to(tl.float64)
            token, _ = first_above(weights, column, goal - below)
    tl.store(next_ptr + row, token.to(tl.int64))


@triton.jit
def first_above(weights, place, goal):
    """The first of ``place`` with mass and cumulative ``weights`` above ``goal``; else the last with mass.

    Also the mass of the places before it.
    """
    beyond: tl.constexpr = 2147483647
    has_mass = weights > 0.0
    is_above = has_mass & (tl.cumsum(weights, axis=0) > goal)
    chosen = tl.min(tl.where(is_above, place, beyond), axis=0)
    chosen = tl.where(chosen == beyond, tl.max(tl.where(has_mass, place, -1), axis=0), chosen)
    return chosen, tl.sum(tl.where(place < chosen, weights, 0.0), axis=0)
