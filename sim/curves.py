"""Seconds of one operator against its size: monotone, piecewise linear, with a known range and error.

A curve is either fitted to measured points (:func:`fit_curve`) or written down by a roofline. The cost model
composes the curves of :class:`Operators` into the seconds of a step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from sim.surface import FAR, Surface

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds as a function of a size (tokens, rows, bytes, …).

    Between the points the curve is linear. Size 0 takes no time: the operator does not run. Below the first
    point the time stays what it is there, as launching a kernel has a floor. Beyond the last point it grows
    in proportion, with the slope of the last half of the range.

    Attributes:
        x: sizes, positive and increasing; the fitted range is [x[0], x[-1]].
        seconds: at those sizes, positive and not decreasing.
        relative_std: standard deviation of measured/curve, around 1: 0.05 is five per cent.
        source: what the curve is from, for reports.
        knots, base, slopes: the same curve as ``base[i] + slopes[i] * (size - knots[i])`` with i the last knot
            that is not above the size.

    Raises:
        ValueError: points that are not such a curve.
    """

    x: tuple[float, ...]
    seconds: tuple[float, ...]
    relative_std: float
    source: str
    knots: tuple[float, ...] = field(init=False, repr=False, compare=False)
    base: tuple[float, ...] = field(init=False, repr=False, compare=False)
    slopes: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        x, y = np.array(self.x, np.float64), np.array(self.seconds, np.float64)
        if x.ndim != 1 or x.shape != y.shape or x.size == 0:
            raise ValueError(f"a curve needs as many sizes as seconds, at least one: {x.shape}, {y.shape}")
        if not (np.all(np.isfinite(x)) and x[0] > 0.0 and np.all(np.diff(x) > 0.0)):
            raise ValueError(f"sizes {self.x} must be finite, > 0 and increasing")
        if not (np.all(np.isfinite(y)) and y[0] > 0.0 and np.all(np.diff(y) >= 0.0)):
            raise ValueError(f"seconds {self.seconds} must be finite, > 0 and not decreasing")
        if not 0.0 <= self.relative_std < math.inf:
            raise ValueError(f"relative_std={self.relative_std} must be finite and >= 0")
        inner = np.diff(y) / np.diff(x)
        middle = max(float(x[0]), float(x[-1]) / 2)
        last = y[0] / x[0] if x.size == 1 else (y[-1] - np.interp(middle, x, y)) / (x[-1] - middle)
        object.__setattr__(self, "knots", (0.0, *x.tolist()))
        object.__setattr__(self, "base", (float(y[0]), *y.tolist()))
        object.__setattr__(self, "slopes", (0.0, *inner.tolist(), float(last)))

    def __call__(self, sizes: ArrayLike) -> FloatArray:
        """Seconds, float64 of the shape of ``sizes``, which are >= 0."""
        x = np.asarray(sizes, np.float64)
        knots = np.array(self.knots)
        index = np.searchsorted(knots, x, side="right") - 1
        seconds = np.array(self.base)[index] + np.array(self.slopes)[index] * (x - knots[index])
        return np.where(x > 0.0, seconds, 0.0)

    @property
    def limits(self) -> tuple[float, float]:
        """The sizes beyond which an answer is far outside the fitted range."""
        return self.x[0] / FAR, self.x[-1] * FAR


class BoundedCurve:
    """A curve at one plain float within ``limits``; outside, a KeyError."""

    __slots__ = ("base", "high", "knots", "low", "slopes")

    def __init__(self, curve: Curve, limits: tuple[float, float]) -> None:
        self.knots, self.base, self.slopes = curve.knots, curve.base, curve.slopes
        self.low, self.high = limits

    def __call__(self, size: float) -> float:
        if not self.low <= size <= self.high:
            raise KeyError
        knots = self.knots
        index = bisect_right(knots, size) - 1
        return self.base[index] + self.slopes[index] * (size - knots[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """Seconds of the operators of a step on one device, for one model.

    Attributes:
        dense: everything of one decoder layer that depends on the number of tokens alone: its matrices, norms,
            rotary embedding, activation. By tokens.
        decode_attention: of the decoding rows in one layer, one query each. By KV entries read, all rows together,
            at least ``decode_row_entries`` per row on average.
        prefill_attention: of the prompt chunks in one layer. By query-key pairs, ``prefill_token_pairs`` more for
            each of their tokens.
        lm_head: final norm and output head. By rows of logits.
        sampling: logits to probabilities to tokens, verification included. By rows of logits.
        mixed_attention: of the decoding rows in one layer in a step that has prompt chunks as well, whose kernel
            then neither splits a row's context nor shares what the query heads of a KV head read; ``None`` where
            that was not measured: ``decode_attention`` holds then too. By KV entries, all rows together.
        all_reduce: one all-reduce among tensor-parallel devices; ``None`` on one device. By bytes.
        draft_step: one pass of the draft model, head and choice of the token included, attention over its
            context excluded; ``None`` without a draft model. By rows.
        draft_prefill: the draft model's pass over prompt tokens. By tokens.
        verify_pair_s: seconds per query-key pair of decoding rows in one layer, which bounds verification
            from below where many drafts make it compute-bound.
        prefill_context_s: seconds per KV entry that a prompt chunk reads in one layer, which bounds short
            chunks over a long context from below.
        decode_row_entries: KV entries that a row takes the time of at least: the tile that it reads.
        decode_context_s: seconds per KV entry of one decoding row, with the mean context, which bound its attention
            from below where the kernel does not share a row's context among processors.
        decode_surface: decoding rows alone by rows and mean KV entries of a row, where a grid of these was measured; it
            goes before ``decode_attention``, whose error it is taken to have.
        prefill_token_pairs: query-key pairs that would take as long as a prompt token does beside its own: tiles
            across the causal diagonal.
        mixed_row_s: seconds of a decoding row in one layer beside ``mixed_attention``.
        mixed_row_token_s: the same per query token of the longest chunk: the kernel launches as many tiles for each
            row as the longest has.
        draft_context_s: seconds per KV entry that a pass of the draft model reads, all its layers together.
        draft_row_s: seconds per drafting row and step outside any model: n-gram lookup on the host.
        overhead_s: seconds per step on the host that are not hidden behind the device.
        overhead_row_s: the same per decoding row.
        overhead_relative_std: relative standard deviation of the two.
    """

    dense: Curve
    decode_attention: Curve
    prefill_attention: Curve
    lm_head: Curve
    sampling: Curve
    mixed_attention: Curve | None = None
    all_reduce: Curve | None = None
    draft_step: Curve | None = None
    draft_prefill: Curve | None = None
    verify_pair_s: float = 0.0
    prefill_context_s: float = 0.0
    decode_row_entries: float = 0.0
    decode_context_s: float = 0.0
    decode_surface: Surface | None = None
    prefill_token_pairs: float = 0.0
    mixed_row_s: float = 0.0
    mixed_row_token_s: float = 0.0
    draft_context_s: float = 0.0
    draft_row_s: float = 0.0
    overhead_s: float = 0.0
    overhead_row_s: float = 0.0
    overhead_relative_std: float = 0.0

    def __post_init__(self) -> None:
        for name, value in self.scalars():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be finite and >= 0")
        if (self.draft_step is None) != (self.draft_prefill is None):
            raise ValueError("draft_step and draft_prefill come together: give both curves or neither")

    def curves(self) -> Iterator[tuple[str, Curve]]:
        """Name and curve of each operator that the model has."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Curve):
                yield item.name, value

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Name and value of each coefficient."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float):
                yield item.name, float(value)

    def tables(self) -> tuple[pl.DataFrame, dict[str, Any]]:
        """All points (columns operator, x, seconds) and the rest as plain values: ``curves``, ``coefficients`` and
        ``surfaces``."""
        points = [
            (name, size, seconds)
            for name, curve in self.curves()
            for size, seconds in zip(curve.x, curve.seconds, strict=True)
        ]
        schema = {"operator": pl.String, "x": pl.Float64, "seconds": pl.Float64}
        curves = {
            name: {"relative_std": curve.relative_std, "source": curve.source}
            for name, curve in self.curves()
        }
        frame = pl.DataFrame(points, schema=schema, orient="row")
        surfaces = {"decode_surface": self.decode_surface.plain()} if self.decode_surface else {}
        return frame, {"curves": curves, "coefficients": dict(self.scalars()), "surfaces": surfaces}


def operators_from_tables(points: pl.DataFrame, entries: Mapping[str, Any]) -> Operators:
    """The operators that :meth:`Operators.tables` took apart.

    Raises:
        KeyError, TypeError, ValueError: tables that do not fit together.
    """
    curves = {
        name: Curve(x=tuple(part["x"]), seconds=tuple(part["seconds"]), **entries["curves"][name])
        for (name,), part in points.group_by("operator", maintain_order=True)
    }
    surfaces = {name: Surface.from_plain(plain) for name, plain in entries.get("surfaces", {}).items()}
    return Operators(**curves, **surfaces, **entries["coefficients"])


def fit_curve(x: ArrayLike, seconds: ArrayLike, *, source: str, max_points: int = 32) -> Curve:
    """The monotone curve through medians of measured points, with the spread of the points around it.

    Equal sizes are one bin; when there are more than ``max_points``, neighbours on a logarithmic scale share
    one, save for the smallest and the largest size, which mark the fitted range. Each bin has its median size
    and median time, and isotonic regression of the logarithms, weighted by the bins' counts, makes the times
    non-decreasing. The spread is the root mean square of log(measured/curve).

    Args:
        x: float [n], sizes > 0.
        seconds: float [n], measured times > 0.
        source: for reports: device, library and date.
        max_points: most points of the curve, >= 3.

    Raises:
        ValueError: no points, or points that are not positive and finite.
    """
    # Here, because it takes longer to import than everything else and simulations do not fit.
    from scipy.optimize import isotonic_regression  # pyright: ignore[reportMissingTypeStubs]

    sizes, times = np.asarray(x, np.float64), np.asarray(seconds, np.float64)
    if sizes.ndim != 1 or sizes.shape != times.shape or sizes.size == 0:
        raise ValueError(f"need as many sizes as seconds, at least one: {sizes.shape}, {times.shape}")
    if max_points < 3:
        raise ValueError(f"max_points={max_points} must be >= 3: two ends and something between")
    for name, values in (("x", sizes), ("seconds", times)):
        wrong = values[~(np.isfinite(values) & (values > 0.0))]
        if wrong.size:
            raise ValueError(f"{name} has {wrong[0]}: drop points that are not finite and > 0")
    bins = _bins(sizes, max_points)
    members = [bins == index for index in range(int(bins.max()) + 1)]
    points = np.array([np.median(sizes[member]) for member in members])
    medians = np.log([np.median(times[member]) for member in members])
    weights = np.array([member.sum() for member in members], np.float64)
    fit: Any = isotonic_regression(medians, weights=weights)
    rising: FloatArray = np.exp(fit.x)
    curve = Curve(x=tuple(points.tolist()), seconds=tuple(rising.tolist()), relative_std=0.0, source=source)
    residual = float(np.sqrt(np.mean(np.log(times / curve(sizes)) ** 2)))
    return Curve(x=curve.x, seconds=curve.seconds, relative_std=residual, source=source)


def _bins(sizes: FloatArray, max_points: int) -> NDArray[np.intp]:
    """Bin of each size, numbered without gaps in rising order."""
    distinct, inverse = np.unique(sizes, return_inverse=True)
    if distinct.size <= max_points:
        return inverse
    inner = np.log(distinct[1:-1])
    edges = np.linspace(float(inner[0]), float(inner[-1]), max_points - 1)[1:-1]
    labels = np.concatenate(([0], 1 + np.searchsorted(edges, inner), [max_points - 1]))
    return np.unique(labels, return_inverse=True)[1][inverse]
