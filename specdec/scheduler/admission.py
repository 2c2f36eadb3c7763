"""Who joins the batch: requests move from the queue to the table as the policy, the budget and the KV pool allow."""

from __future__ import annotations

import math

from specdec.scheduler.blocks import BlockPool
from specdec.scheduler.limits import SchedulerConfig
from specdec.scheduler.policy import BatchPolicy, WaitingQueue
from specdec.scheduler.request import Request, RequestState
from specdec.scheduler.table import RequestTable


class Joined:
    """What :meth:`Admission.admit` let in: the requests, their tokens of this step, and KV to bring about first.

    Attributes:
        num_swapped_blocks: of host memory, that are free again.
    """

    __slots__ = ("copies", "new", "num_swapped_blocks", "requests", "swapped_in")

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.new: list[int] = []
        self.copies: list[tuple[int, int]] = []
        self.swapped_in: list[Request] = []
        self.num_swapped_blocks = 0


class Admission:
    """Lets requests of ``queue`` into ``table``, with their blocks of ``pool``; all three are the step loop's."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: BatchPolicy,
        pool: BlockPool,
        table: RequestTable,
        queue: WaitingQueue,
    ) -> None:
        self._config, self._policy = config, policy
        self._pool, self._table, self._queue = pool, table, queue
        self._watermark_blocks = int(config.watermark * config.num_blocks)

    def may_admit_at(self, step: int) -> bool:
        """Whether requests may join in this step: with multi-step scheduling, a running batch opens now and then."""
        return step % self._config.num_scheduler_steps == 0 or len(self._table) == 0

    def most_blocks(self, longest: int) -> int:
        """Blocks that suffice for whomever :meth:`admit` could let in, with ``longest`` tokens for the last of them."""
        if len(self._table) == 0:
            return 0  # nobody else needs any, so what is free is known exactly
        spare_rows = self._config.max_num_seqs - len(self._table)
        return self._pool.blocks_for(longest) + spare_rows + self._watermark_blocks

    def admit(self, now_s: float, budget: int, joined: Joined, draining: bool) -> int:
        """Move requests from the queue to the table and note them in ``joined``; the token budget that is left.

        Args:
            draining: no request will arrive any more.
        """
        policy, queue, table = self._policy, self._queue, self._table
        if not policy.is_open(queue, len(table), self._config.max_num_seqs, draining, now_s):
            return budget
        while queue and not table.is_full and (budget > 0 or not policy.joins_running):
            request = queue.head
            matched: list[int] = []
            if self._config.prefix_caching and not request.num_swapped:
                matched = self._pool.match(self._known_hashes(request))
            cached = min(len(matched) * self._config.block_size, request.num_known - 1)
            cached = request.num_swapped or cached
            tokens = request.num_known - cached
            if tokens > budget and policy.joins_running and not policy.chunked_prefill:
                break
            if not self._take_blocks(request, matched, cached, joined.copies):
                break
            queue.pop()
            request.state = RequestState.RUNNING
            request.num_cached = cached
            if math.isnan(request.first_scheduled_s):
                request.first_scheduled_s = now_s
            if request.num_swapped:
                joined.num_swapped_blocks += self._pool.blocks_for(request.num_swapped)
                request.num_swapped = 0
                joined.swapped_in.append(request)
            granted = min(tokens, budget) if tokens <= budget or policy.chunked_prefill else 0
            joined.requests.append(request)
            joined.new.append(granted)
            budget -= granted
        return budget

    def may_admit_later(self) -> bool:
        """Whether a later step might admit from the queue although nothing arrives or finishes."""
        if not self._queue or self._table.is_full or not self._policy.joins_running:
            return False
        request = self._queue.head
        hashes = self._known_hashes(request)
        matched = self._pool.match(hashes)
        if self._fits(request, self._shared(request, matched)):
            return True
        # Blocks only get scarcer while rows decode, so a head that does not fit stays out, unless a running
        # row completes the very block that the head's cached prefix lacks next.
        return len(matched) < len(hashes) and self._may_register(hashes[: len(matched) + 1])

    def _known_hashes(self, request: Request) -> list[int]:
        """Hashes of the full blocks of ``request``'s known tokens."""
        return request.block_hashes[: request.num_known // self._config.block_size]

    def _shared(self, request: Request, matched: list[int]) -> list[int]:
        """The matched blocks that ``request`` can hold as they are.

        When the prefix cache holds every token, the last one must still be computed for its logits, and that
        writes into the last block: it is copied first (copy-on-write).
        """
        is_full_hit = len(matched) * self._config.block_size == request.num_known
        return matched[:-1] if is_full_hit else matched

    def _fits(self, request: Request, shared: list[int]) -> bool:
        """Whether blocks for all known tokens of ``request`` are free, beside those it shares."""
        pool = self._pool
        fresh = pool.blocks_for(request.num_known) - len(shared)
        reserve = self._watermark_blocks if self._table.active.size else 0
        evictable = pool.num_evictable(shared) if shared else 0
        return fresh + reserve <= pool.num_free - evictable

    def _take_blocks(
        self, request: Request, matched: list[int], cached: int, copies: list[tuple[int, int]]
    ) -> bool:
        """Hold the blocks for all known tokens of ``request`` and give it a row, if they are free."""
        pool, shared = self._pool, self._shared(request, matched)
        if not self._fits(request, shared):
            return False
        blocks = pool.allocate(pool.blocks_for(request.num_known) - len(shared), shared)
        if len(shared) < len(matched):
            copies.append((matched[-1], int(blocks[len(shared)])))
        row = self._table.insert(request, blocks, cached)
        self._table.num_registered[row] = len(shared)
        return True

    def _may_register(self, hashes: list[int]) -> bool:
        """Whether a running row, whose blocks begin as ``hashes`` do, may yet name the last of them."""
        table, last = self._table, len(hashes) - 1
        rows = table.active[table.num_registered[table.active] <= last]
        own = (table.request(row).block_hashes[: last + 1] for row in rows.tolist())
        return any(hashes[: len(known)] == known for known in own)
