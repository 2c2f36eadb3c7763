"""Plots of a device's calibration: measured against fitted by operator, and errors on whole steps.

The look is that of ``specdec.plots``; each function takes data and returns a matplotlib ``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specdec.plots import _DPI, INK, MUTED, PALETTE, _figure_row, _legend_below, _need, _style
from specdec.plots_validation import _diagonal

_HEADINGS = {"lm_head": "Output head"}
_SMALLEST_MS = 1e-3  # differences below a microsecond are noise


def operators(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Fitted against measured seconds in a whole pass, a panel for each operator, with the range of the repeats.

    Args:
        table: ``operator``, ``measured_s``, ``low_s``, ``high_s``, ``fitted_s``, ``pass_s`` and ``rows`` of each size.
    """
    _need(table, "sizes")
    names = list(dict.fromkeys(row["operator"] for row in table))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.5 + 3.9 * lines), dpi=_DPI, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        own = [row for row in table if row["operator"] == name]
        keys = ("measured_s", "low_s", "high_s", "fitted_s", "pass_s")
        measured, low, high, fitted, whole = (1e3 * np.array([row[key] for row in own]) for key in keys)
        shown = (measured > _SMALLEST_MS) & (fitted > _SMALLEST_MS)
        large = measured >= 0.2 * whole
        drawn = (
            (shown & large, PALETTE[0], "≥ 20 % of its pass"),
            (shown & ~large, MUTED, "less: mostly noise"),
        )
        for chosen, colour, label in drawn:
            left, right = measured - np.maximum(low, _SMALLEST_MS), high - measured
            error = np.maximum(np.stack([left, right])[:, chosen], 0.0)
            style = {"markersize": 3.5, "elinewidth": 0.7, "alpha": 0.75, "color": colour, "label": label}
            axes.errorbar(measured[chosen], fitted[chosen], xerr=error, fmt="o", **style)
        if shown.any():
            axes.set_xscale("log")
            axes.set_yscale("log")
            every = np.concatenate([measured[shown], fitted[shown]])
            axes.set_xlim(0.6 * every.min(), 1.7 * every.max())
            axes.set_ylim(0.6 * every.min(), 1.7 * every.max())
            _diagonal(axes, every, share=0.1)
        hidden = int(np.count_nonzero(~shown))
        heading = str(_HEADINGS.get(name, name.replace("_", " ").capitalize()))
        heading = f"{heading} ({hidden} below 1 µs)" if hidden else heading
        _style(axes, heading, "measured, ms", "fitted, ms")
    _legend_below(figure, grid[0])
    return figure


def whole_steps(whole: Sequence[Mapping[str, float]]) -> Figure:
    """Random whole steps that nothing was fitted to: predicted against measured, and the distribution of the error.

    Args:
        whole: ``measured_s``, ``low_s``, ``high_s``, ``fitted_s`` of each step.
    """
    _need(whole, "whole steps")
    keys = ("measured_s", "low_s", "high_s", "fitted_s")
    measured, low, high, fitted = (1e3 * np.array([row[key] for row in whole]) for key in keys)
    figure, (left, right) = _figure_row(2, 9.0, 4.2)
    error = np.maximum(np.stack([measured - low, high - measured]), 0.0)
    style = {"markersize": 4, "elinewidth": 0.8, "alpha": 0.8, "color": PALETTE[0]}
    left.errorbar(measured, fitted, xerr=error, fmt="o", label="step, range of its repeats", **style)
    left.set_xscale("log")
    left.set_yscale("log")
    _diagonal(left, np.concatenate([measured, fitted]), share=0.1)
    _style(left, "Whole steps, never fitted", "measured, ms", "predicted, ms")
    off = 100.0 * np.abs(fitted / measured - 1.0)
    noise = 100.0 * (high - low) / (2.0 * measured)
    shares = np.arange(1, off.size + 1) / off.size
    right.step(
        np.sort(off), shares, where="post", color=PALETTE[0], linewidth=2.0, label="error of the prediction"
    )
    right.step(
        np.sort(noise),
        shares,
        where="post",
        color=INK,
        linewidth=1.2,
        linestyle=(0, (4, 2)),
        label="± of the repeats",
    )
    right.set_ylim(0.0, 1.02)
    right.set_xlim(left=0.0)
    _style(right, "Share of steps within an error", "%", "share of steps")
    right.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
