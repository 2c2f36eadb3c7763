"""Plots of training. The look is that of ``specdec.plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specdec.plots import _MARKERS, INK, _colour, _figure_row, _legend_below, _need, _style


def learning_curve(curve: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Left: held-out acceptance by draft position over the tokens seen; right: tokens per step of greedy chains.

    Args:
        curve: ``tokens``, ``greedy`` (a rate for each draft position, given that the drafts before it were accepted)
            and ``tau``.
    """
    _need(curve, "evaluations")
    figure, (left, right) = _figure_row(2, 9.0, 3.8)
    tokens = [point["tokens"] / 1e3 for point in curve]
    for index in range(len(curve[0]["greedy"])):
        rates = [point["greedy"][index] for point in curve]
        style = {"color": _colour(index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
        left.plot(tokens, rates, label=f"draft {index + 1}", clip_on=False, zorder=3, **style)
    right.plot(tokens, [point["tau"] for point in curve], color=INK, marker="o", markersize=4, zorder=3)
    left.set_ylim(0.0, 1.0)
    right.set_ylim(bottom=1.0)
    _style(left, title, "thousand tokens seen", "P(accepted | reached)")
    _style(right, f"τ of {len(curve[0]['greedy'])}-token chains", "thousand tokens seen", "tokens per step")
    _legend_below(figure, left)
    return figure
