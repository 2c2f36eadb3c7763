"""Results that are written row by row, so that a stopped experiment loses nothing and resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specdec.config import Config

Row = dict[str, Any]


def fingerprint(config: Config, *without: str) -> str:
    """Tells configurations apart by all that results depend on.

    Args:
        without: options of the experiment that only say which rows are wanted.
    """
    plain = {key: value for key, value in config.as_dict().items() if key not in ("tracking", "output_root")}
    options = {key: value for key, value in plain["experiment"].items() if key not in without}
    text = json.dumps({**plain, "experiment": options}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(path: Path, config_hash: str | None = None) -> list[Row]:
    """The rows of a file of JSON lines, none if there is no file; the half line of a killed run is left out.

    Args:
        config_hash: take those rows alone whose ``config_hash`` it is.
    """
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if config_hash is None or row.get("config_hash") == config_hash]


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
