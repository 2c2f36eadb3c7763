"""Seconds of one operator against two sizes: monotone, linear between the points of a measured grid.

Attention of decoding rows takes longer for many rows with short contexts than for few with long ones, although the KV
entries are as many: a curve of entries is off by some per cent there, which a grid is not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

FAR = 2.0
"""A size is far outside a fitted range [low, high] when below low / FAR or above high · FAR."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Seconds by rows and context.

    Below the first point of either size the time stays what it is there, beyond the last it goes on as between the last
    two.

    Attributes:
        rows, contexts: of the grid, positive and increasing, at least two each.
        seconds: of each of ``rows``, those by context; positive and decreasing along neither.
        source: what it is from, for reports.
        limits: rows and context beyond which an answer is far outside the grid.

    Raises:
        ValueError: a grid that is not such a surface.
    """

    rows: tuple[float, ...]
    contexts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]
    source: str
    limits: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rows", "contexts"):
            sizes = np.array(getattr(self, name), np.float64)
            if sizes.size < 2 or not (
                np.all(np.isfinite(sizes)) and sizes[0] > 0.0 and np.all(np.diff(sizes) > 0.0)
            ):
                raise ValueError(f"{name}={sizes.tolist()} must be two or more, finite, > 0 and increasing")
        grid = np.array(self.seconds, np.float64)
        if grid.shape != (len(self.rows), len(self.contexts)):
            raise ValueError(f"seconds are {grid.shape}, the grid is {len(self.rows)} × {len(self.contexts)}")
        if not (np.all(np.isfinite(grid)) and np.all(grid > 0.0)):
            raise ValueError("seconds must be finite and > 0")
        if any(np.any(np.diff(grid, axis=axis) < 0.0) for axis in (0, 1)):
            raise ValueError("seconds must decrease neither with rows nor with context: smooth them first")
        object.__setattr__(self, "limits", (FAR * self.rows[-1], FAR * self.contexts[-1]))

    @classmethod
    def of(cls, rows: ArrayLike, contexts: ArrayLike, seconds: ArrayLike, source: str) -> Surface:
        """Through medians of measured points, made monotone.

        What is missing (many rows of long contexts fit no memory) goes on with rows as between the last two measured.

        Args:
            rows, contexts, seconds: float [n], > 0.

        Raises:
            ValueError: fewer than two numbers of rows, or than two contexts that were measured with two.
        """
        x, y, z = (np.asarray(values, np.float64) for values in (rows, contexts, seconds))
        xs, ys = np.unique(x), np.unique(y)
        grid = np.full((xs.size, ys.size), math.nan)
        for i, row in enumerate(xs):
            for j, context in enumerate(ys):
                here = z[(x == row) & (y == context)]
                grid[i, j] = np.median(here) if here.size else math.nan
        enough = np.isfinite(grid).sum(axis=0) >= 2
        grid, ys = grid[:, enough], ys[enough]
        if min(grid.shape) < 2:
            raise ValueError(f"a grid of {grid.shape} points is no surface: measure more sizes of each kind")
        for column in grid.T:
            _complete(xs, column)
        rising = _rising(_rising(grid, 0), 1)
        return cls(
            rows=tuple(xs.tolist()),
            contexts=tuple(ys.tolist()),
            seconds=tuple(tuple(line) for line in rising.tolist()),
            source=source,
        )

    def at(self, rows: float, context: float) -> float:
        """Seconds at plain sizes > 0."""
        i, u = _place(self.rows, rows)
        j, v = _place(self.contexts, context)
        lower, upper = self.seconds[i], self.seconds[i + 1]
        before, behind = lower[j] + v * (lower[j + 1] - lower[j]), upper[j] + v * (upper[j + 1] - upper[j])
        return before + u * (behind - before)

    def __call__(self, rows: FloatArray, contexts: FloatArray) -> FloatArray:
        """Seconds, float64 [n]; 0 where there are no rows."""
        pairs = zip(rows.tolist(), contexts.tolist(), strict=True)
        return np.array([self.at(*pair) if pair[0] > 0.0 else 0.0 for pair in pairs], np.float64)

    def times(self, factor: float) -> Surface:
        """The same of a device that takes ``factor`` times as long."""
        seconds = tuple(tuple(factor * value for value in line) for line in self.seconds)
        return Surface(rows=self.rows, contexts=self.contexts, seconds=seconds, source=self.source)

    def plain(self) -> dict[str, Any]:
        """As :meth:`from_plain` takes it: lists, strings and numbers."""
        return {
            "rows": list(self.rows),
            "contexts": list(self.contexts),
            "seconds": [list(line) for line in self.seconds],
            "source": self.source,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Surface:
        return cls(
            rows=tuple(plain["rows"]),
            contexts=tuple(plain["contexts"]),
            seconds=tuple(tuple(line) for line in plain["seconds"]),
            source=plain["source"],
        )


class BoundedSurface:
    """A surface at plain floats up to ``limits``, rows and context; beyond, a KeyError."""

    __slots__ = ("at", "context", "rows")

    def __init__(self, surface: Surface, limits: tuple[float, float]) -> None:
        self.at = surface.at
        self.rows, self.context = limits

    def __call__(self, rows: float, context: float) -> float:
        if rows > self.rows or context > self.context:
            raise KeyError
        return self.at(rows, context)


def _complete(sizes: FloatArray, seconds: FloatArray) -> None:
    """Fill in, in place, what is NaN in ``seconds``."""
    known = np.isfinite(seconds)
    x, y = sizes[known], seconds[known]
    slope = max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
    beyond = sizes > x[-1]
    seconds[beyond] = y[-1] + slope * (sizes[beyond] - x[-1])
    between = ~known & ~beyond
    seconds[between] = np.interp(sizes[between], x, y)


def _place(sizes: Sequence[float], size: float) -> tuple[int, float]:
    """The interval that ``size`` lies in, or is nearest to, and how far into it; beyond its end, more than 1."""
    index = min(max(bisect_right(sizes, size) - 1, 0), len(sizes) - 2)
    low, high = sizes[index], sizes[index + 1]
    return index, max(0.0, (size - low) / (high - low))


def _rising(grid: FloatArray, axis: int) -> FloatArray:
    """The nearest to ``grid`` that does not fall along ``axis``, between its running maximum and its running minimum
    from behind."""
    highest = np.maximum.accumulate(grid, axis=axis)
    lowest = np.flip(np.minimum.accumulate(np.flip(grid, axis), axis=axis), axis)
    return 0.5 * (highest + lowest)
