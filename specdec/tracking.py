"""Where results go: the run directory, and Weights & Biases beside it.

The directory is the truth; W&B gets the same metrics, tables, plots and traces, and keeps its own files in
``wandb/`` below it. ``offline`` (the default) needs neither network nor account:
``wandb sync <run directory>/wandb/offline-run-…`` uploads it later.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from specdec.config import CHOICES, TrackingConfig
from specdec.names import unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for the duration of a context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def wide_console() -> Console:
    """A console of the terminal's width; of a file or a pipe, one that tables fit into."""
    return Console(width=None if sys.stdout.isatty() else 120)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` so that ``path`` is never half written. NaN and infinity become null."""
    text = json.dumps(_finite(content), indent=2)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n")
    part.replace(path)


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
    console: Console = field(default_factory=wide_console)
    _wandb: Any = None
    _closing: ExitStack = field(default_factory=ExitStack)

    @property
    def trace_directory(self) -> Path:
        return self.directory / "trace"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars by name, to W&B's charts; ``step`` is their horizontal axis."""
        if self._wandb:
            # W&B's own step must never fall and counts tables too, so ours is a metric beside the others.
            self._wandb.log(dict(metrics) if step is None else {**metrics, "step": step})

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of equal-keyed rows: ``tables/<name>.json`` and a W&B table."""
        folder = self.directory / "tables"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", list(rows))
        if self._wandb and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            data = [[_finite(row[column]) for column in rows[0]] for row in rows]
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
        with self._closing:
            if self._wandb:
                self._wandb.summary.update(_flat(summary))
                self._wandb.finish(exit_code=0 if summary.get("status") == "ok" else 1)


def start_run(
    directory: Path, config: Mapping[str, Any], tracking: TrackingConfig, job_type: str, group: str | None
) -> Run:
    """Open a run in ``directory``; the W&B side follows ``tracking.mode``.

    Args:
        config: what W&B shows as the run's configuration.
        job_type: the experiment.
        group: W&B group when ``tracking.group`` names none; runs of one sweep share it.

    Raises:
        ValueError: unknown mode, with the nearest ones, or W&B cannot start.
    """
    modes = CHOICES["tracking.mode"]
    if tracking.mode not in modes:
        raise unknown_name("tracking.mode", tracking.mode, modes)
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(directory)
    if tracking.mode != "disabled":
        with ExitStack() as stack:
            stack.enter_context(_wandb_folders(directory))
            run._wandb = _start_wandb(directory, config, tracking, job_type, group)
            run._closing = stack.pop_all()
    return run


def _wandb_folders(directory: Path) -> AbstractContextManager[None]:
    """W&B's caches and staged artifacts go beside the run's own files, unless the user put them elsewhere."""
    folders = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data"}
    base = directory.resolve() / "wandb"
    return environment(
        **{name: str(base / folder) for name, folder in folders.items() if name not in os.environ}
    )


def _start_wandb(
    directory: Path, config: Mapping[str, Any], tracking: TrackingConfig, job_type: str, group: str | None
) -> Any:
    import wandb

    try:
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group or group,
            tags=tracking.tags,
            job_type=job_type,
            name=f"{job_type}-{directory.name}",
            dir=str(directory),
            mode=cast(Any, tracking.mode),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    except wandb.Error as error:
        raise ValueError(
            f"W&B did not start ({error}): log in with `wandb login`, or tracking.mode=offline"
        ) from error
    run.define_metric("*", step_metric="step")
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
