"""Trees that are grown node by node, and their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.drafter.base import Draft


@dataclass(slots=True)
class Nodes:
    """One row's draft: its nodes' fields, parents before children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    def append(self, token: int, parent: int, confidence: float) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.confidence.append(confidence)


def pack(rows: Sequence[Nodes], tree: bool) -> Draft:
    """The draft of ``rows``; if not ``tree``, each must be a chain."""
    num_drafted = np.array([len(nodes.tokens) for nodes in rows], np.int32)
    shape = len(rows), int(num_drafted.max(initial=0))
    tokens, parents = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    confidence = np.zeros(shape, np.float32)
    for index, nodes in enumerate(rows):
        count = len(nodes.tokens)
        tokens[index, :count] = nodes.tokens
        parents[index, :count] = nodes.parents
        confidence[index, :count] = nodes.confidence
    return Draft(tokens, num_drafted, parents=parents if tree else None, confidence=confidence)
