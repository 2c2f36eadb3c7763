"""The record of a run: every step's plan and outcome, every request's life. Parquet, written as it comes.

``step`` and ``request`` only append to a list. Every ``flush_every`` entries the list becomes a numbered part
file, complete or absent, because it is written under another name first; ``close`` merges the parts into one
file per table. A process that is killed leaves its parts, which the readers accept as well, so at most the
last buffer is lost. (One file with growing row groups would not do: Parquet's footer comes last, so such a
file is unreadable until it is closed.) The lists in the steps table are enough for an exact replay, see
:func:`iter_steps`.

>>> with TraceWriter(directory) as trace:
...     llm.generate(prompts, params, trace=trace)
>>> read_steps(directory).select("step", "verify_s", "num_emitted")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from specdec.scheduler.plan import StepOutcome, StepPlan
from specdec.scheduler.request import Request

_INTS = pl.List(pl.Int64)
_BOOLS = pl.List(pl.Boolean)
_HASHES = pl.List(pl.UInt64)
Hashes = list[int]
_STEP_SCALARS: dict[str, Any] = {
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
    "kept_ahead": pl.Boolean,
}
# Columns whose lists have the same length in a step; the names are the plan's or the outcome's, but for the
# rows' num_accepted and num_emitted, whose names the totals have.
_PLAN_ROWS = ("rows", "request_ids", "context", "num_new", "num_drafts", "emits")
_PLAN_LISTS = ("preempted", "copies", "swapped_out", "swapped_out_blocks", "swapped_in")
_OUTCOME_ROWS = {
    "num_drafted": "num_drafted",
    "draft_depths": "draft_depths",
    "row_accepted": "num_accepted",
    "row_emitted": "num_emitted",
    "finished": "finished",
}
STEP_SCHEMA: dict[str, Any] = _STEP_SCALARS | {
    "rows": _INTS,
    "request_ids": _INTS,
    "context": _INTS,
    "num_new": _INTS,
    "num_drafts": _INTS,
    "emits": _BOOLS,
    "num_drafted": _INTS,
    "draft_depths": _INTS,
    "row_accepted": _INTS,
    "row_emitted": _INTS,
    "finished": _BOOLS,
    "admitted": _INTS,
    "num_cached": _INTS,
    "preempted": _INTS,
    "copies": _INTS,
    "swapped_out": _INTS,
    "swapped_out_blocks": _INTS,
    "swapped_in": _INTS,
    "hashed_rows": _INTS,
    "block_hashes": _HASHES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One finished request; times in seconds on the run's clock.

    ``num_rejected`` counts the first rejection of a step only: what was drafted behind it was never judged.
    Entry j of ``position_drafted`` and ``position_accepted`` counts draft token j + 1 of a step. ``prompt_hashes``
    name the full blocks of the prompt, for a replay of prefix hits.
    """

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
    prompt_hashes: Hashes

    @staticmethod
    def of(
        request: Request,
        block_size: int,
        finish_reason: str = "stop",
        position_drafted: Sequence[int] = (),
        position_accepted: Sequence[int] = (),
    ) -> RequestRecord:
        """The record of a request that the scheduler has finished, with blocks of ``block_size`` tokens."""
        return RequestRecord(
            request_id=request.request_id,
            task=request.task,
            arrival_s=request.arrival_s,
            first_scheduled_s=request.first_scheduled_s,
            first_token_s=request.first_token_s,
            finish_s=request.finish_s,
            prompt_len=request.prompt_len,
            num_generated=request.num_generated,
            num_steps=request.num_steps,
            num_drafted=request.num_drafted,
            num_accepted=request.num_accepted,
            num_rejected=request.num_rejected,
            num_cached=request.num_cached,
            num_preemptions=request.num_preemptions,
            finish_reason=finish_reason,
            max_tokens=request.max_tokens,
            priority=request.priority,
            deadline_s=request.deadline_s,
            position_drafted=list(position_drafted),
            position_accepted=list(position_accepted),
            prompt_hashes=request.block_hashes[: request.prompt_len // block_size],
        )


_TYPES = {"int": pl.Int64, "float": pl.Float64, "str": pl.String, "list[int]": _INTS, "Hashes": _HASHES}
REQUEST_SCHEMA: dict[str, Any] = {item.name: _TYPES[str(item.type)] for item in fields(RequestRecord)}
_StepEntry = tuple[StepPlan, StepOutcome, float, float, int, int, int, bool | None]


class TraceWriter:
    """Writes ``<name>.steps.parquet`` and ``<name>.requests.parquet`` into ``directory``.

    Args:
        directory: made if missing.
        name: of this run, if a directory holds several.
        flush_every: rows per part file.

    Raises:
        ValueError: the directory already holds a trace of that name, or ``flush_every`` < 1.
    """

    def __init__(self, directory: Path, name: str = "run", flush_every: int = 256) -> None:
        if flush_every < 1:
            raise ValueError(f"flush_every={flush_every} must be >= 1")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        for table, path in zip(("steps", "requests"), self.paths, strict=True):
            if path.exists() or _parts(self.directory, name, table):
                raise ValueError(
                    f"{self.directory} already holds a trace named {name!r}: choose another name or "
                    f"directory, or delete {name}.{table}.*"
                )
        self._flush_every = flush_every
        self._steps: list[_StepEntry] = []
        self._requests: list[RequestRecord] = []
        self._num_parts = {"steps": 0, "requests": 0}

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def paths(self) -> list[Path]:
        """Where ``close`` leaves the steps and the requests."""
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
        kept_ahead: bool | None = None,
    ) -> None:
        """Record one executed step. The arrays are kept, not copied: never write to them afterwards.

        Args:
            plan, outcome: of this step.
            start_s: the time that ``StepLoop.begin`` was given.
            end_s: when the step was done.
            num_running, num_waiting, num_free_blocks: after its commit.
            kept_ahead: whether the plan that was made while the step before it ran was the one; ``None`` without such.
        """
        self._steps.append(
            (plan, outcome, start_s, end_s, num_running, num_waiting, num_free_blocks, kept_ahead)
        )
        if len(self._steps) >= self._flush_every:
            self._flush_steps()

    def request(self, record: RequestRecord) -> None:
        """Record one finished request."""
        self._requests.append(record)
        if len(self._requests) >= self._flush_every:
            self._flush_requests()

    def close(self) -> None:
        """Flush, and merge the parts into one file per table. Closing again does nothing."""
        self._flush_steps()
        self._flush_requests()
        for table, schema, path in zip(
            ("steps", "requests"), (STEP_SCHEMA, REQUEST_SCHEMA), self.paths, strict=True
        ):
            parts = _parts(self.directory, self.name, table)
            if not parts and path.exists():
                continue
            hidden = path.with_suffix(".tmp")
            if parts:
                pl.scan_parquet(parts).sink_parquet(hidden)
            else:
                pl.DataFrame(schema=schema).write_parquet(hidden)
            hidden.replace(path)
            for part in parts:
                part.unlink()

    def _flush_steps(self) -> None:
        if self._steps:
            self._write("steps", _step_frame(self._steps))
            self._steps.clear()

    def _flush_requests(self) -> None:
        if self._requests:
            rows = [astuple(record) for record in self._requests]
            self._write("requests", pl.DataFrame(rows, schema=REQUEST_SCHEMA, orient="row"))
            self._requests.clear()

    def _write(self, table: str, frame: pl.DataFrame) -> None:
        path = self.directory / f"{self.name}.{table}.part{self._num_parts[table]:06d}.parquet"
        frame.write_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        self._num_parts[table] += 1


def _step_frame(entries: Sequence[_StepEntry]) -> pl.DataFrame:
    plans = [entry[0] for entry in entries]
    outcomes = [entry[1] for entry in entries]
    rows = {name: [getattr(plan, name) for plan in plans] for name in _PLAN_ROWS}
    rows |= {column: [getattr(out, name) for out in outcomes] for column, name in _OUTCOME_ROWS.items()}
    admissions = {"admitted": [plan.admitted for plan in plans], "num_cached": [p.num_cached for p in plans]}
    hashes = {
        "hashed_rows": [out.hashed_rows for out in outcomes],
        "block_hashes": [out.block_hashes for out in outcomes],
    }
    scalars = pl.DataFrame([_step_scalars(*entry) for entry in entries], schema=_STEP_SCALARS, orient="row")
    lists = [
        _list_columns(rows),
        _list_columns(admissions),
        *(_list_columns({name: [getattr(plan, name).ravel() for plan in plans]}) for name in _PLAN_LISTS),
        _list_columns(hashes),
    ]
    return pl.concat([scalars, *lists], how="horizontal").select(
        pl.col(name).cast(dtype) for name, dtype in STEP_SCHEMA.items()
    )


def _step_scalars(
    plan: StepPlan,
    outcome: StepOutcome,
    start_s: float,
    end_s: float,
    num_running: int,
    num_waiting: int,
    num_free_blocks: int,
    kept_ahead: bool | None,
) -> tuple[float | int | None, ...]:
    """In the order of ``_STEP_SCALARS``. A row that computes one token and emits is decoding, as the
    scheduler sees it, even if that token is the last of a prompt; all other rows are prefill."""
    is_prefill = (plan.num_new > 1) | ~plan.emits
    return (
        plan.step,
        start_s,
        end_s,
        outcome.draft_s,
        outcome.verify_s,
        outcome.sample_s,
        outcome.overhead_s,
        plan.rows.size,
        int(np.count_nonzero(is_prefill)),
        int(plan.num_new[is_prefill].sum()),
        int(outcome.num_drafted.sum()),
        int(outcome.num_accepted.sum()),
        int(outcome.num_emitted.sum()),
        num_running,
        num_waiting,
        num_free_blocks,
        plan.preempted.size,
        kept_ahead,
    )


def _list_columns(columns: dict[str, list[Any]]) -> pl.DataFrame:
    """List columns from arrays, one array per row; the columns' arrays have equal lengths row by row.

    Grouping flat columns is several times faster than giving polars the arrays one by one.
    """
    lengths = [array.size for array in next(iter(columns.values()))]
    index = pl.DataFrame({"index": np.arange(len(lengths))})
    flat = pl.DataFrame(
        {"index": np.repeat(index["index"].to_numpy(), lengths)}
        | {name: np.concatenate(arrays) for name, arrays in columns.items()}
    )
    lists = flat.group_by("index", maintain_order=True).agg(pl.all())
    joined = index.join(lists, on="index", how="left", maintain_order="left").drop("index")
    return joined.with_columns(pl.all().fill_null(pl.lit([])))


def read_steps(directory: Path, name: str = "run") -> pl.DataFrame:
    """The steps table of a closed or interrupted trace.

    Raises:
        FileNotFoundError: there is neither a table nor a part of one.
    """
    return _read(Path(directory), name, "steps")


def read_requests(directory: Path, name: str = "run") -> pl.DataFrame:
    """The requests table of a closed or interrupted trace; see :func:`read_steps`."""
    return _read(Path(directory), name, "requests")


def iter_steps(steps: pl.DataFrame) -> Iterator[tuple[StepPlan, StepOutcome]]:
    """The recorded plans and outcomes, array for array as they were, in the order they ran."""
    for row in steps.iter_rows(named=True):
        plan = StepPlan(
            step=row["step"],
            now_s=row["start_s"],
            rows=np.array(row["rows"], np.int64),
            request_ids=np.array(row["request_ids"], np.int64),
            context=np.array(row["context"], np.int32),
            num_new=np.array(row["num_new"], np.int32),
            num_drafts=np.array(row["num_drafts"], np.int32),
            emits=np.array(row["emits"], np.bool_),
            admitted=np.array(row["admitted"], np.int64),
            num_cached=np.array(row["num_cached"], np.int32),
            preempted=np.array(row["preempted"], np.int64),
            copies=np.array(row["copies"], np.int32).reshape(-1, 2),
            swapped_out=np.array(row["swapped_out"], np.int64),
            swapped_out_blocks=np.array(row["swapped_out_blocks"], np.int64),
            swapped_in=np.array(row["swapped_in"], np.int64),
            wake_s=math.inf,  # only a plan with nothing to run has another time to wake
        )
        num_drafted, depths = (np.array(row[name], np.int32) for name in ("num_drafted", "draft_depths"))
        outcome = StepOutcome(
            num_drafted=num_drafted,
            num_accepted=np.array(row["row_accepted"], np.int32),
            num_emitted=np.array(row["row_emitted"], np.int32),
            finished=np.array(row["finished"], np.bool_),
            draft_s=row["draft_s"],
            verify_s=row["verify_s"],
            sample_s=row["sample_s"],
            overhead_s=row["overhead_s"],
            hashed_rows=np.array(row["hashed_rows"], np.int64),
            block_hashes=np.array(row["block_hashes"], np.uint64),
            tree_depths=None if np.array_equal(depths, num_drafted) else depths,
        )
        yield plan, outcome


def _parts(directory: Path, name: str, table: str) -> list[Path]:
    return sorted(directory.glob(f"{name}.{table}.part*.parquet"))


def _read(directory: Path, name: str, table: str) -> pl.DataFrame:
    # Whole first: a process killed while it deleted merged parts leaves the table and some of the parts.
    whole = directory / f"{name}.{table}.parquet"
    if whole.exists():
        return pl.read_parquet(whole)
    parts = _parts(directory, name, table)
    if not parts:
        raise FileNotFoundError(f"no trace table {whole}: was the run started with tracing?")
    return pl.concat([pl.read_parquet(part) for part in parts])
