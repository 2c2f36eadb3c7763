"""Quantiles of millions of durations in bounded memory.

Built on DDSketch, whose bins are counts. The compactors of KLL, the usual alternative, are random without a
seed, so that two equal runs would report different percentiles; t-digests are not, but promise no error bound
and depend on the order in which replicas are merged.

>>> sketch = QuantileSketch(exact_limit=1000)
>>> sketch.extend(np.arange(100_000) / 1000.0)
>>> abs(sketch.quantile(0.99) / 99.0 - 1.0) < 1e-3
True
"""

from __future__ import annotations

import math

import numpy as np
from ddsketch import DDSketch, LogarithmicMapping
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

# Virtual times of a day are no finer than 10⁻¹¹ s, so a shorter difference of two is rounding and counts as 0.
RESOLUTION_S = 1e-9
_PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_FIRST_CAPACITY = 1024


class QuantileSketch:
    """Quantiles, mean and maximum of durations: exact while there are few, then within a relative error.

    Up to ``exact_limit`` values are kept. The next one folds them into a DDSketch (Masson, Rim and Lee, VLDB
    2019): logarithmic bins, so that every quantile is within ``relative_error`` of an order statistic, however
    heavy the tail. Its bins are counts: the same values give the same answer in whatever order and from
    however many replicas they come. From then on the kept values are only a buffer. 10⁻⁹ and less counts as 0.

    Args:
        exact_limit: values kept, >= 1; 8 bytes each.
        relative_error: of a quantile once there are more, in (0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, exact_limit: int = 100_000, relative_error: float = 1e-3) -> None:
        if exact_limit < 1 or not 0.0 < relative_error < 1.0:
            raise ValueError(
                f"exact_limit={exact_limit} must be >= 1 and relative_error={relative_error} in (0, 1)"
            )
        self.exact_limit = exact_limit
        self.relative_error = relative_error
        self.count = 0
        self.total = 0.0
        self.max = math.nan
        self._kept = np.empty(min(exact_limit, _FIRST_CAPACITY))
        self._num_kept = 0
        self._mapping = LogarithmicMapping(relative_error)
        self._sketch: DDSketch | None = None

    @property
    def is_exact(self) -> bool:
        return self._sketch is None

    @property
    def mean(self) -> float:
        """Exact; ``nan`` of no values."""
        return self.total / self.count if self.count else math.nan

    def extend(self, values: ArrayLike) -> None:
        """Take in values; ``nan`` (a time per output token that does not exist) is left out.

        Args:
            values: float [N], >= 0 and finite.

        Raises:
            ValueError: a value that is negative (beyond rounding) or infinite.
        """
        array = np.asarray(values, np.float64).ravel()
        known = array[~np.isnan(array)]
        if known.size == 0:
            return
        low, high = float(known.min()), float(known.max())
        if low < -RESOLUTION_S or high == math.inf:
            raise ValueError(f"values from {low} to {high} are no durations: all must be finite and >= 0")
        self.count += known.size
        self.total += float(known.sum())
        self.max = high if math.isnan(self.max) else max(self.max, high)
        self._keep(known)

    def quantile(self, q: float) -> float:
        """The q-quantile, interpolated linearly between order statistics while exact; ``nan`` of no values.

        Raises:
            ValueError: ``q`` outside [0, 1].
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q={q} must be in [0, 1]: the 99th percentile is q=0.99")
        if self._sketch is None:
            return float(np.quantile(self._kept[: self._num_kept], q)) if self.count else math.nan
        self._fold()
        value = self._sketch.get_quantile_value(q)
        assert value is not None, "a sketch is made of at least one value"
        return min(float(value), self.max)

    def percentiles(self) -> dict[str, float]:
        """``mean``, ``p50``, ``p90``, ``p95``, ``p99``, as ``specdec.metrics.percentiles`` gives them."""
        return {"mean": self.mean} | {name: self.quantile(q) for name, q in _PERCENTILES.items()}

    def merge(self, other: QuantileSketch) -> None:
        """Take in what ``other`` has seen; ``other`` stays as it is.

        Raises:
            ValueError: the two have different relative errors.
        """
        if other.relative_error != self.relative_error:
            raise ValueError(
                f"relative errors {self.relative_error} and {other.relative_error} differ: bins do not match"
            )
        if other.count == 0:
            return
        self.count += other.count
        self.total += other.total
        self.max = other.max if math.isnan(self.max) else max(self.max, other.max)
        if other._sketch is not None:
            self._sketch = self._sketch or DDSketch(self.relative_error)
            self._sketch.merge(other._sketch)
        self._keep(other._kept[: other._num_kept])

    def _keep(self, values: FloatArray) -> None:
        while values.size:
            if self._num_kept == self.exact_limit:
                self._fold()
            part = values[: self.exact_limit - self._num_kept]
            end = self._num_kept + part.size
            if end > self._kept.size:
                grown = np.empty(min(max(end, 2 * self._kept.size), self.exact_limit))
                grown[: self._num_kept] = self._kept[: self._num_kept]
                self._kept = grown
            self._kept[self._num_kept : end] = part
            self._num_kept = end
            values = values[part.size :]

    def _fold(self) -> None:
        """Move the kept values into the sketch, bin by bin: one call of the library per bin, not per value."""
        self._sketch = self._sketch or DDSketch(self.relative_error)
        values = self._kept[: self._num_kept]
        positive = values[values > RESOLUTION_S]
        if positive.size < values.size:
            self._sketch.add(0.0, values.size - positive.size)
        if positive.size:
            bins = np.ceil(np.log(positive) / math.log(self._mapping.gamma)).astype(np.int64)
            lowest = int(bins.min())
            counts = np.bincount(bins - lowest)
            used = np.flatnonzero(counts)
            for key, count in zip((used + lowest).tolist(), counts[used].tolist(), strict=True):
                self._sketch.add(self._mapping.value(key), count)
        self._num_kept = 0
