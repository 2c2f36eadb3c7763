"""What is counted while a simulation runs: requests by their fate, Little's law, and the growth of a queue."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from sim.replica import SimRequest
from sim.streaming import LittlesLaw, RunMetrics
from specdec.metrics import Slo

COUNTS = ("num_submitted", "num_finished", "num_rejected", "num_failed", "num_retried", "num_escalated")
_ROWS = 2048
_MOST_SAMPLES = 256
_LEAST_INCREMENTS = 16
_LEAST_FINISHED = 32
_SIGNIFICANCE = 4.0


class Books:
    """Requests of one replica, or of a cluster whose replicas hand requests to each other.

    Attributes:
        num_submitted: arrivals: finished + rejected + failed + those in flight.
        num_finished, num_rejected, num_failed: requests that ended so.
        num_retried: times that a request was sent again after a failure.
        num_escalated: requests that went on to a larger model.
        discarded_tokens: prompt and output tokens of answers that were not good enough.
    """

    __slots__ = (*COUNTS, "_codes", "_gone_s", "discarded_tokens", "little", "metrics")

    def __init__(self, slo: Slo | None) -> None:
        self.num_submitted = self.num_finished = self.num_rejected = 0
        self.num_failed = self.num_retried = self.num_escalated = 0
        self.discarded_tokens = 0
        self.little = LittlesLaw()
        self.metrics = RunMetrics(slo, capacity=_ROWS)
        self._codes: dict[str, int] = {}
        self._gone_s: list[float] = []

    def finish(self, request: SimRequest, now_s: float) -> None:
        """``request`` ended well, now."""
        self.num_finished += 1
        self.little.change(now_s, -1)
        code = self._codes.get(request.task)
        if code is None:
            code = self._codes[request.task] = self.metrics.task_code(request.task)
        self.metrics.add(
            (
                request.arrival_s,
                request.first_scheduled_s,
                request.first_token_s,
                request.finish_s,
                request.prompt_len,
                request.num_generated,
                request.num_steps,
                request.num_drafted,
                request.num_accepted,
                request.num_rejected,
                request.num_preemptions,
                code,
            )
        )

    def fail(self, request: SimRequest, now_s: float) -> None:
        """``request`` is given up, now."""
        self.num_failed += 1
        self.little.change(now_s, -1)
        self._gone_s.append(now_s - request.arrival_s)

    def close(self, now_s: float, in_flight: Iterable[SimRequest]) -> None:
        """The end of the simulation.

        Args:
            in_flight: the requests that are still inside, wherever they are.

        Raises:
            AssertionError: a request was lost or counted twice, or Little's law does not hold.
        """
        inside_s = [now_s - request.arrival_s for request in in_flight]
        ended = self.num_finished + self.num_rejected + self.num_failed
        assert self.num_submitted == ended + len(inside_s), (
            f"{self.num_submitted} requests were submitted, {self.num_finished} finished, {self.num_rejected} were "
            f"rejected, {self.num_failed} failed, {len(inside_s)} are in flight: the sum is wrong"
        )
        self.little.change(now_s, 0)
        self.little.check(math.fsum((self.metrics.total_sojourn_s, *self._gone_s, *inside_s)))


class Backlog:
    """Whether a queue grows without bound, from its length at every so-manyth arrival.

    Over the last three quarters of the arrivals the increments of the queue have a mean and a standard
    deviation. A queue below its capacity returns to a level, so that their sum stays small; one above grows by a
    like amount each time. Growth counts as significant where the mean increment exceeds four standard errors of
    it. A burst that ends before the replica has finished even 32 requests says nothing.
    """

    __slots__ = ("_finished", "_lengths", "_stride", "due", "num_seen")

    def __init__(self) -> None:
        self.num_seen = 0
        self.due = 1  # the arrival to sample at
        self._stride = 1
        self._lengths: list[int] = []
        self._finished = 0

    def sample(self, num_waiting: int, num_finished: int) -> None:
        """At the arrival ``due``."""
        self._lengths.append(num_waiting)
        self._finished = num_finished
        self.due = self.num_seen + self._stride
        if len(self._lengths) == _MOST_SAMPLES:
            del self._lengths[1::2]
            self._stride *= 2

    def growth(self) -> float:
        """Requests per arrival by which the queue grows; 0 where that is not significant."""
        lengths = np.array(self._lengths[len(self._lengths) // 4 :], np.float64)
        if lengths.size <= _LEAST_INCREMENTS or self._finished < _LEAST_FINISHED:
            return 0.0
        increments = np.diff(lengths)
        error = float(increments.std(ddof=1)) / math.sqrt(increments.size)
        mean = float(increments.mean())
        return mean / self._stride if mean > _SIGNIFICANCE * error else 0.0
