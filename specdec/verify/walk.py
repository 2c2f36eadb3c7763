"""Rules that walk from the root: try a node's children in draw order, step into the first accepted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.tree.topology import ROOT
from specdec.verify.numerics import Array
from specdec.verify.tree_base import Stop, TreeDrafts


class Laws(Protocol):
    """What a rule knows at one node, for the rows [b] that are there; rejection narrows them."""

    rows: NDArray[np.int64]

    def ratio(self, child: int) -> Array:
        """[b]; the child is accepted with this probability, or surely above 1."""
        ...

    def reject(self, child: int, stay: NDArray[np.bool_]) -> Any:
        """Drop a child for the rows that ``stay`` [b]."""
        ...

    def weights(self) -> Array:
        """Unnormalised distribution [b, V] of the next token if no further child is tried."""
        ...


LawsAt = Callable[[int, NDArray[np.int64]], Laws]
"""(node, rows) to the laws there."""


def walk(drafts: TreeDrafts, uniforms: Array, laws_at: LawsAt) -> list[Stop]:
    """Where each row stops. A node's uniform decides about it once, when its parent has been reached."""
    waiting = {ROOT: np.arange(drafts.tokens.shape[0])}
    stops = []
    for node in range(ROOT, len(drafts.tree)):
        rows = waiting.pop(node, None)
        if rows is None or not rows.size:
            continue
        laws = laws_at(node, rows)
        for child in drafts.tree.children_of(node):
            accepted = (uniforms[laws.rows, child] < laws.ratio(child)).astype(np.bool_)
            waiting[child] = laws.rows[accepted]
            if accepted.all():
                break
            laws.reject(child, ~accepted)
        else:
            stops.append(Stop(node, laws.rows, laws.weights()))
    return stops


def walk_thresholds(drafts: TreeDrafts, laws_at: LawsAt) -> Array:
    """Probability [B, n] of each node to be accepted once its parent is and its earlier siblings are not."""
    num_rows, size = drafts.tokens.shape
    rows, everyone = np.arange(num_rows), np.ones(num_rows, np.bool_)
    thresholds = np.zeros((num_rows, size), drafts.ones(0).dtype)
    for node in range(ROOT, size):
        laws = laws_at(node, rows)
        for child in drafts.tree.children_of(node):
            thresholds[:, child] = np.minimum(laws.ratio(child), 1)
            laws.reject(child, everyone)
    return thresholds
