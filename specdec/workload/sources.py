"""Streams of requests: synthetic, replayed from a trace, or asked by a fixed number of users.

A source is a description; every call of ``chunks`` starts the same stream anew, and the size of the chunks
does not change its values.

>>> source = SyntheticSource(Poisson(5.0), FixedLengths(100, 20), num_requests=10_000_000, seed=0)
>>> sum(len(requests) for requests in source.chunks(65_536))
10000000
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.names import unknown_name
from specdec.workload.arrivals import BLOCK, ArrivalProcess, FloatArray, arrival_chunks, regroup
from specdec.workload.hashing import pair_hash
from specdec.workload.lengths import LengthDistribution
from specdec.workload.requests import Requests
from specdec.workload.tasks import TaskMix

THINK_TIMES = ("exponential", "constant")
# Smaller than BLOCK, since a request may bring hundreds of hashes.
_TRACE_BLOCK = 8192


class RequestSource(Protocol):
    """Anything that gives requests in the order of arrival."""

    def chunks(self, size: int) -> Iterator[Requests]:
        """All requests, ``size`` at a time, the last chunk maybe shorter, none empty."""
        ...


def collect(source: RequestSource) -> Requests:
    """All requests of a source at once.

    Raises:
        ValueError: a source without requests.
    """
    return Requests.concat(list(source.chunks(BLOCK)))


@dataclass(frozen=True, slots=True)
class SyntheticSource:
    """Requests of given laws: when they arrive, and how long they are.

    Args:
        process: of the arrivals.
        lengths: one law, or a mix of task classes.
        num_requests: >= 1.
        seed: of arrivals and lengths, which use generators of their own.
        max_tokens: limit that the scheduler sees; see ``TaskMix.requests``.

    Raises:
        ValueError: a count or a limit < 1.
    """

    process: ArrivalProcess
    lengths: LengthDistribution | TaskMix
    num_requests: int
    seed: int
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_count("num_requests", self.num_requests)
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens)

    def chunks(self, size: int) -> Iterator[Requests]:
        return regroup(self._blocks(), size, Requests.concat, Requests.slice)

    def _blocks(self) -> Iterator[Requests]:
        arrival_rng, length_rng = np.random.default_rng(self.seed).spawn(2)
        mix = TaskMix.of(self.lengths)
        for arrival_s in arrival_chunks(self.process, self.num_requests, arrival_rng):
            yield mix.requests(arrival_s, length_rng, max_tokens=self.max_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class TraceSource:
    """A trace at another rate, cut to some requests or repeated until there are so many.

    A repetition begins one mean gap after the last request of the one before, with new session numbers.

    Args:
        requests: at least one.
        num_requests: ``None`` for the trace as it is.
        rate_factor: times as many requests per second.
        repeat_hashes: whether repetitions have the prefixes of the first round. By default they have new ones,
            since a cache that remembers the previous round would look better than the trace allows; prefixes
            that all requests share are then new in each round too.

    Raises:
        ValueError: an empty trace, a count < 1 or a factor that is not positive and finite.
    """

    requests: Requests
    num_requests: int | None = None
    rate_factor: float = 1.0
    repeat_hashes: bool = False

    def __post_init__(self) -> None:
        if not len(self.requests):
            raise ValueError("the trace has no requests")
        if self.num_requests is not None:
            _check_count("num_requests", self.num_requests)
        if not 0.0 < self.rate_factor < math.inf:
            raise ValueError(f"rate_factor={self.rate_factor} must be a finite number > 0")

    def chunks(self, size: int) -> Iterator[Requests]:
        return regroup(self._blocks(), size, Requests.concat, Requests.slice)

    def _blocks(self) -> Iterator[Requests]:
        trace = self.requests.scale_rate(self.rate_factor)
        span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
        period_s = span_s * len(trace) / (len(trace) - 1) if len(trace) > 1 else 0.0
        num_sessions = int(trace.session.max()) + 1
        num = len(trace) if self.num_requests is None else self.num_requests
        for start in range(0, num, _TRACE_BLOCK):
            rounds, rows = np.divmod(np.arange(start, min(start + _TRACE_BLOCK, num)), len(trace))
            part = trace.take(rows)
            session = np.where(part.session >= 0, part.session + rounds * num_sessions, part.session)
            moved = replace(part.with_arrivals(part.arrival_s + rounds * period_s), session=session)
            yield moved if self.repeat_hashes else self._with_new_hashes(moved, rounds)

    def _with_new_hashes(self, part: Requests, rounds: NDArray[np.int64]) -> Requests:
        """Other hashes in each round, but in the first as they are."""
        number = np.repeat(rounds, np.diff(part.hash_start)).astype(np.uint64)
        return replace(part, hashes=np.where(number == 0, part.hashes, pair_hash(part.hashes, number)))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Users who each think, ask, wait for the answer, and think again, until ``num_requests`` were asked.

    When a request arrives depends on when the one before was answered, so the driver of this description (a
    simulator) decides it: whichever user is due next asks the next request of ``chunks``, after having thought
    for the next time of ``think_chunks``. All users begin by thinking, at time 0.

    Args:
        num_users: >= 1, the most requests under way at a time.
        think_time_s: mean, >= 0 and finite.
        lengths: one law, or a mix of task classes.
        num_requests: of all users together, >= 1.
        seed: of think times and lengths, which use generators of their own.
        think_time: ``"exponential"`` or ``"constant"``.
        max_tokens: limit that the scheduler sees; see ``TaskMix.requests``.

    Raises:
        ValueError: a count or a limit < 1, a negative or endless think time, or an unknown law of it.
    """

    num_users: int
    think_time_s: float
    lengths: LengthDistribution | TaskMix
    num_requests: int
    seed: int
    think_time: str = "exponential"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_count("num_users", self.num_users)
        _check_count("num_requests", self.num_requests)
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens)
        if not 0.0 <= self.think_time_s < math.inf:
            raise ValueError(f"think_time_s={self.think_time_s} must be a finite number >= 0")
        if self.think_time not in THINK_TIMES:
            raise unknown_name("law of think times", self.think_time, THINK_TIMES)

    def chunks(self, size: int) -> Iterator[Requests]:
        """The requests in the order of asking, all with ``arrival_s`` 0: they arrive when they are asked."""
        rng, mix = np.random.default_rng(self.seed).spawn(2)[0], TaskMix.of(self.lengths)
        blocks = (mix.requests(np.zeros(num), rng, max_tokens=self.max_tokens) for num in self._block_sizes())
        return regroup(blocks, size, Requests.concat, Requests.slice)

    def think_chunks(self, size: int) -> Iterator[FloatArray]:
        """Seconds of thought before each request of ``chunks``, float64, ``size`` at a time."""
        rng, exponential = np.random.default_rng(self.seed).spawn(2)[1], self.think_time == "exponential"
        blocks = (
            rng.exponential(self.think_time_s, num) if exponential else np.full(num, self.think_time_s)
            for num in self._block_sizes()
        )
        return regroup(blocks, size, np.concatenate, lambda think_s, start, stop: think_s[start:stop])

    def _block_sizes(self) -> Iterator[int]:
        return (min(BLOCK, self.num_requests - start) for start in range(0, self.num_requests, BLOCK))


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be >= 1")
