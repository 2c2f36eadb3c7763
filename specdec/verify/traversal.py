"""Traversal verification: Weng et al., "Traversal verification for speculative tree decoding", arXiv 2505.12398.

From the leaves up, so that a rejected node does not end its ancestors. Every node v on the way to the leftmost
leaf has a ratio P: 1 at the root, and min(1, P_v · target_v[x] / draft_v[x]) at its child x, as in block
verification. The leaf is accepted, with all of its path, with probability P. Otherwise it is deleted, and at its
parent v

    r = (P_v · target_v − draft_v)⁺,  Z = Σ r,  target_v ← r / Z,  draft_v[x] ← 0 and renormalise,
    P_v ← Z / (Z + 1 − P_v), while the root's stays 1,

and the search goes on. The next token comes from target_v of the accepted node. On a chain this is block
verification. On trees it accepts more than recursive rejection sampling as a rule, but not always: below a node
other than the root, accepting a shallow child more often leaves less of the target for a deeper sibling after it. So
put deep subtrees first.

A node is tried when all below it and to the left of it have been deleted, so its threshold depends on the drafts
only: the first node in post-order with u < P is accepted, else the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specdec.tree.topology import ROOT
from specdec.verify.numerics import Array
from specdec.verify.tree_base import NodeLaws, Stop, TreeDrafts, TreeRule, draft_ratios


def thresholds(drafts: TreeDrafts) -> Array:
    """P [B, n] of each node at the time when it is tried, all before it in post-order having been deleted."""
    search = _Search(drafts, draft_ratios(drafts), None)
    search.run()
    return search.thresholds


def accept(drafts: TreeDrafts, uniforms: Array) -> list[Stop]:
    """Where each row stops, for ``uniforms`` [B, n]."""
    search = _Search(drafts, draft_ratios(drafts), uniforms)
    search.run()
    return search.stops


@dataclass
class _Search:
    """Post-order search of all rows at once; without uniforms nothing is accepted and thresholds are kept."""

    drafts: TreeDrafts
    ratios: Array
    uniforms: Array | None
    stops: list[Stop] = field(default_factory=list)
    thresholds: Array = field(init=False)

    def __post_init__(self) -> None:
        self.thresholds = np.zeros(self.drafts.tokens.shape, self.drafts.ones(0).dtype)

    def run(self) -> None:
        rows = np.arange(self.drafts.tokens.shape[0])
        self._visit(ROOT, rows, self.drafts.ones(rows.size))

    def _visit(self, node: int, rows: NDArray[np.int64], ratio: Array) -> NDArray[np.bool_]:
        """Try the subtree of ``node`` for ``rows`` [b] with ``ratio`` [b] its P; True [b] where all is deleted."""
        deleted = np.zeros(rows.size, np.bool_)
        if not (ratio > 0).any():
            return ~deleted  # P is 0 all the way down
        laws, place = NodeLaws(self.drafts, self.ratios, node, rows), np.arange(rows.size)
        children = self.drafts.tree.children_of(node)
        for child in children:
            lost = self._visit(child, laws.rows, np.minimum(ratio * laws.ratio(child), 1))
            place, ratio = place[lost], ratio[lost]
            if not place.size:
                return deleted
            if child == children[-1] and self._hopeless(node, rows[place], ratio):
                deleted[place] = True
                return deleted
            mass = laws.reject(child, lost, ratio)
            if node != ROOT:
                ratio = _next_ratio(mass, ratio)
        deleted[place] = self._try(node, laws, ratio)
        return deleted

    def _hopeless(self, node: int, rows: NDArray[np.int64], ratio: Array) -> bool:
        """True if no row can accept ``node``: P only falls, so the last residual need not be computed."""
        if node == ROOT or self.uniforms is None:
            return False
        return not (self.uniforms[rows, node] < ratio).any()

    def _try(self, node: int, laws: NodeLaws, ratio: Array) -> NDArray[np.bool_]:
        """Accept ``node`` with probability ``ratio`` [b]; True where it is deleted."""
        if self.uniforms is None:
            if node != ROOT:
                self.thresholds[laws.rows, node] = ratio
            return np.ones(laws.rows.size, np.bool_)
        accepted = np.ones(laws.rows.size, np.bool_)
        if node != ROOT:
            accepted = (self.uniforms[laws.rows, node] < ratio).astype(np.bool_)
        if accepted.any():
            self.stops.append(Stop(node, laws.rows[accepted], laws.weights()[accepted]))
        return ~accepted


def _next_ratio(mass: Array, ratio: Array) -> Array:
    """Z / (Z + 1 − P) with 0/0 = 1: laws that agree below the resolution."""
    both = mass + 1 - ratio
    settled = both == 0
    return np.where(settled, 1, mass / np.where(settled, 1, both))


RULE = TreeRule(True, thresholds, accept)
