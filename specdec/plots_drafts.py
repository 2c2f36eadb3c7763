"""Plots that compare drafters, in the look of ``specdec.plots``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from specdec.plots import _DPI, _MARKERS, GRID, MUTED, PALETTE, _colour, _figure, _need, _style

_MOST_LINES = 14
"""In one panel."""
_WIDE = 3.0
"""Plain steps, beyond which costs are drawn on a logarithmic axis."""


def tau_against_cost(cells: pl.DataFrame) -> Figure:
    """Tokens per step against the cost of a step; along each grey line the speed-up is the same.

    Where some drafts are many times as dear as others, both axes are logarithmic. Colours that come a second time are
    dashed.

    Args:
        cells: columns ``drafter``, ``num_drafts``, ``temperature``, ``tau`` and ``step_ratio``, the seconds of a
            step over those of a plain one.
    """
    _need(cells, "cells")
    figure, axes = _figure(7.4, 4.8)
    right = 1.12 * max(1.2, float(cells["step_ratio"].max()))  # pyright: ignore[reportArgumentType]
    top = 1.12 * max(1.2, float(cells["tau"].max()))  # pyright: ignore[reportArgumentType]
    is_wide = right > _WIDE
    left, bottom = (0.8, 0.95) if is_wide else (0.0, 0.0)
    if is_wide:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, values in ((axes.xaxis, (1, 2, 3, 5, 10, 20, 50)), (axes.yaxis, (1, 1.5, 2, 3, 5, 10))):
            axis.set_major_locator(FixedLocator(values))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    for speedup in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0):
        start, end = max(left, bottom / speedup), min(right, top / speedup)
        if start >= end:
            continue
        style = {"color": MUTED, "linewidth": 1.2} if speedup == 1.0 else {"color": GRID, "linewidth": 1.2}
        axes.plot([start, end], [start * speedup, end * speedup], zorder=1, **style)
        axes.annotate(
            f"{speedup:g}×", (end, end * speedup), color=MUTED, fontsize=8, ha="right", va="top", zorder=1
        )
    names, temperatures = cells["drafter"].unique(maintain_order=True), cells["temperature"].unique().sort()
    for index, name in enumerate(names):
        for place, temperature in enumerate(temperatures):
            chosen = (pl.col("drafter") == name) & (pl.col("temperature") == temperature)
            mine = cells.filter(chosen).sort("num_drafts")
            axes.plot(
                mine["step_ratio"],
                mine["tau"],
                marker=_MARKERS[place % len(_MARKERS)],
                color=_colour(index),
                linestyle="-" if index < len(PALETTE) else "--",
                label=f"{name}, T={temperature:g}" if len(temperatures) > 1 else name,
                linewidth=1.0,
                markersize=5,
                alpha=0.9,
                zorder=3,
            )
            for x, y, k in mine.select("step_ratio", "tau", "num_drafts").iter_rows():
                axes.annotate(
                    str(k), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7, color=MUTED
                )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    _style(
        axes,
        "What a step gives, and what it costs",
        "seconds of a step / of a plain step",
        "τ, tokens per step",
    )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def survival(cells: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Share of verifications that accept a draft up to each position; the area under a line is τ - 1.

    Of many cells each drafter has a panel of its own.

    Args:
        cells: drafter, which decides the colour or the panel, label, and shares at positions 1, 2, ….
    """
    drawn = [cell for cell in cells if len(cell[2])]
    _need(drawn, "drafts")
    drafters = list(dict.fromkeys(name for name, _, _ in drawn))
    top = min(1.0, 1.15 * max(max(values) for _, _, values in drawn))
    if len(drawn) <= _MOST_LINES:
        figure, axes = _figure(7.4, 4.4)
        panels = {axes: drafters}
    else:
        columns = min(4, len(drafters))
        rows = -(-len(drafters) // columns)
        figure = Figure(figsize=(3.4 * columns, 0.4 + 2.9 * rows), dpi=_DPI, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        panels = {axes: [name] for axes, name in zip(grid, drafters, strict=False)}
        for axes in grid[len(drafters) :]:
            axes.set_visible(False)
    for axes, shown in panels.items():
        for drafter in shown:
            own = [cell for cell in drawn if cell[0] == drafter]
            for place, (_, label, values) in enumerate(own):
                axes.plot(
                    np.arange(1, len(values) + 1),
                    values,
                    label=label,
                    color=_colour(drafters.index(drafter) if len(panels) == 1 else place),
                    marker=_MARKERS[place % len(_MARKERS)],
                    linewidth=1.2,
                    markersize=4,
                )
        axes.set_ylim(0.0, top)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        title = "Acceptance by position" if len(panels) == 1 else shown[0]
        _style(axes, title, "draft position, in trees the depth", "P(accepted up to here)")
        if len(panels) == 1:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.legend(frameon=False, fontsize=7, loc="upper right")
    return figure


def controllers_by_load(
    cells: pl.DataFrame, load: str, value: str, *, title: str, xlabel: str = "", ylabel: str = ""
) -> Figure:
    """A line for each controller over the load, on a logarithmic axis; of speed-ups, plain is the line at 1.

    Args:
        cells: columns ``controller``, ``load`` (positive) and ``value``; plain decoding is the controller ``off``.
        load, value: names of columns.
        xlabel, ylabel: by default the names.
    """
    _need(cells, "cells")
    figure, axes = _figure(7.4, 4.4)
    is_ratio = value == "speedup"
    if is_ratio:
        axes.axhline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="plain")
    for index, name in enumerate(cells["controller"].unique(maintain_order=True)):
        if is_ratio and name == "off":
            continue
        mine = cells.filter(pl.col("controller") == name).sort(load)
        style = {
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 5,
            "color": _colour(index - is_ratio),
        }
        is_subject = name == "goodput"
        style |= {"linewidth": 2.2 if is_subject else 1.2, "zorder": 4 if is_subject else 3}
        axes.plot(mine[load], mine[value], label=name, **style)
    axes.set_xscale("log", base=2)
    ticks = cells[load].unique().sort().to_list()
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.0)
    _style(axes, title, xlabel or load, ylabel or value)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
