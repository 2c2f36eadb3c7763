"""Results that are written row by row, so that a stopped experiment loses nothing and resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, none if there is no file; the half line of a killed run is left out."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@contextmanager
def appended(path: Path) -> Iterator[Callable[[Row], None]]:
    """Adds rows to ``path``, each on disk at once, the first on a line of its own."""
    with path.open("a+") as lines:
        lines.seek(0)
        text = lines.read()
        if text and not text.endswith("\n"):
            lines.write("\n")

        def add(row: Row) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        yield add
