"""Plots of kernel timings."""

from __future__ import annotations

import polars as pl
from matplotlib.figure import Figure


def published_against_roofline(known: pl.DataFrame) -> Figure:
    """How near published kernels come to what the shapes cost at the chips' peaks.

    Args:
        known: ``op``, ``chip``, ``roofline_us`` and ``published_us``.
    """
    figure = Figure(figsize=(7.0, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (chip,) in enumerate(known.select("chip").unique(maintain_order=True).iter_rows()):
        for op, marker in (("linear", "o"), ("paged_attention", "^")):
            some = known.filter((pl.col("chip") == chip) & (pl.col("op") == op))
            if some.height:
                axes.scatter(
                    some["roofline_us"].to_numpy(),
                    some["published_us"].to_numpy(),
                    marker=marker,
                    color=f"C{number}",
                    s=22,
                    label=f"{chip}, {op}",
                )
    low, high = (
        float(x) for x in (known["roofline_us"].to_numpy().min(), known["published_us"].to_numpy().max())
    )
    for share in (1.0, 0.5):
        axes.plot(
            [low, high], [low / share, high / share], color="grey", lw=0.8, ls="-" if share == 1 else ":"
        )
    axes.set(xscale="log", yscale="log", xlabel="roofline, µs", ylabel="published, µs")
    axes.set_title("solid: at the roofline, dotted: half of it")
    axes.legend(fontsize=7)
    return figure
