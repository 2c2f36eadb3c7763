"""From measured points to curves of a known shape, and how far such a curve is off on sizes that it never saw.

Attention is fitted in the form that the cost model composes (:class:`sim.curves.Operators`):

* decoding rows: a curve of KV entries, at least c per row on average;
* prompt chunks: the longer of a curve of query-key pairs + c · tokens, and of reading the KV cache once;
* decoding rows beside chunks: a curve of KV entries + rows · (a + b · tokens of the chunk).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sim.curves import Curve, FloatArray, fit_curve

Fit = TypeVar("Fit")

MAX_POINTS = 48
"""Of a fitted curve."""
_ROW_ENTRIES = (0.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
_TOKEN_PAIRS = (0.0, 32.0, 64.0, 128.0, 192.0, 256.0, 384.0, 512.0)
_FLOOR_S = 1e-8  # a difference of two measurements may come out as zero or less
_SMALL_CONTEXT = 64.0  # KV entries of a row up to which its own overhead is what takes the time
_MANY_ROWS = 8  # from which the longest single row no longer decides


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors on sizes that a fit did not see, in shares of what was measured.

    Attributes:
        median, p90: of the absolute relative error.
        bias: mean of the signed one, log(fitted/measured).
        num_points: that these are over.
    """

    median: float
    p90: float
    bias: float
    num_points: int

    @classmethod
    def of(cls, fitted: FloatArray, measured: FloatArray) -> HeldOut:
        log = np.log(fitted / measured)
        error = np.abs(np.expm1(log))
        return cls(
            round(float(np.median(error)), 4),
            round(float(np.quantile(error, 0.9)), 4),
            round(float(log.mean()), 4),
            int(error.size),
        )


def hold_out(
    fit: Callable[[NDArray[np.bool_]], Callable[[NDArray[np.bool_]], FloatArray]],
    groups: NDArray[np.int64],
    measured: FloatArray,
    *,
    num_folds: int = 5,
) -> HeldOut:
    """Cross-validate, leaving out whole sizes.

    Args:
        fit: from a mask of points to fit on to a function from a mask to the fitted seconds there.
        groups: of each point, the size that it shares with others; all points of one are left out together.
        measured: seconds of each point.
        num_folds: the sizes are dealt out to so many folds in turn. The smallest and the largest stay in, as
            they mark the fitted range.

    Raises:
        ValueError: fewer than three sizes: nothing can be left out.
    """
    sizes = np.unique(groups)
    if sizes.size < 3:
        raise ValueError(f"{sizes.size} sizes cannot be cross-validated: at least 3 are needed")
    inner = sizes[1:-1]
    fitted = np.full(measured.shape, np.nan)
    for fold in range(min(num_folds, inner.size)):
        left = np.isin(groups, inner[fold :: min(num_folds, inner.size)])
        fitted[left] = fit(~left)(left)
    seen = np.isfinite(fitted)
    return HeldOut.of(fitted[seen], measured[seen])


def simplified(curve: Curve, tolerance: float = 0.005) -> Curve:
    """The curve with the fewest of its points, greedily, that stays within a relative ``tolerance`` of it."""
    x, y = np.array(curve.x), np.array(curve.seconds)
    kept = [0]
    while kept[-1] < x.size - 1:
        start = kept[-1]
        stop = start + 1
        for candidate in range(start + 2, x.size):
            line = np.interp(x[start : candidate + 1], x[[start, candidate]], y[[start, candidate]])
            if np.abs(line / y[start : candidate + 1] - 1.0).max() > tolerance:
                break
            stop = candidate
        kept.append(stop)
    return replace(curve, x=tuple(x[kept].tolist()), seconds=tuple(y[kept].tolist()))


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """Attention of decoding rows alone: the longer of ``curve(max(entries, row_entries · rows))`` and ``context_s``
    per KV entry of a row, where the kernel does not share a row's context among processors."""

    curve: Curve
    row_entries: float
    context_s: float = 0.0

    def __call__(self, rows: FloatArray, entries: FloatArray) -> FloatArray:
        return np.maximum(
            self.curve(np.maximum(entries, self.row_entries * rows)), self.context_s * entries / rows
        )


def fit_decode(rows: FloatArray, entries: FloatArray, seconds: FloatArray, source: str) -> DecodeFit:
    """Attention of ``rows`` that decode over ``entries`` KV entries in all.

    Raises:
        ValueError: see ``fit_curve``.
    """
    fits = (
        DecodeFit(fit_curve(np.maximum(entries, c * rows), seconds, source=source, max_points=MAX_POINTS), c)
        for c in _ROW_ENTRIES
    )
    return _closest(fits, lambda fit: fit.curve.relative_std)


@dataclass(frozen=True, slots=True)
class PrefillFit:
    """Attention of prompt chunks: the longer of ``curve(pairs + token_pairs · tokens)`` and ``context_s`` per
    KV entry that the chunk reads."""

    curve: Curve
    token_pairs: float
    context_s: float

    def __call__(self, tokens: FloatArray, pairs: FloatArray) -> FloatArray:
        return np.maximum(self.curve(pairs + self.token_pairs * tokens), self.context_s * pairs / tokens)


def fit_prefill(tokens: FloatArray, context: FloatArray, seconds: FloatArray, source: str) -> PrefillFit:
    """Attention of one chunk of ``tokens`` over ``context`` cached ones.

    Raises:
        ValueError: see ``fit_curve``.
    """
    pairs = tokens * (context + 0.5 * (tokens + 1.0))
    context_s = _reading_s(tokens, context, seconds)
    computing = context_s * pairs / tokens < 0.7 * seconds
    if np.count_nonzero(computing) < 3:
        computing = np.ones(tokens.shape, np.bool_)
    fits = (
        PrefillFit(
            fit_curve(
                (pairs + c * tokens)[computing], seconds[computing], source=source, max_points=MAX_POINTS
            ),
            c,
            context_s,
        )
        for c in _TOKEN_PAIRS
    )
    # Chunks that fill a step's budget are what serving mostly computes, hence the weights.
    return _closest(fits, lambda fit: _spread(fit(tokens, pairs), seconds, tokens))


def _reading_s(tokens: FloatArray, context: FloatArray, seconds: FloatArray) -> float:
    """Seconds per KV entry that a single short chunk reads: the slope of the shortest over its longest contexts."""
    short = tokens == tokens.min()
    x, y = context[short], seconds[short]
    if np.unique(x).size < 3:
        return 0.0
    order = np.argsort(x)
    x, y = x[order], y[order]
    far = x >= x[-1] / 4.0
    if np.count_nonzero(far) < 2:
        far[-2:] = True
    return max(0.0, float(np.polyfit(x[far], y[far], 1)[0]))


@dataclass(frozen=True, slots=True)
class MixedFit:
    """What decoding rows add to a step with chunks: ``curve(entries) + rows · (row_s + row_token_s · chunk)``."""

    curve: Curve
    row_s: float
    row_token_s: float

    def __call__(self, rows: FloatArray, entries: FloatArray, chunk: FloatArray) -> FloatArray:
        return self.curve(entries) + rows * (self.row_s + self.row_token_s * chunk)


def fit_mixed(
    rows: FloatArray, entries: FloatArray, chunk: FloatArray, added_s: FloatArray, source: str
) -> MixedFit:
    """Attention of decoding rows beside a chunk.

    Args:
        rows: that decode, >= 1, over ``entries`` KV entries in all.
        chunk: prompt tokens of the same step, >= 1.
        added_s: what was measured, less the same chunk alone.

    Raises:
        ValueError: no rows with short contexts to tell the cost of a row by.
    """
    short = (entries <= _SMALL_CONTEXT * rows) & (rows >= _MANY_ROWS)
    if not short.any():
        raise ValueError(
            f"no point has {_MANY_ROWS} rows with contexts of at most {_SMALL_CONTEXT:.0f} tokens: the cost of a row "
            "beside a chunk cannot be told from that of its context"
        )
    sizes = np.unique(chunk[short])
    each = np.array([np.median((added_s / rows)[short & (chunk == size)]) for size in sizes])
    slope, base = np.polyfit(sizes, each, 1, w=1.0 / each) if sizes.size > 1 else (0.0, float(each[0]))
    slope, base = max(0.0, float(slope)), max(0.0, float(base))
    left_s = added_s - rows * (base + slope * chunk)
    many = (rows >= _MANY_ROWS) & (entries > _SMALL_CONTEXT * rows)
    curve = fit_curve(entries[many], np.maximum(left_s[many], _FLOOR_S), source=source, max_points=MAX_POINTS)
    return MixedFit(curve, base, slope)


def _spread(fitted: FloatArray, measured: FloatArray, weights: FloatArray) -> float:
    return float(np.sqrt(np.average(np.log(fitted / measured) ** 2, weights=weights)))


def _closest(fits: Iterable[Fit], error: Callable[[Fit], float]) -> Fit:
    return min(fits, key=error)


def floored(curve: Curve) -> Curve:
    """The same curve with a range from 1 on: below the smallest size that was measured, launching takes the time."""
    if curve.x[0] <= 1.0:
        return curve
    return replace(curve, x=(1.0, *curve.x), seconds=(curve.seconds[0], *curve.seconds))


def fit_decode_groups(
    points: dict[int, tuple[FloatArray, FloatArray, FloatArray, FloatArray]], source: str
) -> tuple[dict[int, DecodeFit], HeldOut]:
    """Attention of decoding rows by bytes, for several numbers of query heads per KV head.

    Args:
        points: query heads per KV head → rows, KV entries of all rows, bytes of an entry, seconds.

    Returns:
        A curve of bytes for each, all with the same least entries per row, and the error over all of them where
        whole numbers of rows are left out.
    """

    def sizes(least: float, group: int) -> FloatArray:
        rows, entries, entry_bytes, _ = points[group]
        return entry_bytes * np.maximum(entries, least * rows)

    def fit(least: float, group: int, context_s: float, kept: NDArray[np.bool_]) -> DecodeFit:
        rows, entries, _, seconds = points[group]
        shared = kept & (context_s * entries / rows < 0.7 * seconds)
        shared = shared if np.count_nonzero(shared) >= 3 else kept
        curve = fit_curve(sizes(least, group)[shared], seconds[shared], source=source, max_points=MAX_POINTS)
        return DecodeFit(curve, least, context_s)

    def predicted(one: DecodeFit, group: int) -> FloatArray:
        rows, entries, _, _ = points[group]
        return np.maximum(one.curve(sizes(one.row_entries, group)), one.context_s * entries / rows)

    def spread(one: DecodeFit, group: int) -> float:
        seconds = points[group][3]
        return _spread(predicted(one, group), seconds, np.ones(seconds.shape))

    def best(least: float, group: int) -> DecodeFit:
        every = np.ones(points[group][0].shape, np.bool_)
        rates = {0.0, _single_row_s(*points[group])}
        return _closest(
            (fit(least, group, rate, every) for rate in sorted(rates)), lambda one: spread(one, group)
        )

    least = _closest(
        _ROW_ENTRIES, lambda least: sum(spread(best(least, group), group) ** 2 for group in points)
    )
    fits = {group: best(least, group) for group in points}
    fitted: list[FloatArray] = []
    measured: list[FloatArray] = []
    for group, (rows, _, _, seconds) in points.items():
        for number in np.unique(rows)[1:-1]:
            left = rows == number
            again = fit(least, group, fits[group].context_s, ~left)
            fitted.append(predicted(again, group)[left])
            measured.append(seconds[left])
    if not fitted:
        raise ValueError(f"{source}: decode attention needs at least 3 batch sizes")
    return fits, HeldOut.of(np.concatenate(fitted), np.concatenate(measured))


def _single_row_s(
    rows: FloatArray, entries: FloatArray, entry_bytes: FloatArray, seconds: FloatArray
) -> float:
    """Seconds per KV entry of the fewest rows with the fewest KV heads, over their longest contexts."""
    few = (rows == rows.min()) & (entry_bytes == entry_bytes.min())
    context, taken = (entries / rows)[few], seconds[few]
    far = context >= context.max() / 4.0
    if np.unique(context[far]).size < 2:
        return 0.0
    return max(0.0, float(np.polyfit(context[far], taken[far], 1)[0]))


def fit_prefill_sizes(
    tokens: FloatArray,
    pairs: FloatArray,
    pair_dims: FloatArray,
    seconds: FloatArray,
    lengths: FloatArray,
    source: str,
) -> tuple[PrefillFit, HeldOut]:
    """Attention of whole prompts by ``(pairs + c · tokens) · pair_dims``, over several numbers and sizes of heads.

    Args:
        tokens, pairs: of all prompts in one launch.
        pair_dims: query heads · head size.
        lengths: of each prompt; whole lengths are left out for the error.
    """

    def fit(c: float, kept: NDArray[np.bool_]) -> PrefillFit:
        sizes = (pairs + c * tokens) * pair_dims
        return PrefillFit(fit_curve(sizes[kept], seconds[kept], source=source, max_points=MAX_POINTS), c, 0.0)

    every = np.ones(tokens.shape, np.bool_)
    best = _closest((fit(c, every) for c in _TOKEN_PAIRS), lambda one: one.curve.relative_std)
    sizes = (pairs + best.token_pairs * tokens) * pair_dims

    def curve(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], FloatArray]:
        found = fit(best.token_pairs, kept).curve
        return lambda left: found(sizes[left])

    return best, hold_out(curve, lengths.astype(np.int64), seconds)


def scaled(curve: Curve, factor: float) -> Curve:
    """The same curve of sizes that are ``factor`` times as large."""
    return replace(curve, x=tuple(value * factor for value in curve.x))


def minimum(error: Callable[[FloatArray], float], start: Sequence[float]) -> tuple[FloatArray, float]:
    """Where ``error`` is least near ``start``, and how large it is there; Nelder and Mead's simplex."""
    optimize: Any = import_module(
        "scipy.optimize"
    )  # here, as it takes long to import and simulations do not fit
    options = {"maxiter": 400, "xatol": 1e-2, "fatol": 1e-5}
    found = optimize.minimize(error, np.asarray(start, np.float64), method="Nelder-Mead", options=options)
    return np.asarray(found.x, np.float64), float(found.fun)
