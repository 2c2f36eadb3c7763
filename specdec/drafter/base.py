"""What a drafter gives (:class:`Draft`), what it is given (:class:`DraftHost`), and the protocol between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.rows import RowState
from specdec.runner import Runner
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan
from specdec.scheduler.table import RequestTable


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens of one step over the plan's R rows.

    Attributes:
        tokens: int64 [R, K]; entries beyond ``num_drafted`` are meaningless.
        num_drafted: int32 [R], at most the plan's ``num_drafts``.
        probs: float32 [R, K, V], the exact distributions that sampled rows' tokens were drawn from; ``None``
            when every token is a deterministic function of the prefix. Rows of greedy requests are not filled.
    """

    tokens: NDArray[np.int64]
    num_drafted: IntArray
    probs: NDArray[np.float32] | None = None

    @staticmethod
    def none(num_rows: int) -> Draft:
        return Draft(np.zeros((num_rows, 0), np.int64), np.zeros(num_rows, np.int32))


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


class Drafter(Protocol):
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

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn what became of the last proposal; called once per step, drafts or not."""
        ...
