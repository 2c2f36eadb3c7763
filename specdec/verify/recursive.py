"""Recursive rejection sampling on trees whose siblings were drawn without replacement.

SpecInfer, arXiv 2305.09781 (multi-step speculative sampling), with the draft's zeroing of Sequoia, arXiv 2402.12374
(sampling and verification). Children are tried in draw order: x is accepted with probability
min(1, target[x] / draft[x]); after its rejection target ← norm((target − draft)⁺), draft[x] ← 0, and the draft is
renormalised. Without an accepted child, or when the draft's mass is used up, the next token comes from the target
that is left.
"""

from __future__ import annotations

from specdec.verify.numerics import Array
from specdec.verify.tree_base import NodeLaws, Stop, TreeDrafts, TreeRule, draft_ratios
from specdec.verify.walk import LawsAt, walk, walk_thresholds


def thresholds(drafts: TreeDrafts) -> Array:
    """Probability [B, n] of each node to be accepted once its parent is and its earlier siblings are not."""
    return walk_thresholds(drafts, _laws(drafts))


def accept(drafts: TreeDrafts, uniforms: Array) -> list[Stop]:
    """Where each row stops, for ``uniforms`` [B, n]."""
    return walk(drafts, uniforms, _laws(drafts))


def _laws(drafts: TreeDrafts) -> LawsAt:
    ratios = draft_ratios(drafts)
    return lambda node, rows: NodeLaws(drafts, ratios, node, rows)


RULE = TreeRule(True, thresholds, accept)
