"""Tables for the console. The plots are in ``specdec.plots``.

>>> Console().print(summary_table(rows, {"drafter": "drafter", "speedup": "speed-up ×"}, title="quickstart"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def summary_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | Sequence[str] | None = None,
    *,
    title: str = "",
) -> Table:
    """A rich table of ``rows``, numbers right-aligned.

    Args:
        rows: equal-keyed mappings; a missing key or ``None`` or ``nan`` shows as a dash.
        columns: keys to show, in order, with their headings; default all keys of the first row.
        title: above the table.

    Raises:
        ValueError: no rows, or a column that no row has.
    """
    if not rows:
        raise ValueError("no rows to show: did the experiment measure anything?")
    keys = list(rows[0]) if columns is None else list(columns)
    headings = columns if isinstance(columns, Mapping) else {key: key.replace("_", " ") for key in keys}
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for key in keys:
        if not any(key in row for row in rows):
            raise ValueError(f"column {key!r} is in no row: known are {', '.join(rows[0])}")
        numeric = all(_is_number(row.get(key)) for row in rows)
        table.add_column(headings[key], justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*(format_value(row.get(key)) for key in keys))
    return table


def latency_rows(table: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows for :func:`summary_table` from ``metrics.latency_table``, in milliseconds."""
    return [
        {"latency (ms)": name.removesuffix("_s"), **{key: value * 1e3 for key, value in columns.items()}}
        for name, columns in table.items()
    ]


def format_value(value: Any) -> str:
    """Three significant digits, or all digits of an integer; a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0.0 or math.isinf(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
