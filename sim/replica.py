"""One replica in virtual time: the engine's main loop, begin → execute → commit, where executing is a draw.

The scheduler is the engine's own ``StepLoop``. An acceptance model says how many drafts each row accepts, a cost
model how long the step takes. Two shortcuts change no result, as a test on random workloads holds: where decoding rows
need no decision, ``Cruise`` only counts them; where ``StepLoop.horizon`` promises equal plans, many steps are taken at
once. In both the replica sleeps over steps that are alike; an arrival wakes it at the end of the step in progress.

>>> env = simpy.Environment()
>>> replica = Replica(env, loop, cost_model, make_acceptance("constant", alpha=0.8))
>>> replica.submit(SimRequest(request_id=0, prompt_len=100, max_tokens=512, output_len=40))
>>> env.run(until=10.0)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.acceptance import AcceptanceModel
from sim.futures import Flights, Futures, Luck
from sim.step_features import StepCost, StepFeatures, cruise_features, features
from specdec.scheduler import Cruise, CruisePlan, Ended, Request, StepLoop, StepOutcome, StepPlan
from specdec.scheduler.plan import IntArray
from specdec.trace import RequestRecord, TraceWriter

MAX_STEPS_AHEAD = 256
"""Most steps that are drawn at once, which bounds memory."""

_SHORT_CRUISE = 8  # one that ends sooner was not worth its beginning: so many steps are taken before the next

FloatArray = NDArray[np.float64]
Process = Generator[simpy.Event, Any, None]


class StepTimes(Protocol):
    """What a replica asks of a cost model; ``sim.cost_model.CostModel`` is one."""

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        """Seconds of one step."""
        ...


@dataclass(slots=True, kw_only=True)
class SimRequest(Request):
    """A request and what only the simulator knows of it.

    Args:
        output_len: tokens after which the model ends its answer; the scheduler sees ``max_tokens`` only.
        luck: the drafts that it will accept; the replica draws it.
    """

    output_len: int
    luck: Luck | None = None

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if not 1 <= self.output_len <= self.max_tokens:
            raise ValueError(
                f"request {self.request_id}: output_len={self.output_len} must be in [1, max_tokens="
                f"{self.max_tokens}]"
            )


class _Steps(NamedTuple):
    """M steps of one plan that were drawn at once.

    Attributes:
        accepted: int32 [M, R].
        costs: of each step.
        ends_s: when each ends.
        num_waiting: requests that wait, until one arrives in the last step.
    """

    accepted: IntArray
    costs: list[StepCost[float]]
    ends_s: list[float]
    num_waiting: int


class Replica:
    """A model on its devices, with a scheduler of its own.

    Args:
        env: virtual time.
        loop: the scheduler; nobody else may submit to it.
        cost_model: seconds of a step.
        acceptance: drafts accepted; bound to the loop's table here.
        seed: of the acceptance draws.
        swap_block_s: seconds to move one KV block between device and host memory.
        on_finish: called with each request that ends, at its end.
        trace: where every step is recorded.
        fast_forward: draw many steps at once where that is exact; the results are the same without.

    Attributes:
        now_s: end of the last step.
        busy_s: seconds spent in steps.
        num_steps, num_plans: steps taken, and how many of them were planned one by one.
    """

    def __init__(
        self,
        env: simpy.Environment,
        loop: StepLoop,
        cost_model: StepTimes,
        acceptance: AcceptanceModel,
        *,
        seed: int = 0,
        swap_block_s: float = 0.0,
        on_finish: Callable[[SimRequest], None] | None = None,
        trace: TraceWriter | None = None,
        fast_forward: bool = True,
    ) -> None:
        self.env, self.loop = env, loop
        self.now_s = env.now
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_plans = 0
        self._seconds = cost_model.predict_scalar
        self._swap_block_s = swap_block_s
        self._on_finish = on_finish
        self._trace = trace
        self._fast_forward = fast_forward and loop.speculation.is_constant
        max_rows = loop.config.max_num_seqs
        self._left = np.zeros(max_rows, np.int32)
        self._futures = Futures(acceptance, max_rows, loop.speculation.max_drafts, seed)
        self._cruise = Cruise(loop)
        self._flights = Flights(loop, self._futures, self._left)
        self._cruise_from = 0 if self._fast_forward and trace is None else 1 << 62
        self._hashing: set[int] = set()  # running requests whose output has block hashes
        self._only_decodes = False
        self._is_idle = False
        self._is_ahead = False
        self._is_stopped = False
        self._process = env.process(self.run())

    def submit(self, request: SimRequest) -> None:
        """A request arrives, now.

        Raises:
            ValueError: it can never run here; see ``StepLoop.check``.
        """
        request.luck = self._futures.draw(request.request_id, request.task, request.output_len)
        self.loop.submit(request)
        if self._is_idle or self._is_ahead:
            self._wake()

    def drain(self) -> None:
        """No request will come any more: policies that wait for a full batch stop waiting."""
        self.loop.draining = True
        if self._is_idle:
            self._wake()

    def stop(self) -> list[SimRequest]:
        """The replica fails: its step in progress is lost, nothing more happens here.

        Returns:
            What ran, in the order of admission, then what waited, in the order of the queue.
        """
        self._is_stopped = True
        table, queue = self.loop.table, self.loop.queue
        lost = [table.request(row) for row in table.active.tolist()]
        lost += [queue.pop() for _ in range(len(queue))]
        return [request for request in lost if isinstance(request, SimRequest)]

    def _wake(self) -> None:
        self._is_idle = self._is_ahead = False
        self._process.interrupt()

    def run(self) -> Process:
        """The main loop."""
        while not self._is_stopped:
            if self.loop.next_step >= self._cruise_from and not self._hashing and self._cruise.enter():
                yield from self._cruise_on()
            else:
                yield from self._step()

    def _step(self) -> Process:
        """One plan, and as many steps as it provably holds for."""
        alike = self._steps_alike()
        plan = self.loop.begin(self.now_s)
        if plan.is_empty:
            yield from self._rest(plan)
            return
        for request_id in plan.preempted.tolist():
            self._hashing.discard(request_id)
        self._enter(plan.admitted.size)
        steps = self._execute(plan, alike)
        num_done = yield from self._sleep(steps.ends_s)
        if not self._is_stopped:
            self._commit(plan, steps, num_done)

    def _cruise_on(self) -> Process:
        """Steps of which the decoding rows are only counted, as long as the scheduler can say what they are."""
        cruise, flights, loop = self._cruise, self._flights, self.loop
        first = loop.next_step
        for row in cruise.joined_at:
            flights.start(row, first)
        while not self._hashing:
            plan = cruise.begin(self.now_s)
            if plan is None:
                break
            self._enter(len(plan.admitted))
            ends_s = self._flight_times(plan)
            num_done = yield from self._sleep(ends_s)
            if self._is_stopped:
                return
            if num_done > 1:
                plan = cruise.skip(plan, num_done - 1, ends_s[num_done - 2])
            self._advance(ends_s[num_done - 1], num_done)
            self._land(plan)
        flights.abort(cruise)
        if loop.next_step < first + _SHORT_CRUISE:
            self._cruise_from = loop.next_step + _SHORT_CRUISE

    def _flight_times(self, plan: CruisePlan) -> list[float]:
        """When this step ends, and those after it that are alike, up to the first in which a row ends."""
        alike = min(self._cruise.steps_alike(plan), MAX_STEPS_AHEAD)
        ends_s: list[float] = []
        end_s = self.now_s
        for step in range(plan.step, min(plan.step + alike, max(self._flights.next_end, plan.step) + 1)):
            base = cruise_features(plan, self._flights.context_at(step))
            cost = self._seconds(base)
            if step % self.loop.config.num_scheduler_steps:
                cost = cost._replace(overhead_s=0.0)
            end_s += cost.total_s
            ends_s.append(end_s)
        return ends_s

    def _land(self, plan: CruisePlan) -> None:
        """Commit a step of the cruise: rows end, and prompts that are computed begin to decode."""
        loop, flights = self.loop, self._flights
        ended = flights.land(plan.step)
        for row, _, _, emits in plan.chunks:
            if emits:
                self._left[row] -= 1
                if not self._left[row]:
                    request = loop.table.request(row)
                    counts = request.num_drafted, request.num_accepted, request.num_rejected
                    generated = int(loop.table.num_known[row] - loop.table.prompt_len[row]) + 1
                    ended.append(Ended(row, generated, *counts, int(loop.table.num_steps[row]) + 1))
        finished = [loop.table.request(end.row) for end in ended]
        gone = {end.row for end in ended}
        self._cruise.commit(plan, ended, self.now_s)
        for row, _, _, emits in plan.chunks:
            if emits and row not in gone:
                flights.start(row, plan.step + 1)
        self._finish(finished)

    def _steps_alike(self) -> int:
        """Steps from now whose plans are equal for certain; 1 says nothing."""
        loop = self.loop
        if not (self._fast_forward and self._only_decodes) or self._hashing:
            return 1
        if loop.awaits_first_token(loop.table.active):
            return 1  # the last token of a prompt, computed as if it were decoded
        return min(max(1, loop.horizon(self.now_s)), MAX_STEPS_AHEAD)

    def _rest(self, plan: StepPlan) -> Process:
        """Wait for an arrival, or for the policy to change its mind."""
        self._is_idle = True
        until = self.env.event() if plan.wake_s == math.inf else self.env.timeout(plan.wake_s - self.env.now)
        try:
            yield until
            self._is_idle = False
            self.now_s = max(self.now_s, plan.wake_s)
        except simpy.Interrupt:
            self.now_s = max(self.now_s, self.env.now)

    def _sleep(self, ends_s: list[float]) -> Generator[simpy.Event, Any, int]:
        """Until the steps are over or somebody arrives; how many steps happened."""
        env = self.env
        if len(ends_s) == 1:
            yield env.timeout(max(0.0, ends_s[0] - env.now))
            return 1
        self._is_ahead = True
        try:
            yield env.timeout(max(0.0, ends_s[-1] - env.now))
            self._is_ahead = False
            return len(ends_s)
        except simpy.Interrupt:
            # The step in progress ends, and the newcomer has its chance with the next.
            num_done = min(bisect_left(ends_s, env.now), len(ends_s) - 1) + 1
            yield env.timeout(max(0.0, ends_s[num_done - 1] - env.now))
            return num_done

    def _enter(self, num_admitted: int) -> None:
        """Load the rows of newcomers, the last so many of the table."""
        table, size = self.loop.table, self.loop.config.block_size
        for row in table.active[len(table) - num_admitted :].tolist():
            request = table.request(row)
            assert isinstance(request, SimRequest) and request.luck
            self._left[row] = request.output_len - request.num_generated
            self._futures.enter(row, request.luck, request.output_len)
            if len(request.block_hashes) > request.prompt_len // size:
                self._hashing.add(request.request_id)

    def _execute(self, plan: StepPlan, num_steps: int) -> _Steps:
        """Draw what the next steps accept and how long they take, up to the first in which a request ends."""
        rows, size = plan.rows, plan.rows.size
        base = features(plan)
        self._only_decodes = base.prefill_tokens == 0
        if num_steps == 1:
            accepted = self._futures.at(rows, self.loop.table.num_steps[rows], plan.num_drafts)
            cost = self._cost(plan, base)
            return _Steps(accepted[None], [cost], [self.now_s + cost.total_s], self.loop.num_waiting)
        # Each step emits at least one token, so a request ends within so many steps.
        num_steps = min(num_steps, int(self._left[rows].min()))
        accepted = self._futures.ahead(rows, self.loop.table.num_steps[rows], plan.num_drafts, num_steps)
        emitted = np.cumsum(accepted + 1, axis=0)
        ended = (emitted >= self._left[rows]).any(axis=1)
        num_steps = int(ended.argmax()) + 1 if ended.any() else num_steps
        costs: list[StepCost[float]] = []
        ends_s: list[float] = []
        end_s, context = self.now_s, base.decode_context
        for step, tokens in enumerate((accepted[:num_steps].sum(axis=1) + size).tolist(), start=plan.step):
            costs.append(self._cost(plan._replace(step=step), base._replace(decode_context=context)))
            context += tokens
            end_s += costs[-1].total_s
            ends_s.append(end_s)
        return _Steps(accepted[:num_steps], costs, ends_s, self.loop.num_waiting)

    def _cost(self, plan: StepPlan, base: StepFeatures[float]) -> StepCost[float]:
        """Seconds of a step, with what the scheduler's options add to the cost model's or take from it."""
        cost, config = self._seconds(base), self.loop.config
        if plan.step % config.num_scheduler_steps:
            cost = cost._replace(overhead_s=0.0)  # planned ahead
        if plan.swapped_out.size or plan.swapped_in.size:
            cached = dict(zip(plan.admitted.tolist(), plan.num_cached.tolist(), strict=True))
            back = sum(-(-cached[i] // config.block_size) for i in plan.swapped_in.tolist())
            moved = plan.swapped_out_blocks.size + back
            cost = cost._replace(overhead_s=cost.overhead_s + self._swap_block_s * moved)
        return cost

    def _commit(self, plan: StepPlan, steps: _Steps, num_done: int) -> None:
        """The first ``num_done`` of the steps happened."""
        loop, rows, accepted = self.loop, plan.rows, steps.accepted
        for step in range(num_done - 1 if self._trace else 0):
            self._record_ahead(plan, steps, step)
        if num_done > 1:
            before = accepted[: num_done - 1]
            total = before.sum(axis=0, dtype=np.int32)
            rejected = (before < plan.num_drafts).sum(axis=0, dtype=np.int32)
            self._left[rows] -= total + np.int32(num_done - 1)
            plan = loop.skip(plan, num_done - 1, total, rejected, steps.ends_s[num_done - 2])
        outcome, ended = self._outcome(plan, accepted[num_done - 1], steps.costs[num_done - 1])
        end_s = steps.ends_s[num_done - 1]
        finished = [loop.table.request(row) for row in rows[ended].tolist()]
        loop.commit(plan, outcome, end_s)
        self._advance(end_s, num_done)
        if self._trace:
            self._trace.step(
                plan, outcome, plan.now_s, end_s, loop.num_running, loop.num_waiting, loop.pool.num_free
            )
        self._finish(finished)

    def _advance(self, end_s: float, num_steps: int) -> None:
        self.busy_s += end_s - self.now_s
        self.num_steps += num_steps
        self.num_plans += 1
        self.now_s = end_s

    def _finish(self, requests: list[Request]) -> None:
        for request in requests:
            assert isinstance(request, SimRequest)
            self._hashing.discard(request.request_id)
            if self._trace:
                self._trace.request(RequestRecord.of(request, self.loop.config.block_size))
            if self._on_finish:
                self._on_finish(request)

    def _outcome(
        self, plan: StepPlan, accepted: IntArray, cost: StepCost[float]
    ) -> tuple[StepOutcome, NDArray[np.intp]]:
        """What one step did, and which of the plan's rows ended."""
        rows = plan.rows
        left = self._left[rows]
        emitted = np.minimum(accepted + 1, left)
        if np.count_nonzero(plan.emits) < rows.size:
            emitted *= plan.emits
        left -= emitted
        self._left[rows] = left
        finished = left == 0
        outcome = StepOutcome(
            num_drafted=plan.num_drafts,
            num_accepted=accepted,
            num_emitted=emitted,
            finished=finished,
            draft_s=cost.draft_s,
            verify_s=cost.verify_s,
            sample_s=cost.sample_s,
            overhead_s=cost.overhead_s,
        )
        return outcome, finished.nonzero()[0]

    def _record_ahead(self, plan: StepPlan, steps: _Steps, step: int) -> None:
        """Trace one of the steps that are about to be skipped, as if it had been taken alone."""
        assert self._trace is not None
        loop, rows, cost = self.loop, plan.rows, steps.costs[step]
        size = loop.config.block_size
        context = plan.context + step + steps.accepted[:step].sum(axis=0, dtype=np.int32)
        more = -(-(context + 1 + plan.num_drafts) // size) - loop.table.num_blocks[rows]
        start_s = steps.ends_s[step - 1] if step else plan.now_s
        quiet = plan._replace(step=plan.step + step, now_s=start_s, context=context)
        outcome = StepOutcome(
            num_drafted=plan.num_drafts,
            num_accepted=steps.accepted[step],
            num_emitted=steps.accepted[step] + np.int32(1),
            finished=np.zeros(rows.size, np.bool_),
            draft_s=cost.draft_s,
            verify_s=cost.verify_s,
            sample_s=cost.sample_s,
            overhead_s=cost.overhead_s,
        )
        free = loop.pool.num_free - int(np.maximum(more, 0).sum())
        self._trace.step(
            quiet, outcome, start_s, steps.ends_s[step], loop.num_running, steps.num_waiting, free
        )
