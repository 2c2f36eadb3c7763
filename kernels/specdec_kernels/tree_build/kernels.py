"""The kernels of ``tree_build``: ``grow``, ``choose`` and ``compress`` for reranking, and ``pack`` for masks."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# Inside kernels everything is a tensor or a constant of Triton's, which its own annotations do not show.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def candidate(
    logprobs_ptr, scores_ptr, beam_ptr, place, num_candidates, num_children, HAS_PREVIOUS: tl.constexpr
):
    """Scores float64 of a row's candidates at ``place``; −inf beyond the last and for NaN."""
    inside = place < num_candidates
    logprob = tl.load(logprobs_ptr + place, mask=inside, other=float("-inf")).to(tl.float64)
    logprob = tl.where(logprob != logprob, float("-inf"), logprob)
    score = tl.where(logprob > 0.0, 0.0, logprob)
    if HAS_PREVIOUS:
        parent = tl.load(beam_ptr + place // num_children, mask=inside, other=0)
        score += tl.load(scores_ptr + parent, mask=inside, other=0.0)
    return score


@triton.jit
def num_better(score, place, other_score, other_place):
    """How many of the others [N] are better than each of ``score`` [M]: larger, or equal and to the left.

    Scores are at most 0, so the bits of their magnitudes order them.
    """
    magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    key = (score.to(tl.int64, bitcast=True) & magnitude)[:, None]
    other = (other_score.to(tl.int64, bitcast=True) & magnitude)[None, :]
    better = (other < key) | ((other == key) & (other_place[None, :] < place[:, None]))
    return tl.sum(better.to(tl.int32), axis=1)


@triton.jit(
    do_not_specialize=[
        "previous_start",
        "num_previous",
        "num_beam",
        "num_candidates",
        "num_children",
        "width",
    ]
)
def grow(
    logprobs_ptr,
    previous_scores_ptr,
    previous_beam_ptr,
    scores_ptr,
    parents_ptr,
    beam_ptr,
    previous_start,
    num_previous,
    num_beam,
    num_candidates,
    num_children,
    width,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
):
    """Score a block of a row's candidates and put those among the best ``width`` at their places in the beam."""
    row = tl.program_id(0).to(tl.int64)
    logprobs_ptr += row * num_candidates
    previous_scores_ptr += row * num_previous
    previous_beam_ptr += row * num_beam
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_candidates
    score = candidate(
        logprobs_ptr,
        previous_scores_ptr,
        previous_beam_ptr,
        place,
        num_candidates,
        num_children,
        HAS_PREVIOUS,
    )
    parent = tl.full([BLOCK], -1, tl.int64)
    if HAS_PREVIOUS:
        parent = previous_start + tl.load(previous_beam_ptr + place // num_children, mask=inside, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_candidates, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_score = candidate(
            logprobs_ptr,
            previous_scores_ptr,
            previous_beam_ptr,
            other,
            num_candidates,
            num_children,
            HAS_PREVIOUS,
        )
        rank += num_better(score, place, other_score, other)
    tl.store(scores_ptr + row * num_candidates + place, score, mask=inside)
    tl.store(parents_ptr + row * num_candidates + place, parent, mask=inside)
    tl.store(beam_ptr + row * width + rank, place.to(tl.int64), mask=inside & (rank < width))


@triton.jit(do_not_specialize=["num_candidates", "size"])
def choose(
    scores_ptr,
    sizes_ptr,
    chosen_ptr,
    num_candidates,
    size,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """1 for those of a block of a row's candidates that are among the row's best, else 0."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * num_candidates
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_candidates
    score = tl.load(scores_ptr + place, mask=inside, other=float("-inf"))
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_candidates, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_score = tl.load(scores_ptr + other, mask=other < num_candidates, other=float("-inf"))
        rank += num_better(score, place, other_score, other)
    limit = size
    if HAS_SIZES:
        limit = tl.minimum(size, tl.load(sizes_ptr + row))
    chosen = (rank < limit) & (score > float("-inf"))
    tl.store(chosen_ptr + row * num_candidates + place, chosen.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["num_candidates", "size"])
def compress(
    chosen_ptr,
    scores_ptr,
    tokens_ptr,
    above_ptr,
    numbers_ptr,
    parents_out_ptr,
    tokens_out_ptr,
    counts_ptr,
    candidates_out_ptr,
    scores_out_ptr,
    num_candidates,
    size,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Move a row's chosen candidates to the left and renumber their parents."""
    row = tl.program_id(0).to(tl.int64)
    chosen_ptr += row * num_candidates
    scores_ptr += row * num_candidates
    tokens_ptr += row * num_candidates
    above_ptr += row * num_candidates
    numbers_ptr += row * num_candidates
    out = row * size
    count = 0
    for start in range(0, num_candidates, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < num_candidates
        chosen = tl.load(chosen_ptr + place, mask=inside, other=0)
        tl.store(numbers_ptr + place, count + tl.cumsum(chosen, axis=0) - 1, mask=inside)
        count += tl.sum(chosen, axis=0)
    tl.debug_barrier()  # other threads look up the parents' numbers
    for start in range(0, num_candidates, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < num_candidates
        chosen = tl.load(chosen_ptr + place, mask=inside, other=0) > 0
        node = out + tl.load(numbers_ptr + place, mask=chosen, other=0)
        above = tl.load(above_ptr + place, mask=chosen, other=-1)
        parent = tl.load(numbers_ptr + above, mask=chosen & (above >= 0), other=-1)
        tl.store(parents_out_ptr + node, parent, mask=chosen)
        tl.store(tokens_out_ptr + node, tl.load(tokens_ptr + place, mask=chosen, other=0), mask=chosen)
        tl.store(candidates_out_ptr + node, place.to(tl.int64), mask=chosen)
        tl.store(scores_out_ptr + node, tl.load(scores_ptr + place, mask=chosen, other=0.0), mask=chosen)
    tl.store(counts_ptr + row, count)
    rest = tl.arange(0, SIZE)
    unused = (rest >= count) & (rest < size)
    tl.store(parents_out_ptr + out + rest, tl.full([SIZE], -1, tl.int32), mask=unused)
    tl.store(tokens_out_ptr + out + rest, tl.zeros([SIZE], tl.int64), mask=unused)
    tl.store(candidates_out_ptr + out + rest, tl.zeros([SIZE], tl.int64), mask=unused)
    tl.store(scores_out_ptr + out + rest, tl.zeros([SIZE], tl.float64), mask=unused)


@triton.jit(do_not_specialize=["num_rows", "num_entries"])
def pack(
    parents_ptr,
    counts_ptr,
    depths_ptr,
    masks_ptr,
    num_rows,
    num_entries,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Climb from all entries of several rows at once, noting the entries on the way."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    entry = tl.arange(0, ENTRIES)[None, :]
    inside = (row < num_rows) & (entry < num_entries)
    count = tl.load(counts_ptr + row, mask=row < num_rows, other=0)
    used = inside & (entry <= count)
    at = tl.where(used, entry, 0)
    parents_ptr += row * (num_entries - 1)
    low = used.to(tl.int64)  # the root's bit
    high = tl.zeros([ROWS, ENTRIES], tl.int64)
    depth = tl.zeros([ROWS, ENTRIES], tl.int32)
    one = tl.full([ROWS, ENTRIES], 1, tl.int64)
    climbing = tl.max(tl.max(at, axis=1), axis=0)
    while climbing > 0:
        bit = one << (at & 63).to(tl.int64)
        low |= tl.where((at > 0) & (at < 64), bit, 0)
        high |= tl.where(at >= 64, bit, 0)
        depth += (at > 0).to(tl.int32)
        above = tl.load(parents_ptr + at - 1, mask=at > 0, other=-1).to(tl.int32) + 1
        at = tl.minimum(
            above, tl.maximum(at - 1, 0)
        )  # a parent that is not before its child must not hang the GPU
        climbing = tl.max(tl.max(at, axis=1), axis=0)
    mask = masks_ptr + 2 * (row * num_entries + entry)
    tl.store(mask, low, mask=inside)
    tl.store(mask + 1, high, mask=inside)
    tl.store(depths_ptr + row * (num_entries - 1) + entry - 1, depth, mask=inside & (entry > 0))
