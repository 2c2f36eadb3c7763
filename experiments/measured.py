"""What experiments read off their traced runs: seconds per token and per phase."""

from __future__ import annotations

import polars as pl

from experiments.common import Served

PHASES = ("draft_s", "verify_s", "sample_s", "overhead_s")


def seconds_per_token(served: Served) -> float:
    """Decoding seconds per token after the first, summed over requests that decode at once."""
    requests = served.requests
    decode_s = float((requests["finish_s"] - requests["first_token_s"]).sum())
    return decode_s / float((requests["num_generated"] - 1).sum())


def phases(served: Served) -> dict[str, float]:
    """Mean seconds of each phase in steps without prefill."""
    decoding = served.steps.filter(pl.col("num_prefill_rows") == 0)
    return {phase: float(decoding[phase].to_numpy().mean()) for phase in PHASES}


def mean_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """Key by key."""
    return {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
