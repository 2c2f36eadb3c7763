"""One replica in virtual time: the engine's main loop, begin → execute → commit, where executing is a draw.

The scheduler is the engine's own ``StepLoop``. An acceptance model says how many drafts each row accepts, a cost
model how long the step takes. While ``StepLoop.horizon`` promises equal plans, the replica draws many steps at once
and sleeps to the end of the last; an arrival wakes it, and it goes back to the end of the step in progress. The
trace is the same as step by step, with the same seed.

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
from sim.step_features import StepCost, StepFeatures, features
from specdec.scheduler import Request, StepLoop, StepOutcome, StepPlan
from specdec.scheduler.plan import IntArray
from specdec.trace import RequestRecord, TraceWriter

MAX_STEPS_AHEAD = 256
"""Most steps that are drawn at once, which bounds memory."""

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
    """

    output_len: int

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
        uniforms: float64 [M, R], what they were drawn with.
        num_waiting: requests that wait, until one arrives in the last step.
    """

    accepted: IntArray
    costs: list[StepCost[float]]
    ends_s: list[float]
    uniforms: FloatArray
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
        self._acceptance = acceptance
        self._seed = seed
        self._swap_block_s = swap_block_s
        self._on_finish = on_finish
        self._trace = trace
        self._fast_forward = fast_forward and loop.speculation.is_constant
        self._left = np.zeros(loop.config.max_num_seqs, np.int32)
        self._uniforms = _UniformStream(seed)
        self._hashing: set[int] = set()  # running requests whose output has block hashes
        self._only_decodes = False
        self._is_idle = False
        self._is_ahead = False
        self._is_stopped = False
        acceptance.bind(loop.config.max_num_seqs)
        self._process = env.process(self.run())

    @property
    def num_outstanding(self) -> int:
        """Requests that wait or run here."""
        return self.loop.num_waiting + self.loop.num_running

    def submit(self, request: SimRequest) -> None:
        """A request arrives, now.

        Raises:
            ValueError: it can never run here; see ``StepLoop.check``.
        """
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
        loop = self.loop
        while not self._is_stopped:
            alike = self._steps_alike()
            plan = loop.begin(self.now_s)
            if plan.is_empty:
                yield from self._rest(plan)
                continue
            if plan.admitted.size or plan.preempted.size:
                self._enter(plan)
            steps = self._execute(plan, alike)
            num_done = len(steps.ends_s)
            if num_done == 1:
                yield self.env.timeout(max(0.0, steps.ends_s[0] - self.env.now))
            else:
                num_done = yield from self._sleep(steps)
            if not self._is_stopped:
                self._commit(plan, steps, num_done)

    def _steps_alike(self) -> int:
        """Steps from now whose plans are equal for certain; 1 says nothing."""
        if not (self._fast_forward and self._only_decodes) or self._hashing:
            return 1
        return min(max(1, self.loop.horizon(self.now_s)), MAX_STEPS_AHEAD)

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

    def _sleep(self, steps: _Steps) -> Generator[simpy.Event, Any, int]:
        """Until the steps are over or somebody arrives; how many steps happened."""
        env, ends_s = self.env, steps.ends_s
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

    def _enter(self, plan: StepPlan) -> None:
        """Load the rows of newcomers; forget who was preempted."""
        table, size = self.loop.table, self.loop.config.block_size
        for request_id in plan.preempted.tolist():
            self._hashing.discard(request_id)
        for row in table.active[table.active.size - plan.admitted.size :].tolist():
            request = table.request(row)
            assert isinstance(request, SimRequest)
            self._left[row] = request.output_len - request.num_generated
            self._acceptance.enter(row, request.request_id, request.task, self._seed)
            if len(request.block_hashes) > request.prompt_len // size:
                self._hashing.add(request.request_id)

    def _execute(self, plan: StepPlan, num_steps: int) -> _Steps:
        """Draw what the next steps accept and how long they take, up to the first in which a request ends."""
        rows, size = plan.rows, plan.rows.size
        base = features(plan)
        self._only_decodes = base.prefill_tokens == 0
        if num_steps == 1:
            uniforms = self._uniforms.peek(size)
            accepted = self._acceptance.draw(rows, plan.num_drafts, uniforms)
            cost = self._cost(plan, base)
            waiting = self.loop.num_waiting
            return _Steps(accepted[None], [cost], [self.now_s + cost.total_s], uniforms[None], waiting)
        # Each step emits at least one token, so a request ends within so many steps.
        num_steps = min(num_steps, int(self._left[rows].min()))
        uniforms = self._uniforms.peek(num_steps * size).reshape(num_steps, size)
        accepted = self._acceptance.draw_many(rows, plan.num_drafts, uniforms)
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
        return _Steps(accepted[:num_steps], costs, ends_s, uniforms[:num_steps], self.loop.num_waiting)

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
        self._uniforms.advance(num_done * rows.size)
        self._acceptance.advance(rows, steps.uniforms[:num_done])
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
        self.busy_s += end_s - self.now_s
        self.num_steps += num_done
        self.num_plans += 1
        self.now_s = end_s
        if self._trace:
            self._trace.step(
                plan, outcome, plan.now_s, end_s, loop.num_running, loop.num_waiting, loop.pool.num_free
            )
        for request in finished:
            assert isinstance(request, SimRequest)
            self._hashing.discard(request.request_id)
            if self._trace:
                self._trace.request(RequestRecord.of(request, loop.config.block_size))
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


class _UniformStream:
    """Uniforms in [0, 1), looked at before they are used up."""

    _BLOCK = 1 << 15

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._values = self._rng.random(self._BLOCK)
        self._used = 0

    def peek(self, count: int) -> FloatArray:
        """The next ``count``; the same ones again until :meth:`advance`."""
        if self._used + count > self._values.size:
            fresh = self._rng.random(max(self._BLOCK, count))
            self._values = np.concatenate([self._values[self._used :], fresh])
            self._used = 0
        return self._values[self._used : self._used + count]

    def advance(self, count: int) -> None:
        """Use up ``count``."""
        self._used += count
