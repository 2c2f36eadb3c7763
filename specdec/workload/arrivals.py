"""When requests arrive: open-loop processes, all at once or in chunks of bounded memory.

A process draws in blocks of a fixed size, so a stream of 10^7 requests has the same values in chunks of any
size as in one array.

>>> arrivals("poisson", 100, np.random.default_rng(0), rate_per_s=2.0)
>>> burst = Mmpp(rates_per_s=(1.0, 20.0), dwell_s=(60.0, 5.0))
>>> for times_s in arrival_chunks(burst, 10_000_000, np.random.default_rng(0)): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from specdec.names import unknown_name

FloatArray = NDArray[np.float64]
Part = TypeVar("Part", bound=Sized)

PROCESSES = ("poisson", "gamma", "uniform", "all_at_once")
"""Processes that a rate, and for gamma a coefficient of variation, describe: those of :func:`arrivals`."""
BLOCK = 1 << 16
"""Values drawn at once. Changing it changes the streams of ``Mmpp`` and ``Diurnal`` for a given seed."""
_SEGMENTS = 1024


class ArrivalProcess(Protocol):
    """A law of arrival times, without a state: every call of ``blocks`` starts anew at time 0."""

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second in the long run, ``inf`` for ``AllAtOnce``."""
        ...

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        """``num`` rising times in seconds, in arrays of any size but bounded."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent exponential gaps.

    Args:
        rate_per_s: mean requests per second, > 0 and finite.
    """

    rate_per_s: float

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        return _running_sums(lambda count: rng.exponential(1.0 / self.rate_per_s, count), num)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gamma gaps.

    Args:
        rate_per_s: mean requests per second, > 0 and finite.
        cv: standard deviation of the gaps / their mean: above 1 bursty, 1 is Poisson, below 1 smoother.
    """

    rate_per_s: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)
        if not 0.0 < self.cv < math.inf:
            raise ValueError(f"cv={self.cv} must be a finite number > 0")

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        shape = 1.0 / self.cv**2
        scale_s = 1.0 / self.rate_per_s / shape
        return _running_sums(lambda count: rng.gamma(shape, scale_s, count), num)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Equal gaps, no chance.

    Args:
        rate_per_s: requests per second, > 0 and finite.
    """

    rate_per_s: float

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        for start in range(0, num, BLOCK):
            ranks = np.arange(start + 1, min(start + BLOCK, num) + 1, dtype=np.float64)
            yield ranks * (1.0 / self.rate_per_s)


@dataclass(frozen=True, slots=True)
class AllAtOnce:
    """Everything at time 0: an offline batch."""

    @property
    def mean_rate_per_s(self) -> float:
        return math.inf

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        for start in range(0, num, BLOCK):
            yield np.zeros(min(BLOCK, num - start))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mmpp:
    """Two-state Markov-modulated Poisson process (Fischer & Meier-Hellstern, Performance Evaluation 1993).

    A hidden state switches after exponential times; in state ``i`` arrivals are Poisson with ``rates_per_s[i]``.
    It starts in its stationary law. With the rate ``m`` on average, ``w`` the share of time in state 0 and
    ``g = 1/dwell_s[0] + 1/dwell_s[1]``, counts over ``t`` seconds have the variance-to-mean ratio
    ``1 + 2 w (1 - w) (r0 - r1)² / (m g) · (1 - (1 - exp(-g t)) / (g t))``.

    Args:
        rates_per_s: of the two states, >= 0, at least one of them > 0.
        dwell_s: mean stay in each state, > 0 and finite.
    """

    rates_per_s: tuple[float, float]
    dwell_s: tuple[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates_per_s", tuple(self.rates_per_s))
        object.__setattr__(self, "dwell_s", tuple(self.dwell_s))
        rates, dwells = self.rates_per_s, self.dwell_s
        if len(rates) != 2 or not all(0.0 <= rate < math.inf for rate in rates) or max(rates) == 0.0:
            raise ValueError(f"rates_per_s={rates} must be two finite numbers >= 0, not both 0")
        if len(dwells) != 2 or not all(0.0 < dwell < math.inf for dwell in dwells):
            raise ValueError(f"dwell_s={dwells} must be two finite numbers > 0")

    @property
    def mean_rate_per_s(self) -> float:
        (rate_0, rate_1), (dwell_0, dwell_1) = self.rates_per_s, self.dwell_s
        return (rate_0 * dwell_0 + rate_1 * dwell_1) / (dwell_0 + dwell_1)

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        """By time change: a Poisson process of rate 1, run through the inverse of the integrated rate."""
        segments = self._segments(rng.spawn(1)[0])
        start_s, start_units, rates = next(segments)
        for units in _running_sums(rng.standard_exponential, num):
            known = [(start_s, start_units, rates)]
            while known[-1][1][-1] <= units[-1]:
                known.append(next(segments))
            start_s, start_units, rates = (np.concatenate(parts) for parts in zip(*known, strict=True))
            # A segment of rate 0 begins where the next does, so "right" never picks it.
            rows = np.searchsorted(start_units, units, side="right") - 1
            times_s = start_s[rows] + (units - start_units[rows]) / rates[rows]
            # Rounding must not carry a time past the start of the next segment.
            yield np.minimum(times_s, start_s[rows + 1])
            start_s, start_units, rates = (part[rows[-1] :] for part in (start_s, start_units, rates))

    def _segments(self, rng: np.random.Generator) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
        """Start, integrated rate at the start, and rate of the stays, float64 [_SEGMENTS] each time."""
        state = int(rng.random() * sum(self.dwell_s) >= self.dwell_s[0])
        order = [state, 1 - state] * (_SEGMENTS // 2)
        rates, means_s = np.array(self.rates_per_s)[order], np.array(self.dwell_s)[order]
        end_s = end_units = 0.0
        while True:
            stays_s = rng.exponential(means_s)
            bounds_s = np.cumsum(np.concatenate(([end_s], stays_s)))
            bounds_units = np.cumsum(np.concatenate(([end_units], stays_s * rates)))
            yield bounds_s[:-1], bounds_units[:-1], rates
            end_s, end_units = float(bounds_s[-1]), float(bounds_units[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal:
    """Poisson arrivals whose rate follows a sine: ``rate_per_s · (1 + amplitude · sin(2π (t/period_s + phase)))``.

    Drawn by thinning (Lewis & Shedler, Naval Research Logistics 1979), which is exact.

    Args:
        rate_per_s: mean over a period, > 0 and finite.
        amplitude: in [0, 1]; 1 falls to no requests at all once a period.
        period_s: > 0 and finite.
        phase: where in its period the rate is at time 0, in periods; 0.25 is the peak, 0.75 the trough.
    """

    rate_per_s: float
    amplitude: float = 0.5
    period_s: float = 86_400.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)
        if not 0.0 <= self.amplitude <= 1.0:
            raise ValueError(f"amplitude={self.amplitude} must be in [0, 1]: a rate is never negative")
        if not 0.0 < self.period_s < math.inf:
            raise ValueError(f"period_s={self.period_s} must be a finite number > 0")
        if not math.isfinite(self.phase):
            raise ValueError(f"phase={self.phase} must be a finite number of periods")

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s

    def rate_at(self, time_s: FloatArray) -> FloatArray:
        """Requests per second at each time, same shape as ``time_s``."""
        angle = 2.0 * math.pi * (time_s / self.period_s + self.phase)
        return self.rate_per_s * (1.0 + self.amplitude * np.sin(angle))

    def blocks(self, num: int, rng: np.random.Generator) -> Iterator[FloatArray]:
        peak_per_s = self.rate_per_s * (1.0 + self.amplitude)
        thinning = rng.spawn(1)[0]
        candidates = _running_sums(lambda count: rng.exponential(1.0 / peak_per_s, count))
        while num > 0:
            times_s = next(candidates)
            kept_s = times_s[thinning.random(times_s.size) * peak_per_s < self.rate_at(times_s)][:num]
            num -= kept_s.size
            yield kept_s


_PROCESSES: dict[str, Callable[..., ArrivalProcess]] = {
    "poisson": Poisson,
    "gamma": Gamma,
    "uniform": Uniform,
    "all_at_once": AllAtOnce,
    "mmpp": Mmpp,
    "diurnal": Diurnal,
}


def make_process(name: str, **parameters: object) -> ArrivalProcess:
    """The process of a name, one of ``PROCESSES``, ``"mmpp"`` or ``"diurnal"``, for configuration files.

    Raises:
        ValueError: unknown name, with the nearest ones; a parameter that the process does not have, or lacks.
    """
    if name not in _PROCESSES:
        raise unknown_name("arrival process", name, _PROCESSES)
    try:
        return _PROCESSES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"arrival process {name!r} and {parameters}: {error}") from error


def arrivals(
    process: str | ArrivalProcess,
    num: int,
    rng: np.random.Generator,
    *,
    rate_per_s: float = math.inf,
    cv: float = 1.0,
) -> FloatArray:
    """Arrival times of an open-loop workload.

    Args:
        process: ``"poisson"`` (independent exponential gaps), ``"gamma"`` (gamma gaps with coefficient of
            variation ``cv``), ``"uniform"`` (equal gaps), ``"all_at_once"``, or a process such as ``Mmpp``,
            which holds its own parameters.
        num: of requests.
        rng: for the gaps.
        rate_per_s: mean requests per second, for a process given by name; not used by ``all_at_once``.
        cv: standard deviation of the gaps / their mean; only for ``"gamma"``.

    Returns:
        float64 [num], seconds, rising; the first gap starts at 0.

    Raises:
        ValueError: unknown process, with the nearest ones; a rate or ``cv`` that is not positive and finite;
            a negative ``num``; a ``cv`` for a process that has none.
    """
    law = _named(process, rate_per_s, cv) if isinstance(process, str) else process
    _check_num(num)
    return np.concatenate([np.empty(0), *law.blocks(num, rng)])


def arrival_chunks(
    process: ArrivalProcess, num: int, rng: np.random.Generator, *, size: int = BLOCK
) -> Iterator[FloatArray]:
    """The times of :func:`arrivals` with the same ``rng``, ``size`` at a time, in bounded memory.

    Raises:
        ValueError: a negative ``num`` or ``size`` < 1.
    """
    _check_num(num)
    return regroup(
        process.blocks(num, rng), size, np.concatenate, lambda times_s, start, stop: times_s[start:stop]
    )


def regroup(
    blocks: Iterator[Part],
    size: int,
    concat: Callable[[Sequence[Part]], Part],
    cut: Callable[[Part, int, int], Part],
) -> Iterator[Part]:
    """The items of ``blocks``, ``size`` at a time; only the last part may be shorter, and none is empty.

    Args:
        blocks: parts of any length.
        size: >= 1.
        concat: joins parts.
        cut: ``cut(part, start, stop)`` is a range of a part.

    Raises:
        ValueError: ``size`` < 1.
    """
    if size < 1:
        raise ValueError(f"size={size} of a chunk must be >= 1")
    return _regrouped(blocks, size, concat, cut)


def _regrouped(
    blocks: Iterator[Part],
    size: int,
    concat: Callable[[Sequence[Part]], Part],
    cut: Callable[[Part, int, int], Part],
) -> Iterator[Part]:
    held: list[Part] = []
    num_held = 0
    for block in blocks:
        held.append(block)
        num_held += len(block)
        if num_held < size:
            continue
        joined = held[0] if len(held) == 1 else concat(held)
        num_whole = num_held - num_held % size
        for start in range(0, num_whole, size):
            yield cut(joined, start, start + size)
        held, num_held = [cut(joined, num_whole, num_held)], num_held - num_whole
    if num_held:
        yield concat(held)


def _named(name: str, rate_per_s: float, cv: float) -> ArrivalProcess:
    if name not in PROCESSES:
        raise unknown_name("arrival process", name, PROCESSES)
    if name == "all_at_once":
        return AllAtOnce()
    _check_rate(rate_per_s)
    if not 0.0 < cv < math.inf or (name != "gamma" and cv != 1.0):
        raise ValueError(f"cv={cv} must be a finite number > 0, and only the process 'gamma' takes one")
    return Gamma(rate_per_s, cv) if name == "gamma" else make_process(name, rate_per_s=rate_per_s)


def _running_sums(draw: Callable[[int], FloatArray], num: int | None = None) -> Iterator[FloatArray]:
    """Running sums of ``num`` drawn gaps, for ever if ``None``, in blocks of ``BLOCK``."""
    total, num_left = 0.0, num
    while num_left is None or num_left > 0:
        count = BLOCK if num_left is None else min(BLOCK, num_left)
        sums = np.cumsum(np.concatenate(([total], draw(count))))[1:]
        total = float(sums[-1])
        num_left = None if num_left is None else num_left - count
        yield sums


def _check_rate(rate_per_s: float) -> None:
    if not 0.0 < rate_per_s < math.inf:
        raise ValueError(
            f"rate_per_s={rate_per_s} must be a finite number > 0; for no gaps use 'all_at_once'"
        )


def _check_num(num: int) -> None:
    if num < 0:
        raise ValueError(f"num={num} must be >= 0")
