"""The plots of a run. Each function takes data and returns a matplotlib ``Figure``; none touches global
state.

>>> acceptance_by_position({"ngram": metrics.acceptance_by_position(rows)}).savefig("acceptance.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from specdec.metrics import PHASES, latencies

# Okabe and Ito's palette, told apart with any colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INK, MUTED, GRID = "#222222", "#6B6B6B", "#E3E3E3"
PHASE_COLOURS = {"draft": PALETTE[1], "verify": PALETTE[0], "sample": PALETTE[2], "overhead": "#9A9A9A"}
PREFILL, DECODE, SPECULATED = PALETTE[3], PALETTE[4], PALETTE[2]
# Behind labels that a line may cross.
_BACKING = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
_DPI = 150
_MARKERS = "osD^vPX"


def speedup_by_task(
    speedups: Mapping[str, Mapping[str, float]], *, title: str = "Speed-up over plain decoding"
) -> Figure:
    """Grouped bars: one group for each task, one bar for each drafter, a line at 1 for plain decoding.

    Args:
        speedups: drafter → task → ratio.
    """
    tasks = list(dict.fromkeys(task for by_task in speedups.values() for task in by_task))
    _need(tasks, "speed-ups")
    figure, axes = _figure(max(6.0, 1.2 + 0.5 * len(tasks) * (len(speedups) + 0.8)), 3.8)
    width = 0.8 / len(speedups)
    for index, (drafter, by_task) in enumerate(speedups.items()):
        heights = np.array([by_task.get(task, np.nan) for task in tasks], np.float64)
        at = np.arange(len(tasks)) + (index - (len(speedups) - 1) / 2) * width
        bars = axes.bar(at, heights, width * 0.94, label=drafter, color=_colour(index), zorder=2)
        labels = ["" if np.isnan(height) else f"{height:.2f}" for height in heights]
        axes.bar_label(bars, labels=labels, padding=2, fontsize=7.5, color=INK, bbox=_BACKING, zorder=4)
    axes.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=3, label="plain = 1")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.margins(y=0.14)
    _style(axes, title, "", "speed-up", grid="y")
    axes.tick_params(axis="x", length=0)
    _legend_below(figure, axes)
    return figure


def acceptance_by_position(
    tables: Mapping[str, pl.DataFrame], *, title: str = "Acceptance by draft position"
) -> Figure:
    """Left: the rate of a position once it is reached; right: the share of drafts that survive up to it.

    Args:
        tables: drafter → ``metrics.acceptance_by_position``; drafters without drafts are left out.
    """
    drawn = {name: table for name, table in tables.items() if table.height}
    _need(drawn, "drafts")
    figure, panels = _figure_row(2, 9.0, 3.8)
    columns = ("conditional_rate", "survival")
    headings = (title, "Survival up to a position")
    labels = ("P(accepted | reached)", "P(accepted up to here)")
    for axes, column, heading, label in zip(panels, columns, headings, labels, strict=True):
        for index, (name, table) in enumerate(drawn.items()):
            style = {"color": _colour(index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}
            axes.plot(table["position"], table[column], label=name, clip_on=False, zorder=3, **style)
        axes.set_ylim(0.0, 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _style(axes, heading, "draft position", label)
    _legend_below(figure, panels[0])
    return figure


def latency_cdf(runs: Mapping[str, pl.DataFrame], *, slo_s: Mapping[str, float] | None = None) -> Figure:
    """Cumulative shares of time to first token, time per output token and end-to-end time.

    Args:
        runs: name → requests table.
        slo_s: limits to mark, by ``"ttft_s"``, ``"tpot_s"`` or ``"e2e_s"``.
    """
    _need(runs, "runs")
    figure, panels = _figure_row(3, 11.0, 3.6)
    names = {"ttft_s": "Time to first token", "tpot_s": "Time per output token", "e2e_s": "End to end"}
    tables = {name: latencies(requests) for name, requests in runs.items()}
    for axes, (column, heading) in zip(panels, names.items(), strict=True):
        longest_s = max(float(np.nanmax(table[column].to_numpy(), initial=0.0)) for table in tables.values())
        scale, unit = (1e3, "ms") if longest_s < 1.0 else (1.0, "s")
        for index, (name, table) in enumerate(tables.items()):
            values = np.sort(table[column].drop_nans().to_numpy()) * scale
            shares = np.arange(1, values.size + 1) / max(values.size, 1)
            axes.step(values, shares, where="post", label=name, color=_colour(index), linewidth=1.6)
        limit_s = (slo_s or {}).get(column)
        if limit_s is not None and np.isfinite(limit_s):
            axes.axvline(limit_s * scale, color=PALETTE[5], linewidth=1.0, linestyle=(0, (4, 2)))
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate("SLO", (limit_s * scale, 0.03), (3, 0), **place, fontsize=8, color=PALETTE[5])
        axes.set_ylim(0.0, 1.02)
        axes.set_xlim(left=0.0)
        _style(axes, heading, unit, "share of requests" if axes is panels[0] else "")
    if len(runs) > 1:
        _legend_below(figure, panels[0])
    return figure


def step_gantt(steps: pl.DataFrame, *, max_steps: int = 500, max_requests: int = 200) -> Figure:
    """What ran when: the phases of each step above, the requests' prefill and decode steps below.

    Args:
        steps: steps table.
        max_steps, max_requests: drawn are the first steps, until either is reached; the heading says if that
            is not all.

    Raises:
        ValueError: the table has no rows.
    """
    if steps.height == 0:
        raise ValueError("the steps table is empty: there is nothing to draw")
    window, ids = _first_steps(steps, max_steps, max_requests)
    origin_s = float(window["start_s"][0])
    span_s = float(np.max(window["end_s"].to_numpy())) - origin_s
    scale, unit = (1e3, "ms") if span_s < 2.0 else (1.0, "s")
    heights = [0.28 * len(PHASES) + 0.2, min(7.0, max(1.2, 0.2 * len(ids)))]
    figure = Figure(figsize=(11.0, sum(heights) + 0.9), dpi=_DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    _draw_phases(top, window, origin_s, scale)
    _draw_requests(bottom, window, ids, origin_s, scale)
    whole = window.height == steps.height
    shown = f"{window.height} steps" if whole else f"first {window.height} of {steps.height} steps"
    _style(top, f"Phases of the {shown}", "", "", grid="x")
    _style(bottom, "", f"time ({unit})", "request", grid="x")
    bottom.set_xlim(0.0, span_s * scale)
    kinds = {"prefill": PREFILL, "decode, one token": DECODE, "decode, drafts accepted": SPECULATED}
    handles = [Patch(color=colour, label=name) for name, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _first_steps(steps: pl.DataFrame, max_steps: int, max_requests: int) -> tuple[pl.DataFrame, list[int]]:
    """The first steps in which no more than so many requests appear, and those requests in order."""
    seen: dict[int, None] = {}
    for index, row_ids in enumerate(steps["request_ids"].head(max_steps).to_list()):
        grown = seen | dict.fromkeys(row_ids)
        if index and len(grown) > max_requests:
            return steps.head(index), list(seen)
        seen = grown
    return steps.head(max_steps), list(seen)


def _draw_phases(axes: Axes, steps: pl.DataFrame, origin_s: float, scale: float) -> None:
    lanes = list(PHASES)
    at = steps["start_s"].to_numpy() - origin_s
    for phase in ("overhead", "draft", "verify", "sample"):
        length = steps[f"{phase}_s"].to_numpy()
        lane = lanes.index(phase)
        colour = PHASE_COLOURS[phase]
        # An edge of its own colour keeps a phase visible that is thinner than a pixel.
        _boxes(
            axes, at * scale, length * scale, np.full(at.size, lane), 0.8, colour, edge=colour, edge_width=0.5
        )
        at = at + length
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.5, -0.5)


def _draw_requests(axes: Axes, steps: pl.DataFrame, ids: list[int], origin_s: float, scale: float) -> None:
    lists = ["request_ids", "num_new", "emits", "row_accepted"]
    rows = steps.filter(pl.col("num_rows") > 0).select("start_s", "end_s", *lists).explode(lists)
    lanes = {request_id: lane for lane, request_id in enumerate(ids)}
    lane = np.array([lanes[request_id] for request_id in rows["request_ids"].to_list()], np.int64)
    start = (rows["start_s"].to_numpy() - origin_s) * scale
    length = (rows["end_s"] - rows["start_s"]).to_numpy() * scale
    decodes = rows["emits"].to_numpy() & (rows["num_new"].to_numpy() == 1)
    accepted = rows["row_accepted"].to_numpy() > 0
    kinds = ((~decodes, PREFILL), (decodes & ~accepted, DECODE), (decodes & accepted, SPECULATED))
    for chosen, colour in kinds:
        _boxes(axes, start[chosen], length[chosen], lane[chosen], 0.78, colour, edge="white", edge_width=0.15)
    every = max(1, len(ids) // 16)
    axes.set_yticks(range(0, len(ids), every), [str(i) for i in ids[::every]])
    axes.set_ylim(len(ids) - 0.5, -0.5)


def _boxes(
    axes: Axes,
    start: Any,
    length: Any,
    lane: Any,
    height: float,
    colour: str,
    *,
    edge: str,
    edge_width: float,
) -> None:
    """Horizontal bars as one collection: thousands of them draw in an instant."""
    low, high = lane - height / 2, lane + height / 2
    corners = [(start, low), (start + length, low), (start + length, high), (start, high)]
    vertices = np.stack([np.stack(np.broadcast_arrays(x, y), axis=-1) for x, y in corners], axis=1)
    style = {"facecolor": colour, "edgecolor": edge, "linewidth": edge_width, "snap": False}
    axes.add_collection(PolyCollection(list(vertices), **style, zorder=2))


def speedup_by_acceptance(
    measured: pl.DataFrame, formula: pl.DataFrame | None = None, *, title: str = "Speed-up by acceptance rate"
) -> Figure:
    """Measured points against the formula's lines, one colour for each draft length.

    Args:
        measured: columns ``k``, ``alpha``, ``speedup`` and, for error bars, ``low`` and ``high``.
        formula: columns ``k``, ``alpha``, ``speedup``.
    """
    _need(measured, "measurements")
    figure, axes = _figure(6.6, 4.4)
    for index, k in enumerate(sorted(measured["k"].unique().to_list())):
        points = measured.filter(pl.col("k") == k).sort("alpha")
        colour, marker = _colour(index), _MARKERS[index % len(_MARKERS)]
        if "low" in points.columns:
            ends = np.stack([points["speedup"] - points["low"], points["high"] - points["speedup"]])
            axes.errorbar(points["alpha"], points["speedup"], ends, fmt="none", ecolor=colour, capsize=2)
        axes.plot(points["alpha"], points["speedup"], marker, color=colour, label=f"k = {k}", zorder=3)
        if formula is not None:
            line = formula.filter(pl.col("k") == k).sort("alpha")
            axes.plot(line["alpha"], line["speedup"], color=colour, linewidth=1.3)
    axes.axhline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    axes.set_ylim(bottom=0.0)
    _style(axes, title, "acceptance rate α", "speed-up over plain")
    axes.legend(
        frameon=False, fontsize=9, title="points measured, lines formula" if formula is not None else None
    )
    return figure


def predicted_against_measured(
    measured: ArrayLike, predicted: ArrayLike, *, label: str, groups: Sequence[str] | None = None
) -> Figure:
    """Scatter with the diagonal and a band of ±10 %; the heading gives the mean absolute relative error.

    Args:
        measured, predicted: positive, [N] each.
        label: what they are, with the unit.
        groups: name of each point's group, for colours.
    """
    x, y = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)
    _need(x, "measurements")
    error = float(np.mean(np.abs(y - x) / x))
    figure, axes = _figure(5.2, 5.0)
    low, high = 0.9 * min(x.min(), y.min()), 1.1 * max(x.max(), y.max())
    diagonal = np.geomspace(low, high, 64)
    axes.fill_between(diagonal, 0.9 * diagonal, 1.1 * diagonal, color=GRID, label="±10 %", zorder=1)
    axes.plot(diagonal, diagonal, color=MUTED, linewidth=1.0, zorder=2)
    names = np.array(groups if groups is not None else [""] * x.size)
    for index, name in enumerate(dict.fromkeys(names.tolist())):
        style = {"color": _colour(index), "marker": _MARKERS[index % len(_MARKERS)], "alpha": 0.75}
        axes.scatter(
            x[names == name], y[names == name], s=22, linewidths=0, label=name or None, zorder=3, **style
        )
    if high / low > 20.0:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    _style(axes, f"Mean error {error:.1%}", f"measured {label}", f"predicted {label}")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def ratio_bars(
    ratios: Mapping[str, float],
    goals: Mapping[str, float] | None = None,
    *,
    title: str,
    xlabel: str = "ratio",
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Horizontal bars of ratios, with a line at 1 and, where there is one, a mark at the goal.

    Args:
        ratios: name → ratio.
        goals: name → goal.
        intervals: name → (low, high), drawn as error bars.
    """
    _need(ratios, "ratios")
    figure, axes = _figure(7.5, 1.3 + 0.42 * len(ratios))
    values = np.array(list(ratios.values()), np.float64)
    axes.barh(np.arange(values.size), values, 0.62, color=PALETTE[0], zorder=2)
    for index, (name, value) in enumerate(ratios.items()):
        interval, goal = (intervals or {}).get(name, (value, value)), (goals or {}).get(name, 0.0)
        if interval[0] < interval[1]:
            axes.plot(interval, [index, index], color=INK, linewidth=1.2, zorder=3)
        if goal:
            axes.plot([goal, goal], [index - 0.42, index + 0.42], color=PALETTE[5], linewidth=2.2, zorder=4)
        beside = (max(value, interval[1], goal), index)
        place = {"textcoords": "offset points", "va": "center", "bbox": _BACKING, "zorder": 5}
        axes.annotate(f"{value:.2f}", beside, (5, 0), **place, fontsize=9, color=INK)
    axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=3)
    axes.set_yticks(range(values.size), list(ratios))
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.12 * max(values.max(), *(goals or {}).values(), 1.0))
    _style(axes, title, xlabel + (" (mark: goal)" if goals else ""), "", grid="x")
    axes.tick_params(axis="y", length=0)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots()


def _figure_row(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, list(figure.subplots(1, count))


def _style(axes: Axes, title: str, xlabel: str, ylabel: str, grid: str = "both") -> None:
    """One look for all plots."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=9.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=9.5, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.7)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _need(data: Any, name: str) -> None:
    if len(data) == 0:
        raise ValueError(f"no {name} to draw: did the run measure anything?")
