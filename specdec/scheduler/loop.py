"""The step loop: begin → (somebody executes) → commit. Time is an argument, tensors never appear."""

from __future__ import annotations

import math

import numpy as np

from specdec.scheduler.admission import Admission, Joined
from specdec.scheduler.ahead import Ahead, foreseen, plan_of
from specdec.scheduler.blocks import BlockPool
from specdec.scheduler.limits import SchedulerConfig
from specdec.scheduler.plan import NO_COPIES, NO_IDS, NO_INTS, IntArray, LongArray, StepOutcome, StepPlan
from specdec.scheduler.policy import BatchPolicy, WaitingQueue
from specdec.scheduler.request import Request, RequestState
from specdec.scheduler.shares import give_decodes, share
from specdec.scheduler.speculation import SpeculationController
from specdec.scheduler.table import RequestTable


class StepLoop:
    """Plans and commits the steps of one replica.

    Attributes:
        next_step: number of the next plan.
        num_swapped_blocks: KV blocks in host memory.
        kept_ahead: whether the last plan is the one that :meth:`look_ahead` had made; ``None`` if it had made none.

    Set ``draining`` once no request will be submitted any more: static batching then runs its last,
    partial batch.

    Args:
        config: limits.
        policy: batching policy.
        speculation: draft-length controller.
    """

    def __init__(
        self, config: SchedulerConfig, policy: BatchPolicy, speculation: SpeculationController
    ) -> None:
        self.config = config
        self.policy = policy
        self.speculation = speculation
        self.draining = False
        self.pool = BlockPool(config.num_blocks, config.block_size, prefix_caching=config.prefix_caching)
        self.table = RequestTable(
            config.max_num_seqs, self.pool.blocks_for(config.max_model_len), config.block_size
        )
        self.queue = WaitingQueue(config.order, config.ageing_s)
        self.next_step = 0
        self.num_swapped_blocks = 0
        self.kept_ahead: bool | None = None
        self._ahead: Ahead | None = None
        self._longest_known = 0
        self._longest_possible = min(config.max_model_len, config.num_blocks * config.block_size)
        self._silent: dict[int, Request] = {}  # rows without a first token
        # Sliced instead of made anew in every step.
        self._ones = np.ones(config.max_num_seqs, np.int32)
        self._max_drafts = np.full(config.max_num_seqs, speculation.max_drafts, np.int32)
        self._admission = Admission(config, policy, self.pool, self.table, self.queue)

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_running(self) -> int:
        return len(self.table)

    @property
    def has_work(self) -> bool:
        return bool(self.queue) or self.num_running > 0

    def check(self, request: Request) -> None:
        """See that ``request`` can run here, before any work starts.

        Raises:
            ValueError: the request can never run: longer than the model's limit, than the KV pool, or than
                the token budget of a policy that computes prompts whole.
        """
        config, longest = self.config, request.prompt_len + request.max_tokens
        whole = not self.policy.chunked_prefill
        if longest <= self._longest_possible and (not whole or longest <= config.max_num_batched_tokens):
            return
        name = f"request {request.request_id}"
        if longest > config.max_model_len:
            raise ValueError(
                f"{name}: prompt of {request.prompt_len} tokens + max_tokens={request.max_tokens} exceeds "
                f"max_model_len={config.max_model_len}: shorten the prompt or lower max_tokens"
            )
        if self.pool.blocks_for(longest) > config.num_blocks:
            raise ValueError(
                f"{name} needs {self.pool.blocks_for(longest)} KV blocks of {config.block_size} tokens, the "
                f"pool has num_blocks={config.num_blocks}: enlarge the KV pool or lower max_tokens"
            )
        raise ValueError(
            f"{name}: {longest} tokens exceed max_num_batched_tokens={config.max_num_batched_tokens} and "
            "this policy computes prompts whole: raise the budget or use the policy 'chunked'"
        )

    def submit(self, request: Request) -> None:
        """Queue ``request``; see :meth:`check` for the errors.

        Its ``num_swapped`` may say that so many of its first tokens have their KV in host memory already, as after
        a prefill elsewhere. That KV counts as swapped out, whatever ``num_swap_blocks`` is.
        """
        self.check(request)
        if request.num_swapped:
            self.num_swapped_blocks += self.pool.blocks_for(request.num_swapped)
        request.state = RequestState.WAITING
        self._longest_known = max(self._longest_known, request.prompt_len + request.max_tokens)
        self.queue.push(request)

    def cancel(self, request_id: int) -> None:
        """Forget a request, waiting or running, between ``commit`` and ``begin``; unknown ids are ignored."""
        for row in self.table.active[self.table.request_ids[self.table.active] == request_id].tolist():
            self.pool.release(self.table.blocks(row))
            self.table.remove(row).state = RequestState.FINISHED
            self._silent.pop(row, None)
        cancelled = self.queue.discard(request_id)
        if cancelled and cancelled.num_swapped:
            self.num_swapped_blocks -= self.pool.blocks_for(cancelled.num_swapped)

    def begin(self, now_s: float) -> StepPlan:
        """Decide the next step. Every call is followed by :meth:`commit`, unless the plan is empty."""
        left: list[Request] = []
        swapped: list[LongArray] = []
        self.kept_ahead = None
        ahead = self._take_ahead(self._ahead) if self._ahead else None
        if ahead:
            pending, drafts, new, budget = ahead.pending, ahead.drafts, ahead.new, ahead.budget
        else:
            pending, drafts = self._reserve_decodes(now_s, left, swapped)
            new, budget = share(self.policy, self.config.max_num_batched_tokens, pending, drafts)
        joined = Joined()
        if not left and self.queue and self.may_admit_at(self.next_step):
            budget = self.admit(now_s, budget, joined)
        if ahead and not joined.requests:
            self.next_step += 1
            return ahead.settled(now_s, self.table)
        if not self.policy.decode_first:
            give_decodes(pending, new, drafts, budget)
        if joined.requests:
            new = np.concatenate([new, np.array(joined.new, np.int32)])
            drafts = np.concatenate([drafts, np.zeros(len(joined.requests), np.int32)])
        return self._plan(now_s, new, drafts, joined, left, swapped)

    def look_ahead(self, plan: StepPlan) -> StepPlan | None:
        """Between ``begin`` and ``commit``, while ``plan`` runs: plan the step after it, as far as that is certain.

        Nothing changes but the time that the next ``begin`` takes: it gives the plan that it would have given, from
        this one if what was assumed of the outcome came true; see ``specdec.scheduler.ahead``. Under a controller
        whose answer may change nothing is planned ahead.

        Returns:
            The next plan if nobody joins and the assumption holds, but for ``now_s``; ``begin`` then returns its
            arrays. ``None`` if there is none, or its contexts hang on the drafts of ``plan``.
        """
        self._ahead = None
        if self.speculation.max_drafts and not self.speculation.is_constant:
            return None
        rows, computed, known = foreseen(self.table, plan)
        pending = known - computed
        wanted = self._wanted_drafts(plan.now_s, rows, known) * (pending == 1)
        drafts = wanted.copy()
        new, budget = share(self.policy, self.config.max_num_batched_tokens, pending, drafts)
        all_new, all_drafts = new, drafts
        if not self.policy.decode_first:
            all_new, all_drafts = new.copy(), drafts.copy()
            give_decodes(pending, all_new, all_drafts, budget)
        following = plan_of(self.next_step, self.table, rows, computed, known, all_new, all_drafts)
        if following.is_empty:
            return None
        is_exact = not plan.num_drafts.any()
        growth = self._growth(rows, computed, wanted) if is_exact else None
        self._ahead = Ahead(rows, pending, wanted, new, drafts, budget, is_exact, growth, following)
        return following if is_exact else None

    def _take_ahead(self, ahead: Ahead) -> Ahead | None:
        """``ahead``, with its blocks held, if it is what would be planned now."""
        table, rows = self.table, ahead.rows
        self._ahead, self.kept_ahead = None, False
        if ahead.fits(table):
            growth = ahead.growth
            if not ahead.is_exact:
                growth = self._growth(rows, table.num_computed[rows], ahead.wanted)
            self.kept_ahead = growth is None or self._hold(*growth)
        return ahead if self.kept_ahead else None

    def _plan(
        self,
        now_s: float,
        new: IntArray,
        drafts: IntArray,
        joined: Joined,
        left: list[Request],
        swapped: list[LongArray],
    ) -> StepPlan:
        table = self.table
        rows = table.active.copy()
        if np.count_nonzero(new) < new.size:
            scheduled = new > 0
            rows, new, drafts = rows[scheduled], new[scheduled], drafts[scheduled]
        context = table.num_computed[rows]
        idle = rows.size == 0 and len(table) == 0 and len(self.queue) > 0
        step = self.next_step
        self.next_step += rows.size > 0
        came, went = joined.requests, [r for r in left if r.num_swapped]
        return StepPlan(
            step=step,
            now_s=now_s,
            rows=rows,
            request_ids=table.request_ids[rows],
            context=context,
            num_new=new,
            num_drafts=drafts,
            emits=context + new == table.num_known[rows],
            admitted=_ids(came),
            num_cached=np.array([r.num_cached for r in came], np.int32) if came else NO_INTS,
            preempted=_ids(left),
            copies=np.array(joined.copies, np.int32) if joined.copies else NO_COPIES,
            swapped_out=_ids(went),
            swapped_out_blocks=np.concatenate(swapped) if swapped else NO_IDS,
            swapped_in=_ids(joined.swapped_in),
            wake_s=self.policy.wake_s(self.queue) if idle else math.inf,
        )

    def _reserve_decodes(
        self, now_s: float, left: list[Request], swapped: list[LongArray]
    ) -> tuple[IntArray, IntArray]:
        """Hold the blocks that decoding rows will write; int32 [active] known tokens to compute, drafts that fit.

        Under block pressure drafts go first, then whole requests, last in the queue's order first.
        """
        table, rows = self.table, self.table.active
        if rows.size == 0:
            return NO_INTS, NO_INTS
        computed, known = table.num_computed[rows], table.num_known[rows]
        pending = known - computed
        drafts = self._wanted_drafts(now_s, rows, known)
        if np.count_nonzero(pending != self._ones[: rows.size]):
            drafts *= pending == 1
        growth = self._growth(rows, computed, drafts)
        if growth and not self._hold(*growth):
            return self._reserve_under_pressure(now_s, left, swapped)
        return pending, drafts

    def _growth(
        self, rows: LongArray, computed: IntArray, drafts: IntArray
    ) -> tuple[LongArray, IntArray] | None:
        """Which of ``rows`` lack blocks for one token and their drafts behind ``computed``, and how many."""
        # A row that still computes its prompt holds the blocks of all of it, so it is never short.
        short = (computed + drafts >= self.table.capacity[rows]).nonzero()[0]
        if short.size == 0:
            return None
        growing = rows[short]
        room = self.table.capacity[growing] - computed[short] - 1 - drafts[short]
        return growing, -(room // self.config.block_size)

    def _hold(self, growing: LongArray, need: IntArray) -> bool:
        """Give rows ``need`` more blocks each; false, with nothing done, if too few are free."""
        total = int(need.sum())
        if total > self.pool.num_free:
            return False
        self.table.append_blocks(growing, need, self.pool.allocate(total))
        return True

    def _wanted_drafts(self, now_s: float, rows: LongArray, known: IntArray) -> IntArray:
        """Drafts that each of ``rows``, were it decoding, would have with room enough, int32 [R]."""
        if self.speculation.max_drafts == 0:
            return np.zeros(rows.size, np.int32)
        wanted = (
            self._max_drafts[: rows.size]
            if self.speculation.is_constant
            else self.speculation.num_drafts(self.table, rows, now_s)
        )
        # The last token comes from the target itself.
        return np.minimum(wanted, self.table.max_known[rows] - known - self._ones[: rows.size])

    def _reserve_under_pressure(
        self, now_s: float, left: list[Request], swapped: list[LongArray]
    ) -> tuple[IntArray, IntArray]:
        """:meth:`_reserve_decodes` where not every row can have all that it wants."""
        table, size = self.table, self.config.block_size
        while True:
            rows, held = table.active, table.num_blocks[table.active]
            computed = table.num_computed[rows]
            pending = table.num_known[rows] - computed
            decode = pending == 1
            plain = np.where(decode, -(-(computed + 1) // size), held)
            spare = self.pool.num_free - int(np.maximum(plain - held, 0).sum())
            if spare >= 0:
                break
            if not self._give_back(rows, plain):
                left.append(self._preempt(swapped))
        drafts = self._wanted_drafts(now_s, rows, computed + pending) * decode
        need_plain = np.maximum(plain - held, 0)
        need = np.where(decode, np.maximum(-(-(computed + 1 + drafts) // size) - held, 0), 0)
        keep = np.cumsum(need - need_plain) <= spare
        need = np.where(keep, need, need_plain)
        fitting = np.minimum(drafts, (held + need) * size - computed - 1).astype(np.int32)
        drafts = np.where(keep, drafts, fitting)
        growing = np.flatnonzero(need)
        if growing.size:
            blocks = self.pool.allocate(int(need.sum()))
            table.append_blocks(rows[growing], need[growing], blocks)
        return pending, drafts

    def _give_back(self, rows: LongArray, num_blocks: IntArray) -> bool:
        """Release blocks beyond ``num_blocks`` of each row, left from rejected drafts; whether any were."""
        longer = self.table.num_blocks[rows] > num_blocks
        for row, count in zip(rows[longer].tolist(), num_blocks[longer].tolist(), strict=True):
            self.pool.release(self.table.truncate_blocks(row, count))
        return bool(longer.any())

    def _preempt(self, swapped: list[LongArray]) -> Request:
        """Send the running request that is last in the queue's order back to the queue."""
        table, pool = self.table, self.pool
        rows, ids = table.active.tolist(), table.request_ids
        row = max(rows, key=lambda r: (self.queue.key(table.request(r)), ids[r]))
        blocks, computed = table.blocks(row).astype(np.int64), int(table.num_computed[row])
        request = table.remove(row)
        self._silent.pop(row, None)
        if self.num_swapped_blocks + pool.blocks_for(computed) <= self.config.num_swap_blocks:
            request.num_swapped = computed
            self.num_swapped_blocks += pool.blocks_for(computed)
            swapped.append(blocks[: pool.blocks_for(computed)])
        pool.release(blocks)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.queue.push(request)
        return request

    def may_admit_at(self, step: int) -> bool:
        """Whether requests may join in this step: with multi-step scheduling, a running batch opens now and then."""
        return self._admission.may_admit_at(step)

    def most_blocks_admitted(self, budget: int) -> int:
        """Blocks that suffice for whomever :meth:`admit` could let in with this token budget."""
        return self._admission.most_blocks(budget + self._longest_known)

    def admit(self, now_s: float, budget: int, joined: Joined) -> int:
        """Move requests from the queue to the table; the token budget that is left."""
        budget = self._admission.admit(now_s, budget, joined, self.draining)
        self.num_swapped_blocks -= joined.num_swapped_blocks
        if joined.requests:
            newcomers = self.table.active[-len(joined.requests) :].tolist()
            for row, request in zip(newcomers, joined.requests, strict=True):
                if math.isnan(request.first_token_s):
                    self._silent[row] = request
        return budget

    def commit(self, plan: StepPlan, outcome: StepOutcome, now_s: float) -> None:
        """Record what happened in ``plan``; ``now_s`` is the end of the step."""
        table, rows = self.table, plan.rows
        accepted, drafted, emitted = outcome.num_accepted, outcome.num_drafted, outcome.num_emitted
        known = table.num_known[rows]
        if self._silent:
            for row in rows[(known == table.prompt_len[rows]) & plan.emits].tolist():
                self.first_token(row, now_s)
        table.num_computed[rows] = plan.context + plan.num_new + accepted
        table.num_known[rows] = known + emitted
        if self.speculation.max_drafts:
            table.num_drafted[rows] += drafted
            table.num_accepted[rows] += accepted
            table.num_rejected[rows] += accepted < outcome.draft_depths
        table.num_steps[rows] += plan.emits
        if self.config.prefix_caching:
            self._register_blocks(plan, outcome)
        for row in rows[outcome.finished].tolist():
            self.finish(row, now_s)

    def awaits_first_token(self, rows: LongArray) -> bool:
        """Whether any of ``rows`` has not emitted yet."""
        return any(row in self._silent for row in rows.tolist()) if self._silent else False

    def first_token(self, row: int, now_s: float) -> None:
        """``row`` emits; if it never did before, that was its first token."""
        if row in self._silent:
            self._silent.pop(row).first_token_s = now_s

    def finish(self, row: int, now_s: float) -> None:
        """The answer of ``row`` has ended."""
        self.pool.release(self.table.blocks(row))
        request = self.table.remove(row)
        request.state = RequestState.FINISHED
        request.finish_s = now_s

    def skip(
        self,
        plan: StepPlan,
        num_steps: int,
        num_accepted: IntArray,
        num_rejected: IntArray,
        now_s: float,
    ) -> StepPlan:
        """Between ``begin`` and ``commit``: ``num_steps`` steps of this same plan happened; the plan that follows.

        Only as far as :meth:`horizon` promised, and nothing may have finished. The state afterwards is that of as
        many commits and begins, except that other numbers may name the blocks.

        Args:
            plan: of the first of these steps.
            num_steps: of which ``num_accepted`` and ``num_rejected``, int32 [R], are the sums.
            now_s: when the plan that follows begins.
        """
        table, rows = self.table, plan.rows
        advance = num_steps + num_accepted
        context = plan.context + advance
        table.num_computed[rows] = context
        table.num_known[rows] += advance
        table.num_drafted[rows] += num_steps * plan.num_drafts
        table.num_accepted[rows] += num_accepted
        table.num_rejected[rows] += num_rejected
        table.num_steps[rows] += num_steps
        need = -(-(context + 1 + plan.num_drafts) // self.config.block_size) - table.num_blocks[rows]
        growing = np.flatnonzero(need > 0)
        if growing.size:
            blocks = self.pool.allocate(int(need[growing].sum()))
            table.append_blocks(rows[growing], need[growing], blocks)
        self.next_step += num_steps
        return plan._replace(step=plan.step + num_steps, now_s=now_s, context=context)

    def _register_blocks(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Name the blocks that this step filled with committed tokens."""
        table = self.table
        for row, value in zip(outcome.hashed_rows.tolist(), outcome.block_hashes.tolist(), strict=True):
            table.request(row).block_hashes.append(value)
            table.num_hashes[row] += 1
        full = np.minimum(
            table.num_computed[plan.rows] // self.config.block_size, table.num_hashes[plan.rows]
        )
        completed = full > table.num_registered[plan.rows]
        for row in plan.rows[completed].tolist():
            self.register_blocks(row)

    def register_blocks(self, row: int) -> None:
        """Name the blocks of ``row`` that are full of computed tokens and whose hashes are known."""
        table = self.table
        start, stop = int(table.num_registered[row]), int(table.num_computed[row]) // self.config.block_size
        hashes = table.request(row).block_hashes[start:stop]
        if hashes:
            self.pool.register(table.block_table[row, start : start + len(hashes)].tolist(), hashes)
            table.num_registered[row] = start + len(hashes)

    def horizon(self, now_s: float) -> int:
        """For how many steps from now the plan provably stays the same, if nothing arrives or finishes.

        "The same" means equal rows, ``num_new`` and ``num_drafts``, nothing admitted and nothing preempted,
        whatever is accepted. 0 is always safe; the simulator then goes step by step.
        """
        table, config = self.table, self.config
        rows = table.active
        if rows.size == 0 or not self.speculation.is_constant:
            return 0
        computed = table.num_computed[rows]
        if (table.num_known[rows] - computed != 1).any() or self._admission.may_admit_later():
            return 0
        # The token budget may cut these drafts, but then it cuts them alike in every step.
        advance = 1 + self.speculation.num_drafts(table, rows, now_s)
        steps = int((table.num_left(rows) // advance).min())
        held, free = table.num_blocks[rows], self.pool.num_free
        low = 0
        while low < steps:
            middle = (low + steps + 1) // 2
            need = np.maximum(-(-(computed + middle * advance) // config.block_size) - held, 0)
            low, steps = (middle, steps) if int(need.sum()) <= free else (low, middle - 1)
        return low


def _ids(requests: list[Request]) -> LongArray:
    return np.array([r.request_id for r in requests], np.int64) if requests else NO_IDS
