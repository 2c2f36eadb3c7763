"""Dynamic trees of an EAGLE head: EAGLE-2, arXiv 2406.16858; the choices are those of ``specdec.tree.dynamic``.

Only nodes that are still among the best of their row are expanded, for no other can end up in its tree. So a row never
feeds more nodes than it may draft, and the KV slots that the scheduler reserved for drafts suffice. A mask covers the
tokens of one pass, so every level feeds the inner nodes of the levels before it again.

Legend: B rows, W expanded nodes of a level, k children of each, D draft vocabulary, H hidden size, N nodes that a level
expands over all rows. Slot 0 of a row stands for its root, slot 1 + l · W + w for place w of level l's beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.scheduler.plan import IntArray, LongArray
from specdec.tree import ROOT, DynamicTrees, Level, grow, pack_trees, rerank


@dataclass(frozen=True, slots=True)
class TreePass:
    """What one pass of the head computes, rows one after another: each its root, then inner nodes, level by level.

    Attributes:
        rows: int64 [P], the rows that are fed, among B.
        counts: int32 [P], tokens of each.
        logit_counts: int32 [P], its last tokens that are expanded.
        depths: int32 [T].
        tree_mask: int64 [T, 2].
        inputs: [T, H].
    """

    rows: LongArray
    counts: IntArray
    logit_counts: IntArray
    depths: IntArray
    tree_mask: NDArray[np.int64]
    inputs: Tensor


class Expander(Protocol):
    """What trees need of their drafter."""

    def top(self, logits: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best tokens of logits [N, D] and their log-probabilities, [N, k] each, best first."""
        ...

    def child_inputs(self, tokens: NDArray[np.int64], outputs: Tensor) -> Tensor:
        """Layer inputs [n, H] of tokens int64 [n] behind entries with ``outputs`` [n, H]."""
        ...

    def run(self, tree_pass: TreePass) -> tuple[Tensor, Tensor]:
        """Logits float32 [N, D] and outputs [N, H] of the expanded nodes."""
        ...


def grow_trees(
    expander: Expander,
    logits: Tensor,
    outputs: Tensor,
    inputs: Tensor,
    sizes: IntArray,
    top_k: int,
    depth: int,
) -> tuple[DynamicTrees, NDArray[np.float32]]:
    """Trees of at most ``sizes`` nodes below entries that have been computed.

    Args:
        logits, outputs, inputs: [B, D], [B, H] and [B, H] of the roots.
        sizes: int32 [B].
        top_k: k and W.
        depth: most levels.

    Returns:
        The trees and each node's probability given its parent, float32 [B, max(sizes)].
    """
    tokens, logprobs = expander.top(logits)
    if depth == 1:
        return _children(tokens, logprobs, sizes)
    num_rows, hidden_size = inputs.shape
    store = inputs.new_zeros(2, num_rows, 1 + (depth - 1) * top_k, hidden_size)
    all_inputs, all_outputs = store[0], store[1]
    all_inputs[:, 0], all_outputs[:, 0] = inputs, outputs
    levels = [grow(None, tokens[:, None], logprobs[:, None], top_k)]
    for index in range(depth - 1):
        trees = rerank(_limited(levels, sizes), int(sizes.max()))
        slots = _slots(levels, trees, top_k)
        newest = (trees.level == index) & (slots > 0)
        if not newest.any():
            break
        row, node = newest.nonzero()
        above = trees.parents[row, node]
        parents = np.where(above == ROOT, 0, slots[row, above])
        at = torch.from_numpy(row), torch.from_numpy(slots[row, node])
        all_inputs[at] = expander.child_inputs(
            trees.tokens[row, node], all_outputs[at[0], torch.from_numpy(parents)]
        )
        logits, outputs = expander.run(_pass(trees, slots, newest, all_inputs))
        all_outputs[at] = outputs
        beam = (slots[row, node] - 1) % top_k
        width = levels[-1].beam.shape[1]
        shape = num_rows, width, tokens.shape[-1]
        children, logprobs = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
        children[row, beam], logprobs[row, beam] = expander.top(logits)
        levels.append(grow(levels[-1], children, logprobs, top_k))
    trees = rerank(_limited(levels, sizes), int(sizes.max()))
    return trees, _confidence(levels, trees)


def _children(
    tokens: NDArray[np.int64], logprobs: NDArray[np.float32], sizes: IntArray
) -> tuple[DynamicTrees, NDArray[np.float32]]:
    """Trees of one level: the roots' best children [B, k]."""
    width = int(sizes.max())
    most = min(width, tokens.shape[1])
    logprobs = logprobs[:, :most]
    counts = np.minimum(sizes, (logprobs > -np.inf).sum(axis=1)).astype(np.int32)
    used = np.arange(most) < counts[:, None]
    shape = tokens.shape[0], width
    chosen, confidence, place = (
        np.zeros(shape, np.int64),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int64),
    )
    chosen[:, :most] = np.where(used, tokens[:, :most], 0)
    place[:, :most] = np.where(used, np.arange(most), 0)
    confidence[:, :most] = np.where(used, np.exp(logprobs), 0.0)
    parents, level = np.full(shape, ROOT, np.int32), np.zeros(shape, np.int64)
    return DynamicTrees(parents, chosen, counts, level, place), confidence


def _limited(levels: Sequence[Level], sizes: IntArray) -> list[Level]:
    """The levels with each row's best ``sizes`` candidates only."""
    scores = np.concatenate([level.scores for level in levels], axis=1)
    ranks = np.empty(scores.shape, np.int64)
    order = np.argsort(-scores, axis=1, kind="stable")
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[1]), scores.shape), axis=1)
    scores = np.where(ranks < sizes[:, None], scores, -np.inf)
    ends = np.cumsum([level.scores.shape[1] for level in levels])[:-1]
    parts = np.split(scores, ends, axis=1)
    return [replace(level, scores=part) for level, part in zip(levels, parts, strict=True)]


def _slots(levels: Sequence[Level], trees: DynamicTrees, top_k: int) -> NDArray[np.int64]:
    """The slot of each node that is in a beam, int64 [B, K]; 0 for the others, which are not expanded."""
    slots = np.zeros(trees.parents.shape, np.int64)
    for index, level in enumerate(levels):
        slot_of = np.zeros(level.scores.shape, np.int64)
        first = 1 + index * top_k
        np.put_along_axis(slot_of, level.beam, first + np.arange(level.beam.shape[1])[None], axis=1)
        row, node = _nodes_of(trees, index)
        slots[row, node] = slot_of[row, trees.place[row, node]]
    return slots


def _nodes_of(trees: DynamicTrees, level: int) -> tuple[LongArray, LongArray]:
    """Rows and numbers of the nodes of a level."""
    used = np.arange(trees.tokens.shape[1]) < trees.counts[:, None]
    row, node = ((trees.level == level) & used).nonzero()
    return row, node


def _pass(
    trees: DynamicTrees, slots: NDArray[np.int64], newest: NDArray[np.bool_], all_inputs: Tensor
) -> TreePass:
    """Feed the inner nodes of the rows that expand ``newest`` [B, K]."""
    rows = np.flatnonzero(newest.any(axis=1))
    inner, width = slots[rows] > 0, slots.shape[1]
    numbers = np.cumsum(inner, axis=1) - 1
    counts = inner.sum(axis=1).astype(np.int32)
    row, node = inner.nonzero()
    parents = np.full((rows.size, width), ROOT, np.int32)
    above = trees.parents[rows][row, node]
    parents[row, numbers[row, node]] = np.where(above == ROOT, ROOT, numbers[row, above])
    depths, masks = pack_trees(parents, counts)
    used = np.arange(width + 1) <= counts[:, None]  # the root and the inner nodes
    entry_slots = np.zeros((rows.size, width + 1), np.int64)
    entry_slots[row, numbers[row, node] + 1] = slots[rows][row, node]
    entry_depths = np.concatenate([np.zeros((rows.size, 1), np.int32), depths], axis=1)
    fed = torch.from_numpy(np.repeat(rows, counts + 1)), torch.from_numpy(entry_slots[used])
    return TreePass(
        rows,
        counts + 1,
        newest[rows].sum(axis=1).astype(np.int32),
        entry_depths[used],
        masks[used],
        all_inputs[fed],
    )


def _confidence(levels: Sequence[Level], trees: DynamicTrees) -> NDArray[np.float32]:
    """Each node's probability given its parent, from cumulative scores."""
    scores = np.zeros(trees.parents.shape)
    for index, level in enumerate(levels):
        row, node = _nodes_of(trees, index)
        scores[row, node] = level.scores[row, trees.place[row, node]]
    above = np.take_along_axis(scores, np.maximum(trees.parents, 0).astype(np.int64), axis=1)
    return np.exp(scores - np.where(trees.parents == ROOT, 0.0, above)).astype(np.float32)
