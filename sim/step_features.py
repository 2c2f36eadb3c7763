"""What the cost of a step depends on (:class:`StepFeatures`) and what it is (:class:`StepCost`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from sim.curves import FloatArray
from specdec.scheduler import CruisePlan, StepPlan

Real = TypeVar("Real", float, FloatArray)


class StepFeatures(NamedTuple, Generic[Real]):
    """What the cost of a step depends on: whole numbers, or float64 arrays [P] of P plans.

    Attributes:
        num_tokens: positions that the target computes: prefill, decode and drafts.
        num_logits: rows of the output head.
        decode_rows: rows that decode.
        decode_tokens: their positions, 1 + drafts each.
        decode_context: sum of their cached tokens.
        prefill_tokens: prompt tokens to compute.
        prefill_pairs: query-key pairs of the prompt chunks: new · context + new · (new + 1) / 2 each.
        draft_steps: passes of the drafter after one another: the most drafts of a row.
        draft_rows: rows that draft.
        draft_tokens: drafts of all rows.
    """

    num_tokens: Real
    num_logits: Real
    decode_rows: Real
    decode_tokens: Real
    decode_context: Real
    prefill_tokens: Real
    prefill_pairs: Real
    draft_steps: Real
    draft_rows: Real
    draft_tokens: Real


class StepCost(NamedTuple, Generic[Real]):
    """Seconds of a step by phase, floats or float64 arrays [P].

    Attributes:
        draft_s: the drafter.
        verify_s: the target's pass.
        sample_s: from its logits to accepted and new tokens.
        overhead_s: the host, where the device does not hide it.
        relative_std: standard deviation of the total in shares of it, the operators' errors being independent.
    """

    draft_s: Real
    verify_s: Real
    sample_s: Real
    overhead_s: Real
    relative_std: Real

    @property
    def total_s(self) -> Real:
        return self.draft_s + self.verify_s + self.sample_s + self.overhead_s


def features(plan: StepPlan) -> StepFeatures[float]:
    """The features of one plan.

    A row with one known token that emits is decoding; everything else is prefill.
    """
    new, drafts, context, emits = plan.num_new, plan.num_drafts, plan.context, plan.emits
    # Called once per simulated step: reduce() skips the Python half of sum(), count_nonzero is quicker still.
    num_new, num_drafts = int(np.add.reduce(new)), int(np.add.reduce(drafts))
    cached, rows = int(np.add.reduce(context)), int(np.count_nonzero(emits))
    num_logits, chunk, pairs = rows + num_drafts, 0, 0.0  # a row that drafts emits
    if num_new != new.size or rows != new.size:
        prefill = (new != 1) | ~emits
        size, before = new[prefill].astype(np.float64), context[prefill].astype(np.float64)
        rows, chunk = new.size - size.size, int(np.add.reduce(size))
        cached -= int(np.add.reduce(before))
        pairs = float(size.dot(before + 0.5 * (size + 1.0)))
    steps = int(np.maximum.reduce(drafts)) if num_drafts else 0
    draft_rows = int(np.count_nonzero(drafts)) if num_drafts else 0
    tokens, row_tokens = num_new + num_drafts, rows + num_drafts
    return StepFeatures(
        tokens, num_logits, rows, row_tokens, cached, chunk, pairs, steps, draft_rows, num_drafts
    )


def cruise_features(plan: CruisePlan, decode_context: int) -> StepFeatures[float]:
    """The features of a step whose decoding rows are only counted; :func:`features` of the same step."""
    rows, k = plan.num_decodes, plan.num_drafts
    decode_tokens, draft_rows = rows * (1 + k), rows if k else 0
    tokens = logits = decode_tokens
    chunk, pairs = 0, 0.0
    for _, context, new, emits in plan.chunks:
        tokens += new
        logits += emits
        if new == 1 and emits:
            rows += 1
            decode_tokens += 1
            decode_context += context
        else:
            chunk += new
            pairs += new * (context + 0.5 * (new + 1.0))
    steps = k if draft_rows else 0
    return StepFeatures(
        tokens,
        logits,
        rows,
        decode_tokens,
        decode_context,
        chunk,
        pairs,
        steps,
        draft_rows,
        draft_rows * k,
    )


def stack_features(rows: Sequence[StepFeatures[float]]) -> StepFeatures[FloatArray]:
    """The features of P plans as one record of float64 arrays [P]."""
    return StepFeatures(*np.array(rows, np.float64).reshape(len(rows), len(StepFeatures._fields)).T)


def check_features(features: StepFeatures[FloatArray]) -> None:
    """Refuse features that no plan has.

    Raises:
        ValueError: naming the feature and its first wrong value.
    """
    tokens, logits, rows, row_tokens, context, chunk, pairs, steps, draft_rows, drafts = features
    for name, values in features._asdict().items():
        wrong = values[~((values >= 0.0) & np.isfinite(values))]
        if wrong.size:
            raise ValueError(f"{name}={wrong[0]} must be finite and >= 0: give the features of a plan")
    for name, values in (("num_tokens", tokens), ("num_logits", logits)):
        wrong = values[values != np.floor(values)]
        if wrong.size:
            raise ValueError(f"{name}={wrong[0]} must be a whole number")
    rules = (
        ((rows > 0.0) == (row_tokens > 0.0), "decode_rows and decode_tokens must both be 0 or both not"),
        (row_tokens >= rows, "decode_tokens must be >= decode_rows: each decoding row computes a token"),
        ((rows > 0.0) | (context == 0.0), "decode_context must be 0 without decode_rows"),
        ((chunk > 0.0) == (pairs > 0.0), "prefill_tokens and prefill_pairs must both be 0 or both not"),
        (pairs >= chunk, "prefill_pairs must be >= prefill_tokens: each token attends to itself"),
        ((steps > 0.0) == (drafts > 0.0), "draft_steps and draft_tokens must both be 0 or both not"),
        ((draft_rows > 0.0) == (drafts > 0.0), "draft_rows and draft_tokens must both be 0 or both not"),
        (draft_rows <= rows, "draft_rows must be <= decode_rows: only a decoding row drafts"),
        ((drafts == 0.0) | (steps >= 1.0), "draft_steps must be >= 1 where tokens are drafted"),
        (
            (steps <= drafts) & (drafts <= steps * draft_rows),
            "draft_tokens must be in [draft_steps, draft_steps · draft_rows]",
        ),
    )
    for holds, rule in rules:
        if not holds.all():
            index = int(np.argmin(holds))
            values = ", ".join(f"{name}={value[index]:g}" for name, value in features._asdict().items())
            raise ValueError(f"{rule}: got {values}")
