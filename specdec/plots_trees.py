"""Plots of draft trees, in the look of ``specdec.plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

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

Row = Mapping[str, Any]
_MAX_DEPTHS = 6


def acceptance_by_rank(rows: Sequence[Row]) -> Figure:
    """The rate of each rank with its interval: of all depths on the left, by depth of the parent on the right.

    Args:
        rows: ``depth`` (``None`` for all), ``rank`` from 0, ``rate``, ``low``, ``high``.
    """
    _need(rows, "ranks")
    figure, panels = _figure_row(2, 10.0, 4.0)
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    for axes, chosen in zip(panels, ([None], [depth for depth in depths if depth is not None]), strict=True):
        for index, depth in enumerate(chosen[:_MAX_DEPTHS]):
            mine = [row for row in rows if row["depth"] == depth]
            ranks = np.array([row["rank"] + 1 for row in mine], np.float64)
            rates = np.array([row["rate"] for row in mine])
            bars = np.abs(np.array([[row["low"] for row in mine], [row["high"] for row in mine]]) - rates)
            shift = 0.0 if len(chosen) == 1 else 0.08 * (index - (min(len(chosen), _MAX_DEPTHS) - 1) / 2)
            axes.errorbar(
                ranks + shift,
                rates,
                yerr=bars,
                color=_colour(index),
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=2,
                label=f"depth {depth}",
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0.0)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0.0, min(1.0, top))
    _style(panels[0], "Acceptance by rank", "rank of the child", "P(this child is the accepted one)")
    _style(panels[1], "By depth of the parent (0: the root)", "rank of the child", "")
    panels[1].legend(frameon=False, fontsize=8)
    return figure


def tau_by_nodes(rows: Sequence[Row], best: ArrayLike) -> Figure:
    """Tokens per step against the tree's size: the best that the rates allow, and what was measured.

    Hollow marks are predictions for trees of other shapes.

    Args:
        rows: ``kind``, ``batch``, ``nodes``, ``tau`` and ``predicted_tau`` (``None`` if there is none); of what changes
            its trees, ``drafts``, the mean.
        best: predicted, of the best tree of 0, 1, … nodes.
    """
    _need(rows, "trees")
    figure, axes = _figure(7.4, 4.6)
    curve = np.asarray(best, np.float64)
    axes.plot(np.arange(curve.size), curve, color=MUTED, linewidth=1.4, zorder=2)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for row in rows:
        colour, marker = _colour(kinds.index(row["kind"])), _marker(batches.index(row["batch"]))
        nodes = row["drafts"] if row["kind"] == "goodput" else row["nodes"]
        axes.scatter(nodes, row["tau"], s=30, linewidths=0, alpha=0.85, zorder=4, color=colour, marker=marker)
        if row["predicted_tau"] is not None and row["kind"] not in ("own", "sequoia"):
            shape: dict[str, Any] = {"facecolors": "none", "edgecolors": colour, "marker": marker}
            axes.scatter(nodes, row["predicted_tau"], s=60, linewidths=1.1, zorder=3, **shape)
    handles: list[Any] = [Line2D([], [], color=MUTED, label="best tree, predicted")]
    handles += [Patch(color=_colour(index), label=kind) for index, kind in enumerate(kinds)]
    handles += [
        Line2D([], [], color=INK, linestyle="", marker=_marker(index), markersize=5, label=f"batch {batch}")
        for index, batch in enumerate(batches)
    ]
    hollow = {"marker": "o", "markersize": 5, "markerfacecolor": "none", "markeredgecolor": INK}
    handles.append(Line2D([], [], linestyle="", label="predicted, other shapes", **hollow))
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=1.0)
    _style(axes, "What a tree's nodes give", "nodes of the tree", "τ, tokens per step")
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def speedup_by_tree(rows: Sequence[Row]) -> Figure:
    """A panel for each batch: bars of measured speed-ups, a mark at the predicted one, the chosen tree's name in bold.

    Args:
        rows: ``batch``, ``tree``, ``is_chosen``, ``speedup`` and ``predicted_speedup`` (``None`` if there is none).
    """
    _need(rows, "trees")
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    most = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    width, height = 1.0 + 4.6 * len(batches), 1.8 + 0.36 * most
    if len(batches) == 1:
        figure, axes = _figure(width, height)
        panels = [axes]
    else:
        figure, panels = _figure_row(len(batches), width, height)
    right = 1.15 * max(max(row["speedup"], row["predicted_speedup"] or 0.0, 1.0) for row in rows)
    for axes, batch in zip(panels, batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        values = [row["speedup"] for row in mine]
        axes.barh(np.arange(len(mine)), values, 0.62, color=PALETTE[0], zorder=2, label="measured")
        for place, row in enumerate(mine):
            predicted = row["predicted_speedup"]
            if predicted is not None:
                ends = [place - 0.4, place + 0.4]
                label = "predicted" if place == 0 else None
                axes.plot([predicted] * 2, ends, color=PALETTE[5], linewidth=2.2, zorder=4, label=label)
            beside = max(row["speedup"], predicted or 0.0), place
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": INK}
            axes.annotate(f"{row['speedup']:.2f}", beside, (5, 0), **style)
        axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=3)
        axes.set_yticks(range(len(mine)), [row["tree"] for row in mine])
        axes.invert_yaxis()
        axes.set_xlim(0.0, right)
        _style(axes, f"Batch {batch}", "speed-up over plain decoding", "", grid="x")
        axes.tick_params(axis="y", length=0)
        for label, row in zip(axes.get_yticklabels(), mine, strict=True):
            label.set_fontweight("bold" if row["is_chosen"] else "normal")
    _legend_below(figure, panels[0])
    return figure


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]
