"""What a drafter gives (:class:`Draft`), what it gets (:class:`DraftHost`, :class:`Verified`), and the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specdec.rows import RowState
from specdec.runner import Runner
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan
from specdec.scheduler.table import RequestTable


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens of one step over the plan's R rows: a chain or a tree for each.

    Attributes:
        tokens: int64 [R, K]; entries beyond ``num_drafted`` are meaningless.
        num_drafted: int32 [R], at most the plan's ``num_drafts``.
        probs: the exact distributions that sampled rows' tokens were drawn from; ``None`` when every token is a
            deterministic function of the prefix. Rows of greedy requests are not filled. Of chains float32
            [R, K, V], entry j being token j's; of trees float32 [R, K + 1, V], entry 0 that of the root's children
            and j + 1 that of node j's: siblings are drawn without replacement, in the order of their numbers.
        parents: int32 [R, K], each node's parent among the row's nodes, of a lower number than its own, or −1 for
            the last known token; ``None`` for chains.
        confidence: float32 [R, K], the drafter's estimate of the probability that a node is accepted, given that its
            parent is; ``None`` if it has none. It ranks nodes and has no part in verification.
    """

    tokens: NDArray[np.int64]
    num_drafted: IntArray
    probs: NDArray[np.float32] | None = None
    parents: IntArray | None = None
    confidence: NDArray[np.float32] | None = None

    @staticmethod
    def none(num_rows: int) -> Draft:
        return Draft(np.zeros((num_rows, 0), np.int64), np.zeros(num_rows, np.int32))


@dataclass(frozen=True, slots=True)
class Verified:
    """What the target made of a draft, over the plan's R rows.

    Attributes:
        draft: what was verified.
        logits: float32 [N, V], of each emitting row in turn: after its last known token, then after each of its
            drafted ones.
        logit_start: int64 [R], where a row's logits begin; -1 if the row does not emit.
        path: int64 [R, D], the accepted tokens' places in the draft, in order; entries beyond the outcome's
            ``num_accepted`` are meaningless. What is emitted may end sooner, at a stop.
        query_start: int32 [R + 1], where each row's tokens begin in the target's pass: its new known ones, then its
            drafts.
        hidden: float32 [L, T, hidden_size], outputs of the layers that the drafter asked for; ``None`` if of none.
    """

    draft: Draft
    logits: Tensor
    logit_start: NDArray[np.int64]
    path: NDArray[np.int64]
    query_start: IntArray
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DraftHost:
    """What an engine shows its drafter.

    Attributes:
        state: token values and sampling parameters by row.
        table: the scheduler's table; ``block_table`` also addresses a drafter's own KV cache.
        target: the target model's runner and, through it, its KV cache.
        num_blocks, block_size: size of the paged cache.
    """

    state: RowState
    table: RequestTable
    target: Runner
    num_blocks: int
    block_size: int


MODEL_FREE = frozenset({"ngram", "suffix", "recycling", "synthetic"})
"""Names of the drafters that run no model: what they take counts by rows, not by passes."""


class Drafter(Protocol):
    """Attributes:
    captures: decoder layers of the target whose outputs, the residual stream, it wants to observe.
    """

    captures: Sequence[int]

    @property
    def name(self) -> str: ...

    def bind(self, host: DraftHost) -> None:
        """Attach to an engine, before its first step."""
        ...

    def propose(self, plan: StepPlan) -> Draft:
        """Draft at most ``plan.num_drafts`` tokens for each row.

        How many are returned may depend on the prefix, never on the values of the drafted tokens of this
        step in a way that hides a sampled token from verification.
        """
        ...

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Learn what became of the last proposal; called once per step, drafts or not.

        The emitted tokens are among the known ones already; the scheduler has not committed the step yet.
        """
        ...
