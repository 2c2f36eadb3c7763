"""The steps of a trace as Chrome trace-event JSON, to be opened in ui.perfetto.dev or chrome://tracing.

The engine is one process with a track for each phase and counters for the queue, the running requests and the
free KV blocks; the requests are another process with a track each, of prefill and decode slices.

>>> write_perfetto(read_steps(directory), directory / "steps.perfetto.json")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from specdec.metrics import PHASES

ENGINE_PID = 1
REQUESTS_PID = 2
STEP_TID = 1
_COUNTERS = ("num_running", "num_waiting", "num_free_blocks")
_MICROSECONDS = 1e6

Event = dict[str, Any]


def write_perfetto(steps: pl.DataFrame, path: Path) -> Path:
    """Write the trace-event JSON of ``steps`` to ``path``; returns ``path``.

    Raises:
        ValueError: the table has no rows.
    """
    document = {"traceEvents": trace_events(steps), "displayTimeUnit": "ms"}
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    return path


def trace_events(steps: pl.DataFrame) -> list[Event]:
    """Trace events of a steps table: metadata (``M``) first, then slices (``X``) and counters (``C``) by
    time.

    Times are microseconds from the first step's start. The trace has the seconds of each phase and not its
    start, so within a step the phases are drawn in the order they run: overhead (planning), draft, verify,
    sample.

    Raises:
        ValueError: the table has no rows.
    """
    if steps.height == 0:
        raise ValueError("the steps table is empty: there is nothing to draw")
    origin_s = float(steps["start_s"][0])
    events: list[Event] = []
    request_ids: dict[int, None] = {}
    for row in steps.iter_rows(named=True):
        request_ids.update(dict.fromkeys(row["request_ids"]))
        events += _engine_events(row, origin_s)
        events += _request_events(row, origin_s)
    events.sort(key=lambda event: event["ts"])
    return [*_names(list(request_ids)), *events]


def _engine_events(row: dict[str, Any], origin_s: float) -> list[Event]:
    start_us = (row["start_s"] - origin_s) * _MICROSECONDS
    end_us = max(start_us, (row["end_s"] - origin_s) * _MICROSECONDS)
    columns = (
        "num_rows",
        "num_prefill_tokens",
        "num_draft_tokens",
        "num_accepted",
        "num_emitted",
        "num_preempted",
    )
    args = {column: row[column] for column in columns}
    events = [_slice(f"step {row['step']}", ENGINE_PID, STEP_TID, start_us, end_us - start_us, args)]
    at_us = start_us
    for phase in ("overhead", "draft", "verify", "sample"):
        # The previous commit's seconds are booked here as overhead, so the sum may pass the step's end.
        length_us = min(max(0.0, row[f"{phase}_s"]) * _MICROSECONDS, end_us - at_us)
        if length_us > 0.0:
            events.append(
                _slice(phase, ENGINE_PID, _phase_tid(phase), at_us, length_us, {"step": row["step"]})
            )
            at_us += length_us
    for name in _COUNTERS:
        events.append(
            {"name": name, "ph": "C", "pid": ENGINE_PID, "ts": end_us, "args": {"value": row[name]}}
        )
    return events


def _request_events(row: dict[str, Any], origin_s: float) -> list[Event]:
    start_us = (row["start_s"] - origin_s) * _MICROSECONDS
    length_us = max(0.0, row["end_s"] - row["start_s"]) * _MICROSECONDS
    events: list[Event] = []
    per_row = ("request_ids", "num_new", "emits", "num_drafted", "row_accepted", "row_emitted")
    for request_id, new, emits, drafted, accepted, emitted in zip(
        *(row[key] for key in per_row), strict=True
    ):
        decodes = emits and new == 1
        args = {"step": row["step"], "num_new": new, "num_emitted": emitted}
        if decodes:
            args |= {"num_drafted": drafted, "num_accepted": accepted}
        name = "decode" if decodes else "prefill"
        # Track 0 is the process itself in the viewer.
        events.append(_slice(name, REQUESTS_PID, request_id + 1, start_us, length_us, args))
    return events


def _slice(name: str, pid: int, tid: int, start_us: float, length_us: float, args: Event) -> Event:
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start_us, "dur": length_us, "args": args}


def _names(request_ids: list[int]) -> list[Event]:
    tracks = {(ENGINE_PID, STEP_TID): "steps"}
    tracks |= {(ENGINE_PID, _phase_tid(phase)): phase for phase in PHASES}
    tracks |= {(REQUESTS_PID, request_id + 1): f"request {request_id}" for request_id in request_ids}
    events = [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "ts": 0.0, "args": {"name": name}}
        for pid, name in ((ENGINE_PID, "engine"), (REQUESTS_PID, "requests"))
    ]
    for order, ((pid, tid), name) in enumerate(tracks.items()):
        place = {"pid": pid, "tid": tid, "ts": 0.0}
        events.append({"name": "thread_name", "ph": "M", **place, "args": {"name": name}})
        events.append({"name": "thread_sort_index", "ph": "M", **place, "args": {"sort_index": order}})
    return events


def _phase_tid(phase: str) -> int:
    return STEP_TID + 1 + PHASES.index(phase)
