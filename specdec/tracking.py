"""Where results go: the run directory, and Weights & Biases beside it.

The directory is the truth; W&B gets the same metrics, tables, plots and traces. ``offline`` (the default) needs
neither network nor account: ``wandb sync <run directory>/wandb/offline-run-…`` uploads it later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from specdec.config import TrackingConfig
from specdec.names import unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("offline", "online", "disabled")
log = logging.getLogger(__name__)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` so that ``path`` is never half written. NaN and infinity become null."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w") as file:
        json.dump(_finite(content), file, indent=2)
        file.write("\n")
    Path(name).replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Run:
    """One experiment run: its directory, its console and its W&B run.

    Attributes:
        directory: holds ``summary.json``, ``plots/``, ``tables/``, ``trace/``.
        console: for progress bars and tables.
    """

    directory: Path
    console: Console = field(default_factory=Console)
    _wandb: Any = None

    @property
    def trace_directory(self) -> Path:
        return self.directory / "trace"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars by name, to W&B's charts."""
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of equal-keyed rows: ``tables/<name>.json`` and a W&B table."""
        folder = self.directory / "tables"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", list(rows))
        if self._wandb and rows:
            import wandb

            columns = list(rows[0])
            data = [[_finite(row[column]) for column in columns] for row in rows]
            self._wandb.log({name: wandb.Table(columns=columns, data=data)})

    def log_figure(self, name: str, figure: Figure) -> Path:
        """A plot: ``plots/<name>.png`` and a W&B image."""
        folder = self.directory / "plots"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.png"
        figure.savefig(path)
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))})
        return path

    def log_trace(self, paths: Sequence[Path]) -> None:
        """Trace files, as one W&B artifact."""
        if self._wandb and paths:
            import wandb

            artifact = wandb.Artifact(f"trace-{self._wandb.id}", type="trace")
            for path in paths:
                artifact.add_file(str(path), name=path.name)
            self._wandb.log_artifact(artifact)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` and close the W&B run."""
        write_json(self.directory / "summary.json", summary)
        if self._wandb:
            self._wandb.summary.update(_flat(summary))
            self._wandb.finish(exit_code=0 if summary.get("status") == "ok" else 1, quiet=True)


def start_run(
    directory: Path, config: Mapping[str, Any], tracking: TrackingConfig, job_type: str, group: str | None
) -> Run:
    """Open a run in ``directory``; the W&B side follows ``tracking.mode``.

    Raises:
        ValueError: unknown mode, with the nearest ones.
    """
    if tracking.mode not in MODES:
        raise unknown_name("tracking.mode", tracking.mode, MODES)
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(directory)
    if tracking.mode != "disabled":
        import wandb

        run._wandb = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group or group,
            tags=tracking.tags,
            job_type=job_type,
            name=f"{job_type}-{directory.name}",
            dir=str(directory),
            mode=tracking.mode,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    return run


def _flat(summary: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested scalars by dotted name; lists are left to the tables."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = _finite(value)
    return flat
