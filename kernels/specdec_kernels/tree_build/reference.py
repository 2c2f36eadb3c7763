"""Draft trees that follow the draft's confidence: EAGLE-2, arXiv 2406.16858 (expansion and reranking).

A node's score is the log-probability that the draft gives to the path down to it, a float64 sum. At each level the best
candidates of a row are expanded, whoever their parents are; at the end the best of all candidates stay. Scores only
fall along a path, and of equal ones the earlier candidate, whose level is no deeper, counts as better. So the ancestors
of what stays stay too.

Legend: R rows, W expanded candidates of the level before, k children of each, C = W · k candidates of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1
MAX_NODES = 127
"""Nodes of a row that fit a packed mask beside the root."""


@dataclass(frozen=True, slots=True)
class Level:
    """Candidates of one level.

    Attributes:
        tokens: int64 [R, C].
        scores: float64 [R, C], at most 0; −inf where there is no candidate.
        parents: int64 [R, C], the parent's place among the candidates of all levels, −1 the root.
        beam: int64 [R, min(width, C)], this level's places of the candidates to expand, best first.
        start: candidates of a row in the levels before this one.
    """

    tokens: Tensor
    scores: Tensor
    parents: Tensor
    beam: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class DynamicTrees:
    """One tree per row, parents before their children; entries past ``counts`` are −1 (parents) and 0.

    Attributes:
        parents: int32 [R, size].
        tokens: int64 [R, size].
        counts: int32 [R], less than ``size`` where a row had fewer candidates.
        candidates: int64 [R, size], the node's place among the candidates of all levels.
        scores: float64 [R, size], the node's.
    """

    parents: Tensor
    tokens: Tensor
    counts: Tensor
    candidates: Tensor
    scores: Tensor


def grow(previous: Level | None, tokens: Tensor, logprobs: Tensor, width: int) -> Level:
    """Candidates below the beam of ``previous``, and the best ``width`` of them to expand.

    Args:
        previous: None below the root.
        tokens: int64 [R, W, k], children of each beam entry (W = 1 below the root).
        logprobs: [R, W, k], the draft's log-probability of each child given its parent; −inf or NaN for no child.
            What rounding has put above 0 counts as 0.
        width: how many to expand.

    Raises:
        ValueError: shapes that do not fit, a width below 1.
    """
    check_children(previous, tokens, logprobs, width)
    scores = torch.where(logprobs.isnan(), -torch.inf, logprobs).clamp(max=0).double()
    if previous is None:
        parents = torch.full_like(tokens, ROOT)
    else:
        scores = scores + previous.scores.gather(1, previous.beam)[:, :, None]
        parents = (previous.start + previous.beam)[:, :, None].expand_as(tokens)
    scores = scores.flatten(1)
    beam = _order(scores)[:, :width]
    return Level(tokens.flatten(1), scores, parents.flatten(1), beam, next_start(previous))


def rerank(levels: Sequence[Level], size: int, sizes: Tensor | None = None) -> DynamicTrees:
    """The best ``size`` candidates of all ``levels``, as trees.

    Args:
        levels: one or more, in order.
        size: most nodes of a row.
        sizes: int32 [R], most nodes of each row; ``size`` if None.

    Raises:
        ValueError: no levels, or a size below 0.
    """
    check_levels(levels, size)
    scores = torch.cat([level.scores for level in levels], dim=1)
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    above = torch.cat([level.parents for level in levels], dim=1)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    ranks = torch.empty_like(places).scatter_(1, _order(scores), places)
    limits = torch.full_like(ranks[:, :1], size) if sizes is None else sizes[:, None].clamp(max=size)
    chosen = (ranks < limits) & (scores > -torch.inf)
    numbers = chosen.cumsum(1) - 1
    trees = empty_trees(scores, size)
    trees.parents.fill_(ROOT)
    for values in (trees.tokens, trees.candidates, trees.scores):
        values.zero_()
    row, place = chosen.nonzero(as_tuple=True)
    node = numbers[row, place]
    parent = above[row, place]
    trees.parents[row, node] = torch.where(parent == ROOT, ROOT, numbers[row, parent]).int()
    trees.tokens[row, node] = tokens[row, place]
    trees.candidates[row, node] = place
    trees.scores[row, node] = scores[row, place]
    trees.counts.copy_(chosen.sum(1))
    return trees


def pack_trees(parents: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Depths and packed ancestor masks of trees, as attention kernels read them.

    A row's entries are its root, entry 0, and its nodes: node i is entry i + 1. Entry a sees entry b if bit b % 64 of
    word b // 64 of mask a is set; it sees the root, its ancestors and itself.

    Args:
        parents: int32 [R, K], K ≤ 127, each node's parent, before it, or −1; those past ``counts`` are not read.
        counts: int32 [R], nodes of each row.

    Returns:
        depths int32 [R, K], 1 below the root, and masks int64 [R, K + 1, 2]; 0 past ``counts``.

    Raises:
        ValueError: more than 127 nodes.
    """
    check_width(parents)
    num_rows, width = parents.shape
    depths = torch.zeros(num_rows, width + 1, dtype=torch.int32, device=parents.device)
    masks = torch.zeros(num_rows, width + 1, 2, dtype=torch.int64, device=parents.device)
    masks[:, 0, 0] = 1
    rows = torch.arange(num_rows, device=parents.device)
    for entry in range(1, width + 1):
        used = counts >= entry
        above = torch.where(used, parents[:, entry - 1] + 1, 0).long()
        depths[:, entry] = torch.where(used, depths[rows, above] + 1, 0)
        own = torch.zeros(2, dtype=torch.int64, device=parents.device)
        own[entry // 64] = -(1 << 63) if entry % 64 == 63 else 1 << entry % 64
        masks[:, entry] = torch.where(used[:, None], masks[rows, above] | own, 0)
    return depths[:, 1:], masks


def check_children(previous: Level | None, tokens: Tensor, logprobs: Tensor, width: int) -> None:
    expected = (tokens.shape[0], 1) if previous is None else tuple(previous.beam.shape)
    if logprobs.shape != tokens.shape or tuple(tokens.shape[:2]) != expected:
        raise ValueError(
            f"tokens {list(tokens.shape)} and logprobs {list(logprobs.shape)} must both be {expected} plus the children"
        )
    if width < 1:
        raise ValueError(f"width={width} must be >= 1")


def check_levels(levels: Sequence[Level], size: int) -> None:
    if not levels or size < 0:
        raise ValueError(f"{len(levels)} levels and size={size}: give at least one level and a size >= 0")


def check_width(parents: Tensor) -> None:
    if parents.shape[1] > MAX_NODES:
        raise ValueError(
            f"{parents.shape[1]} nodes do not fit a packed mask: use at most {MAX_NODES} per tree"
        )


def next_start(previous: Level | None) -> int:
    return 0 if previous is None else previous.start + previous.scores.shape[1]


def empty_trees(scores: Tensor, size: int) -> DynamicTrees:
    """Uninitialised, for the rows of ``scores``."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(scores.shape[0], *shape, dtype=dtype, device=scores.device)

    return DynamicTrees(
        parents=empty(torch.int32, size),
        tokens=empty(torch.int64, size),
        counts=empty(torch.int32),
        candidates=empty(torch.int64, size),
        scores=empty(torch.float64, size),
    )


def _order(scores: Tensor) -> Tensor:
    """Places [R, C], best first; of equal scores the left one is better."""
    return scores.sort(dim=1, descending=True, stable=True).indices
