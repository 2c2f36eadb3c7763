"""A cost model from timed passes of the target on one device, with its error on sizes that the fit did not see.

Passes are timed whole, so an operator's seconds are differences: a pass with logits less the same without, a pass
over contexts less that of as many single tokens without any, both of the same round. Such differences have the noise
of whole passes, so curves are isotonic in seconds (not in their logarithms), each size weighted by the inverse square
of its pass. The forms are those that :class:`sim.curves.Operators` composes:

* ``dense``: a rising curve of tokens; ``lm_head``: of rows of logits; ``sampling`` likewise;
* decoding rows: the longer of a rising curve of KV entries, at least c per row, and of a single row's reading;
* verification: the longer of that and of a time per query-key pair; trees are not fitted, they are judged by that;
* prompt chunks: the longer of a rising curve of query-key pairs + c · tokens, and of reading the KV cache once;
* the host: a + b · rows.

>>> fit = fit_device(read_passes(rows), read_host(rows), num_layers=30, source="this machine")
>>> fit.operators, fit.held_out["dense"]["median"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from sim.cost_model import CostModel
from sim.curves import Curve, FloatArray, Operators
from sim.device_points import (
    FLOOR_S,
    KINDS,
    MIXED,
    TREE,
    Mask,
    Points,
    fit_chunks,
    fit_pair_s,
    fit_rows,
    points_of,
    read_passes,
    rising,
)
from sim.profiles.fitting import HeldOut, hold_out
from sim.step_features import StepFeatures, stack_features

__all__ = [
    "KINDS",
    "MIXED",
    "DeviceFit",
    "achieved_rates",
    "fit_device",
    "points_of",
    "read_passes",
    "rising",
]

Fitted = Callable[[Mask], FloatArray]

NOTICEABLE = 0.2
"""An operator's own error is judged where it takes at least this share of its pass: elsewhere it is all noise."""
_OPERATORS = {
    "dense": "dense",
    "head": "lm_head",
    "decode": "decode_attention",
    "verify": "verification",
    "prefill": "prefill_attention",
}


@dataclass(frozen=True)
class DeviceFit:
    """What was fitted and how well.

    Attributes:
        operators: for ``CostModel``.
        held_out: operator → ``spread`` (half the range from the tenth to the ninetieth percentile of the repeats, in
            shares of the median; the median over sizes) and, where enough sizes were measured, ``pass_median``,
            ``pass_p90``, ``pass_bias``, ``pass_num_points`` (of whole passes, with the operator's sizes left out) and,
            of the passes of which the operator takes a noticeable share, its own ``median``, ``p90``, ``bias``,
            ``num_points``.
        table: a row per size: operator, rows, tokens, context, measured_s, low_s, high_s (what the operator takes in
            a whole pass), fitted_s, pass_s, fitted_pass_s.
        whole: a row per random whole step, never fitted: measured_s, low_s, high_s, fitted_s.
        whole_error: median, p90, bias, num_points over those; ``None`` without any.
    """

    operators: Operators
    held_out: dict[str, dict[str, float | None]]
    table: list[dict[str, Any]]
    whole: list[dict[str, float]]
    whole_error: dict[str, float] | None


def fit_device(
    passes: pl.DataFrame,
    host: pl.DataFrame,
    *,
    num_layers: int,
    source: str,
    mixed: Sequence[Mapping[str, Any]] = (),
    drafts: Sequence[Mapping[str, Any]] = (),
    is_asynchronous: bool = False,
) -> DeviceFit:
    """Fit all operators and judge them.

    Args:
        passes: see :func:`read_passes`.
        host: rows, sample_s, overhead_s, verify_s, mean_context of plain decoding steps of an engine; each a median
            of a short run.
        num_layers: decoder layers of the target.
        source: for reports.
        mixed: whole steps that nothing is fitted to: ``index``, ``seconds`` and the fields of ``StepFeatures``.
        drafts: what drafting took; see :func:`fit_drafts`.
        is_asynchronous: the device works on while the host goes ahead, so that of the pass and the sampling of an
            engine's step only the sum is known.

    Raises:
        ValueError: a kind of pass, or the host, was not measured.
    """
    if host.is_empty():
        raise ValueError("no steps of an engine were measured: raise the budget")
    fitting = _Fitting({kind: points_of(passes, kind) for kind in KINDS}, num_layers, source)
    fits = {kind: fitting.added(kind) for kind in KINDS}
    held_out = {_OPERATORS[kind]: fitting.errors(kind) for kind in KINDS}
    trees = points_of(passes, TREE) if TREE in passes["kind"].unique() else None
    if trees is not None:
        held_out["tree_verification"] = fitting.tree_errors(trees)
    operators = fitting.operators()
    operators = _with_honest_spread(operators, held_out)
    operators = _with_host(operators, host, num_layers, is_asynchronous, source)
    operators = replace(operators, **fit_drafts(drafts, source))
    table = [
        row for kind in KINDS for row in fitting.rows(_OPERATORS[kind], fitting.points[kind], fits[kind])
    ]
    if trees is not None:
        table += fitting.rows("tree_verification", trees, fitting.verification(trees))
    whole = _whole_steps(operators, num_layers, mixed)
    return DeviceFit(operators, held_out, table, whole, whole_error(whole))


class _Fitting:
    """Fits of each kind to all of its points or to some."""

    def __init__(self, points: Mapping[str, Points], num_layers: int, source: str) -> None:
        self.points, self._num_layers, self._source = points, num_layers, source
        self._decode = fit_rows(points["decode"], num_layers, source)
        self._prefill = fit_chunks(points["prefill"], num_layers, source)
        self._pair_s = fit_pair_s(points["verify"], self._decode, num_layers)

    def operators(self) -> Operators:
        dense, head = self.points["dense"], self.points["head"]
        layer_s = dense.pass_s / self._num_layers
        return Operators(
            dense=rising(dense.totals, layer_s, layer_s, self._source),
            lm_head=rising(head.totals, head.added_s, head.pass_s, self._source),
            sampling=Curve(x=(1.0,), seconds=(FLOOR_S,), relative_std=0.0, source=self._source),
            decode_attention=self._decode.curve,
            decode_row_entries=self._decode.row_entries,
            decode_context_s=self._decode.context_s,
            verify_pair_s=self._pair_s,
            prefill_attention=self._prefill.curve,
            prefill_token_pairs=self._prefill.token_pairs,
            prefill_context_s=self._prefill.context_s,
        )

    def added(self, kind: str, kept: Mask | None = None) -> Fitted:
        """From a mask to what the operator takes in these passes, fitted to the points ``kept``."""
        points = self.points[kind]
        every = np.ones(points.rows.shape, np.bool_)
        some = points.where(every if kept is None else kept)
        layers, source = self._num_layers, self._source
        if kind in ("dense", "head"):
            curve = rising(some.totals, some.added_s, some.pass_s, source)
            return lambda left: curve(points.totals[left])
        if kind == "decode":
            decode = fit_rows(some, layers, source)
            return lambda left: layers * decode(points.rows[left], points.entries[left])
        if kind == "verify":
            return self.verification(points, fit_pair_s(some, self._decode, layers))
        prefill = fit_chunks(some, layers, source)
        return lambda left: layers * prefill(points.tokens[left], points.pairs[left])

    def verification(self, points: Points, pair_s: float | None = None) -> Fitted:
        """What verification takes in passes ``points``, with the fitted seconds of a pair unless others are given."""
        a_pair_s = self._pair_s if pair_s is None else pair_s

        def seconds(left: Mask) -> FloatArray:
            reading_s = self._decode(points.rows[left], points.entries[left])
            return self._num_layers * np.maximum(reading_s, a_pair_s * points.verify_pairs[left])

        return seconds

    def tree_errors(self, points: Points) -> dict[str, float | None]:
        """Of passes over trees, as :meth:`errors` has them; none of them is fitted."""
        every = np.ones(points.rows.shape, np.bool_)
        fitted = self.verification(points)(every)
        before_s = points.pass_s - points.added_s
        result: dict[str, float | None] = {"spread": self._spread(points)}
        whole = HeldOut.of(np.maximum(before_s + fitted, FLOOR_S), points.pass_s)
        result |= {f"pass_{name}": value for name, value in asdict(whole).items()}
        large = points.added_s >= NOTICEABLE * points.pass_s
        if np.count_nonzero(large) >= 3:
            result |= asdict(HeldOut.of(np.maximum(fitted[large], FLOOR_S), points.added_s[large]))
        return result

    def errors(self, kind: str) -> dict[str, float | None]:
        """Held-out errors and the spread of the repeats; see :class:`DeviceFit`."""
        points = self.points[kind]
        groups = points.rows if kind == "decode" else points.tokens
        if kind in ("dense", "head"):
            groups = points.totals
        groups = groups.astype(np.int64)
        before_s = points.pass_s - points.added_s

        def whole(kept: Mask) -> Fitted:
            found = self.added(kind, kept)
            return lambda left: np.maximum(before_s[left] + found(left), FLOOR_S)

        result: dict[str, float | None] = {"spread": self._spread(points)}
        if np.unique(groups).size >= 3:
            error = hold_out(whole, groups, points.pass_s)
            result |= {f"pass_{name}": value for name, value in asdict(error).items()}
        large = points.added_s >= NOTICEABLE * points.pass_s
        if np.unique(groups[large]).size >= 3:
            result |= asdict(self._own_error(kind, groups, large))
        return result

    def _own_error(self, kind: str, groups: NDArray[np.int64], large: Mask) -> HeldOut:
        """Of the operator alone, where it is noticeable."""

        def fit(kept: Mask) -> Fitted:
            gone = np.setdiff1d(groups[large][~kept], groups[large][kept])
            found = self.added(kind, ~np.isin(groups, gone))

            def seconds(left: Mask) -> FloatArray:
                mask = np.zeros(large.shape, np.bool_)
                mask[np.flatnonzero(large)[left]] = True
                return np.maximum(found(mask), FLOOR_S)

            return seconds

        return hold_out(fit, groups[large], self.points[kind].added_s[large])

    def _spread(self, points: Points) -> float:
        return float(np.median((points.high_s - points.low_s) / (2.0 * points.pass_s)))

    def rows(self, operator: str, points: Points, fitted: Fitted) -> list[dict[str, Any]]:
        seconds = fitted(np.ones(points.rows.shape, np.bool_))
        before_s = points.pass_s - points.added_s
        columns: dict[str, ArrayLike] = {
            "rows": points.rows,
            "tokens": points.tokens,
            "context": points.context,
            "measured_s": points.added_s,
            "low_s": points.low_s - before_s,
            "high_s": points.high_s - before_s,
            "fitted_s": seconds,
            "pass_s": points.pass_s,
            "fitted_pass_s": before_s + seconds,
        }
        values = np.array(list(columns.values()), np.float64).T.tolist()
        return [{"operator": operator, **dict(zip(columns, row, strict=True))} for row in values]


def _with_honest_spread(
    operators: Operators, held_out: Mapping[str, Mapping[str, float | None]]
) -> Operators:
    """The curves with the error on unseen sizes as their spread, where that is larger than the residual."""
    curves: dict[str, Curve] = {}
    for name, curve in operators.curves():
        p90 = held_out.get(name, {}).get("p90")
        if p90 is not None:
            curves[name] = replace(curve, relative_std=max(curve.relative_std, p90 / 1.645))
    return replace(operators, **curves)


def _with_host(
    operators: Operators, host: pl.DataFrame, num_layers: int, is_asynchronous: bool, source: str
) -> Operators:
    """Sampling by rows of logits, and the host by rows."""
    columns = ("sample_s", "overhead_s", "verify_s", "mean_context")
    medians = host.group_by("rows").agg(pl.col(*columns).median()).sort("rows")
    rows, sample_s, overhead_s, verify_s, context = (
        medians[name].to_numpy().astype(np.float64) for name in ("rows", *columns)
    )
    if is_asynchronous:
        steps = [
            StepFeatures(n, n, n, n, n * c, 0.0, 0.0, 0.0, 0.0, 0.0)
            for n, c in zip(rows.tolist(), context.tolist(), strict=True)
        ]
        model = CostModel(operators, num_layers=num_layers)
        sample_s = sample_s + verify_s - model.predict(stack_features(steps)).verify_s
    positive = np.maximum(sample_s, FLOOR_S)
    row_s, base_s = 0.0, float(np.median(overhead_s))
    if rows.size > 1:
        row_s = max(0.0, float(np.polyfit(rows, overhead_s, 1, w=1.0 / np.maximum(overhead_s, FLOOR_S))[0]))
        base_s = max(0.0, float(np.median(overhead_s - row_s * rows)))
    fitted = base_s + row_s * rows
    # Robust, as one interrupt can take longer than all else that the host does.
    std = 1.4826 * float(np.median(np.abs(overhead_s / np.maximum(fitted, FLOOR_S) - 1.0)))
    return replace(
        operators,
        sampling=rising(rows, positive, positive, source),
        overhead_s=base_s,
        overhead_row_s=row_s,
        overhead_relative_std=std,
    )


def fit_drafts(drafts: Sequence[Mapping[str, Any]], source: str) -> dict[str, Any]:
    """``draft_step`` and ``draft_prefill`` of a drafter that runs a model, or ``draft_row_s`` of another.

    Args:
        drafts: of each short run ``rows``, ``draft_s`` of a proposal, ``levels`` (its passes after one another) and
            ``is_model``; and for a draft model's passes over prompts ``prompt_tokens`` and ``seconds``.
    """
    steps = [row for row in drafts if "draft_s" in row]
    prompts = [row for row in drafts if "prompt_tokens" in row]
    if not steps:
        return {}
    rows = np.array([row["rows"] for row in steps], np.float64)
    seconds = np.array([row["draft_s"] for row in steps], np.float64)
    if not steps[0]["is_model"]:
        return {"draft_row_s": float(np.median(seconds / rows))}
    per_step = np.maximum(seconds / np.array([row["levels"] for row in steps], np.float64), FLOOR_S)
    nothing = Curve(x=(1.0, 8192.0), seconds=(FLOOR_S, FLOOR_S), relative_std=0.0, source=source)
    prefill = nothing
    if prompts:
        sizes = np.array([row["prompt_tokens"] for row in prompts], np.float64)
        taken = np.array([row["seconds"] for row in prompts], np.float64)
        prefill = rising(sizes, taken, taken, source)
    return {"draft_step": rising(rows, per_step, per_step, source), "draft_prefill": prefill}


def _whole_steps(
    operators: Operators, num_layers: int, mixed: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """Measured against predicted seconds of the target's pass in each whole step."""
    repeats: dict[int, list[Mapping[str, Any]]] = {}
    for row in mixed:
        repeats.setdefault(int(row["index"]), []).append(row)
    model = CostModel(operators, num_layers=num_layers)
    whole: list[dict[str, float]] = []
    for same in repeats.values():
        step = StepFeatures(*(float(same[0][name]) for name in StepFeatures._fields))
        low, middle, high = np.quantile([row["seconds"] for row in same], (0.1, 0.5, 0.9)).tolist()
        fitted = model.predict_scalar(step).verify_s
        whole.append({"measured_s": middle, "low_s": low, "high_s": high, "fitted_s": fitted})
    return whole


def whole_error(whole: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Errors over whole steps, as ``HeldOut`` has them; ``None`` without any."""
    if not whole:
        return None
    fitted, measured = (np.array([row[name] for row in whole]) for name in ("fitted_s", "measured_s"))
    return asdict(HeldOut.of(fitted, measured))


def achieved_rates(
    operators: Operators, layer_params: float, layer_bytes: float, kv_entry_bytes: float
) -> dict[str, float]:
    """What the device reached, read off the curves.

    Args:
        layer_params, layer_bytes: weights of the matrices of one decoder layer.
        kv_entry_bytes: keys and values of one token in one layer.

    Returns:
        ``weight_bytes_per_s``: reading a layer's weights for one token; ``flops_per_s``: the most of its matrix
        products at any number of tokens; ``kv_bytes_per_s``: over the second half of decode attention's range.
    """
    dense, slope = operators.dense, operators.decode_attention.slopes[-1]
    rates = 2.0 * layer_params * np.array(dense.x) / np.array(dense.seconds)
    return {
        "weight_bytes_per_s": layer_bytes / dense.seconds[0],
        "flops_per_s": float(rates.max()),
        "kv_bytes_per_s": kv_entry_bytes / slope if slope > 0.0 else 0.0,
    }
