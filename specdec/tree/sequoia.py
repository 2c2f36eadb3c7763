"""The best tree for measured acceptance rates: Sequoia, arXiv 2402.12374, section 3 (tree construction).

``rates[b]`` is p_b, the probability that the child of rank b (0 for the first drawn) is the accepted one, given that
their parent was accepted; measured with the verifier and at the temperature that will be used. ``rates`` [D, b] has a
row for each depth of the parent, the root's first. A tree's expected tokens per step, bonus token included, are

    1 + Σ over nodes of Π over the node's path of its rates,

and the best tree of at most m entries (root included) and l levels below its root, with b children of the root, has

    T[m, l, b] = max over y of T[y, l, b − 1] + p_b · max over b′ of T[m − y, l − 1, b′],   T[m, l, 0] = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.tree.topology import ROOT, Tree

Times = float | Callable[[int], float] | Sequence[float] | NDArray[np.floating]


def expected_tokens(tree: Tree, rates: ArrayLike) -> float:
    """Expected tokens per step of ``tree``, bonus token included; accepted drafts are one less.

    Ranks and depths beyond ``rates`` are never accepted.
    """
    table = _rates(rates, tree.max_depth)
    total = 1.0
    reach = np.ones(len(tree) + 1)  # the last entry is the root's, which index −1 finds
    for node, parent in enumerate(tree.parents):
        rank, depth = tree.ranks[node], tree.depths[node] - 1
        reach[node] = reach[parent] * table[depth, rank] if rank < table.shape[1] else 0.0
        total += reach[node]
    return float(total)


def sequoia_tree(rates: ArrayLike, size: int, max_depth: int) -> Tree:
    """The tree of at most ``size`` nodes and ``max_depth`` levels with the most expected tokens.

    Nodes that add nothing are left out.

    Args:
        rates: [b] or [D, b] in [0, 1], rows summing to at most 1.
        size: most draft nodes, the root not counted.
        max_depth: most levels of drafts.

    Raises:
        ValueError: rates that are no probabilities, a negative size or depth.
    """
    return _Program.solve(rates, size, max_depth).tree(size)


def best_expected_tokens(rates: ArrayLike, size: int, max_depth: int) -> NDArray[np.float64]:
    """Expected tokens of the best tree of at most m nodes and ``max_depth`` levels, m = 0 … size: [size + 1]."""
    return _Program.solve(rates, size, max_depth).values[0][1:].max(axis=1)


@dataclass(frozen=True, slots=True)
class SequoiaChoice:
    """The tree to draft. ``size`` and ``depth`` are m and d; ``step_s`` the step's time; ``tokens`` expected in it."""

    tree: Tree
    size: int
    depth: int
    step_s: float
    tokens: float


def choose_tree(
    rates: ArrayLike, draft_s: Times, verify_s: Times, max_size: int, max_depth: int
) -> SequoiaChoice:
    """The size m ≤ ``max_size`` and depth d ≤ ``max_depth`` that minimise (d · t_draft + t_verify(m)) / T.

    Searches the whole grid, since measured times have plateaus. m = 0 is plain decoding. Ties go to the smaller m,
    then the smaller d.

    Args:
        rates: as for :func:`sequoia_tree`.
        draft_s: seconds per drafted level; or a callable or array giving those of drafting d levels, d = 0 included.
        verify_s: callable or array giving the seconds to verify m nodes and the root, m = 0 included; a number
            where they do not depend on m.

    Raises:
        ValueError: as for :func:`sequoia_tree`; times that are too few, or not positive for verification.
    """
    if isinstance(draft_s, int | float):
        draft_s = np.arange(max_depth + 1) * float(draft_s)
    draft = _times("draft_s", draft_s, max_depth)
    verify = _times("verify_s", verify_s, max_size)
    if not (np.all(draft >= 0) and np.all(verify > 0)):
        raise ValueError(f"draft_s={draft} must be >= 0 and verify_s={verify} > 0: pass measured seconds")
    tokens = np.stack(
        [best_expected_tokens(rates, max_size, depth) for depth in range(max_depth + 1)], axis=1
    )
    step_s = verify[:, None] + draft
    size, depth = divmod(int(np.argmin(step_s / tokens)), max_depth + 1)
    return SequoiaChoice(
        sequoia_tree(rates, size, depth),
        size,
        depth,
        float(step_s[size, depth]),
        float(tokens[size, depth]),
    )


@dataclass(frozen=True, slots=True)
class _Program:
    """Solved tables by depth of the parent, the root's first and the leaves' last.

    Attributes:
        values: float64 [entries + 1, b + 1] each; T by entries (root included) and number of children.
        splits: int64, likewise; the y of T.
    """

    values: list[NDArray[np.float64]]
    splits: list[NDArray[np.int64]]

    @classmethod
    def solve(cls, rates: ArrayLike, size: int, max_depth: int) -> _Program:
        if size < 0 or max_depth < 0:
            raise ValueError(f"size={size} and max_depth={max_depth} must be >= 0")
        leaves = np.full((size + 2, 1), 1.0)
        leaves[0] = -np.inf  # no room for the root itself
        values, splits = [leaves], [np.zeros(leaves.shape, np.int64)]
        for row in _rates(rates, max_depth)[::-1]:
            solved = _solve_level(row, values[-1].max(axis=1))
            values.append(solved[0])
            splits.append(solved[1])
        return cls(values[::-1], splits[::-1])

    def tree(self, size: int) -> Tree:
        """Parents level by level, from the root's choices down."""
        parents: list[int] = []
        waiting = [(ROOT, size + 1, 0)]  # node, entries of its subtree, its depth
        for node, entries, depth in waiting:
            subtrees = []
            for num_children in range(int(self.values[depth][entries].argmax()), 0, -1):
                left = int(self.splits[depth][entries, num_children])
                subtrees.append(entries - left)
                entries = left
            for subtree in reversed(subtrees):
                waiting.append((len(parents), subtree, depth + 1))
                parents.append(node)
        return Tree(parents)


def _solve_level(
    rates: NDArray[np.float64], below: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """T and y for one depth, from the best values ``below`` [entries + 1] of its children's subtrees."""
    entries = np.arange(below.size)
    values = np.full((below.size, rates.size + 1), -np.inf)
    splits = np.zeros(values.shape, np.int64)
    values[1:, 0] = 1.0
    rest = entries[:, None] - entries  # m − y, of which only positive ones leave room for a child
    below = below[np.maximum(rest, 1)]
    for child, rate in enumerate(rates):
        totals = np.where(rest > 0, values[:, child] + rate * below, -np.inf)
        # The largest of equal y: what adds nothing then gets no entries.
        splits[:, child + 1] = entries[-1] - totals[:, ::-1].argmax(axis=1)
        values[:, child + 1] = totals.max(axis=1)
    return values, splits


def _rates(rates: ArrayLike, depth: int) -> NDArray[np.float64]:
    """[depth, b]; a row of ``rates`` for each depth of the parent, the same for all if there is one list only."""
    table = np.asarray(rates, np.float64)
    if table.ndim not in (1, 2) or table.shape[-1] == 0:
        raise ValueError(
            f"rates have shape {table.shape}: give one list by rank, or one by rank for each depth"
        )
    if not (table >= 0).all() or not (table.sum(axis=-1) <= 1 + 1e-9).all():
        raise ValueError(
            f"rates={table.tolist()} must be >= 0 and sum to at most 1 over the ranks: rank b's rate is the "
            "probability that this child is the accepted one"
        )
    if table.ndim == 1:
        return np.tile(table, (depth, 1))
    padding = np.zeros((max(depth - len(table), 0), table.shape[1]))
    return np.concatenate([table, padding])[:depth]


def _times(name: str, times: Times, last: int) -> NDArray[np.float64]:
    """[last + 1] seconds."""
    if callable(times):
        return np.array([times(count) for count in range(last + 1)], np.float64)
    values = np.asarray(times, np.float64)
    if values.ndim == 0:
        return np.full(last + 1, values)
    if values.size <= last:
        raise ValueError(f"{name} has {values.size} entries: give one for each of 0 to {last}")
    return values[: last + 1]
