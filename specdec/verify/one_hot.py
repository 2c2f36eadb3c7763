"""Verification of deterministic children: EAGLE, arXiv 2401.15077.

Children are tried in order: x is accepted with probability target[x]; after its rejection target[x] ← 0 and the
target is renormalised. Made for trees that are a deterministic function of the prefix (top-k children, n-gram
lookup). Given the tree the output law is the target's, so it holds for any tree that was chosen without a look at
the uniforms; for sampled children "recursive" accepts more, since it knows their odds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.verify.base import require_no_nan
from specdec.verify.numerics import Array, inverse_cdf
from specdec.verify.tree_base import Stop, TreeDrafts, TreeRule
from specdec.verify.walk import LawsAt, walk, walk_thresholds


def thresholds(drafts: TreeDrafts) -> Array:
    """Probability [B, n] of each node to be accepted once its parent is and its earlier siblings are not."""
    return walk_thresholds(drafts, _laws(drafts))


def accept(drafts: TreeDrafts, uniforms: Array) -> list[Stop]:
    """Where each row stops, for ``uniforms`` [B, n]. Whole rows are read at the stop only."""
    return walk(drafts, uniforms, _laws(drafts))


class _OneHotLaws:
    """The target at ``node`` without its rejected children, for ``rows`` [b]."""

    def __init__(self, drafts: TreeDrafts, at_tokens: Array, node: int, rows: NDArray[np.int64]) -> None:
        self._drafts, self._at_tokens, self._node = drafts, at_tokens, node
        self._rejected: list[int] = []
        self.rows = rows
        self._left = drafts.ones(rows.size)  # target's mass without the rejected children

    def ratio(self, child: int) -> Array:
        """target[x] of what is left; rounding can make it exceed 1, or leave nothing to divide by."""
        target = self._at_tokens[self.rows, child]
        none_left = self._left <= target
        return np.where(none_left, target > 0, target / np.where(none_left, 1, self._left))

    def reject(self, child: int, stay: NDArray[np.bool_]) -> None:
        self.rows = self.rows[stay]
        self._left = self._left[stay] - self._at_tokens[self.rows, child]
        self._rejected.append(child)

    def weights(self) -> Array:
        """The target [b, V] without the rejected tokens; all of it where rounding left nothing else."""
        weights = self._drafts.target_probs[self.rows, self._node + 1]
        places = np.arange(self.rows.size)[:, None]
        tokens = self._drafts.tokens[self.rows][:, self._rejected]
        saved = weights[places, tokens]
        weights[places, tokens] = 0
        empty = np.flatnonzero(weights.sum(axis=1) == 0)
        weights[empty[:, None], tokens[empty]] = saved[empty]
        return weights


def _laws(drafts: TreeDrafts) -> LawsAt:
    at_tokens = drafts.at_tokens(drafts.target_probs)
    require_no_nan(at_tokens.sum(axis=1), np.arange(at_tokens.shape[0]))
    return lambda node, rows: _OneHotLaws(drafts, at_tokens, node, rows)


def descend(
    parents: Sequence[int], tokens: Sequence[int], law_at: Callable[[int], Array], uniforms: NDArray[Any]
) -> tuple[list[int], int]:
    """``verify_tree("one_hot", ...)`` of one tree, to the bit, that asks for the target's law at visited nodes only.

    A step visits one node more than it accepts, of all whose logits the target computed. Turning logits into a law (a
    softmax over the vocabulary, filters) is what sampled verification takes its time for.

    Args:
        parents, tokens: of n nodes, parents before children; −1 is the root.
        law_at: from 0 for the root and i + 1 for node i to the target's distribution [V] there.
        uniforms: [n + 1] in [0, 1): one per node, and the last for the next token.

    Returns:
        path, the accepted nodes from the root down, and the token that follows it.

    Raises:
        ValueError: siblings with the same token, among those that were tried; probabilities that are NaN or all zero.
    """
    children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
    for node, parent in enumerate(parents):
        children[parent + 1].append(node)
    path: list[int] = []
    while True:
        law = law_at(path[-1] + 1 if path else 0)
        exact = law.dtype == object
        left, rejected = Fraction(1) if exact else 1.0, list[int]()
        for child in children[path[-1] + 1 if path else 0]:
            token = tokens[child]
            if token in rejected:
                raise ValueError(f"node {child} repeats token {token} of a sibling: merge the two nodes")
            target = law[token] if exact else float(law[token])
            require_no_nan(np.array([target]), np.zeros(1, np.int64))
            if uniforms[child] < (target / left if left > target else target > 0):
                path.append(child)
                break
            left -= target
            rejected.append(token)
        else:
            return path, _next_token(law, rejected, uniforms[-1:])


def _next_token(law: Array, rejected: list[int], uniform: NDArray[Any]) -> int:
    """Drawn from ``law`` [V] without the rejected tokens; from all of it where rounding left nothing else."""
    weights = law.copy()
    weights[rejected] = 0
    return int(inverse_cdf((weights if weights.sum() else law)[None], uniform)[0])


RULE = TreeRule(False, thresholds, accept)
