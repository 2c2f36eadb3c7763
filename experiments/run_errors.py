"""Errors of simulated runs against the measured run of the same requests, with bootstrap intervals.

>>> found = errors(measured, [simulated], np.random.default_rng(0))
>>> found["ttft_p90"].error_pct, found["ttft_p90"].low_pct, found["ttft_p90"].high_pct
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.recorded_run import RunTimes

FloatArray = NDArray[np.float64]

LATENCIES = ("ttft", "tpot", "e2e")
FIGURES = ("mean", "p50", "p90", "p99")
LATENCY_NAMES = tuple(f"{latency}_{figure}" for latency in LATENCIES for figure in FIGURES)
THROUGHPUT, TAU = "tokens_per_s", "tau"
NAMES = (*LATENCY_NAMES, THROUGHPUT, TAU)
NUM_RESAMPLES = 400
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Error:
    """Of one statistic: measured and simulated values (seconds, tokens per second, or tokens per step), the signed
    error in per cent of the measured, and the interval of that."""

    measured: float
    simulated: float
    error_pct: float
    low_pct: float
    high_pct: float


def statistics(runs: Sequence[RunTimes]) -> dict[str, float]:
    """Each of ``NAMES``, the mean of what it is in each of ``runs``."""
    every = np.arange(runs[0].num_tokens.size)[None]
    found = {name: float(values[0]) for name, values in _resampled(runs, every).items()}
    return found | {THROUGHPUT: float(np.mean([run.tokens_per_s for run in runs]))}


def errors(
    measured: RunTimes,
    simulated: Sequence[RunTimes],
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Error]:
    """Errors, by statistic, of the mean over the ``simulated`` runs.

    A statistic is taken of each run by itself, as it was of the measured one: a high percentile of few requests is
    not that of many.

    Intervals are percentile bootstraps (Efron 1979) that resample requests, the same of both sides, as these are
    pairs: the same arrival and the same lengths. Throughput is one figure per run, so its interval resamples the
    simulations, and is a point where there is one.

    Raises:
        ValueError: runs of other numbers of requests.
    """
    count = measured.num_tokens.size
    if not simulated or any(run.num_tokens.size != count for run in simulated):
        raise ValueError(
            f"the measured run has {count} requests, the simulated ones "
            f"{[run.num_tokens.size for run in simulated]}: simulate the measured requests"
        )
    chosen = rng.integers(count, size=(num_resamples, count))
    real, ours = _resampled([measured], chosen), _resampled(simulated, chosen)
    rates = np.array([run.tokens_per_s for run in simulated])
    picked = rng.integers(rates.size, size=(num_resamples, rates.size))
    real[THROUGHPUT], ours[THROUGHPUT] = np.full(num_resamples, measured.tokens_per_s), rates[picked].mean(1)
    whole, whole_ours = statistics([measured]), statistics(simulated)
    found: dict[str, Error] = {}
    for name in NAMES:
        resampled = 100.0 * (ours[name] / real[name] - 1.0)
        low, high = np.quantile(resampled, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0]).tolist()
        error = 100.0 * (whole_ours[name] / whole[name] - 1.0)
        found[name] = Error(whole[name], whole_ours[name], error, low, high)
    return found


def summarised(errors_pct: Iterable[tuple[str, float]]) -> dict[str, float]:
    """``median`` and ``worst`` absolute errors of named statistics, and ``throughput``, the worst of that."""
    named = [(name, abs(error)) for name, error in errors_pct]
    sizes = [error for _, error in named]
    return {
        "median": float(np.median(sizes)),
        "worst": max(sizes),
        "throughput": max(error for name, error in named if name == THROUGHPUT),
    }


def _resampled(runs: Sequence[RunTimes], chosen: NDArray[np.int64]) -> dict[str, FloatArray]:
    """Each statistic but throughput of the requests ``chosen`` int64 [B, n], mean over the runs, float64 [B]."""
    found: dict[str, FloatArray] = {}
    shares = [float(figure[1:]) for figure in FIGURES[1:]]
    for latency in LATENCIES:
        values = np.stack([run.latencies[latency][chosen] for run in runs])
        rows = [values.mean(axis=2), *np.percentile(values, shares, axis=2)]
        found |= {f"{latency}_{figure}": row.mean(axis=0) for figure, row in zip(FIGURES, rows, strict=True)}
    tokens, steps = (
        np.stack([(getattr(run, name)[chosen] - 1).sum(axis=1) for run in runs])
        for name in ("num_tokens", "num_steps")
    )
    found[TAU] = (tokens / steps).mean(axis=0)
    return found
