"""Numbers from a trace: latency, throughput, goodput, acceptance, and where the time went.

Everything here reads the two tables of ``specdec.trace``, so it serves measured and simulated runs alike. A
table without rows is an error; a ratio that has no denominator (the acceptance rate of a run that drafted
nothing, the time per output token of a one-token answer) is ``nan``.

>>> latency_table(read_requests(directory))
>>> tokens_per_step(decode_rows(read_steps(directory)))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

LATENCIES = ("queue_s", "ttft_s", "tpot_s", "e2e_s")
PHASES = ("draft", "verify", "sample", "overhead")
_QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A service-level objective: a request is good if it meets both limits.

    Args:
        ttft_s: most seconds from arrival to the first token.
        tpot_s: most seconds per output token after the first, averaged over the request.

    Raises:
        ValueError: a limit that is not positive.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0 seconds (inf is no limit)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def latencies(requests: pl.DataFrame) -> pl.DataFrame:
    """Latencies of each request, in seconds.

    Returns:
        ``request_id``, ``task``, ``num_generated``, ``queue_s`` (arrival to first scheduled), ``ttft_s``
        (arrival to first token), ``tpot_s`` ((finish − first token) / (tokens − 1), ``nan`` for one token)
        and ``e2e_s``.

    Raises:
        ValueError: the table has no rows.
    """
    _check_rows(requests, "requests")
    # A null, not 0/0, for one token: its decode time is clock noise and x/0 would be infinite.
    later_tokens = pl.when(pl.col("num_generated") > 1).then(pl.col("num_generated") - 1)
    decode_s = pl.col("finish_s") - pl.col("first_token_s")
    return requests.select(
        "request_id",
        "task",
        "num_generated",
        queue_s=pl.col("first_scheduled_s") - pl.col("arrival_s"),
        ttft_s=pl.col("first_token_s") - pl.col("arrival_s"),
        tpot_s=(decode_s / later_tokens).fill_null(math.nan),
        e2e_s=pl.col("finish_s") - pl.col("arrival_s"),
    )


def percentiles(values: ArrayLike) -> dict[str, float]:
    """``mean``, ``p50``, ``p90``, ``p95`` and ``p99`` of the values that are not ``nan``; all ``nan`` if none
    is.

    Percentiles interpolate linearly between order statistics.

    Raises:
        ValueError: ``values`` is empty.
    """
    array = np.asarray(values, np.float64).ravel()
    if array.size == 0:
        raise ValueError("no values to take percentiles of: did any request finish?")
    known = array[~np.isnan(array)]
    if known.size == 0:
        return dict.fromkeys(("mean", *_QUANTILES), math.nan)
    quantiles = np.quantile(known, list(_QUANTILES.values()))
    return {"mean": float(known.mean())} | dict(zip(_QUANTILES, quantiles.tolist(), strict=True))


def latency_table(requests: pl.DataFrame) -> dict[str, dict[str, float]]:
    """The :func:`percentiles` of every latency, by its name in :data:`LATENCIES`."""
    table = latencies(requests)
    return {name: percentiles(table[name].to_numpy()) for name in LATENCIES}


def duration_s(requests: pl.DataFrame) -> float:
    """Seconds from the first arrival to the last finish."""
    _check_rows(requests, "requests")
    return float((requests["finish_s"].to_numpy()).max() - (requests["arrival_s"].to_numpy()).min())


def throughput(requests: pl.DataFrame) -> dict[str, float]:
    """``tokens_per_s`` (generated), ``requests_per_s`` and ``duration_s`` of the whole run."""
    seconds = duration_s(requests)
    return {
        "tokens_per_s": _ratio(float(requests["num_generated"].sum()), seconds),
        "requests_per_s": _ratio(float(requests.height), seconds),
        "duration_s": seconds,
    }


def goodput(requests: pl.DataFrame, slo: Slo) -> dict[str, float]:
    """What met the objective: ``share`` of the requests, and ``requests_per_s`` and ``tokens_per_s`` of
    those.

    A one-token answer has no time per output token and is judged by its first token alone.
    """
    table = latencies(requests)
    tpot_s = table["tpot_s"].to_numpy()
    good = (table["ttft_s"].to_numpy() <= slo.ttft_s) & (np.isnan(tpot_s) | (tpot_s <= slo.tpot_s))
    seconds = duration_s(requests)
    return {
        "share": float(good.mean()),
        "requests_per_s": _ratio(float(good.sum()), seconds),
        "tokens_per_s": _ratio(float(table["num_generated"].to_numpy()[good].sum()), seconds),
    }


def decode_rows(steps: pl.DataFrame) -> pl.DataFrame:
    """One row for each verification: a step of a request that computed one known token and emitted.

    Plain decoding counts as a verification of no drafts. May be empty, if every request generated one token.

    Returns:
        ``step``, ``request_id``, ``num_drafted``, ``draft_depth`` (less than ``num_drafted`` in trees),
        ``num_accepted``, ``num_emitted``. Filter by ``request_id`` for the figures of a task.

    Raises:
        ValueError: the table has no rows.
    """
    _check_rows(steps, "steps")
    lists = ["request_ids", "num_new", "emits", "num_drafted", "draft_depths", "row_accepted", "row_emitted"]
    rows = steps.filter(pl.col("num_rows") > 0).select("step", *lists).explode(lists)
    return rows.filter(pl.col("emits") & (pl.col("num_new") == 1)).select(
        "step",
        "num_drafted",
        request_id="request_ids",
        draft_depth="draft_depths",
        num_accepted="row_accepted",
        num_emitted="row_emitted",
    )


def tokens_per_step(rows: pl.DataFrame) -> float:
    """τ: tokens per verification, the bonus token included; 1 for plain decoding.

    Args:
        rows: of :func:`decode_rows`.
    """
    return _ratio(float(rows["num_emitted"].sum()), float(rows.height))


def acceptance_rate(rows: pl.DataFrame) -> float:
    """α̂ = accepted / (accepted + rejected), where a verification rejects at most one token.

    Tokens drafted behind the first rejection were never judged, so accepted / drafted would fall with the
    draft length although nothing about the draft changed.

    Args:
        rows: of :func:`decode_rows`.
    """
    accepted, judged = judged_drafts(rows)
    return _ratio(float(accepted.sum()), float(judged.sum()))


def judged_drafts(rows: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Accepted and judged (accepted or first rejected) draft tokens of each verification, int64 [N] each.

    The arguments of :func:`bootstrap_ratio` for an interval around :func:`acceptance_rate`.
    """
    accepted = rows["num_accepted"].to_numpy()
    return accepted, accepted + (accepted < rows["draft_depth"].to_numpy())


def acceptance_by_position(rows: pl.DataFrame) -> pl.DataFrame:
    """How far drafts survive.

    Args:
        rows: of :func:`decode_rows`.

    Returns:
        One row per draft position j = 1, 2, …, which in trees is a depth: ``position``, ``num_reached``
        (verifications that drafted a token there and accepted all before it), ``num_accepted``,
        ``conditional_rate`` c_j, and ``survival`` Π_{i≤j} c_i, the chance that a draft of at least j tokens is
        accepted up to j. Without drafts there are no rows.
    """
    drafted, accepted = rows["draft_depth"].to_numpy(), rows["num_accepted"].to_numpy()
    positions = np.arange(1, int(drafted.max(initial=0)) + 1)
    reached = [int(((drafted >= j) & (accepted >= j - 1)).sum()) for j in positions]
    kept = [int((accepted >= j).sum()) for j in positions]
    rates = [_ratio(float(k), float(n)) for k, n in zip(kept, reached, strict=True)]
    return pl.DataFrame(
        {
            "position": positions,
            "num_reached": np.array(reached, np.int64),
            "num_accepted": np.array(kept, np.int64),
            "conditional_rate": np.array(rates, np.float64),
            "survival": np.cumprod(np.array(rates, np.float64)),
        }
    )


def phase_times(steps: pl.DataFrame) -> pl.DataFrame:
    """Where the time went.

    Returns:
        One row for each of :data:`PHASES` and ``idle`` (between the first start and the last end, but in no
        phase): ``phase``, ``total_s``, ``share`` of the whole, ``mean_s`` per step.

    Raises:
        ValueError: the table has no rows.
    """
    _check_rows(steps, "steps")
    totals = {phase: float(steps[f"{phase}_s"].sum()) for phase in PHASES}
    ends_s, starts_s = steps["end_s"].to_numpy(), steps["start_s"].to_numpy()
    # What a step's commit cost is booked in the next step, so phases may exceed the span by a hair.
    totals["idle"] = max(0.0, float(ends_s.max() - starts_s.min()) - sum(totals.values()))
    whole_s = sum(totals.values())
    return pl.DataFrame(
        {
            "phase": list(totals),
            "total_s": list(totals.values()),
            "share": [_ratio(total_s, whole_s) for total_s in totals.values()],
            "mean_s": [total_s / steps.height for total_s in totals.values()],
        }
    )


def plans_ahead(steps: pl.DataFrame) -> dict[str, int]:
    """How many plans that were made while the step before ran were ``kept``, and how many ``discarded`` because the
    outcome was another than assumed.

    Raises:
        ValueError: the table has no rows.
    """
    _check_rows(steps, "steps")
    kept = steps["kept_ahead"].drop_nulls()
    return {"kept": int(kept.sum()), "discarded": int((~kept).sum())}


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile-bootstrap interval of Σ numerators / Σ denominators, resampling the pairs (Efron 1979).

    The pairs must be independent of each other: verifications of one request are not quite, so resample
    requests where it matters.

    Args:
        numerators, denominators: [N] each.
        rng: for the resamples.
        level: of the interval, in (0, 1).
        num_resamples: >= 1.

    Raises:
        ValueError: no pairs, unequal lengths, or ``level`` or ``num_resamples`` out of range.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if above.ndim != 1 or above.shape != below.shape or above.size == 0:
        raise ValueError(
            f"numerators {above.shape} and denominators {below.shape} must be equally long, not empty"
        )
    if not 0.0 < level < 1.0 or num_resamples < 1:
        raise ValueError(f"level={level} must be in (0, 1) and num_resamples={num_resamples} >= 1")
    ratios = np.empty(num_resamples)
    for index in range(num_resamples):
        chosen = rng.integers(above.size, size=above.size)
        ratios[index] = _ratio(float(above[chosen].sum()), float(below[chosen].sum()))
    tail = (1.0 - level) / 2.0
    known = ratios[~np.isnan(ratios)]
    low, high = np.quantile(known, [tail, 1.0 - tail]).tolist() if known.size else (math.nan, math.nan)
    return Interval(estimate=_ratio(float(above.sum()), float(below.sum())), low=low, high=high)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _check_rows(table: pl.DataFrame, name: str) -> None:
    if table.height == 0:
        raise ValueError(
            f"the {name} table is empty: nothing ran, or the run ended before anything was traced"
        )
