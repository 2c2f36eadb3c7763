"""Plots of predictions against what was measured: one point per request or row, and distributions over one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from specdec.plots import (
    _MARKERS,
    INK,
    MUTED,
    PALETTE,
    _colour,
    _figure,
    _figure_row,
    _legend_below,
    _need,
    _style,
)
from specdec.plots_load import _plain_ticks

FloatArray = NDArray[np.float64]
_NAMES = {"ttft": "Time to first token", "tpot": "Time per output token", "e2e": "End to end"}


def latency_scatter(measured: Mapping[str, FloatArray], predicted: Mapping[str, FloatArray]) -> Figure:
    """Predicted against measured latencies of the same requests, a panel for each kind.

    Args:
        measured, predicted: seconds by ``"ttft"``, ``"tpot"``, ``"e2e"``.
    """
    _need(measured, "latencies")
    figure, panels = _figure_row(len(measured), 3.8 * len(measured), 3.8)
    for axes, (name, real) in zip(panels, measured.items(), strict=True):
        ours = predicted[name]
        seen = np.isfinite(real) & np.isfinite(ours)
        scale, unit = _unit(real[seen])
        axes.scatter(real[seen] * scale, ours[seen] * scale, s=9, alpha=0.6, color=_colour(0), linewidths=0)
        _diagonal(axes, np.concatenate([real[seen], ours[seen]]) * scale)
        _style(axes, _NAMES.get(name, name), f"measured, {unit}", f"predicted, {unit}")
    return figure


def latency_cdfs(runs: Mapping[str, Mapping[str, FloatArray]]) -> Figure:
    """Cumulative shares of requests, a panel for each kind of latency, a line for each of ``runs``."""
    _need(runs, "runs")
    names = list(next(iter(runs.values())))
    figure, panels = _figure_row(len(names), 3.8 * len(names), 3.8)
    for axes, name in zip(panels, names, strict=True):
        values = [run[name][np.isfinite(run[name])] for run in runs.values()]
        scale, unit = _unit(np.concatenate(values))
        for index, (label, seconds) in enumerate(zip(runs, values, strict=True)):
            shares = np.arange(1, seconds.size + 1) / seconds.size
            width = 2.2 if index == 0 else 1.3
            style = "-" if index < 2 else (0, (4, 2))
            axes.step(
                np.sort(seconds) * scale,
                shares,
                where="post",
                label=label,
                color=INK if index == 0 else _colour(index - 1),
                linewidth=width,
                linestyle=style,
            )
        axes.set_ylim(0.0, 1.02)
        _style(axes, _NAMES.get(name, name), unit, "share of requests" if axes is panels[0] else "")
    _legend_below(figure, panels[0])
    return figure


def row_scatter(
    panels: Mapping[str, Mapping[str, tuple[FloatArray, FloatArray]]], unit: str = "ms"
) -> Figure:
    """Predicted against measured on logarithmic axes: panel → group → (measured, predicted); ±10 % is shaded."""
    _need(panels, "rows")
    figure, drawn = _figure_row(len(panels), 5.2 * len(panels), 4.6)
    for axes, (heading, groups) in zip(drawn, panels.items(), strict=True):
        every: list[FloatArray] = []
        for index, (label, (real, ours)) in enumerate(groups.items()):
            marker = _MARKERS[(index + index // len(PALETTE)) % len(_MARKERS)]  # no colour and marker twice
            style = {"s": 14, "alpha": 0.65, "linewidths": 0, "marker": marker}
            axes.scatter(real, ours, color=_colour(index), label=label, zorder=3, **style)
            every += [real, ours]
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_ticks(axis)
        _diagonal(axes, np.concatenate(every), share=0.1)
        _style(axes, heading, f"measured, {unit}", f"predicted, {unit}")
    _legend_below(figure, drawn[0])
    return figure


def speedup_comparison(
    methods: Sequence[str], published: Sequence[float], predicted: Mapping[str, Sequence[float]]
) -> Figure:
    """Published speed-ups as bars and predictions, of one or several chips, as points beside them."""
    _need(methods, "methods")
    figure, axes = _figure(9.0, 4.0)
    places = np.arange(len(methods))
    axes.bar(places, published, width=0.55, color=MUTED, alpha=0.45, label="published, A100", zorder=2)
    for index, (label, values) in enumerate(predicted.items()):
        shift = (index - (len(predicted) - 1) / 2) * 0.16
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(places + shift, values, marker, color=_colour(index), label=label, markersize=6, zorder=3)
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.set_xticks(places, methods, rotation=20, ha="right")
    _style(axes, "Speed-up over plain decoding, batch 1", "", "speed-up ×", grid="y")
    _legend_below(figure, axes)
    return figure


def _unit(seconds: FloatArray) -> tuple[float, str]:
    return (1e3, "ms") if float(seconds.max(initial=0.0)) < 1.0 else (1.0, "s")


def _diagonal(axes: Axes, values: FloatArray, share: float = 0.0) -> None:
    """The line where both are equal, over the range of ``values``, with a band of ±``share``."""
    low, high = float(values.min()), float(values.max())
    if share:
        ends = np.array([low * 0.9, high * 1.1])
        axes.fill_between(
            ends, ends * (1 - share), ends * (1 + share), color=PALETTE[2], alpha=0.15, linewidth=0
        )
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=4)
