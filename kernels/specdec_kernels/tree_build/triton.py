"""Dynamic trees on a GPU: candidates are ranked by counting those that are better, so ties need no sort to be stable.

Scores are float64 sums of float32 numbers, exactly the host's, so every choice is the host's bit for bit.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# Launches take options and types that the kernels' own signatures do not show; inside, all is a tensor of Triton's.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.tree_build.reference import (
    DynamicTrees,
    Level,
    check_children,
    check_levels,
    check_width,
    empty_trees,
    next_start,
)
from specdec_kernels.tuning import CompileCase, architecture, config_for


@dataclass(frozen=True, slots=True)
class Config:
    """What a program takes.

    Attributes:
        block: candidates that it ranks. others: candidates that it compares them with at once.
        compress: candidates of a row at once where they are renumbered.
        entries: rows times entries where masks are packed.
    """

    block: int = 64
    others: int = 32
    compress: int = 1024
    entries: int = 1024


CONFIGS = {"default": Config()}


@triton.jit
def _candidate(
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
def _num_better(score, place, other_score, other_place):
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
def _grow(
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
    score = _candidate(
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
        other_score = _candidate(
            logprobs_ptr,
            previous_scores_ptr,
            previous_beam_ptr,
            other,
            num_candidates,
            num_children,
            HAS_PREVIOUS,
        )
        rank += _num_better(score, place, other_score, other)
    tl.store(scores_ptr + row * num_candidates + place, score, mask=inside)
    tl.store(parents_ptr + row * num_candidates + place, parent, mask=inside)
    tl.store(beam_ptr + row * width + rank, place.to(tl.int64), mask=inside & (rank < width))


@triton.jit(do_not_specialize=["num_candidates", "size"])
def _choose(
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
        rank += _num_better(score, place, other_score, other)
    limit = size
    if HAS_SIZES:
        limit = tl.minimum(size, tl.load(sizes_ptr + row))
    chosen = (rank < limit) & (score > float("-inf"))
    tl.store(chosen_ptr + row * num_candidates + place, chosen.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["num_candidates", "size"])
def _compress(
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
def _pack(
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


def grow(previous: Level | None, tokens: Tensor, logprobs: Tensor, width: int) -> Level:
    """As ``reference.grow``."""
    check_children(previous, tokens, logprobs, width)
    num_rows, num_beam, num_children = tokens.shape
    num_candidates = num_beam * num_children
    width = min(width, num_candidates)
    scores = torch.empty(num_rows, num_candidates, dtype=torch.float64, device=tokens.device)
    parents = torch.empty(num_rows, num_candidates, dtype=torch.int64, device=tokens.device)
    beam = torch.empty(num_rows, width, dtype=torch.int64, device=tokens.device)
    config = config_for(CONFIGS, architecture(tokens.device))
    if scores.numel():
        _grow[(num_rows, triton.cdiv(num_candidates, config.block))](
            logprobs.contiguous(),
            scores if previous is None else previous.scores,
            beam if previous is None else previous.beam,
            scores,
            parents,
            beam,
            0 if previous is None else previous.start,
            0 if previous is None else previous.scores.shape[1],
            num_beam,
            num_candidates,
            num_children,
            width,
            BLOCK=config.block,
            OTHERS=config.others,
            HAS_PREVIOUS=previous is not None,
            num_warps=4,
        )
    return Level(tokens.flatten(1), scores, parents, beam, next_start(previous))


def rerank(levels: Sequence[Level], size: int, sizes: Tensor | None = None) -> DynamicTrees:
    """As ``reference.rerank``."""
    check_levels(levels, size)
    scores = torch.cat([level.scores for level in levels], dim=1)
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    above = torch.cat([level.parents for level in levels], dim=1)
    trees = empty_trees(scores, size)
    num_rows, num_candidates = scores.shape
    if num_rows == 0:
        return trees
    config = config_for(CONFIGS, architecture(scores.device))
    chosen, numbers = (torch.empty_like(scores, dtype=torch.int32) for _ in range(2))
    _choose[(num_rows, triton.cdiv(num_candidates, config.block))](
        scores,
        scores if sizes is None else sizes.contiguous(),
        chosen,
        num_candidates,
        size,
        BLOCK=config.block,
        OTHERS=config.others,
        HAS_SIZES=sizes is not None,
        num_warps=4,
    )
    _compress[(num_rows,)](
        chosen,
        scores,
        tokens,
        above,
        numbers,
        trees.parents,
        trees.tokens,
        trees.counts,
        trees.candidates,
        trees.scores,
        num_candidates,
        size,
        BLOCK=min(triton.next_power_of_2(num_candidates), config.compress),
        SIZE=triton.next_power_of_2(max(size, 1)),
        num_warps=4,
    )
    return trees


def pack_trees(parents: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.pack_trees``."""
    check_width(parents)
    num_rows, num_entries = parents.shape[0], parents.shape[1] + 1
    depths = torch.empty(num_rows, num_entries - 1, dtype=torch.int32, device=parents.device)
    masks = torch.empty(num_rows, num_entries, 2, dtype=torch.int64, device=parents.device)
    entries, rows = _pack_block(num_entries, config_for(CONFIGS, architecture(parents.device)))
    if num_rows:
        _pack[(triton.cdiv(num_rows, rows),)](
            parents.contiguous(),
            counts.contiguous(),
            depths,
            masks,
            num_rows,
            num_entries,
            ROWS=rows,
            ENTRIES=entries,
            num_warps=4,
        )
    return depths, masks


def _pack_block(num_entries: int, config: Config) -> tuple[int, int]:
    """Entries, padded, and rows of a program."""
    entries = triton.next_power_of_2(num_entries)
    return entries, max(config.entries // entries, 1)


def compile_cases(arch: str) -> list[CompileCase]:
    """What EAGLE-2 launches on ``arch``: ten candidates of ten children each, six levels, trees of up to 127 nodes."""
    config = config_for(CONFIGS, arch)
    ranking = {"BLOCK": config.block, "OTHERS": config.others}
    cases = [
        _case(
            f"grow, {dtype}{', below a level' if below else ''}",
            _grow,
            {**ranking, "HAS_PREVIOUS": below},
            dtype,
        )
        for dtype in ("fp32", "bf16")
        for below in (False, True)
    ]
    cases += [
        _case(f"choose{', sizes' if sizes else ''}", _choose, {**ranking, "HAS_SIZES": sizes})
        for sizes in (False, True)
    ]
    cases += [_case(f"compress, {size}", _compress, {"BLOCK": 512, "SIZE": size}) for size in (32, 64)]
    for num_nodes in (8, 32, 127):
        entries, rows = _pack_block(num_nodes + 1, config)
        cases.append(_case(f"pack, {num_nodes} nodes", _pack, {"ROWS": rows, "ENTRIES": entries}))
    return cases


_INT64 = (
    "beam_ptr",
    "previous_beam_ptr",
    "tokens_ptr",
    "above_ptr",
    "tokens_out_ptr",
    "candidates_out_ptr",
    "masks_ptr",
)
_FLOAT64 = ("scores_ptr", "previous_scores_ptr", "scores_out_ptr")


def _case(name: str, kernel: Any, constants: dict[str, Any], logprobs: str = "fp32") -> CompileCase:
    pointers = {
        **dict.fromkeys(_INT64, "*i64"),
        **dict.fromkeys(_FLOAT64, "*fp64"),
        "logprobs_ptr": f"*{logprobs}",
    }
    if kernel is _grow:
        pointers["parents_ptr"] = "*i64"
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    return CompileCase(
        op="tree_build",
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
    )
