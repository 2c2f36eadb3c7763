"""The record of a run: every step's plan and outcome, every request's life. Parquet, written as it comes.

Rows are buffered and flushed as numbered part files; ``close`` merges them. A process that is killed leaves its
parts, which the readers accept as well, so at most the last buffer is lost. The lists in the steps table are
enough for an exact replay.

>>> with TraceWriter(directory) as trace:
...     llm.generate(prompts, params, trace=trace)
>>> read_steps(directory).select("step", "verify_s", "num_emitted")
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    from specdec.scheduler.plan import StepOutcome, StepPlan

INTS = pl.List(pl.Int64)
STEP_SCHEMA: dict[str, Any] = {
    "step": pl.Int64,
    "start_s": pl.Float64,
    "end_s": pl.Float64,
    "draft_s": pl.Float64,
    "verify_s": pl.Float64,
    "sample_s": pl.Float64,
    "overhead_s": pl.Float64,
    "num_rows": pl.Int64,
    "num_prefill_rows": pl.Int64,
    "num_prefill_tokens": pl.Int64,
    "num_draft_tokens": pl.Int64,
    "num_accepted": pl.Int64,
    "num_emitted": pl.Int64,
    "num_running": pl.Int64,
    "num_waiting": pl.Int64,
    "num_free_blocks": pl.Int64,
    "num_preempted": pl.Int64,
    "request_ids": INTS,
    "context": INTS,
    "num_new": INTS,
    "num_drafts": INTS,
    "emits": pl.List(pl.Boolean),
    "num_drafted": INTS,
    "row_accepted": INTS,
    "row_emitted": INTS,
    "finished": pl.List(pl.Boolean),
    "admitted": INTS,
    "num_cached": INTS,
    "preempted": INTS,
    "copies": INTS,
    "hashed_rows": INTS,
    "block_hashes": pl.List(pl.UInt64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One finished request; times in seconds on the run's clock. Position j counts draft token j + 1."""

    request_id: int
    task: str
    arrival_s: float
    first_scheduled_s: float
    first_token_s: float
    finish_s: float
    prompt_len: int
    num_generated: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    num_rejected: int
    num_cached: int
    num_preemptions: int
    finish_reason: str
    max_tokens: int
    priority: int
    deadline_s: float
    position_drafted: list[int]
    position_accepted: list[int]


_TYPES = {"int": pl.Int64, "float": pl.Float64, "str": pl.String, "list[int]": INTS}
REQUEST_SCHEMA: dict[str, Any] = {item.name: _TYPES[str(item.type)] for item in fields(RequestRecord)}


class TraceWriter:
    """Writes ``<name>.steps.parquet`` and ``<name>.requests.parquet`` into ``directory``.

    Args:
        directory: made if missing.
        name: of this run, if a directory holds several.
        flush_every: rows per part file.
    """

    def __init__(self, directory: Path, name: str = "run", flush_every: int = 512) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._flush_every = flush_every
        self._steps: list[tuple[Any, ...]] = []
        self._requests: list[dict[str, Any]] = []
        self._num_parts = {"steps": 0, "requests": 0}

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def paths(self) -> list[Path]:
        return [self.directory / f"{self.name}.{table}.parquet" for table in ("steps", "requests")]

    def step(
        self,
        plan: StepPlan,
        outcome: StepOutcome,
        start_s: float,
        end_s: float,
        num_running: int,
        num_waiting: int,
        num_free_blocks: int,
    ) -> None:
        """Record one executed step; the counts are those after its commit."""
        self._steps.append((plan, outcome, start_s, end_s, num_running, num_waiting, num_free_blocks))
        if len(self._steps) >= self._flush_every:
            self._flush_steps()

    def request(self, record: RequestRecord) -> None:
        """Record one finished request."""
        self._requests.append(asdict(record))
        if len(self._requests) >= self._flush_every:
            self._flush_requests()

    def close(self) -> None:
        """Flush, and merge the parts into one file per table."""
        self._flush_steps()
        self._flush_requests()
        for table, schema in (("steps", STEP_SCHEMA), ("requests", REQUEST_SCHEMA)):
            parts = _parts(self.directory, self.name, table)
            merged = pl.concat([pl.read_parquet(part) for part in parts]) if parts else pl.DataFrame(schema=schema)
            path = self.directory / f"{self.name}.{table}.parquet"
            merged.write_parquet(path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            for part in parts:
                part.unlink()

    def _flush_steps(self) -> None:
        if self._steps:
            self._write("steps", [_step_row(*entry) for entry in self._steps], STEP_SCHEMA)
            self._steps.clear()

    def _flush_requests(self) -> None:
        if self._requests:
            self._write("requests", self._requests, REQUEST_SCHEMA)
            self._requests.clear()

    def _write(self, table: str, rows: list[dict[str, Any]], schema: dict[str, Any]) -> None:
        number = self._num_parts[table]
        self._num_parts[table] += 1
        path = self.directory / f"{self.name}.{table}.part{number:06d}.parquet"
        pl.DataFrame(rows, schema=schema).write_parquet(path)


def _step_row(
    plan: StepPlan,
    outcome: StepOutcome,
    start_s: float,
    end_s: float,
    num_running: int,
    num_waiting: int,
    num_free_blocks: int,
) -> dict[str, Any]:
    prefill = plan.num_new > 1
    return {
        "step": plan.step,
        "start_s": start_s,
        "end_s": end_s,
        "draft_s": outcome.draft_s,
        "verify_s": outcome.verify_s,
        "sample_s": outcome.sample_s,
        "overhead_s": outcome.overhead_s,
        "num_rows": plan.rows.size,
        "num_prefill_rows": int(prefill.sum()),
        "num_prefill_tokens": int(plan.num_new[prefill].sum()),
        "num_draft_tokens": int(outcome.num_drafted.sum()),
        "num_accepted": int(outcome.num_accepted.sum()),
        "num_emitted": int(outcome.num_emitted.sum()),
        "num_running": num_running,
        "num_waiting": num_waiting,
        "num_free_blocks": num_free_blocks,
        "num_preempted": plan.preempted.size,
        "request_ids": plan.request_ids.tolist(),
        "context": plan.context.tolist(),
        "num_new": plan.num_new.tolist(),
        "num_drafts": plan.num_drafts.tolist(),
        "emits": plan.emits.tolist(),
        "num_drafted": outcome.num_drafted.tolist(),
        "row_accepted": outcome.num_accepted.tolist(),
        "row_emitted": outcome.num_emitted.tolist(),
        "finished": outcome.finished.tolist(),
        "admitted": plan.admitted.tolist(),
        "num_cached": plan.num_cached.tolist(),
        "preempted": plan.preempted.tolist(),
        "copies": plan.copies.ravel().tolist(),
        "hashed_rows": outcome.hashed_rows.tolist(),
        "block_hashes": outcome.block_hashes.tolist(),
    }


def read_steps(directory: Path, name: str = "run") -> pl.DataFrame:
    """The steps table of a closed or interrupted trace.

    Raises:
        FileNotFoundError: there is neither a table nor a part of one.
    """
    return _read(Path(directory), name, "steps")


def read_requests(directory: Path, name: str = "run") -> pl.DataFrame:
    """The requests table of a closed or interrupted trace; see :func:`read_steps`."""
    return _read(Path(directory), name, "requests")


def _parts(directory: Path, name: str, table: str) -> list[Path]:
    return sorted(directory.glob(f"{name}.{table}.part*.parquet"))


def _read(directory: Path, name: str, table: str) -> pl.DataFrame:
    whole = directory / f"{name}.{table}.parquet"
    parts = _parts(directory, name, table)
    if parts:
        return pl.concat([pl.read_parquet(part) for part in parts])
    if not whole.exists():
        raise FileNotFoundError(f"no trace table {whole}: was the run started with tracing?")
    return pl.read_parquet(whole)
