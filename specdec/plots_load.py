"""Plots of load: what waits and runs over time, policies over rising load, cost of simulating.

The look is that of ``specdec.plots``; each function takes data and returns a matplotlib ``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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

_MAX_POINTS = 2000
_LINES = ("-", "--")  # a second round through the palette


def policy_curves(
    cells: pl.DataFrame, breaks: Mapping[str, float], *, slo_s: Mapping[str, float] | None = None
) -> Figure:
    """Goodput, p99 of time to first token and p99 of time per output token against load, a line for each policy.

    Args:
        cells: columns ``policy``, ``rate_per_s``, ``goodput_per_s``, ``ttft_p99_s``, ``tpot_p99_s``.
        breaks: policy → first rate that it cannot keep up with, marked by a cross.
        slo_s: limits to mark, by ``"ttft_s"`` and ``"tpot_s"``.
    """
    _need(cells, "cells")
    figure, panels = _figure_row(3, 13.0, 4.6)
    columns = {"goodput_per_s": 1.0, "ttft_p99_s": 1e3, "tpot_p99_s": 1e3}
    policies = cells["policy"].unique(maintain_order=True).to_list()
    for axes, (column, scale) in zip(panels, columns.items(), strict=True):
        for index, policy in enumerate(policies):
            mine = cells.filter(pl.col("policy") == policy).sort("rate_per_s")
            x, y = mine["rate_per_s"].to_numpy(), mine[column].to_numpy() * scale
            style = {"color": _colour(index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
            label = policy.replace("_", " ")
            axes.plot(
                x,
                y,
                label=label,
                linewidth=1.4,
                linestyle=_LINES[index // len(PALETTE) % 2],
                zorder=3,
                **style,
            )
            broken = x == breaks.get(policy, np.nan)
            axes.plot(x[broken], y[broken], "x", color=INK, markersize=9, markeredgewidth=1.6, zorder=4)
        axes.set_xlim(left=0.0)
    _finish_goodput(panels[0], cells)
    limits = slo_s or {}
    for axes, name, heading in (
        (panels[1], "ttft_s", "p99 time to first token"),
        (panels[2], "tpot_s", "p99 time per output token"),
    ):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        _style(axes, heading, "offered load (requests/s)", "ms")
        _mark_limit(axes, limits.get(name))
    if breaks:
        panels[0].plot([], [], "x", color=INK, markersize=8, markeredgewidth=1.6, label="breaks")
    _legend_below(figure, panels[0])
    return figure


def _finish_goodput(axes: Axes, cells: pl.DataFrame) -> None:
    top = float(cells["rate_per_s"].to_numpy().max())
    axes.plot([0.0, top], [0.0, top], color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    axes.annotate(
        "all within the SLO",
        (0.42 * top, 0.42 * top),
        (-4, 6),
        textcoords="offset points",
        fontsize=8,
        color=MUTED,
        ha="right",
    )
    axes.set_ylim(0.0, 1.03 * top)
    _style(axes, "Goodput", "offered load (requests/s)", "requests/s within the SLO")


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, … on a logarithmic axis, written as they are."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _mark_limit(axes: Axes, limit_s: float | None) -> None:
    if limit_s is None or not np.isfinite(limit_s):
        return
    axes.axhline(1e3 * limit_s, color=PALETTE[5], linewidth=1.0, linestyle=(0, (4, 2)))
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate("SLO", (0.01, 1e3 * limit_s), (0, 3), **place, fontsize=8, color=PALETTE[5])


def growth(num_requests: Sequence[float], cpu_s: Sequence[float]) -> tuple[Figure, float]:
    """CPU seconds against requests, both logarithmic, and the slope of the line through them (1 is linear).

    Args:
        num_requests, cpu_s: at least two points, positive.
    """
    x, y = np.asarray(num_requests, np.float64), np.asarray(cpu_s, np.float64)
    if x.size < 2:
        raise ValueError(f"{x.size} points have no slope: give at least two")
    slope, at_one = np.polyfit(np.log(x), np.log(y), 1)
    figure, axes = _figure(5.6, 4.2)
    line = np.geomspace(x.min(), x.max(), 32)
    axes.plot(line, np.exp(at_one) * line**slope, color=MUTED, linewidth=1.2, label=f"slope {slope:.2f}")
    axes.plot(x, y, "o", color=PALETTE[0], label="measured", zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    _style(axes, "Cost of simulating", "requests", "CPU seconds")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure, float(slope)


def load_over_time(steps: pl.DataFrame, num_blocks: int) -> Figure:
    """Requests that run and wait (above) and the share of the KV blocks in use (below) over time.

    Args:
        steps: steps table.
        num_blocks: KV blocks of the replica.

    Raises:
        ValueError: the table has no rows.
    """
    _need(steps, "steps")
    shown = steps.gather_every(max(1, steps.height // _MAX_POINTS))
    at_s = shown["end_s"].to_numpy() - float(steps["start_s"][0])
    figure = Figure(figsize=(9.0, 4.6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for index, (column, label) in enumerate({"num_running": "running", "num_waiting": "waiting"}.items()):
        top.step(at_s, shown[column], where="pre", label=label, color=_colour(index), linewidth=1.2)
    used = 1.0 - shown["num_free_blocks"].to_numpy() / num_blocks
    bottom.step(at_s, used, where="pre", color=PALETTE[2], linewidth=1.2)
    top.set_ylim(bottom=0.0)
    bottom.set_ylim(0.0, 1.02)
    bottom.set_xlim(left=0.0)
    _style(top, "Load over time", "", "requests")
    _style(bottom, "", "time (s)", "KV in use")
    top.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    return figure
