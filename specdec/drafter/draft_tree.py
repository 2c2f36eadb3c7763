"""Trees of a fixed shape, drafted by a model: level by level, siblings by rank or drawn without replacement.

The children of a greedy request's node are the draft's best tokens. Those of a sampled one are drawn from the draft's
law without replacement, as recursive and traversal verification take them (SpecInfer, arXiv 2305.09781; Sequoia, arXiv
2402.12374). How many there are depends on the law's support alone, never on what was drawn.

Legend: R rows of the plan, n nodes of the tree, E entries that are expanded, V vocabulary. Entry 0 of a row is its
root, entry i + 1 is node i.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafter.base import Draft, DraftHost
from specdec.random import Stream, uniforms
from specdec.rows import StepInput
from specdec.sampling import sample_from_probs
from specdec.scheduler.plan import BoolArray, LongArray, StepPlan
from specdec.tree import Tree


def breadth_first(tree: Tree) -> Tree:
    """The same tree with its nodes numbered level by level, siblings in their order."""
    order = np.argsort(tree.depths, kind="stable")
    number = np.empty(len(tree), np.int64)
    number[order] = np.arange(len(tree))
    parents = np.array(tree.parents, np.int64)[order]
    return Tree(np.where(parents < 0, -1, number[parents]).tolist())


class TreeDraft:
    """One step's trees, which grow with each call of :meth:`expand`.

    Args:
        host: of the drafter.
        plan: rows with ``num_drafts`` of fewer nodes than the tree get its first nodes.
        tree: numbered level by level.
    """

    def __init__(self, host: DraftHost, plan: StepPlan, tree: Tree) -> None:
        self._host, self._plan, self._tree = host, plan, tree
        size = len(tree)
        self._ends = np.cumsum(
            np.bincount(tree.depths, minlength=tree.max_depth + 1)
        )  # of each level's nodes
        self._counts = np.minimum(plan.num_drafts, size)
        self._tokens = np.zeros((plan.rows.size, size), np.int64)
        self._is_drawn: BoolArray = np.zeros((plan.rows.size, size), np.bool_)
        self._probs: NDArray[np.float32] | None = None
        if (host.state.temperature[plan.rows[self._counts > 0]] > 0).any():
            vocab_size = host.target.config.vocab_size
            self._probs = np.zeros((plan.rows.size, size + 1, vocab_size), np.float32)

    def grow(self, logits: Tensor, forward: Callable[[StepInput], Tensor]) -> Draft:
        """Draft all levels; ``logits`` [E, V] are those of the roots of the rows that draft, in order."""
        rows = np.flatnonzero(self._counts)
        entries = np.zeros(rows.size, np.int64)
        for level in range(1, self._tree.max_depth + 1):
            self._expand(rows, entries, logits)
            if level == self._tree.max_depth:
                break
            first, last = int(self._ends[level - 1]), int(self._ends[level])
            going = np.flatnonzero(self._counts > last)  # whose next level is not empty
            if going.size == 0:
                break
            logits = forward(self._input(going, first, last))
            rows = np.repeat(going, last - first)
            entries = np.tile(np.arange(first, last) + 1, going.size)
        return self._draft()

    def _input(self, going: LongArray, first: int, last: int) -> StepInput:
        """Root and nodes up to ``last``; a mask covers one pass, so all levels are fed again."""
        host, rows = self._host, self._plan.rows[going]
        self._host.state.tokens[
            rows[:, None], self._host.state.num_known[rows][:, None] + np.arange(last)
        ] = self._tokens[going, :last]
        ones = np.ones(going.size, np.int32)
        depths = np.append(0, self._tree.depths[:last]).astype(np.int32)
        return StepInput(
            host.state,
            host.table.block_table,
            host.block_size,
            rows,
            host.state.num_known[rows] - ones,
            ones * np.int32(last + 1),
            ones * np.int32(last - first),
            depths=np.tile(depths, going.size),
            tree_mask=np.tile(self._tree.packed_masks[: last + 1], (going.size, 1)),
        )

    def _expand(self, rows: LongArray, entries: LongArray, logits: Tensor) -> None:
        """Choose the children of ``entries`` [E] of the plan's rows ``rows`` [E]."""
        state, children = self._host.state, self._tree.children
        nodes = _padded([children[entry] for entry in entries.tolist()])
        wanted = (nodes >= 0) & (nodes < self._counts[rows][:, None])
        wanted[entries > 0] &= self._is_drawn[rows, entries - 1][entries > 0][:, None]
        if not wanted.any():
            return
        best = logits.topk(nodes.shape[1]).indices.numpy(force=True)
        sampled = np.flatnonzero(state.temperature[self._plan.rows[rows]] > 0)
        if sampled.size:
            self._draw(rows[sampled], entries[sampled], nodes[sampled], wanted, sampled, logits, best)
        entry, rank = wanted.nonzero()
        self._tokens[rows[entry], nodes[entry, rank]] = best[entry, rank]
        self._is_drawn[rows[entry], nodes[entry, rank]] = True

    def _draw(
        self,
        rows: LongArray,
        entries: LongArray,
        nodes: LongArray,
        wanted: BoolArray,
        sampled: LongArray,
        logits: Tensor,
        best: LongArray,
    ) -> None:
        """Put tokens drawn without replacement into ``best``, and take out of ``wanted`` what could not be drawn."""
        state, table_rows = self._host.state, self._plan.rows[rows]
        assert self._probs is not None
        law = state.probs(logits[torch.from_numpy(sampled)], table_rows)
        self._probs[rows, entries] = law.numpy(force=True)
        counters = state.num_known[table_rows].astype(np.uint64)
        noise = uniforms(state.seeds[table_rows], counters, Stream.DRAFT, len(self._tree))
        law = law.clone()
        for rank in range(nodes.shape[1]):
            some = np.flatnonzero(wanted[sampled, rank])
            # A law of few tokens has no more of them once all are drawn.
            empty = (law[torch.from_numpy(some)].sum(dim=-1) <= 0.0).numpy(force=True)
            wanted[sampled[some[empty]], rank] = False
            some = some[~empty]
            if some.size == 0:
                continue
            chosen = sample_from_probs(law[torch.from_numpy(some)], noise[some, nodes[some, rank]])
            best[sampled[some], rank] = chosen
            law[torch.from_numpy(some), torch.from_numpy(chosen)] = 0.0

    def _draft(self) -> Draft:
        """All rows' trees, each without the nodes that could not be drawn."""
        parents = np.tile(np.array(self._tree.parents, np.int32), (self._plan.rows.size, 1))
        num_drafted = self._is_drawn.sum(axis=1).astype(np.int32)
        ragged = np.flatnonzero(num_drafted < self._counts)
        for row in ragged.tolist():
            kept = np.flatnonzero(self._is_drawn[row])
            number = np.cumsum(self._is_drawn[row]) - 1
            above = parents[row, kept]
            parents[row, : kept.size] = np.where(above < 0, -1, number[above])
            self._tokens[row, : kept.size] = self._tokens[row, kept]
            if self._probs is not None:
                self._probs[row, 1 : kept.size + 1] = self._probs[row, kept + 1]
        return Draft(self._tokens, num_drafted, self._probs, parents)


def _padded(lists: list[tuple[int, ...]]) -> LongArray:
    """int64 [E, most], -1 where a list has ended."""
    padded = np.full((len(lists), max(map(len, lists), default=0)), -1, np.int64)
    for index, values in enumerate(lists):
        padded[index, : len(values)] = values
    return padded
