"""Array arithmetic that holds for float32, float64 and ``fractions.Fraction`` object arrays alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""float32, float64, or object (``Fraction``)."""

_CHUNK = 256


def widen(values: Array) -> Array:
    """``values`` in float64; exact numbers stay as they are."""
    return values if values.dtype == object else values.astype(np.float64, copy=False)


def row_sums(values: Array) -> Array:
    """[B, V] to [B], accumulated in float64 or exactly."""
    return values.sum(axis=1) if values.dtype == object else values.sum(axis=1, dtype=np.float64)


def is_nan(values: Array) -> NDArray[np.bool_]:
    """True where NaN, which exact numbers never are."""
    return np.zeros(values.shape, np.bool_) if values.dtype == object else np.isnan(values)


def inverse_cdf(weights: Array, uniforms: Array) -> NDArray[np.int64]:
    """Draw one index per row with probability proportional to ``weights``.

    The first index whose cumulative weight exceeds ``uniform * total``: an index of weight zero is never
    drawn. The search first finds a chunk of columns by the chunks' sums and then looks inside it, which is
    the same draw in exact arithmetic and avoids a cumulative sum over the whole row.

    Args:
        weights: [B, V], non-negative, not necessarily normalised.
        uniforms: [B] in [0, 1).

    Raises:
        ValueError: naming the rows whose weights hold NaN or infinity, or are all zero.
    """
    width = weights.shape[1]
    chunk_sums = widen(np.add.reduceat(weights, np.arange(0, width, _CHUNK), axis=1))
    _require_mass(chunk_sums)
    chunk, rest = _first_above(chunk_sums, widen(uniforms))
    columns = chunk[:, None] * _CHUNK + np.arange(min(_CHUNK, width))
    inside = np.take_along_axis(weights, np.minimum(columns, width - 1), axis=1)
    offset, _ = _first_above(widen(np.where(columns < width, inside, 0)), rest)
    return chunk * _CHUNK + offset


def _first_above(weights: Array, uniforms: Array) -> tuple[NDArray[np.int64], Array]:
    """Index [B] drawn from ``weights`` [B, n], and where in that index's interval the uniform fell, in [0, 1]."""
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1]
    # uniform * total can round up to total in floats: stay below it, so that an index always exists.
    limit = total if total.dtype == object else np.nextafter(total, 0)
    target = np.minimum(uniforms * total, limit)
    index = np.argmax(cumulative > target[:, None], axis=1)
    rows = np.arange(weights.shape[0])
    chosen = weights[rows, index]
    rest = (target - (cumulative[rows, index] - chosen)) / chosen
    return index, np.clip(rest, 0, 1)


def _require_mass(chunk_sums: Array) -> None:
    total = row_sums(chunk_sums)
    # total - total is 0 unless the total is NaN or infinite.
    usable = (total > 0) & (total - total == 0)
    if not usable.all():
        rows = np.flatnonzero(~usable).tolist()
        raise ValueError(
            f"probabilities of rows {rows} are NaN, infinite or all zero: check the logits of these rows"
        )
