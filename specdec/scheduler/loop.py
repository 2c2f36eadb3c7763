"""The step loop: begin → (somebody executes) → commit. Time is an argument, tensors never appear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from specdec.scheduler.blocks import BlockPool
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan
from specdec.scheduler.policy import BatchPolicy, WaitingQueue
from specdec.scheduler.request import Request, RequestState
from specdec.scheduler.speculation import SpeculationController, fit_drafts
from specdec.scheduler.table import RequestTable


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one replica.

    Args:
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most token positions the target computes in one step, drafts included.
        num_blocks: KV blocks.
        block_size: tokens per block.
        max_model_len: most tokens of one request, prompt included.
        prefix_caching: share KV blocks between requests with a common prefix.
        watermark: share of the blocks that an admission must leave free while others run, so that a newcomer
            is not preempted in the next step.
        order: order of the waiting queue.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    num_blocks: int = 1024
    block_size: int = 16
    max_model_len: int = 2048
    prefix_caching: bool = True
    watermark: float = 0.01
    order: str = "fcfs"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every running request needs at least one token per step"
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark={self.watermark} must be in [0, 1)")


class StepLoop:
    """Plans and commits the steps of one replica.

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
        self.table = RequestTable(config.max_num_seqs, self.pool.blocks_for(config.max_model_len))
        self.queue = WaitingQueue(config.order)
        self._step = 0
        self._watermark_blocks = int(config.watermark * config.num_blocks)

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
        config, name = self.config, f"request {request.request_id}"
        longest = request.prompt_len + request.max_tokens
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
        if not self.policy.chunked_prefill and longest > config.max_num_batched_tokens:
            raise ValueError(
                f"{name}: {longest} tokens exceed max_num_batched_tokens={config.max_num_batched_tokens} and "
                "this policy computes prompts whole: raise the budget or use the policy 'chunked'"
            )

    def submit(self, request: Request) -> None:
        """Queue ``request``; see :meth:`check` for the errors."""
        self.check(request)
        request.state = RequestState.WAITING
        self.queue.push(request)

    def cancel(self, request_id: int) -> None:
        """Forget a request, waiting or running, between ``commit`` and ``begin``; unknown ids are ignored."""
        for row in self.table.active[self.table.request_ids[self.table.active] == request_id].tolist():
            self.pool.release(self.table.blocks(row).copy())
            self.table.remove(row).state = RequestState.FINISHED
        self.queue.discard(request_id)

    def begin(self, now_s: float) -> StepPlan:
        """Decide the next step. Every call is followed by :meth:`commit`, unless the plan is empty."""
        preempted: list[int] = []
        drafts = self._reserve_decodes(now_s, preempted)
        new = np.zeros(drafts.size, np.int32)
        rows = self.table.active
        pending = self.table.num_known[rows] - self.table.num_computed[rows]
        budget = self.config.max_num_batched_tokens
        if self.policy.chunked_prefill:
            budget = self._give_decodes(pending, new, drafts, budget)
        budget = self._give_prefills(pending, new, budget)
        admitted: list[Request] = []
        admitted_new: list[int] = []
        copies: list[tuple[int, int]] = []
        if not preempted:
            budget = self._admit(now_s, budget, admitted, admitted_new, copies)
        if not self.policy.chunked_prefill:
            self._give_decodes(pending, new, drafts, budget)
        new = np.concatenate([new, np.array(admitted_new, np.int32)])
        drafts = np.concatenate([drafts, np.zeros(len(admitted), np.int32)])
        return self._plan(now_s, new, drafts, admitted, preempted, copies)

    def _plan(
        self,
        now_s: float,
        new: IntArray,
        drafts: IntArray,
        admitted: list[Request],
        preempted: list[int],
        copies: list[tuple[int, int]],
    ) -> StepPlan:
        table = self.table
        scheduled = new > 0
        rows = table.active[scheduled]
        new = new[scheduled]
        context = table.num_computed[rows]
        idle = rows.size == 0 and self.num_running == 0 and len(self.queue) > 0
        plan = StepPlan(
            step=self._step,
            now_s=now_s,
            rows=rows,
            request_ids=table.request_ids[rows],
            context=context,
            num_new=new,
            num_drafts=drafts[scheduled],
            emits=context + new == table.num_known[rows],
            admitted=np.array([r.request_id for r in admitted], np.int64),
            num_cached=np.array([r.num_cached for r in admitted], np.int32),
            preempted=np.array(preempted, np.int64),
            copies=np.array(copies, np.int32).reshape(-1, 2),
            wake_s=self.policy.wake_s(self.queue) if idle else math.inf,
        )
        self._step += 0 if plan.is_empty else 1
        return plan

    def _reserve_decodes(self, now_s: float, preempted: list[int]) -> IntArray:
        """Hold the blocks that decoding rows will write; int32 [active] drafts that fit.

        Under block pressure drafts go first, then whole requests, last in the queue's order first.
        """
        table, size = self.table, self.config.block_size
        while True:
            rows, held = table.active, table.num_blocks[table.active]
            computed = table.num_computed[rows]
            decode = table.num_known[rows] - computed == 1
            plain = np.where(decode, -(-(computed + 1) // size), held)
            spare = self.pool.num_free - int(np.maximum(plain - held, 0).sum())
            if spare >= 0:
                break
            if not self._give_back(rows, plain):
                preempted.append(self._preempt())
        limit = table.max_tokens[rows] - table.num_generated[rows] - 1
        wanted = np.minimum(self.speculation.num_drafts(table, rows, now_s), limit)
        drafts = np.where(decode, wanted, 0).astype(np.int32)
        need_plain = np.maximum(plain - held, 0)
        need = np.where(decode, np.maximum(-(-(computed + 1 + drafts) // size) - held, 0), 0)
        extra = need - need_plain
        if extra.sum() > spare:
            keep = np.cumsum(extra) <= spare
            need = np.where(keep, need, need_plain)
            fitting = np.minimum(drafts, (held + need) * size - computed - 1).astype(np.int32)
            drafts = np.where(keep, drafts, fitting)
        if need.any():
            table.append_blocks(rows, need, self.pool.allocate(int(need.sum())))
        return drafts

    def _give_back(self, rows: IntArray, num_blocks: IntArray) -> bool:
        """Release blocks beyond ``num_blocks`` of each row, left from rejected drafts; whether any were."""
        longer = self.table.num_blocks[rows] > num_blocks
        for row, count in zip(rows[longer].tolist(), num_blocks[longer].tolist(), strict=True):
            self.pool.release(self.table.truncate_blocks(row, count))
        return bool(longer.any())

    def _preempt(self) -> int:
        """Send the running request that is last in the queue's order back to the queue; its id."""
        table = self.table
        rows, ids = table.active.tolist(), table.request_ids
        row = max(rows, key=lambda r: (self.queue.key(table.request(r)), ids[r]))
        self.pool.release(table.blocks(row).copy())
        request = table.remove(row)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.queue.push(request)
        return request.request_id

    def _give_decodes(self, pending: IntArray, new: IntArray, drafts: IntArray, budget: int) -> int:
        """One token to each decoding row in order, then drafts evenly; the budget that is left."""
        decoding = np.flatnonzero(pending == 1)
        served = decoding[:budget]
        drafts[decoding[budget:]] = 0
        new[served] = 1
        drafts[served] = fit_drafts(drafts[served], budget - served.size)
        return budget - served.size - int(drafts[served].sum())

    def _give_prefills(self, pending: IntArray, new: IntArray, budget: int) -> int:
        """Tokens to rows whose prompt is not computed yet, in order; the budget that is left."""
        for index in np.flatnonzero(pending > 1).tolist():
            tokens = int(pending[index])
            if tokens > budget and not self.policy.chunked_prefill:
                break
            new[index] = min(tokens, budget)
            budget -= int(new[index])
            if budget == 0:
                break
        return budget

    def _admit(
        self,
        now_s: float,
        budget: int,
        admitted: list[Request],
        admitted_new: list[int],
        copies: list[tuple[int, int]],
    ) -> int:
        """Move requests from the queue to the table; the budget that is left."""
        policy, queue = self.policy, self.queue
        limit = self.config.max_num_seqs
        if not queue or not policy.is_open(queue, self.num_running, limit, self.draining, now_s):
            return budget
        while queue and not self.table.is_full and (budget > 0 or not policy.joins_running):
            request = queue.head
            matched = self.pool.match(self._known_hashes(request))
            cached = min(len(matched) * self.config.block_size, request.num_known - 1)
            tokens = request.num_known - cached
            if tokens > budget and policy.joins_running and not policy.chunked_prefill:
                break
            if not self._take_blocks(request, matched, cached, copies):
                break
            queue.pop()
            request.state = RequestState.RUNNING
            request.num_cached = cached
            if math.isnan(request.first_scheduled_s):
                request.first_scheduled_s = now_s
            granted = min(tokens, budget) if tokens <= budget or policy.chunked_prefill else 0
            admitted.append(request)
            admitted_new.append(granted)
            budget -= granted
        return budget

    def _known_hashes(self, request: Request) -> list[int]:
        """Hashes of the full blocks of ``request``'s known tokens."""
        return request.block_hashes[: request.num_known // self.config.block_size]

    def _shared(self, request: Request, matched: list[int]) -> list[int]:
        """The matched blocks that ``request`` can hold as they are.

        When the prefix cache holds every token, the last one must still be computed for its logits, and that
        writes into the last block: it is copied first (copy-on-write).
        """
        is_full_hit = len(matched) * self.config.block_size == request.num_known
        return matched[:-1] if is_full_hit else matched

    def _fits(self, request: Request, shared: list[int]) -> bool:
        """Whether blocks for all known tokens of ``request`` are free, beside those it shares."""
        fresh = self.pool.blocks_for(request.num_known) - len(shared)
        reserve = self._watermark_blocks if self.num_running else 0
        return fresh + reserve <= self.pool.num_free - self.pool.num_evictable(shared)

    def _take_blocks(
        self, request: Request, matched: list[int], cached: int, copies: list[tuple[int, int]]
    ) -> bool:
        """Hold the blocks for all known tokens of ``request`` and give it a row, if they are free."""
        pool, shared = self.pool, self._shared(request, matched)
        if not self._fits(request, shared):
            return False
        pool.share(shared)
        fresh = pool.allocate(pool.blocks_for(request.num_known) - len(shared))
        if len(shared) < len(matched):
            copies.append((matched[-1], int(fresh[0])))
        row = self.table.insert(request, np.concatenate([np.array(shared, np.int32), fresh]), cached)
        self.table.num_registered[row] = len(shared)
        return True

    def commit(self, plan: StepPlan, outcome: StepOutcome, now_s: float) -> None:
        """Record what happened in ``plan``; ``now_s`` is the end of the step."""
        table, rows = self.table, plan.rows
        first = (table.num_generated[rows] == 0) & (outcome.num_emitted > 0)
        table.num_computed[rows] = plan.context + plan.num_new + outcome.num_accepted
        table.num_known[rows] += outcome.num_emitted
        table.num_generated[rows] += outcome.num_emitted
        table.num_drafted[rows] += outcome.num_drafted
        table.num_accepted[rows] += outcome.num_accepted
        table.num_rejected[rows] += outcome.num_accepted < outcome.num_drafted
        table.num_steps[rows] += plan.emits
        for row in rows[first].tolist():
            if math.isnan(table.request(row).first_token_s):
                table.request(row).first_token_s = now_s
        if self.config.prefix_caching:
            self._register_blocks(plan, outcome)
        for row in rows[outcome.finished].tolist():
            self.pool.release(table.blocks(row).copy())
            request = table.remove(row)
            request.state = RequestState.FINISHED
            request.finish_s = now_s

    def _register_blocks(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Name the blocks that this step filled with committed tokens."""
        table = self.table
        for row, value in zip(outcome.hashed_rows.tolist(), outcome.block_hashes.tolist(), strict=True):
            table.request(row).block_hashes.append(value)
        full = table.num_computed[plan.rows] // self.config.block_size
        completed = full > table.num_registered[plan.rows]
        for row, count in zip(plan.rows[completed].tolist(), full[completed].tolist(), strict=True):
            start = int(table.num_registered[row])
            hashes = table.request(row).block_hashes[start:count]
            blocks = table.block_table[row, start : start + len(hashes)].tolist()
            for block, value in zip(blocks, hashes, strict=True):
                self.pool.register(block, value)
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
        if (table.num_known[rows] - computed != 1).any() or self._may_admit():
            return 0
        # The token budget may cut these drafts, but then it cuts them alike in every step.
        advance = 1 + self.speculation.num_drafts(table, rows, now_s)
        steps = int(((table.max_tokens[rows] - table.num_generated[rows]) // advance).min())
        held, free = table.num_blocks[rows], self.pool.num_free
        low = 0
        while low < steps:
            middle = (low + steps + 1) // 2
            need = np.maximum(-(-(computed + middle * advance) // config.block_size) - held, 0)
            low, steps = (middle, steps) if int(need.sum()) <= free else (low, middle - 1)
        return low

    def _may_admit(self) -> bool:
        """Whether a later step might admit from the queue although nothing arrives or finishes."""
        if not self.queue or self.table.is_full or not self.policy.joins_running:
            return False
        request = self.queue.head
        hashes = self._known_hashes(request)
        matched = self.pool.match(hashes)
        if self._fits(request, self._shared(request, matched)):
            return True
        # Blocks only get scarcer while rows decode, so a head that does not fit stays out, unless a running
        # row completes the very block that the head's cached prefix lacks next.
        return len(matched) < len(hashes) and self._may_register(hashes[: len(matched) + 1])

    def _may_register(self, hashes: list[int]) -> bool:
        """Whether a running row, whose blocks begin as ``hashes`` do, may yet name the last of them."""
        table, last = self.table, len(hashes) - 1
        rows = table.active[table.num_registered[table.active] <= last]
        own = (table.request(row).block_hashes[: last + 1] for row in rows.tolist())
        return any(hashes[: len(known)] == known for known in own)
