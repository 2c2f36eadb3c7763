"""Plots of the lossless certificate, in the look of ``specdec.plots``."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from specdec.plots import INK, MUTED, _colour, _style


def places(values: NDArray[np.float64], num_bins: int) -> Figure:
    """Histograms of sampled tokens' places in the target's law, a panel for each position; flat if lossless.

    Args:
        values: float64 [samples, positions] in [0, 1].
    """
    num_samples, num_positions = values.shape
    columns = min(num_positions, 4)
    rows = math.ceil(num_positions / columns)
    figure = Figure(figsize=(2.9 * columns + 0.4, 2.3 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    expected = num_samples / num_bins
    low, high = stats.binom.interval(0.999, num_samples, 1.0 / num_bins)
    for position, axes in enumerate(panels):
        if position >= num_positions:
            axes.set_visible(False)
            continue
        counts, edges = np.histogram(values[:, position], bins=num_bins, range=(0.0, 1.0))
        axes.bar(edges[:-1], counts, width=1.0 / num_bins, align="edge", color=_colour(0), edgecolor="white")
        axes.axhspan(low, high, color=MUTED, alpha=0.25, linewidth=0, zorder=0)
        axes.axhline(expected, color=INK, linewidth=1.0)
        is_low, is_left = position + columns >= num_positions, position % columns == 0
        xlabel, ylabel = ("place in the target's law" if is_low else ""), ("samples" if is_left else "")
        _style(axes, f"token {position + 1}", xlabel, ylabel, "y")
        axes.set_xlim(0.0, 1.0)
    figure.supxlabel("grey: 99.9 % of the counts of a lossless engine", fontsize=8, color=MUTED)
    return figure
