"""A replica under a steady load, in closed form: how many rows decode at once, how fast, and up to which load.

Requests arrive at rate λ, each with a prompt that takes p seconds beside the decoding rows and with O output tokens.
With B rows decoding, E tokens per row and step, and steps of s(B) seconds, a request takes O · s(B) / (B · E) + p
seconds of the engine, so that

    λ(B) = 1 / (O · s(B) / (B · E) + p(B))        TPOT = B / (λ · O)   (Little's law)

Read backwards: the batch that a load leads to. The prompts wait for each other as in an M/G/1 queue. All latencies are
means: bursts and percentiles need a simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from sim.cost_model import CostModel, StepFeatures
from sim.curves import FloatArray
from sim.speculative_step import PLAIN, Drafts, step_seconds

_POINTS, _LOADS = 40, 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What the requests of a workload are like.

    Attributes:
        prompt, output: mean tokens.
        context: mean cached tokens of a decoding row: long answers count more, as they decode for longer.
        prompt_pairs: mean query-key pairs of a prompt.
        prompt_cv2: squared coefficient of variation of the prompts.
    """

    prompt: float
    output: float
    context: float
    prompt_pairs: float
    prompt_cv2: float = 0.0

    @classmethod
    def of(cls, prompts: ArrayLike, outputs: ArrayLike) -> Self:
        """Of a sample of requests.

        Raises:
            ValueError: no requests, or one without tokens.
        """
        p, o = np.asarray(prompts, np.float64), np.asarray(outputs, np.float64)
        if p.size == 0 or p.shape != o.shape or p.min() < 1.0 or o.min() < 1.0:
            raise ValueError(
                f"{p.size} prompts and {o.size} outputs: give as many of both, each of >= 1 token"
            )
        return cls(
            prompt=float(p.mean()),
            output=float(o.mean()),
            context=float((p * o + 0.5 * o * o).sum() / o.sum()),
            prompt_pairs=float((0.5 * p * (p + 1.0)).mean()),
            prompt_cv2=float(p.var() / p.mean() ** 2),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a load leads to: rows that decode, and mean seconds. ``inf`` above the capacity."""

    rate_per_s: float
    batch: float
    tpot_s: float
    ttft_s: float

    @property
    def is_served(self) -> bool:
        return math.isfinite(self.tpot_s)


class MeanField:
    """One replica.

    Args:
        model: seconds of its steps.
        mix: its requests.
        max_rows: most requests at once: the scheduler's limit, or what the KV memory holds.
        drafts, tokens_per_step: what each row drafts, and the expected tokens of a row and step.
        draft_cost_ratio: see ``step_seconds``.

    Attributes:
        model, mix: as given.
        capacity_per_s: the load at which all rows are taken.
    """

    def __init__(
        self,
        model: CostModel,
        mix: Mix,
        max_rows: float,
        drafts: Drafts = PLAIN,
        tokens_per_step: float = 1.0,
        *,
        draft_cost_ratio: float | None = None,
    ) -> None:
        if max_rows < 1.0 or not tokens_per_step >= 1.0:
            raise ValueError(f"max_rows={max_rows} and tokens_per_step={tokens_per_step} must be >= 1")
        self.mix, self.model = mix, model
        self._given = max_rows, drafts, draft_cost_ratio
        rows = np.unique(np.round(np.geomspace(1.0, math.floor(max_rows), _POINTS)))
        step_s = step_seconds(model, rows, mix.context, drafts, draft_cost_ratio=draft_cost_ratio)
        self._rows, self._step_s = rows, step_s
        self._prefill_s = _prefill_seconds(model, rows, mix, drafts)
        rates = 1.0 / (mix.output * step_s / (rows * tokens_per_step) + self._prefill_s)
        # More rows than are best for throughput serve no more.
        self._rates = np.maximum.accumulate(rates)
        self.capacity_per_s = float(self._rates[-1])
        self._tokens = tokens_per_step

    def with_model(self, model: CostModel, tokens_per_step: float | None = None) -> MeanField:
        """The same replica with other seconds, and perhaps other luck with drafts."""
        max_rows, drafts, ratio = self._given
        tokens = self._tokens if tokens_per_step is None else tokens_per_step
        return MeanField(model, self.mix, max_rows, drafts, tokens, draft_cost_ratio=ratio)

    def at(self, rate_per_s: float) -> Point:
        """Where ``rate_per_s`` requests a second lead to."""
        if not 0.0 < rate_per_s < math.inf:
            raise ValueError(f"rate_per_s={rate_per_s} must be finite and > 0")
        if rate_per_s > self.capacity_per_s:
            return Point(rate_per_s=rate_per_s, batch=math.inf, tpot_s=math.inf, ttft_s=math.inf)
        if rate_per_s <= self._rates[0]:
            # Fewer than one row on average: a request decodes alone, between the others' prompts.
            alone_s, prefill_s = float(self._step_s[0]), float(self._prefill_s[0])
            tpot_s = alone_s / self._tokens / max(1.0 - rate_per_s * prefill_s, 1e-9)
            batch = rate_per_s * self.mix.output * tpot_s
        else:
            batch = float(np.interp(rate_per_s, self._rates, self._rows))
            tpot_s = batch / (rate_per_s * self.mix.output)
        step_s = float(np.interp(batch, self._rows, self._step_s))
        prefill_s = float(np.interp(batch, self._rows, self._prefill_s))
        busy = min(rate_per_s * prefill_s, 1.0 - 1e-9)
        waiting_s = 0.5 * busy * prefill_s * (1.0 + self.mix.prompt_cv2) / (1.0 - busy)
        return Point(
            rate_per_s=rate_per_s, batch=batch, tpot_s=tpot_s, ttft_s=waiting_s + prefill_s + 1.5 * step_s
        )

    def capacity_within(self, ttft_s: float = math.inf, tpot_s: float = math.inf) -> float:
        """The highest load with mean latencies within these limits; 0 if there is none."""

        def holds(rate_per_s: float) -> bool:
            point = self.at(rate_per_s)
            return point.ttft_s <= ttft_s and point.tpot_s <= tpot_s

        low, high = self.capacity_per_s * 1e-4, self.capacity_per_s
        if holds(high):
            return high
        if not holds(low):
            return 0.0
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low


def break_even_rate(plain: MeanField, speculative: MeanField) -> float:
    """The lowest load at which a token takes at least as long with speculation as without.

    Returns:
        requests per second; 0 if speculation never pays, ``inf`` if it does up to where plain decoding is full.
    """
    loads = plain.capacity_per_s * np.linspace(0.004, 0.999, _LOADS)
    slower = [speculative.at(float(load)).tpot_s >= plain.at(float(load)).tpot_s for load in loads]
    if not any(slower):
        return math.inf
    first = slower.index(True)
    return 0.0 if first == 0 else float(0.5 * (loads[first - 1] + loads[first]))


def _prefill_seconds(model: CostModel, rows: FloatArray, mix: Mix, drafts: Drafts) -> FloatArray:
    """What one mean prompt adds to the steps of so many decoding rows, the drafter's share included."""
    nothing, cached = np.zeros_like(rows), rows * mix.context
    tokens = rows * (
        1 + drafts.nodes
    )  # beside a chunk, drafts no longer ride for free on a read of the weights
    chunk = np.full_like(rows, max(1.0, round(mix.prompt)))
    pairs = np.maximum(np.full_like(rows, mix.prompt_pairs), chunk)
    alone = model.predict(StepFeatures(tokens, tokens, rows, tokens, cached, *[nothing] * 5))
    both = model.predict(
        StepFeatures(tokens + chunk, tokens + 1.0, rows, tokens, cached, chunk, pairs, *[nothing] * 3)
    )
    return np.maximum(both.total_s - alone.total_s, 1e-9)
