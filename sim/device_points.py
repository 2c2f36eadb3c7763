"""Timed passes of the target by size, and the curves through them; see :mod:`sim.device_fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from sim.curves import Curve, FloatArray
from sim.profiles.fitting import DecodeFit, PrefillFit

Mask = NDArray[np.bool_]

KINDS = ("dense", "head", "decode", "verify", "prefill")
"""Of the passes that are fitted."""
TREE = "tree"
"""Of the passes over token trees, which are judged by the fit of chains."""
MIXED = "mixed"
"""Of the passes that are not: random whole steps."""
FLOOR_S = 1e-9
_ROW_ENTRIES = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_TOKEN_PAIRS = (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_PASSES = {
    "kind": pl.String,
    "round": pl.Int64,
    "rows": pl.Float64,
    "tokens": pl.Float64,
    "context": pl.Float64,
    "seconds": pl.Float64,
}


@dataclass(frozen=True, slots=True)
class Points:
    """The sizes of one kind of pass, float64 [n] each.

    Attributes:
        rows, tokens, context: of each pass; tokens and context are of each row.
        pass_s: median over the rounds; ``low_s``, ``high_s``: the tenth and the ninetieth percentile.
        added_s: median of what the pass takes more than as many single tokens alone in the same round; for ``dense``
            the pass itself.
    """

    rows: FloatArray
    tokens: FloatArray
    context: FloatArray
    pass_s: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    added_s: FloatArray

    @property
    def totals(self) -> FloatArray:
        return self.rows * self.tokens

    @property
    def entries(self) -> FloatArray:
        return self.rows * (self.context + self.tokens)

    @property
    def verify_pairs(self) -> FloatArray:
        """Query-key pairs as the cost model counts those of decoding rows: every query with all entries."""
        return self.tokens * self.entries

    @property
    def pairs(self) -> FloatArray:
        return self.totals * (self.context + 0.5 * (self.tokens + 1.0))

    def where(self, mask: Mask) -> Points:
        return Points(*(getattr(self, name)[mask] for name in self.__slots__))


def read_passes(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """The timed passes of fitted kinds and of trees among ``rows``: kind, round, rows, tokens, context, seconds."""
    chosen = [{name: row[name] for name in _PASSES} for row in rows if row["kind"] in (*KINDS, TREE)]
    return pl.DataFrame(chosen, schema=_PASSES)


def points_of(passes: pl.DataFrame, kind: str) -> Points:
    """The sizes of one kind. Passes of more tokens than any ``dense`` one are left out: nothing to compare with.

    Raises:
        ValueError: nothing of this kind, or nothing of ``dense``, was measured.
    """
    dense: dict[int, dict[float, float]] = {}
    for number, tokens, seconds in (
        passes.filter(pl.col("kind") == "dense").select("round", "rows", "seconds").iter_rows()
    ):
        dense.setdefault(number, {})[tokens] = seconds
    if not dense:
        raise ValueError("no pass of kind 'dense' was measured: raise the budget")
    every = {tokens for one in dense.values() for tokens in one}
    most = max(every)
    usual = {size: float(np.median([one[size] for one in dense.values() if size in one])) for size in every}
    sizes, usual_s = np.array(sorted(every)), np.array([usual[size] for size in sorted(every)])

    def alone_s(number: int, total: float) -> float:
        known = dense.get(number, {})
        return known[total] if total in known else float(np.interp(total, sizes, usual_s))

    found: list[tuple[float, ...]] = []
    own = passes.filter(pl.col("kind") == kind)
    for key, part in own.group_by("rows", "tokens", "context", maintain_order=True):
        rows, tokens, context = (float(value) for value in key)
        if rows * tokens > most:
            continue
        numbers, seconds = part["round"].to_list(), part["seconds"].to_numpy()
        less = [0.0 if kind == "dense" else alone_s(number, rows * tokens) for number in numbers]
        low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
        found.append((rows, tokens, context, middle, low, high, float(np.median(seconds - np.array(less)))))
    if not found:
        raise ValueError(f"no pass of kind {kind!r} was measured: raise the budget")
    return Points(*np.array(sorted(found), np.float64).T)


def rising(sizes: FloatArray, seconds: FloatArray, pass_s: FloatArray, source: str) -> Curve:
    """The rising curve through measured points nearest in squares, weighted by 1 / ``pass_s``².

    Isotonic regression in seconds, as differences may be noise around zero; what comes out at or below zero is raised
    to a nanosecond. ``relative_std`` is the root mean square residual over that of the curve.
    """
    from scipy.optimize import isotonic_regression  # pyright: ignore[reportMissingTypeStubs]

    distinct, inverse = np.unique(sizes, return_inverse=True)
    weights = np.bincount(inverse, 1.0 / pass_s**2)
    means = np.bincount(inverse, seconds / pass_s**2) / weights
    fit: Any = isotonic_regression(means, weights=weights)
    heights: FloatArray = np.maximum.accumulate(np.maximum(fit.x, FLOOR_S))
    curve = Curve(
        x=tuple(distinct.tolist()), seconds=tuple(heights.tolist()), relative_std=0.0, source=source
    )
    fitted = curve(sizes)
    share = np.sqrt(np.mean(((seconds - fitted) / pass_s) ** 2) / np.mean((fitted / pass_s) ** 2))
    return replace(curve, relative_std=float(min(share, 10.0)))


def from_one(curve: Curve) -> Curve:
    """An attention's curve from one entry on: that much is in ``dense`` already, and no more is added there."""
    if curve.x[0] <= 1.0:
        return curve
    return replace(curve, x=(1.0, *curve.x), seconds=(FLOOR_S, *curve.seconds))


def fit_rows(points: Points, num_layers: int, source: str) -> DecodeFit:
    """Attention of one layer of rows that decode single tokens."""
    seconds, pass_s = points.added_s / num_layers, points.pass_s / num_layers
    rows, entries = points.rows, points.entries
    alone_s = _slope(points.context, seconds, rows == rows.min())

    def fit(least: float, context_s: float) -> DecodeFit:
        shared = context_s * entries / rows < 0.7 * seconds
        kept = shared if np.count_nonzero(shared) >= 3 else np.ones(rows.shape, np.bool_)
        sizes = np.maximum(entries, least * rows)
        return DecodeFit(from_one(rising(sizes[kept], seconds[kept], pass_s[kept], source)), least, context_s)

    fits = (fit(least, context_s) for least in _ROW_ENTRIES for context_s in sorted({0.0, alone_s}))
    return min(fits, key=lambda one: _error(one(rows, entries), seconds, pass_s))


def fit_pair_s(points: Points, decode: DecodeFit, num_layers: int) -> float:
    """``Operators.verify_pair_s`` from passes of several tokens per row, given their reading of the KV cache."""
    seconds, pass_s = points.added_s / num_layers, points.pass_s / num_layers
    reading_s = decode(points.rows, points.entries)
    ratios = np.maximum(seconds / points.verify_pairs, 0.0)
    candidates = [0.0, *np.quantile(ratios, np.linspace(0.0, 1.0, 41)).tolist()]
    return min(
        candidates,
        key=lambda pair_s: _error(np.maximum(reading_s, pair_s * points.verify_pairs), seconds, pass_s),
    )


def fit_chunks(points: Points, num_layers: int, source: str) -> PrefillFit:
    """Attention of one layer of one prompt chunk over its context."""
    seconds, pass_s = points.added_s / num_layers, points.pass_s / num_layers
    tokens, pairs = points.tokens, points.pairs
    read_s = _slope(points.context, seconds, tokens == tokens.min())

    def fit(more: float, context_s: float) -> PrefillFit:
        computing = context_s * pairs / tokens < 0.7 * seconds
        kept = computing if np.count_nonzero(computing) >= 3 else np.ones(tokens.shape, np.bool_)
        sizes = pairs + more * tokens
        return PrefillFit(from_one(rising(sizes[kept], seconds[kept], pass_s[kept], source)), more, context_s)

    fits = (fit(more, context_s) for more in _TOKEN_PAIRS for context_s in sorted({0.0, read_s}))
    return min(fits, key=lambda one: _error(one(tokens, pairs), seconds, pass_s))


def _slope(x: FloatArray, seconds: FloatArray, chosen: Mask) -> float:
    """Seconds per token of context over the farther half of the chosen points, >= 0."""
    x, seconds = x[chosen], seconds[chosen]
    far = x >= x.max(initial=0.0) / 4.0
    return max(0.0, float(np.polyfit(x[far], seconds[far], 1)[0])) if np.unique(x[far]).size > 1 else 0.0


def _error(fitted: FloatArray, measured: FloatArray, pass_s: FloatArray) -> float:
    return float(np.mean(((fitted - measured) / pass_s) ** 2))
