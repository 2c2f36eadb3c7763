"""Metrics of a run of up to 10⁷ simulated requests, in bounded memory and without a trace.

A replica hands over each finished request as one row of numbers (:data:`FIELDS`), or whole blocks of rows.
Rows wait in a preallocated buffer and are taken in block by block: sums for the counts, a
:class:`QuantileSketch` for each latency, all of it by task. The definitions are those of ``specdec.metrics``,
and :meth:`RunMetrics.summary` has the shape of what the serving experiment reports, so that simulated and
measured runs are compared key by key. :class:`LittlesLaw` checks the books of every run: no request is lost,
and none is counted twice.

>>> metrics = RunMetrics(Slo(ttft_s=1.0, tpot_s=0.05))
>>> chat = metrics.task_code("chat")
>>> metrics.add((0.0, 0.1, 0.3, 2.3, 512, 41, 17, 64, 25, 11, 0, chat))
>>> metrics.summary()["latency"]["ttft_s"]["p99"]
0.3
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.quantile_sketch import RESOLUTION_S, QuantileSketch
from specdec.metrics import LATENCIES, Slo

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FIELDS = (
    "arrival_s",
    "first_scheduled_s",
    "first_token_s",
    "finish_s",
    "prompt_len",
    "num_generated",
    "num_steps",
    "num_drafted",
    "num_accepted",
    "num_rejected",
    "num_preemptions",
    "task",  # a code from RunMetrics.task_code
)
_TIMES = FIELDS[:4]
_COUNTS = FIELDS[4:-1]
_GENERATED = FIELDS.index("num_generated")
_STEPS = FIELDS.index("num_steps")
_TASK = FIELDS.index("task")
# Packing a tuple into bytes takes 0.6 of the time of assigning it to a row of an array.
_ROW = struct.Struct(f"{len(FIELDS)}d")


class _TaskMetrics:
    """Sums and sketches of one task, or of all.

    Attributes:
        counts: int64 [len(_COUNTS)], sums of these columns.
        num_good, good_tokens: requests within the objective, and what they generated.
    """

    def __init__(self, exact_limit: int) -> None:
        self.num_requests = 0
        self.counts: IntArray = np.zeros(len(_COUNTS), np.int64)
        self.num_good = 0
        self.good_tokens = 0
        self.first_arrival_s = math.inf
        self.last_finish_s = -math.inf
        self.latencies = {name: QuantileSketch(exact_limit) for name in LATENCIES}

    def extend(self, block: FloatArray, slo: Slo | None) -> None:
        arrival_s, first_scheduled_s, first_token_s, finish_s = block[:, : len(_TIMES)].T
        num_generated = block[:, _GENERATED]
        later_tokens = np.where(num_generated > 1, num_generated - 1, math.nan)
        ttft_s, tpot_s = first_token_s - arrival_s, (finish_s - first_token_s) / later_tokens
        columns = (first_scheduled_s - arrival_s, ttft_s, tpot_s, finish_s - arrival_s)
        for name, values in zip(LATENCIES, columns, strict=True):
            self.latencies[name].extend(values)
        self.num_requests += block.shape[0]
        self.counts += block[:, len(_TIMES) : _TASK].sum(axis=0).astype(np.int64)
        self.first_arrival_s = min(self.first_arrival_s, float(arrival_s.min()))
        self.last_finish_s = max(self.last_finish_s, float(finish_s.max()))
        if slo is not None:
            # A one-token answer has no time per output token and is judged by its first token alone.
            good = (ttft_s <= slo.ttft_s) & ~(tpot_s > slo.tpot_s)
            self.num_good += int(np.count_nonzero(good))
            self.good_tokens += int(num_generated[good].sum())

    def merge(self, other: _TaskMetrics) -> None:
        self.num_requests += other.num_requests
        self.counts += other.counts
        self.num_good += other.num_good
        self.good_tokens += other.good_tokens
        self.first_arrival_s = min(self.first_arrival_s, other.first_arrival_s)
        self.last_finish_s = max(self.last_finish_s, other.last_finish_s)
        for name, sketch in self.latencies.items():
            sketch.merge(other.latencies[name])

    def summary(self, duration_s: float, slo: Slo | None) -> dict[str, Any]:
        totals = dict(zip(_COUNTS, self.counts.tolist(), strict=True))
        generated = totals["num_generated"]
        report: dict[str, Any] = {
            "latency": {name: sketch.percentiles() for name, sketch in self.latencies.items()},
            "throughput": {
                "tokens_per_s": _ratio(generated, duration_s),
                "requests_per_s": _ratio(self.num_requests, duration_s),
                "duration_s": duration_s,
            },
        }
        if slo is not None:
            report["goodput"] = {
                "share": _ratio(self.num_good, self.num_requests),
                "requests_per_s": _ratio(self.num_good, duration_s),
                "tokens_per_s": _ratio(self.good_tokens, duration_s),
            }
        judged = totals["num_accepted"] + totals["num_rejected"]
        return report | {
            "tau": _ratio(generated - self.num_requests, totals["num_steps"] - self.num_requests),
            "alpha": _ratio(totals["num_accepted"], judged),
            "num_requests": self.num_requests,
            "num_prompt_tokens": totals["prompt_len"],
            "num_generated": generated,
            "num_drafted": totals["num_drafted"],
            "num_preemptions": totals["num_preemptions"],
            "exact_quantiles": all(sketch.is_exact for sketch in self.latencies.values()),
        }


class RunMetrics:
    """What a run is judged by, from its finished requests.

    τ is (generated − 1) / (steps − 1), summed over requests above and below: the token and the step that end
    a prompt are no verification. That is ``specdec.metrics.tokens_per_step`` but for two rare steps, which
    each emit one token: one that computes the last token of a prompt alone (a verification there, not here)
    and one that recomputes a preempted request (here, not there). So where requests are preempted after their
    first token, this τ lies a little lower.

    Memory is at most ``exact_limit`` · 32 bytes per task, and ``capacity`` · 96 bytes.

    Args:
        slo: what goodput is counted under; without it there is none.
        tasks: names that get the codes 0, 1, …; :meth:`task_code` adds more.
        exact_limit: requests of a task up to which its percentiles are exact, see :class:`QuantileSketch`.
        capacity: rows buffered before they are taken in, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        slo: Slo | None = None,
        *,
        tasks: Sequence[str] = (),
        exact_limit: int = 100_000,
        capacity: int = 16_384,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be >= 1 row")
        self.slo = slo
        self._exact_limit = exact_limit
        self._codes: dict[str, int] = {}
        self._tasks: list[_TaskMetrics] = []
        self._rows = bytearray(capacity * _ROW.size)
        self._num_rows = 0
        for name in tasks:
            self.task_code(name)

    def task_code(self, name: str) -> int:
        """The number that stands for a task in a row; a new name gets the next one."""
        code = self._codes.get(name)
        if code is None:
            code = self._codes[name] = len(self._tasks)
            self._tasks.append(_TaskMetrics(self._exact_limit))
        return code

    def add(self, row: tuple[float, ...]) -> None:
        """Count one finished request; it is checked when the buffer is taken in.

        Args:
            row: numbers in the order of :data:`FIELDS`.
        """
        start = self._num_rows * _ROW.size
        if start == len(self._rows):
            self._flush()
            start = 0
        _ROW.pack_into(self._rows, start, *row)
        self._num_rows += 1

    def extend(self, block: FloatArray) -> None:
        """Count finished requests.

        Args:
            block: float64 [N, len(FIELDS)], not kept.

        Raises:
            ValueError: another shape, times out of order or not finite, counts that cannot be, or an
                unknown task.
        """
        if block.ndim != 2 or block.shape[1] != len(FIELDS):
            raise ValueError(f"block has shape {block.shape}: give [N, {len(FIELDS)}], {', '.join(FIELDS)}")
        if block.shape[0] == 0:
            return
        self._check(block)
        codes = block[:, _TASK].astype(np.int64)
        for code, task in enumerate(self._tasks):
            mine = block if len(self._tasks) == 1 else block[codes == code]
            if mine.shape[0]:
                task.extend(mine, self.slo)

    def merge(self, other: RunMetrics) -> None:
        """Count what ``other``, a replica that ran beside this one on the same clock, has counted.

        Raises:
            ValueError: goodput was counted under another objective.
        """
        if other.slo != self.slo:
            raise ValueError(f"goodput under {self.slo} and under {other.slo} cannot be added: use one SLO")
        self._flush()
        other._flush()
        for name, code in other._codes.items():
            self._tasks[self.task_code(name)].merge(other._tasks[code])

    @property
    def num_requests(self) -> int:
        return self._num_rows + sum(task.num_requests for task in self._tasks)

    @property
    def total_sojourn_s(self) -> float:
        """Σ (finish − arrival), for :meth:`LittlesLaw.check`."""
        self._flush()
        return math.fsum(task.latencies["e2e_s"].total for task in self._tasks)

    def summary(self) -> dict[str, Any]:
        """``latency``, ``throughput``, ``goodput`` (given an SLO), ``tau``, ``alpha`` and counts.

        ``tasks`` holds the same for each task that has finished requests. Its rates are over the whole run's
        time, so that they add up.

        Raises:
            ValueError: no request finished.
        """
        self._flush()
        if self.num_requests == 0:
            raise ValueError("no request finished: run longer, or look for requests that can never be served")
        whole = _TaskMetrics(self._exact_limit)
        for task in self._tasks:
            whole.merge(task)
        duration_s = whole.last_finish_s - whole.first_arrival_s
        tasks = {
            name: self._tasks[code].summary(duration_s, self.slo)
            for name, code in self._codes.items()
            if self._tasks[code].num_requests
        }
        return whole.summary(duration_s, self.slo) | {"tasks": tasks}

    def _flush(self) -> None:
        num_rows, self._num_rows = self._num_rows, 0
        self.extend(np.frombuffer(self._rows).reshape(-1, len(FIELDS))[:num_rows])

    def _check(self, block: FloatArray) -> None:
        times_s = block[:, : len(_TIMES)]
        num_generated, num_steps = block[:, _GENERATED], block[:, _STEPS]
        faults = {
            f"times must be finite and ordered, {' <= '.join(_TIMES)}": ~np.isfinite(times_s).all(axis=1)
            | (np.diff(times_s, axis=1) < -RESOLUTION_S).any(axis=1),
            "num_generated >= num_steps >= 1 must hold: a step emits at least one token": ~(
                (num_generated >= num_steps) & (num_steps >= 1)
            ),
            f"task must be a code that task_code gave, below {len(self._tasks)}": ~np.isin(
                block[:, _TASK], np.arange(len(self._tasks))
            ),
        }
        for rule, broken in faults.items():
            if broken.any():
                row = block[int(np.argmax(broken))]
                named = ", ".join(f"{name}={value:g}" for name, value in zip(FIELDS, row, strict=True))
                raise ValueError(f"{rule}; not so in the request {named}")


class LittlesLaw:
    """The books of a system that requests enter and leave: L = λW, without a trace.

    ∫ N(t) dt, N being the number in the system, equals the sum of the sojourn times (Little 1961): dividing
    both by the time gives L = λW. The two are added up by different code, so a request that is lost, counted
    twice or finished at the wrong time shows. Compensated summation keeps 10⁷ events within the tolerance.

    Args:
        start_s: when the system is empty and its clock starts.
    """

    __slots__ = ("_area", "_compensation", "_last_s", "num_in_system", "start_s")

    def __init__(self, start_s: float = 0.0) -> None:
        self.start_s = start_s
        self.num_in_system = 0
        self._last_s = start_s
        self._area = 0.0
        self._compensation = 0.0

    def change(self, now_s: float, delta: int) -> None:
        """At ``now_s``, ``delta`` requests entered (left, if negative)."""
        span_s = now_s - self._last_s
        assert span_s >= 0.0, f"time ran backwards, from {self._last_s} to {now_s} s"
        term = self.num_in_system * span_s - self._compensation
        area = self._area + term
        self._compensation = (area - self._area) - term
        self._area = area
        self._last_s = now_s
        self.num_in_system += delta
        assert self.num_in_system >= 0, f"at {now_s} s more requests have left than entered"

    @property
    def area_s(self) -> float:
        """∫ N(t) dt up to the last change, in request-seconds."""
        return self._area

    @property
    def mean_in_system(self) -> float:
        """L, the average of N(t) from the start to the last change; ``nan`` if no time has passed."""
        return _ratio(self._area, self._last_s - self.start_s)

    def check(self, total_sojourn_s: float) -> None:
        """Compare with the sum of the sojourn times, to 10⁻⁹ of it.

        Args:
            total_sojourn_s: over all requests that entered; of those still inside, up to the last change
                (``change(now_s, 0)`` sets it).

        Raises:
            AssertionError: the two differ; both are named.
        """
        if not math.isclose(total_sojourn_s, self._area, rel_tol=1e-9):
            raise AssertionError(
                f"Little's law is broken: the number in the system integrates to {self._area!r} "
                f"request-seconds, the sojourn times sum to {total_sojourn_s!r} s ({self.num_in_system} "
                "requests are still inside)"
            )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
