"""Steps in which no decoding row needs a decision, planned at a cost that does not grow with their number.

In most steps of a loaded server a prompt arrives or an answer ends, and nothing else is decided: every decoding row
gets its one token and the same number of drafts. While it is certain that the token budget, the free blocks and every
row's limit hold that much, decoding rows need only be counted. What changes is taken one by one, by the loop's own
methods: who is admitted, how many prompt tokens are computed. As soon as anything is not certain, ``begin`` returns
``None``, the executor hands over the progress of the rows (:meth:`Cruise.leave`) and the loop decides itself.

The plans are those of ``StepLoop.begin`` (a test runs both), so this is for executors that know a row's whole future
when it starts to decode: the simulator. Life: ``enter``, then ``begin`` and ``commit`` for each step, then ``leave``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specdec.scheduler.admission import Joined
from specdec.scheduler.loop import StepLoop
from specdec.scheduler.plan import IntArray, LongArray
from specdec.scheduler.request import Request

_NEVER = 1 << 62


class Chunk(NamedTuple):
    """Prompt tokens of one row to compute in a step; as in ``StepPlan``, a chunk that ``emits`` is the last."""

    row: int
    context: int
    num_new: int
    emits: bool


class CruisePlan(NamedTuple):
    """A step of which the decoding rows are only counted.

    Attributes:
        step, now_s: as in ``StepPlan``.
        num_decodes: rows that decode, each with ``num_drafts`` drafts.
        chunks: prompts, in the order of the rows.
        admitted: requests that entered the table in this step.
    """

    step: int
    now_s: float
    num_decodes: int
    num_drafts: int
    chunks: list[Chunk]
    admitted: list[Request]


class Ended(NamedTuple):
    """A row whose answer ends in this step, and what its request has come to, from its beginning."""

    row: int
    num_generated: int
    num_drafted: int
    num_accepted: int
    num_rejected: int
    num_steps: int


class Cruise:
    """Plans such steps for one loop, which nobody else may step meanwhile.

    Args:
        loop: submitting to it is allowed at any time.

    Attributes:
        joined_at: row to the first step in which it decodes, of all rows that decode.
    """

    def __init__(self, loop: StepLoop) -> None:
        self.loop = loop
        self.joined_at: dict[int, int] = {}
        self._prompts: list[int] = []
        self._until = 0
        self._row_steps = 0

    def enter(self) -> bool:
        """Whether to cruise from here, between a commit and the next begin; if so, it has begun."""
        loop, table = self.loop, self.loop.table
        if not loop.speculation.is_constant or loop.num_swapped_blocks:
            return False
        rows = table.active
        pending = table.num_known[rows] - table.num_computed[rows]
        decodes = rows[pending == 1]
        if loop.awaits_first_token(decodes):
            return False  # the last token of a prompt is computed as if it were decoded
        self._prompts = rows[pending > 1].tolist()
        self.joined_at = dict.fromkeys(decodes.tolist(), loop.next_step)
        self._row_steps = 0
        self._until = _NEVER
        if decodes.size:
            self._until = self._safe_until(loop.next_step, int(table.num_left(decodes).min()))
        return self._until > loop.next_step

    def _safe_until(self, step: int, left: int) -> int:
        """The first step from ``step`` on in which ``max_tokens`` may shorten a draft of a row with ``left`` tokens to
        go, whatever is accepted."""
        k = self.loop.speculation.max_drafts
        return step + (left - 1 - k) // (1 + k) + 1 if k else _NEVER

    def begin(self, now_s: float) -> CruisePlan | None:
        """The next step, or ``None``, with nothing changed, if the loop must decide it."""
        loop, config, num_decodes = self.loop, self.loop.config, len(self.joined_at)
        step, k = loop.next_step, loop.speculation.max_drafts
        decode_tokens = num_decodes * (1 + k)
        spare = self._spare_blocks(num_decodes)
        if step >= self._until or spare < 0 or decode_tokens > config.max_num_batched_tokens:
            return None
        if loop.num_swapped_blocks:
            return None
        known, computed = loop.table.num_known, loop.table.num_computed
        pending = [int(known[row] - computed[row]) for row in self._prompts]
        if 1 in pending:
            return None  # what is left of this prompt counts as decoding, with drafts
        budget = config.max_num_batched_tokens
        if loop.policy.decode_first:
            budget -= decode_tokens
        granted, budget = self._grant(pending, budget)
        admits = bool(loop.queue) and loop.may_admit_at(step)
        if admits and spare < loop.most_blocks_admitted(budget):
            return None
        if not loop.policy.decode_first and not admits and budget < decode_tokens:
            return None
        joined = Joined()
        if admits:
            if not loop.policy.decode_first and num_decodes:
                return None  # how much is left for the decodes is known only after admission
            loop.admit(now_s, budget, joined)
        if not (num_decodes or self._prompts or joined.requests):
            return None
        return self._plan(now_s, granted, joined)

    def steps_alike(self, plan: CruisePlan) -> int:
        """From ``plan`` on, for how many steps the plans are equal if nothing arrives or ends; at least 1."""
        loop, k = self.loop, plan.num_drafts
        if self._prompts or loop.queue or not plan.num_decodes:
            return 1
        room = loop.pool.num_empty - plan.num_decodes
        fitting = (room * loop.config.block_size // (1 + k) - self._row_steps) // plan.num_decodes
        return max(1, min(self._until - plan.step, fitting + 1))

    def skip(self, plan: CruisePlan, num_steps: int, now_s: float) -> CruisePlan:
        """After ``begin``: ``num_steps`` steps of this plan happened; the plan that follows them, at ``now_s``."""
        self.loop.next_step += num_steps
        self._row_steps += num_steps * plan.num_decodes
        return plan._replace(step=plan.step + num_steps, now_s=now_s, admitted=[])

    def _spare_blocks(self, num_decodes: int) -> int:
        """Blocks that stay free in this step even if every draft was and is accepted."""
        k, size = self.loop.speculation.max_drafts, self.loop.config.block_size
        grown = (self._row_steps + num_decodes) * (1 + k) // size + num_decodes
        return self.loop.pool.num_empty - grown

    def _grant(self, pending: list[int], budget: int) -> tuple[list[int], int]:
        """Tokens for each prompt, in order, and the budget that is left."""
        granted: list[int] = []
        for tokens in pending:
            if budget == 0 or (tokens > budget and not self.loop.policy.chunked_prefill):
                break
            granted.append(min(tokens, budget))
            budget -= granted[-1]
        return granted, budget

    def _plan(self, now_s: float, granted: list[int], joined: Joined) -> CruisePlan:
        loop, table = self.loop, self.loop.table
        newcomers = table.active[len(table) - len(joined.requests) :].tolist()
        chunks: list[Chunk] = []
        for row, tokens in zip(
            [*self._prompts[: len(granted)], *newcomers], granted + joined.new, strict=True
        ):
            if tokens:
                context = int(table.num_computed[row])
                chunks.append(Chunk(row, context, tokens, context + tokens == int(table.num_known[row])))
        self._prompts += newcomers
        plan = CruisePlan(
            loop.next_step, now_s, len(self.joined_at), loop.speculation.max_drafts, chunks, joined.requests
        )
        loop.next_step += 1
        self._row_steps += plan.num_decodes
        return plan

    def commit(self, plan: CruisePlan, ended: list[Ended], now_s: float) -> None:
        """Record what happened in ``plan``; every chunk that emits gave one token. ``now_s`` is the step's end."""
        loop, table = self.loop, self.loop.table
        for row, context, num_new, emits in plan.chunks:
            table.num_computed[row] = context + num_new
            if emits:
                table.num_known[row] += 1
                table.num_steps[row] += 1
                loop.first_token(row, now_s)
                self._prompts.remove(row)
                self._join(row, plan.step + 1)
            if loop.config.prefix_caching:
                loop.register_blocks(row)
        for row, generated, *counts in ended:
            self._row_steps -= plan.step + 1 - self.joined_at.pop(row)
            table.num_known[row] = table.prompt_len[row] + generated
            table.num_drafted[row], table.num_accepted[row], table.num_rejected[row], table.num_steps[row] = (
                counts
            )
            loop.finish(row, now_s)

    def _join(self, row: int, step: int) -> None:
        self.joined_at[row] = step
        left = int(self.loop.table.max_known[row] - self.loop.table.num_known[row])
        self._until = min(self._until, self._safe_until(step, left))

    def leave(
        self,
        rows: LongArray,
        num_new: IntArray,
        num_accepted: IntArray,
        num_rejected: IntArray,
        last: IntArray,
    ) -> None:
        """Hand the loop what its decoding rows have come to, so that it can plan the next step itself.

        Args:
            rows: int64 [R], the keys of ``joined_at``.
            num_new: int32 [R], steps that each has taken since it joined.
            num_accepted, num_rejected: int32 [R], in these.
            last: int32 [R], tokens emitted in the last of them; 0 where there was none.
        """
        table, k, size = self.loop.table, self.loop.speculation.max_drafts, self.loop.config.block_size
        emitted = num_new + num_accepted
        table.num_computed[rows] += emitted
        table.num_known[rows] += emitted
        table.num_drafted[rows] += num_new * np.int32(k)
        table.num_accepted[rows] += num_accepted
        table.num_rejected[rows] += num_rejected
        table.num_steps[rows] += num_new
        # Blocks as the last begin would have held them.
        held = table.num_computed[rows] - last + np.int32(1 + k)
        need = np.where(num_new > 0, -(-held // size) - table.num_blocks[rows], 0)
        growing = np.flatnonzero(need > 0)
        if growing.size:
            blocks = self.loop.pool.allocate(int(need[growing].sum()))
            table.append_blocks(rows[growing], need[growing], blocks)
        self.joined_at = {}
