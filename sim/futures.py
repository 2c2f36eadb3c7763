"""What requests will accept, drawn when they arrive at a replica.

So the i-th verification of a request accepts the same number of drafts whenever it happens, alone or in a batch,
before or after a preemption, and runs that differ in their scheduling alone are compared with the same luck.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.acceptance import AcceptanceModel, RequestNoise
from specdec.scheduler import Cruise, Ended, StepLoop
from specdec.scheduler.plan import IntArray, LongArray

_BLOCK = 1 << 16
LongArrays = NDArray[np.int64]


class Draws(NamedTuple):
    """Verifications in a row, of which each request has a stretch.

    Attributes:
        accepted: int32 [N], drafts that each accepts.
        emitted: int64 [N + 1], tokens of all before it.
        rejected: int64 [N + 1], of those before it, how many did not accept all drafts.
    """

    accepted: IntArray
    emitted: LongArrays
    rejected: LongArrays

    @staticmethod
    def of(accepted: IntArray, max_drafts: int) -> Draws:
        sums = np.zeros((2, accepted.size + 1), np.int64)
        np.cumsum(accepted + 1, out=sums[0, 1:])
        np.cumsum(accepted < max_drafts, out=sums[1, 1:])
        return Draws(accepted, *sums)


class Luck(NamedTuple):
    """Where a request's verifications stand: its i-th step is draw ``start + i``."""

    draws: Draws
    start: int


class Futures:
    """Draws the verifications of arriving requests and looks them up for running ones.

    Args:
        acceptance: the law; bound to the rows here.
        max_rows: rows of the request table.
        max_drafts: most drafts of a verification.
        seed: of the draws.
    """

    def __init__(self, acceptance: AcceptanceModel, max_rows: int, max_drafts: int, seed: int) -> None:
        acceptance.bind(max_rows)
        self._acceptance, self._seed = acceptance, seed
        self._max_drafts = max_drafts
        self._rng = np.random.default_rng(seed)
        self._noise = RequestNoise(tag=0xD1CE)
        self._shared, self._used = Draws.of(np.zeros(0, np.int32), max_drafts), 0
        self._lucks: list[Luck | None] = [None] * max_rows
        self._accepted = np.zeros((max_rows, 64), np.int32)
        self._not_loaded: dict[int, int] = {}

    def draw(self, request_id: int, task: str, output_len: int) -> Luck:
        """The luck of an arriving request: one verification for each of at most ``output_len`` steps.

        Where all requests follow one law, each takes the next stretch of one sequence; else it has its own.
        """
        if not self._acceptance.is_alike:
            return Luck(self._own_draws(request_id, task, output_len), 0)
        if self._used + output_len > self._shared.accepted.size:
            self._shared, self._used = self._shared_draws(max(_BLOCK, output_len)), 0
        self._used += output_len
        return Luck(self._shared, self._used - output_len)

    def _own_draws(self, request_id: int, task: str, count: int) -> Draws:
        self._acceptance.enter(0, request_id, task, self._seed)
        uniforms = self._noise.at(self._seed, request_id).random(count)
        limit = np.array([self._max_drafts], np.int32)
        accepted = self._acceptance.draw_many(np.zeros(1, np.int64), limit, uniforms[:, None])
        return Draws.of(np.ascontiguousarray(accepted[:, 0]), self._max_drafts)

    def _shared_draws(self, count: int) -> Draws:
        """By the definition of the law; of one law for all, several times faster than ``draw_many``."""
        uniforms, accepted = self._rng.random(count), np.zeros(count, np.int32)
        for level in self._acceptance.survival(self._max_drafts).tolist():
            accepted += uniforms < level
        return Draws.of(accepted, self._max_drafts)

    def enter(self, row: int, luck: Luck, output_len: int) -> None:
        """A request takes ``row``."""
        self._lucks[row] = luck
        self._not_loaded[row] = output_len

    def luck(self, row: int) -> Luck:
        luck = self._lucks[row]
        assert luck is not None, f"row {row} has no request"
        return luck

    def at(self, rows: LongArray, steps: IntArray, num_drafts: IntArray) -> IntArray:
        """Of ``num_drafts`` int32 [R], how many the ``steps[i]``-th step of ``rows[i]`` accepts, int32 [R]."""
        self._load()
        return np.minimum(self._accepted[rows, steps], num_drafts)

    def ahead(self, rows: LongArray, steps: IntArray, num_drafts: IntArray, num_steps: int) -> IntArray:
        """:meth:`at` of the next ``num_steps`` steps, int32 [num_steps, R]; all of them must exist."""
        self._load()
        return np.minimum(self._accepted[rows, steps + np.arange(num_steps)[:, None]], num_drafts)

    def _load(self) -> None:
        """Copy the newcomers' stretches to where all rows are looked up at once."""
        for row, size in self._not_loaded.items():
            if size > self._accepted.shape[1]:
                wider = np.zeros((self._accepted.shape[0], 2 * size), np.int32)
                wider[:, : self._accepted.shape[1]] = self._accepted
                self._accepted = wider
            draws, start = self.luck(row)
            self._accepted[row, :size] = draws.accepted[start : start + size]
        self._not_loaded.clear()


class Flights:
    """The rest of each decoding row's answer, while the scheduler cruises: when it ends, what it reads and emits.

    Args:
        loop: whose rows they are.
        futures: what they accept.
        left: int32 [max_rows], tokens that each row has still to emit; written for rows that end or land.
    """

    def __init__(self, loop: StepLoop, futures: Futures, left: IntArray) -> None:
        self._loop, self._futures, self._left = loop, futures, left
        self._stretches: dict[int, tuple[int, int]] = {}  # draws from, and to before
        self._ending: dict[int, list[int]] = {}
        self._end_steps: list[int] = []
        self._contexts = _Sums()

    def start(self, row: int, step: int) -> None:
        """``row`` decodes from ``step`` on, as the table has it now."""
        table, (draws, start) = self._loop.table, self._futures.luck(row)
        first = start + int(table.num_steps[row])
        emitted = draws.emitted
        before = emitted[first]
        behind = int(emitted.searchsorted(int(before) + int(self._left[row])))
        self._stretches[row] = first, behind
        self._contexts.add(step, emitted[first:behind] + (table.num_computed[row] - before))
        last = step + behind - first - 1
        if last not in self._ending:
            self._ending[last] = []
            heapq.heappush(self._end_steps, last)
        self._ending[last].append(row)

    def context_at(self, step: int) -> int:
        """Sum of the cached tokens of all rows in ``step``; steps are asked for in order."""
        return self._contexts.at(step)

    @property
    def next_end(self) -> int:
        """The first step in which a row ends; far away if none does."""
        return self._end_steps[0] if self._end_steps else 1 << 62

    def land(self, step: int) -> list[Ended]:
        """The rows that end in ``step``, in the order of admission."""
        if step != self.next_end:
            return []
        heapq.heappop(self._end_steps)
        rows = self._ending.pop(step)
        if len(rows) > 1:
            order = self._loop.table.active.tolist()
            rows.sort(key=order.index)
        return [self._ended(row) for row in rows]

    def _ended(self, row: int) -> Ended:
        request, k = self._loop.table.request(row), self._loop.speculation.max_drafts
        first, behind = self._stretches.pop(row)
        _, accepted, rejected = self._came_to(row, first, behind)
        table, steps = self._loop.table, behind - first
        generated = int(table.num_known[row]) - request.prompt_len + int(self._left[row])
        self._left[row] = 0
        return Ended(
            row,
            generated,
            int(table.num_drafted[row]) + steps * k,
            int(table.num_accepted[row]) + accepted,
            int(table.num_rejected[row]) + rejected,
            int(table.num_steps[row]) + steps,
        )

    def _came_to(self, row: int, first: int, behind: int) -> tuple[int, int, int]:
        """Tokens emitted, drafts accepted and steps with a rejection of a stretch of draws."""
        draws = self._futures.luck(row).draws
        emitted = int(draws.emitted[behind] - draws.emitted[first])
        rejected = int(draws.rejected[behind] - draws.rejected[first])
        return emitted, emitted - (behind - first), rejected

    def abort(self, cruise: Cruise) -> None:
        """Write the rows' progress back, before the next step, and forget them."""
        rows = np.array(list(cruise.joined_at), np.int64)
        counts = np.zeros((4, rows.size), np.int32)
        for place, (row, joined) in enumerate(cruise.joined_at.items()):
            first, steps = self._stretches[row][0], self._loop.next_step - joined
            if steps:
                emitted, accepted, rejected = self._came_to(row, first, first + steps)
                last = 1 + int(self._futures.luck(row).draws.accepted[first + steps - 1])
                counts[:, place] = steps, accepted, rejected, last
                self._left[row] -= emitted
        cruise.leave(rows, *counts)
        self._stretches.clear()
        self._ending.clear()
        self._end_steps.clear()
        self._contexts = _Sums()


class _Sums:
    """Sums over rows by step, for the steps to come; the past is forgotten."""

    def __init__(self) -> None:
        self._first = 0
        self._values: NDArray[np.int64] = np.zeros(1 << 12, np.int64)

    def add(self, step: int, values: NDArray[np.int64]) -> None:
        start = step - self._first
        if start + values.size > self._values.size:
            self._move(step, values.size)
            start = step - self._first
        self._values[start : start + values.size] += values

    def at(self, step: int) -> int:
        place = step - self._first
        return int(self._values[place]) if 0 <= place < self._values.size else 0

    def _move(self, step: int, size: int) -> None:
        """Let the array begin at ``step``, minus one: the step in progress may still be read."""
        first = max(step - 1, self._first)
        kept = self._values[first - self._first :]
        room = max(self._values.size, 2 * (size + 1), 2 * kept.size)
        values = np.zeros(room, np.int64)
        values[: kept.size] = kept
        self._first, self._values = first, values
