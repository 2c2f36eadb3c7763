"""A cost model from the steps of recorded runs, without passes of their own.

The phases of every step were timed, so each is fitted alone, by least squares with coefficients >= 0 in relative
errors: what is found can only rise with every size.

* the target: a rising piecewise linear curve of tokens, and times per row of logits, per KV entry of decoding rows,
  per query-key pair of prompt chunks and per decoding row;
* sampling: a rising curve of rows of logits;
* a drafter with a model: times per pass, per drafted token and per prompt token, which it computes one step later;
* the host: all the rest of the time until the next step's start, a + b · decoding rows; drafting without a model too.

>>> model = fit_steps([step_table(run) for run in runs], has_draft_model=False, source="this machine")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.cost_model import CostModel
from sim.curves import Curve, FloatArray, Operators
from sim.device_points import FLOOR_S, rising
from sim.recorded_run import AS_IT_WAS, Pace, RecordedRun
from sim.replica import StepTimes
from sim.step_features import StepCost, StepFeatures, stack_features

_NUM_KNOTS = 14
_OUTLIER = 3.0
"""A step that takes so many times what the others say counts as if it took that: an interrupt, not a size."""


@dataclass(frozen=True, slots=True)
class StepTable:
    """The steps of a run.

    Attributes:
        features: of P steps, float64 [P] each, with the drafts really proposed.
        draft_s, verify_s, sample_s: phases, float64 [P].
        host_s: the rest of ``seconds``.
        seconds: until the next step's start; see ``RecordedRun.seconds``.
        prefill_before: prompt tokens that the step before computed.
    """

    features: StepFeatures[FloatArray]
    draft_s: FloatArray
    verify_s: FloatArray
    sample_s: FloatArray
    host_s: FloatArray
    seconds: FloatArray
    prefill_before: FloatArray


class AtPace:
    """Step times of a machine on which steps take ``pace`` times as long."""

    def __init__(self, model: StepTimes, pace: Pace) -> None:
        self._model, self._pace = model, pace

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        draft_s, verify_s, sample_s, overhead_s, relative_std = self._model.predict_scalar(features)
        pace = self._pace.prompt if features.prefill_tokens else self._pace.decode
        return StepCost(pace * draft_s, pace * verify_s, pace * sample_s, pace * overhead_s, relative_std)


class LaggedDrafting:
    """A cost model for one simulation of an engine whose draft model computes prompt tokens one step after the target
    did, as it needs what the target found. Steps are asked for in order.

    Args:
        model: with or without a draft model.
    """

    def __init__(self, model: CostModel) -> None:
        self._model, self._prefill_s = model, model.operators.draft_prefill
        self._before = 0.0

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        """Seconds of the next step."""
        cost = self._model.predict_scalar(features)
        if self._prefill_s is None:
            return cost
        late_s, early_s = self._prefill_s([self._before, features.prefill_tokens]).tolist()
        self._before = features.prefill_tokens
        return cost._replace(draft_s=cost.draft_s - early_s + late_s)


def step_table(run: RecordedRun, pace: Pace = AS_IT_WAS) -> StepTable:
    """The steps of ``run`` as the fit takes them, with seconds as of a machine that is not ``pace`` times as slow."""
    stacked = stack_features(run.features)
    slower = np.where(stacked.prefill_tokens > 0.0, pace.prompt, pace.decode)
    phases = (run.steps[name].to_numpy() for name in ("draft_s", "verify_s", "sample_s"))
    draft_s, verify_s, sample_s = (phase_s / slower for phase_s in phases)
    seconds = run.seconds / slower
    host_s = np.maximum(seconds - draft_s - verify_s - sample_s, 0.0)
    before = np.concatenate([[0.0], stacked.prefill_tokens[:-1]])
    return StepTable(stacked, draft_s, verify_s, sample_s, host_s, seconds, before)


def fit_steps(tables: Sequence[StepTable], *, has_draft_model: bool, source: str) -> CostModel:
    """The cost model of the engine that took these steps; curves are of all layers together.

    Args:
        has_draft_model: drafting is fitted by its passes; else it counts as the host's.
        source: for reports.
    """
    table = _joined(tables)
    sizes = table.features
    knots = _knots(sizes.num_tokens)
    entries = sizes.decode_context + sizes.decode_tokens
    ramps = _ramps(sizes.num_tokens, knots)
    columns = np.column_stack([ramps, sizes.num_logits, entries, sizes.prefill_pairs, sizes.decode_rows])
    found = _target(columns, table.verify_s)
    fitted_s = np.maximum(columns @ found, FLOOR_S)
    spread = float(np.sqrt(np.mean((np.minimum(table.verify_s / fitted_s, _OUTLIER) - 1.0) ** 2)))
    heights = np.maximum(np.cumsum(found[: ramps.shape[1]]), FLOOR_S)
    logit_s, entry_s, pair_s, row_s = found[ramps.shape[1] :].tolist()
    host_s = table.host_s if has_draft_model else table.host_s + table.draft_s
    per_step = np.column_stack([np.ones_like(host_s), sizes.decode_rows])
    base_s, host_row_s = _nonnegative(per_step, host_s, fitted_s).tolist()
    draft_step, draft_prefill = _drafting(table, fitted_s, source) if has_draft_model else (None, None)
    sampled = sizes.num_logits > 0.0
    operators = Operators(
        dense=Curve(
            x=tuple(knots.tolist()), seconds=tuple(heights.tolist()), relative_std=spread, source=source
        ),
        decode_attention=_line(entry_s, entries, source),
        prefill_attention=_line(pair_s, sizes.prefill_pairs, source),
        lm_head=_line(logit_s, sizes.num_logits, source),
        sampling=rising(sizes.num_logits[sampled], table.sample_s[sampled], fitted_s[sampled], source),
        draft_step=draft_step,
        draft_prefill=draft_prefill,
        overhead_s=base_s,
        overhead_row_s=host_row_s + row_s,
    )
    return CostModel(operators, num_layers=1, metadata={"origin": f"fitted: {source}"})


def _joined(tables: Sequence[StepTable]) -> StepTable:
    if not tables:
        raise ValueError("no run to fit on: record at least one")
    columns = [np.concatenate(parts) for parts in zip(*(table.features for table in tables), strict=True)]
    rest = (
        np.concatenate([getattr(table, name) for table in tables])
        for name in ("draft_s", "verify_s", "sample_s", "host_s", "seconds", "prefill_before")
    )
    return StepTable(StepFeatures(*columns), *rest)


def _drafting(table: StepTable, scale_s: FloatArray, source: str) -> tuple[Curve, Curve]:
    """Of one pass by its rows, and of prompt tokens."""
    sizes = table.features
    columns = np.column_stack([sizes.draft_steps, sizes.draft_tokens, table.prefill_before])
    pass_s, token_s, prompt_s = _nonnegative(columns, table.draft_s, scale_s).tolist()
    most = max(2.0, float(sizes.draft_rows.max()))
    heights = (max(pass_s + token_s, FLOOR_S), max(pass_s + token_s * most, FLOOR_S))
    step = Curve(x=(1.0, most), seconds=heights, relative_std=0.0, source=source)
    return step, _line(prompt_s, sizes.prefill_tokens, source)


def _nonnegative(columns: FloatArray, seconds: FloatArray, scale_s: FloatArray) -> FloatArray:
    """Coefficients >= 0, float64 [C], of columns [P, C], nearest to ``seconds`` [P] in shares of ``scale_s`` [P]."""
    # Here, because it takes longer to import than everything else.
    from scipy.optimize import nnls  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    weighted = columns / scale_s[:, None]
    units = np.maximum(weighted.max(axis=0), FLOOR_S)  # pairs and rows differ by orders of magnitude
    solve: Any = nnls  # pyright: ignore[reportUnknownVariableType]
    return np.asarray(solve(weighted / units, seconds / scale_s)[0] / units, np.float64)


def _target(columns: FloatArray, verify_s: FloatArray) -> FloatArray:
    """:func:`_nonnegative` in shares of what is fitted: shares of the measured favour steps that were quick by
    chance."""
    found = _nonnegative(columns, verify_s, verify_s)
    fitted_s = np.maximum(columns @ found, FLOOR_S)
    return _nonnegative(columns, np.minimum(verify_s, _OUTLIER * fitted_s), fitted_s)


def _knots(tokens: FloatArray) -> FloatArray:
    """Numbers of tokens at which the curve may bend, rising, at least two."""
    low, high = float(tokens.min()), float(max(tokens.max(), tokens.min() + 1.0))
    return np.unique(np.round(np.geomspace(low, high, _NUM_KNOTS)))


def _ramps(tokens: FloatArray, knots: FloatArray) -> FloatArray:
    """One, and for each pair of knots the share of the way between them, float64 [P, knots]."""
    shares = (tokens[:, None] - knots[:-1]) / np.diff(knots)
    return np.column_stack([np.ones_like(tokens), np.clip(shares, 0.0, 1.0)])


def _line(slope_s: float, sizes: FloatArray, source: str) -> Curve:
    """``slope_s`` seconds per unit, over the range of ``sizes``."""
    x = (1.0, max(2.0, float(sizes.max(initial=0.0))))
    seconds = tuple(max(slope_s * size, FLOOR_S) for size in x)
    return Curve(x=x, seconds=seconds, relative_std=0.0, source=source)
