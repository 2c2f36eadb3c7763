"""What tree rules share: draft trees of one shape, the two laws at a node, and where rows stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from specdec.tree.topology import Tree
from specdec.verify.base import IntArray, require_no_nan
from specdec.verify.numerics import Array, row_sums, widen


@dataclass(frozen=True, slots=True)
class TreeDrafts:
    """Drafts of B rows in trees of one shape. Legend: n nodes, V vocabulary.

    Attributes:
        tree: the shape.
        tokens: int64 [B, n].
        target_probs: [B, n+1, V], distribution after the root (entry 0) and after node i (entry i + 1).
        draft_probs: [B, n+1, V], laid out likewise: what the children of the root and of node i were drawn
            from; entries of leaves are not read. None for deterministic drafts.
    """

    tree: Tree
    tokens: NDArray[np.int64]
    target_probs: Array
    draft_probs: Array | None

    @classmethod
    def build(
        cls, tree: Tree, tokens: IntArray, target_probs: Array, draft_probs: Array | None
    ) -> TreeDrafts:
        """Check shapes and tokens.

        Raises:
            ValueError: shapes that do not fit the tree, tokens outside the vocabulary, siblings with the same
                token; naming the nodes.
        """
        tokens = np.asarray(tokens).astype(np.int64)
        num_rows, size = tokens.shape[0], len(tree)
        vocab_size = target_probs.shape[-1]
        if tokens.shape != (num_rows, size):
            raise ValueError(f"tokens have shape {tokens.shape}: a tree of {size} nodes needs [rows, {size}]")
        for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
            if probs is not None and probs.shape != (num_rows, size + 1, vocab_size):
                raise ValueError(
                    f"{name} has shape {probs.shape}: {num_rows} trees of {size} nodes need "
                    f"{(num_rows, size + 1, vocab_size)}, first the root's distribution and then each node's"
                )
        _check_vocabulary(tokens, vocab_size)
        check_siblings(tree, tokens)
        return cls(tree, tokens, target_probs, draft_probs)

    def ones(self, size: int) -> Array:
        """[size] of what thresholds are computed in: float64, or fractions."""
        return np.full(size, Fraction(1)) if self.target_probs.dtype == object else np.ones(size)

    def at_tokens(self, probs: Array) -> Array:
        """probs [B, n+1, V] at each node's token under its parent, [B, n], touching only those entries."""
        rows = np.arange(self.tokens.shape[0])[:, None]
        return widen(probs[rows, np.array(self.tree.parents, np.intp) + 1, self.tokens])


@dataclass(frozen=True, slots=True)
class Stop:
    """Rows that stop at one node.

    Attributes:
        node: the last accepted node, −1 where none is.
        rows: int64 [b].
        weights: [b, V], unnormalised distribution of the next token.
    """

    node: int
    rows: NDArray[np.int64]
    weights: Array


@dataclass(frozen=True, slots=True)
class TreeRule:
    """An acceptance rule for trees.

    Attributes:
        needs_draft_probs: False for deterministic children.
        thresholds: drafts to [B, n], each node's acceptance threshold in the rule's own sense. It depends on
            the drafts only, not on the uniforms.
        accept: (drafts, uniforms [B, n], one per node) to the stops of all rows.
    """

    needs_draft_probs: bool
    thresholds: Callable[[TreeDrafts], Array]
    accept: Callable[[TreeDrafts, Array], list[Stop]]


class NodeLaws:
    """Target and draft distribution at one node while its children, drawn without replacement, are rejected.

    After the rejection of child x, with ratio P (1 in recursive rejection sampling):

        r = (P · target − draft)⁺,  Z = Σ r,  target ← r / Z,  draft[x] ← 0 and renormalise.

    Both are kept unnormalised with their sums, and the whole rows are first read at the first rejection.

    Args:
        drafts: with ``draft_probs``.
        ratios: [B, n], ``draft_ratios(drafts)``.
        node: −1 for the root.
        rows: int64 [b], who is at this node. Rejection narrows it to those who stay.
    """

    def __init__(self, drafts: TreeDrafts, ratios: Array, node: int, rows: NDArray[np.int64]) -> None:
        assert drafts.draft_probs is not None
        self._drafts, self._ratios, self._node = drafts, ratios, node
        self._target_probs, self._draft_probs = drafts.target_probs, drafts.draft_probs
        self.rows = rows
        self._target: Array | None = None  # [b, V] once a child was rejected, then also:
        self._draft: Array | None = None  # [b, V] without the rejected tokens
        self._target_sum = self._draft_sum = drafts.ones(rows.size)

    def ratio(self, child: int) -> Array:
        """target / draft [b] at the token of ``child``, under the present laws."""
        if self._target is None or self._draft is None:
            return self._ratios[self.rows, child]
        # Summed anew, not by subtraction: what is left can be far smaller than the rounding of what was removed.
        self._draft_sum = row_sums(self._draft)
        at_token = np.arange(self.rows.size), self._drafts.tokens[self.rows, child]
        target, draft = widen(self._target[at_token]), widen(self._draft[at_token])
        return target * self._draft_sum / (draft * self._target_sum)

    def reject(self, child: int, stay: NDArray[np.bool_], scale: Array | int = 1) -> Array:
        """Drop ``child`` from the laws of the rows that ``stay`` [b]; their Z [b'], with ``scale`` [b'] the P.

        In exact arithmetic Z is positive wherever P = 1. In floats two laws that differ by rounding only can
        reject with none left; their residual is then below the resolution, and the target stays as it was.
        """
        self.rows = rows = self.rows[stay]
        entry = self._node + 1
        target = self._target_probs[rows, entry] if self._target is None else _keep(self._target, stay)
        draft = self._draft_probs[rows, entry] if self._draft is None else _keep(self._draft, stay)
        target_sum, draft_sum = self._target_sum[stay], self._draft_sum[stay]
        residual = widen(target) * (scale * draft_sum / target_sum)[:, None]
        residual -= draft
        np.maximum(residual, 0, out=residual)
        residual_sum = row_sums(residual)
        require_no_nan(residual_sum, rows)
        empty = np.flatnonzero(residual_sum == 0)
        residual[empty] = target[empty]
        draft[np.arange(rows.size), self._drafts.tokens[rows, child]] = 0
        self._target, self._draft, self._draft_sum = residual, draft, draft_sum
        self._target_sum = residual_sum.copy()
        self._target_sum[empty] = target_sum[empty]
        return residual_sum / draft_sum

    def weights(self) -> Array:
        """Unnormalised distribution [b, V] of the next token if no further child is tried."""
        return self._target_probs[self.rows, self._node + 1] if self._target is None else self._target


def _keep(values: Array, stay: NDArray[np.bool_]) -> Array:
    """``values[stay]`` for [b, V], copied only where rows leave."""
    return values if stay.all() else values[stay]


def draft_ratios(drafts: TreeDrafts) -> Array:
    """target / draft [B, n] at the nodes' tokens, before any rejection.

    Raises:
        ValueError: naming rows with NaN, or nodes whose token has draft probability zero: then the draft
            distribution is not the one that the token was drawn from.
    """
    assert drafts.draft_probs is not None
    target, draft = drafts.at_tokens(drafts.target_probs), drafts.at_tokens(drafts.draft_probs)
    require_no_nan((target + draft).sum(axis=1), np.arange(target.shape[0]))
    impossible = draft <= 0
    if impossible.any():
        rows, nodes = np.nonzero(impossible)
        raise ValueError(
            f"draft tokens of nodes {np.unique(nodes).tolist()} in rows {np.unique(rows).tolist()} have draft "
            "probability 0: pass the very distribution that the drafter sampled from, or use 'one_hot' for "
            "deterministic children"
        )
    return target / draft


def check_siblings(tree: Tree, tokens: IntArray) -> None:
    """Raise ValueError naming the first node of ``tokens`` [B, n] that repeats a sibling's token."""
    if not tokens.size:
        return
    # Sorted by (parent, token), equal siblings are neighbours.
    keys = tokens + (np.array(tree.parents, np.int64) + 1) * (tokens.max() + 1)
    order = np.argsort(keys, axis=1, kind="stable")
    keys = np.take_along_axis(keys, order, axis=1)
    same = keys[:, 1:] == keys[:, :-1]
    if same.any():
        row, place = np.argwhere(same)[0].tolist()
        first, second = order[row, place : place + 2].tolist()
        raise ValueError(
            f"node {second} in row {row} repeats token {tokens[row, second]} of its sibling {first}: draw "
            "siblings without replacement, or merge the two nodes"
        )


def _check_vocabulary(tokens: NDArray[np.int64], vocab_size: int) -> None:
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        row, node = np.argwhere(outside)[0].tolist()
        raise ValueError(
            f"token {tokens[row, node]} of node {node} in row {row} lies outside the vocabulary of {vocab_size}"
        )
