"""The next step, planned while the one before it runs: what of it does not hang on the outcome.

How many tokens a row gets hangs on how many are known, not on which, so the shares of the running rows are certain if
nobody ends but those who reach ``max_tokens``. A plan made so changes nothing: ``StepLoop.begin`` takes it if the rows
are those that it assumed, and forgets it if not. Three things are left to ``begin``, for the outcome decides them:

* which blocks are taken, since rows that end give theirs back;
* the context of rows that drafted;
* who joins, which also treats an arrival in between as if nothing had been planned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from specdec.scheduler.plan import IntArray, LongArray, StepPlan
from specdec.scheduler.table import RequestTable


class Ahead(NamedTuple):
    """Shares of the next step, over the R rows that run if nobody ends but who must.

    Attributes:
        rows: int64 [R], in admission order.
        pending: int32 [R], known tokens that are not computed.
        wanted: int32 [R], drafts wanted of each, for which blocks are held.
        new, drafts: int32 [R], tokens given before anybody joins; see ``share``.
        budget: tokens left for newcomers.
        is_exact: the step before drafts nothing, so that the contexts are known.
        growth: if they are, which rows lack blocks, int64 [G], and how many, int32 [G]; ``None`` if none does.
        plan: of the step if nobody joins; its time is not set, and its contexts are only if ``is_exact``.
    """

    rows: LongArray
    pending: IntArray
    wanted: IntArray
    new: IntArray
    drafts: IntArray
    budget: int
    is_exact: bool
    growth: tuple[LongArray, IntArray] | None
    plan: StepPlan

    def fits(self, table: RequestTable) -> bool:
        """Whether the running rows are those that were assumed, with room left for the drafts."""
        # Between two begins rows only leave, and who must has left: equally many are the same.
        if table.active.size != self.rows.size:
            return False
        # Each accepted draft brings a row nearer to its end, where it may draft less.
        return self.is_exact or bool((table.num_left(self.rows) > self.wanted).all())

    def settled(self, now_s: float, table: RequestTable) -> StepPlan:
        """The plan at ``now_s``, the begin of its step, with what the outcome has told."""
        if self.is_exact:
            return self.plan._replace(now_s=now_s)
        return self.plan._replace(now_s=now_s, context=table.num_computed[self.plan.rows])


def foreseen(table: RequestTable, plan: StepPlan) -> tuple[LongArray, IntArray, IntArray]:
    """After ``plan``, which is running: the rows that stay, int64 [R], and their computed and known tokens, int32 [R].

    As if no draft were accepted; what is between computed and known is the same whatever is accepted.
    """
    computed, known = table.num_computed.copy(), table.num_known.copy()
    computed[plan.rows] += plan.num_new
    known[plan.rows] += plan.emits
    rows = table.active[known[table.active] < table.max_known[table.active]]
    return rows, computed[rows], known[rows]


def plan_of(
    step: int,
    table: RequestTable,
    rows: LongArray,
    computed: IntArray,
    known: IntArray,
    new: IntArray,
    drafts: IntArray,
) -> StepPlan:
    """The plan number ``step`` in which nobody joins or leaves; arrays are over the running ``rows``."""
    if np.count_nonzero(new) < new.size:
        scheduled = new > 0
        rows, computed, known = rows[scheduled], computed[scheduled], known[scheduled]
        new, drafts = new[scheduled], drafts[scheduled]
    return StepPlan(
        step=step,
        now_s=math.nan,
        rows=rows,
        request_ids=table.request_ids[rows],
        context=computed,
        num_new=new,
        num_drafts=drafts,
        emits=computed + new == known,
    )
