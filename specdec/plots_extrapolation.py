"""Plots of what lies beyond measurements: where speculation pays, large fleets, costs, cheapest fleets.

The look is that of ``specdec.plots``; each function takes data and returns a matplotlib ``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from specdec.plots import (
    _DPI,
    _MARKERS,
    INK,
    MUTED,
    PALETTE,
    _colour,
    _figure,
    _legend_below,
    _need,
    _style,
)
from specdec.plots_load import _plain_ticks

FloatArray = NDArray[np.float64]
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Speed-ups at which the colour changes; white lies around 1."""
_LINE_STYLES = ("-", (0, (4, 2)), (0, (1, 1.4)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class PhasePanel:
    """One small picture.

    Attributes:
        row, column: where it stands. label: above it.
        batches, alphas: float64 [B], [A].
        speedups: float64 [A, B]; NaN stays blank.
    """

    row: str
    column: str
    label: str
    batches: FloatArray
    alphas: FloatArray
    speedups: FloatArray


def phase_diagram(
    panels: Sequence[PhasePanel],
    lines: Mapping[tuple[str, str], Mapping[str, FloatArray]],
    *,
    columns: Sequence[str],
    title: str,
) -> Figure:
    """Speed-up over batch × acceptance, a row of panels for each chip.

    Args:
        panels: at most one for each row and column.
        lines: (row, column) → label → acceptance by batch; NaN interrupts a line.
        columns: in order.
    """
    _need(panels, "panels")
    rows = list(dict.fromkeys(panel.row for panel in panels))
    figure = Figure(
        figsize=(1.1 + 2.75 * len(columns), 1.7 + 2.0 * len(rows)), dpi=_DPI, layout="constrained"
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    colours, norm = _gain_colours()
    drawn: Any = None
    for panel in panels:
        axes = grid[rows.index(panel.row)][list(columns).index(panel.column)]
        mesh = np.ma.masked_invalid(np.clip(panel.speedups, LEVELS[0], LEVELS[-1] - 1e-9))
        axes.set_facecolor("#F2F2F2")
        if panel.batches.size > 1:
            drawn = axes.contourf(
                panel.batches, panel.alphas, mesh, levels=list(LEVELS), cmap=colours, norm=norm
            )
        _draw_lines(axes, panel, lines.get((panel.row, panel.column), {}))
        fitting = panel.batches[np.isfinite(panel.speedups).any(axis=0)]
        if fitting.size < panel.batches.size - 1:  # room for the words
            first = float(panel.batches[fitting.size])
            place = {"ha": "right", "va": "top", "fontsize": 7, "color": MUTED}
            axes.text(
                float(panel.batches[-1]) * 0.93,
                0.97 * float(panel.alphas[-1]),
                f"{first:g} do\nnot fit",
                **place,
            )
        axes.set_title(panel.label, loc="left", fontsize=9, color=INK, pad=3)
    for index, column in enumerate(columns):
        top = grid[0][index]
        top.annotate(
            column,
            (0.5, 1.0),
            (0, 18),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            fontweight="bold",
            color=INK,
        )
        _log_batches(grid[-1][index], panels[0].batches)
        grid[-1][index].set_xlabel("requests at once", fontsize=9)
    for line in grid:
        line[0].set_ylabel("acceptance rate α", fontsize=9)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=grid.ravel().tolist(), shrink=0.6, aspect=36, pad=0.01)
        bar.set_label("speed-up over plain decoding, best number of drafts", fontsize=9)
        bar.set_ticks(list(LEVELS), labels=[f"{level:g}" for level in LEVELS])
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _gain_colours() -> tuple[LinearSegmentedColormap, BoundaryNorm]:
    """Loss in orange, gain in blue, each level its own shade."""
    below = sum(level < 1.0 for level in LEVELS)
    above = len(LEVELS) - 1 - below
    loss = LinearSegmentedColormap.from_list("loss", ["#B34A00", "#F6C9A0", "#FDF1E6"])
    gain = LinearSegmentedColormap.from_list("gain", ["#E4F0F8", "#7FB9DC", "#0072B2", "#00304F"])
    shades = [loss(value) for value in np.linspace(0.0, 1.0, below)]
    shades += [gain(value) for value in np.linspace(0.0, 1.0, above)]
    return LinearSegmentedColormap.from_list("speed-up", shades, N=below + above), BoundaryNorm(
        LEVELS, below + above
    )


def _draw_lines(axes: Axes, panel: PhasePanel, lines: Mapping[str, FloatArray]) -> None:
    for index, (label, alphas) in enumerate(lines.items()):
        style = {
            "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)],
            "linewidth": 1.7 if index == 0 else 1.2,
        }
        axes.plot(panel.batches, alphas, color=INK, label=label, zorder=4, **style)
    axes.set_xscale("log")
    axes.set_xlim(float(panel.batches[0]), float(panel.batches[-1]))
    axes.set_ylim(float(panel.alphas[0]), float(panel.alphas[-1]))
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def _log_batches(axes: Axes, batches: FloatArray) -> None:
    ticks = [value for value in (1, 4, 16, 64, 256, 1024) if batches[0] <= value <= batches[-1]]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def time_over_load(
    loads: FloatArray, curves: Mapping[str, FloatArray], load: float, break_even: float
) -> Figure:
    """Time per output token against the load of a replica, a line for each way to decode.

    Args:
        loads: requests per second, [N].
        curves: name → seconds, [N]; infinite above the capacity.
        load: the one that was asked about.
        break_even: where the second curve crosses the first; 0 or infinite is nowhere.
    """
    _need(curves, "curves")
    figure, axes = _figure(7.0, 4.0)
    for index, (name, seconds) in enumerate(curves.items()):
        shown = np.where(np.isfinite(seconds), 1e3 * seconds, np.nan)
        axes.plot(loads, shown, color=_colour(index), linewidth=1.8, label=name)
        last = np.flatnonzero(np.isfinite(seconds))
        if last.size and last[-1] < loads.size - 1:
            axes.plot(loads[last[-1]], shown[last[-1]], "|", color=_colour(index), markersize=14)
    axes.axvline(load, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), label="this load")
    if 0.0 < break_even < np.inf:
        axes.axvline(break_even, color=PALETTE[5], linewidth=1.0, linestyle=(0, (1, 1.4)), label="break-even")
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=0.0)
    _style(axes, "Time per output token", "requests/s a replica", "ms (mean)")
    _legend_below(figure, axes)
    return figure


_FLEET_COLUMNS = {
    "share": ("Within the SLO", "share of requests", 1.0),
    "tpot_p99_s": ("p99 per output token", "ms", 1e3),
    "ttft_p99_s": ("p99 to the first token", "s", 1.0),
    "cost_usd": ("Cost", "$ per 1M tokens within the SLO", 1.0),
}


def fleets(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Cases by workload and figure: points with the ranges over seeds (thick) and cost models (thin).

    Args:
        rows: ``mix``, ``num_replicas``, ``case`` and each figure with ``<figure>_seed`` and ``<figure>_model``.
    """
    _need(rows, "fleets")
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    numbers = list(dict.fromkeys(row["num_replicas"] for row in rows))
    height = 0.28 * len(cases) * (0.6 + 0.4 * len(numbers)) + 0.9
    figure = Figure(figsize=(13.0, 0.6 + height * len(mixes)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(mixes), len(_FLEET_COLUMNS), squeeze=False, sharey=True)
    for line, mix in zip(grid, mixes, strict=True):
        for axes, (key, (heading, unit, scale)) in zip(line, _FLEET_COLUMNS.items(), strict=True):
            for row in (row for row in rows if row["mix"] == mix):
                index = numbers.index(row["num_replicas"])
                at = cases.index(row["case"]) + 0.3 * (index - (len(numbers) - 1) / 2)
                _draw_range(axes, row, key, at, scale, index)
            axes.set_yticks(range(len(cases)), [case.replace("_", " ") for case in cases])
            axes.margins(x=0.08)
            if key.endswith("_s"):
                axes.set_xscale("log")
                _plain_ticks(axes.xaxis)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(3))  # shares that nearly agree have long labels
            _style(axes, f"{heading}, {mix}" if axes is line[0] else heading, unit, "", grid="x")
            axes.tick_params(axis="y", length=0)
        line[0].set_ylim(len(cases) - 0.5, -0.5)
    for index, number in enumerate(numbers):
        style = {"color": _colour(index), "marker": _MARKERS[index % len(_MARKERS)], "linestyle": "none"}
        grid[0][0].plot([], [], label=f"{number} replicas", **style)
    _legend_below(figure, grid[0][0])
    return figure


def _draw_range(axes: Axes, row: Mapping[str, Any], key: str, at: float, scale: float, index: int) -> None:
    value = row[key]
    if value is None or not np.isfinite(value):
        return
    for suffix, width, alpha in (("model", 1.2, 1.0), ("seed", 4.0, 0.45)):
        span = row[f"{key}_{suffix}"]
        if span and np.isfinite(span).all():
            ends = [scale * end for end in span]
            axes.plot(ends, [at, at], color=_colour(index), linewidth=width, alpha=alpha, zorder=2)
    axes.plot(
        scale * value,
        at,
        color=_colour(index),
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5,
        zorder=3,
    )


def technique_gains(rows: Sequence[Mapping[str, Any]], techniques: Sequence[str], gain: float) -> Figure:
    """Left, the cost of a token on each chip; right, how many times cheaper each technique makes it, with ranges.

    Args:
        rows: ``chip``, ``technique``, ``base_usd``, ``cheaper``, ``cheaper_low``, ``cheaper_high``.
        gain: of each technique on its own measure, marked.
    """
    _need(rows, "chips")
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    figure = Figure(figsize=(12.0, 1.5 + 0.62 * len(chips)), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.4], sharey=True)
    costs = [next(row["base_usd"] for row in rows if row["chip"] == chip) for chip in chips]
    known = np.where(np.isfinite(costs), costs, 0.0)
    bars = left.barh(range(len(chips)), known, 0.6, color=MUTED, alpha=0.55, zorder=2)
    labels = [f"${cost:.2f}" if np.isfinite(cost) else "not within the SLO" for cost in costs]
    left.bar_label(bars, labels=labels, padding=3, fontsize=8, color=INK)
    left.margins(x=0.25)
    for row in rows:
        index = list(techniques).index(row["technique"])
        at = chips.index(row["chip"]) + 0.15 * (index - (len(techniques) - 1) / 2)
        if not np.isfinite(row["cheaper"]):
            continue
        ends = [row["cheaper_low"], row["cheaper_high"]]
        if np.isfinite(ends).all():
            right.plot(ends, [at, at], color=_colour(index), linewidth=1.4, zorder=2)
        right.plot(
            row["cheaper"],
            at,
            color=_colour(index),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5.5,
            linestyle="none",
            label=row["technique"] if row["chip"] == chips[0] else None,
            zorder=3,
        )
    right.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
    right.axvline(
        gain, color=PALETTE[5], linewidth=1.0, linestyle=(0, (1, 1.4)), label=f"the gain itself, {gain:g} ×"
    )
    left.set_yticks(range(len(chips)), chips)
    left.set_ylim(len(chips) - 0.5, -0.5)
    _style(left, "Cost as it is", "$ per 1M output tokens", "", grid="x")
    _style(right, f"Times cheaper with each technique {gain:g} × as good", "×", "", grid="x")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def cost_front(rows: Sequence[Mapping[str, Any]], slo_tpot_s: float) -> Figure:
    """Fleets by rent and p99 time per output token, a colour for each chip; the front is a line.

    Args:
        rows: ``chip``, ``usd_per_hour``, ``tpot_p99_s``, ``verdict``, ``on_front``, and for labels
            ``tensor_parallel``, ``replicas`` and ``case``.
        slo_tpot_s: drawn as a line.
    """
    shown = [row for row in rows if row["tpot_p99_s"] is not None]
    _need(shown, "fleets")
    figure, axes = _figure(8.5, 5.0)
    chips = list(dict.fromkeys(row["chip"] for row in shown))
    for index, chip in enumerate(chips):
        for served, filled in ((True, _colour(index)), (False, "none")):
            mine = [row for row in shown if row["chip"] == chip and (row["verdict"] == "served") == served]
            axes.scatter(
                [row["usd_per_hour"] for row in mine],
                [1e3 * row["tpot_p99_s"] for row in mine],
                s=34,
                marker=_MARKERS[index % len(_MARKERS)],
                facecolors=filled,
                edgecolors=_colour(index),
                label=chip if served else None,
                zorder=3,
            )
    front = sorted((row for row in shown if row["on_front"]), key=lambda row: row["usd_per_hour"])
    axes.step(
        [row["usd_per_hour"] for row in front],
        [1e3 * row["tpot_p99_s"] for row in front],
        where="post",
        color=INK,
        linewidth=1.2,
        label="front",
        zorder=2,
    )
    for row in front:
        text = f"{row['replicas']} × {row['tensor_parallel']} {row['chip']}\n{row['case'].replace('_', ' ')}"
        # Below and left of the front is nothing: a fleet there would be the front.
        place = {"textcoords": "offset points", "fontsize": 7.5, "color": INK, "va": "top", "ha": "right"}
        axes.annotate(text, (row["usd_per_hour"], 1e3 * row["tpot_p99_s"]), (-5, -3), **place)
    axes.axhline(1e3 * slo_tpot_s, color=PALETTE[5], linewidth=1.0, linestyle=(0, (4, 2)), label="SLO")
    axes.scatter([], [], s=34, facecolors="none", edgecolors=MUTED, label="outside the SLO")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.margins(x=0.12, y=0.12)
    _style(axes, "Cheapest fleets", "$ per hour", "p99 time per output token, ms")
    _legend_below(figure, axes)
    return figure
