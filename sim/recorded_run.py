"""A recorded run of our own engine, simulated again from as much of it as is wanted.

From arrivals and lengths alone, with a cost model and a law of acceptance, this is a prediction. Either can be put
back as it was recorded: what each request's verifications drafted and accepted, the seconds of each step, or both,
so that what is left of the error has its place. The replica is the simulator's own.

>>> recorded = RecordedRun(steps, requests, limits, {"name": "chunked"}, max_drafts=4)
>>> predicted = simulate_run(recorded, cost_model, lent_verifications([other], recorded, rng))
>>> predicted.e2e_s.mean() / recorded.times.e2e_s.mean()
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import simpy
from numpy.typing import NDArray

from sim.acceptance import AcceptanceModel, ConstantAcceptance
from sim.replica import Process, Replica, SimRequest, StepTimes
from sim.step_features import StepCost, StepFeatures, features
from specdec.scheduler import SchedulerConfig, StepLoop, StepOutcome, StepPlan, make_controller, make_policy
from specdec.scheduler.plan import IntArray
from specdec.trace import iter_steps

FloatArray = NDArray[np.float64]
LongArray = NDArray[np.int64]

Verifications = Mapping[int, IntArray]
"""Request id → int32 [v, 2]: drafted and accepted tokens of each of its steps that emit, the prompt's first."""

_NOTHING = np.zeros((1, 2), np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimes:
    """What n requests saw, in the order of their ids.

    Attributes:
        ttft_s, tpot_s, e2e_s: float64 [n]; tpot_s of a one-token answer is NaN.
        num_tokens, num_steps: int64 [n], tokens of the answer, and steps that emitted some.
        duration_s: from the first arrival to the last finish.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray
    num_tokens: LongArray
    num_steps: LongArray
    duration_s: float

    @staticmethod
    def of(
        arrival_s: FloatArray, first_s: FloatArray, finish_s: FloatArray, tokens: LongArray, steps: LongArray
    ) -> RunTimes:
        gaps = np.where(tokens > 1, tokens - 1.0, np.nan)
        return RunTimes(
            ttft_s=first_s - arrival_s,
            tpot_s=(finish_s - first_s) / gaps,
            e2e_s=finish_s - arrival_s,
            num_tokens=tokens,
            num_steps=steps,
            duration_s=float(finish_s.max() - arrival_s.min()),
        )

    @property
    def latencies(self) -> dict[str, FloatArray]:
        return {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}

    @property
    def tokens_per_s(self) -> float:
        return float(self.num_tokens.sum()) / self.duration_s


class Pace(NamedTuple):
    """Seconds of two passes that are the same for all runs, or these in shares of others.

    Attributes:
        decode: a full batch of decoding rows, which waits for memory; it stands for all steps without prompts.
        prompt: a chunk of prompt, which computes; it stands for the others.
    """

    decode: float
    prompt: float

    @staticmethod
    def mean(paces: Sequence[Pace]) -> Pace:
        """Geometric."""
        return Pace(*np.exp(np.log(np.array(paces)).mean(axis=0)).tolist())

    def over(self, other: Pace) -> Pace:
        return Pace(self.decode / other.decode, self.prompt / other.prompt)


AS_IT_WAS = Pace(1.0, 1.0)


class RecordedRun:
    """A complete trace: every request that arrived has finished.

    Args:
        steps, requests: as ``specdec.trace`` reads them.
        limits: of the engine that was recorded.
        policy: as :func:`make_policy` takes it.
        max_drafts: of each verification; 0 for plain decoding.
        pace: how fast the machine was around this run.

    Raises:
        ValueError: no request finished.
    """

    def __init__(
        self,
        steps: pl.DataFrame,
        requests: pl.DataFrame,
        limits: SchedulerConfig,
        policy: Mapping[str, Any],
        max_drafts: int,
        pace: Pace = AS_IT_WAS,
    ) -> None:
        if requests.is_empty():
            raise ValueError("the trace has no request that finished: record the run anew")
        self.steps, self.requests = steps, requests.sort("request_id")
        self.limits, self.policy, self.max_drafts = limits, policy, max_drafts
        self.pace = pace

    def loop(self) -> StepLoop:
        """A fresh scheduler, configured as the recorded one was."""
        drafts = (
            make_controller("fixed", max_drafts=self.max_drafts)
            if self.max_drafts
            else make_controller("off")
        )
        return StepLoop(self.limits, make_policy(**self.policy), drafts)

    @cached_property
    def times(self) -> RunTimes:
        """What the requests really saw."""
        names = ("arrival_s", "first_token_s", "finish_s", "num_generated", "num_steps")
        return RunTimes.of(*(self.requests[name].to_numpy() for name in names))

    @cached_property
    def plans(self) -> list[tuple[StepPlan, StepOutcome]]:
        return list(iter_steps(self.steps))

    @cached_property
    def features(self) -> list[StepFeatures[float]]:
        """Of each step, with the drafts that were really proposed."""
        return [features(plan._replace(num_drafts=outcome.num_drafted)) for plan, outcome in self.plans]

    @cached_property
    def seconds(self) -> FloatArray:
        """From each step's start to the next one's, or to its own end where the engine then had nothing to do: all of
        the wall time of a busy engine is in some step."""
        starts, ends = self.steps["start_s"].to_numpy(), self.steps["end_s"].to_numpy()
        return np.where(self._goes_on, np.append(starts[1:], ends[-1]), ends) - starts

    @cached_property
    def seen_s(self) -> FloatArray:
        """When the engine saw each request: whoever ends a pause waits until it is awake, float64 [n]."""
        starts = self.steps["start_s"].to_numpy()
        arrivals = self.requests["arrival_s"].to_numpy()
        step = np.searchsorted(starts, arrivals, "left")
        paused = np.append(True, ~self._goes_on[:-1])[step]
        return np.where(paused, starts[step], arrivals)

    @cached_property
    def _goes_on(self) -> NDArray[np.bool_]:
        """Whether the engine had something to do when each step ended."""
        starts, ends = self.steps["start_s"].to_numpy(), self.steps["end_s"].to_numpy()
        inside = (self.steps["num_running"] + self.steps["num_waiting"]).to_numpy()
        arrivals = np.sort(self.requests["arrival_s"].to_numpy())
        next_arrival = np.append(arrivals, np.inf)[np.searchsorted(arrivals, starts, "right")]
        goes_on = (inside > 0) | (next_arrival <= ends)
        goes_on[-1] = False
        return goes_on

    @cached_property
    def verifications(self) -> Verifications:
        """As they were, drafted and accepted."""
        return {request_id: rows[:, 1:] for request_id, rows in self._planned.items()}

    @cached_property
    def full_verifications(self) -> list[IntArray]:
        """Of each request, int32 [v, 2], those that were allowed all drafts: not the last before an answer's end."""
        every = (rows[1:][rows[1:, 0] == self.max_drafts, 1:] for rows in self._planned.values())
        return [rows for rows in every if rows.size]

    @cached_property
    def _planned(self) -> dict[int, IntArray]:
        """Request id → int32 [v, 3]: allowed, drafted and accepted tokens of the steps that emitted."""
        names = ["request_ids", "emits", "num_drafts", "num_drafted", "row_accepted"]
        rows = self.steps.filter(pl.col("num_rows") > 0).select(names).explode(names).filter(pl.col("emits"))
        return {
            int(request_id): part.select(names[2:]).to_numpy().astype(np.int32)
            for (request_id,), part in rows.group_by("request_ids", maintain_order=True)
        }


def lent_verifications(
    fitted: Sequence[RecordedRun], run: RecordedRun, rng: np.random.Generator
) -> Verifications:
    """A law of acceptance: each request of ``run`` has the verifications of a request of the runs ``fitted``.

    So requests differ as they do there, a request's steps hang together, and drafters that often propose less than
    they may (n-gram lookup that finds nothing) do so here. A request that is longer than its donor goes on with
    another one.

    Raises:
        ValueError: the fitted runs have no drafts although ``run`` speculates.
    """
    outputs = dict(run.requests.select("request_id", "num_generated").iter_rows())
    if run.max_drafts == 0:
        return dict.fromkeys(outputs, _NOTHING)
    donors = [rows for one in fitted for rows in one.full_verifications]
    if not donors:
        raise ValueError(
            f"no verification of the fitted runs was allowed {run.max_drafts} drafts: give longer answers "
            "(validate.output_lens) or fewer drafts (speculation.num_drafts)"
        )
    lent: dict[int, IntArray] = {}
    for request_id, length in outputs.items():
        parts = [_NOTHING]
        while sum(part.shape[0] for part in parts) < length:
            parts.append(donors[int(rng.integers(len(donors)))])
        lent[request_id] = np.concatenate(parts)
    return lent


class RecordedSeconds:
    """A cost model that knows no features: the recorded run's seconds, step after step.

    Attributes:
        num_different: steps that had another size than the recorded one.
    """

    def __init__(self, run: RecordedRun) -> None:
        self._sizes, self._seconds = run.features, run.seconds.tolist()
        self._next = 0
        self.num_different = 0

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        place = min(self._next, len(self._seconds) - 1)
        self.num_different += self._next != place or features != self._sizes[place]
        self._next += 1
        return StepCost(0.0, self._seconds[place], 0.0, 0.0, 0.0)


class _KnownReplica(Replica):
    """A replica whose requests bring their verifications, which may propose less than the plan allows."""

    def __init__(self, *args: Any, verifications: Verifications, **options: Any) -> None:
        super().__init__(*args, **options, fast_forward=False)
        self._verifications = verifications
        self._num_drafted = np.zeros(0, np.int32)

    def _execute(self, plan: StepPlan, num_steps: int) -> Any:
        assert num_steps == 1
        drafted, accepted = self._looked_up(plan).T
        self._num_drafted = np.minimum(drafted, plan.num_drafts)
        steps = super()._execute(plan._replace(num_drafts=self._num_drafted), num_steps)
        return steps._replace(accepted=np.minimum(accepted, self._num_drafted)[None])

    def _looked_up(self, plan: StepPlan) -> IntArray:
        steps = self.loop.table.num_steps[plan.rows].tolist()
        found = np.zeros((plan.rows.size, 2), np.int32)
        for place, (request_id, step) in enumerate(zip(plan.request_ids.tolist(), steps, strict=True)):
            rows = self._verifications[request_id]
            found[place] = rows[min(step, rows.shape[0] - 1)]
        return found

    def _outcome(
        self, plan: StepPlan, accepted: IntArray, cost: StepCost[float]
    ) -> tuple[StepOutcome, NDArray[np.intp]]:
        outcome, ended = super()._outcome(plan, accepted, cost)
        return outcome._replace(num_drafted=self._num_drafted), ended


def simulate_run(
    run: RecordedRun,
    cost_model: StepTimes,
    acceptance: Verifications | AcceptanceModel,
    *,
    seed: int = 0,
    seen_s: FloatArray | None = None,
) -> RunTimes:
    """Simulate the recorded engine from the run's arrivals and lengths.

    Args:
        cost_model: seconds of a step, or :class:`RecordedSeconds`.
        acceptance: of each request, or a law, under which every draft is as long as the plan allows.
        seed: of the draws of a law.
        seen_s: when the engine sees each request, float64 [n]; by default as it arrives. Latencies count from the
            arrival.
    """
    env, loop = simpy.Environment(), run.loop()
    if isinstance(acceptance, Mapping):
        replica: Replica = _KnownReplica(
            env, loop, cost_model, ConstantAcceptance(0.0), verifications=acceptance
        )
    else:
        replica = Replica(env, loop, cost_model, acceptance, seed=seed)
    requests = _requests(run)
    times_s = run.requests["arrival_s"].to_numpy() if seen_s is None else seen_s

    def arrivals() -> Process:
        order: list[int] = np.argsort(times_s, kind="stable").tolist()
        for place in order:
            if (time_s := float(times_s[place])) > env.now:  # who comes at the same time is seen together
                yield env.timeout(time_s - env.now)
            replica.submit(requests[place])
        replica.drain()

    env.process(arrivals())
    env.run()
    missing = [request.request_id for request in requests if not math.isfinite(request.finish_s)]
    assert not missing, f"requests {missing[:5]} never finished"
    floats = (
        np.array([getattr(request, name) for request in requests])
        for name in ("arrival_s", "first_token_s", "finish_s")
    )
    counts = (
        np.array([getattr(request, name) for request in requests], np.int64)
        for name in ("num_generated", "num_steps")
    )
    return RunTimes.of(*floats, *counts)


def _requests(run: RecordedRun) -> list[SimRequest]:
    """In the order of their ids, with their arrivals and lengths and nothing else."""
    return [
        SimRequest(
            request_id=row["request_id"],
            prompt_len=row["prompt_len"],
            max_tokens=row["max_tokens"],
            output_len=row["num_generated"],
            arrival_s=row["arrival_s"],
            task=row["task"],
        )
        for row in run.requests.iter_rows(named=True)
    ]
