"""A trace file line by line: slow, but it can say which line is broken."""

from __future__ import annotations

import calendar
import csv
import json
import math
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from specdec.workload.trace_formats import TraceFormat

if TYPE_CHECKING:
    import polars as pl

_MAX_LEN = 2**31 - 1
_MASK_64 = 2**64 - 1


class _Row(NamedTuple):
    arrival: float
    """In units of the format; whole nanoseconds for dates, which a float would round."""
    prompt_len: int
    output_len: int
    task: str | None
    session: str | None
    hash_ids: list[int] | None


def read_lines(
    path: str, content: bytes, is_json: bool, layout: TraceFormat, *, sort: bool, strict: bool
) -> pl.DataFrame:
    """The table of ``load_trace``; its arguments are explained there. Blank lines are skipped.

    Returns:
        ``arrival_s`` from the earliest time on, ``prompt_len``, ``output_len``, and ``task``, ``session`` and
        ``hash_ids`` if the format has them.

    Raises:
        ValueError: the first broken, unsorted or (if ``strict``) empty request, by file and line number.
    """
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    header = None if is_json else _fields(lines.pop(0)[1])
    rows: list[_Row] = []
    for number, line in lines:
        try:
            row = _row(_record(line, header), layout)
            if not sort and rows and row.arrival < rows[-1].arrival:
                raise ValueError(
                    f"{layout.arrival} is before the one above: sort the lines, or give sort=True"
                )
            if strict and 0 in (row.prompt_len, row.output_len):
                raise ValueError(f"{row.prompt_len} prompt and {row.output_len} output tokens, must be >= 1")
        except (ValueError, csv.Error) as error:  # JSON and UTF-8 errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return _table(rows, layout)


def _fields(line: bytes) -> list[str]:
    return next(csv.reader([line.decode().rstrip("\r")], strict=True))


def _record(line: bytes, header: list[str] | None) -> dict[str, Any]:
    if header is None:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, got {type(record).__name__}")
        return record
    fields = _fields(line)
    if len(fields) != len(header):
        raise ValueError(f"{len(fields)} fields, but the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


def _row(record: dict[str, Any], layout: TraceFormat) -> _Row:
    if missing := [name for name in layout.columns if name not in record]:
        raise ValueError(f"no key {missing[0]!r} among {', '.join(record)}")
    prompt_len = _length(layout.prompt_len, record[layout.prompt_len])
    arrival = record[layout.arrival]
    return _Row(
        _number(layout.arrival, arrival)
        if layout.unit_s is not None
        else _nanoseconds(layout.arrival, arrival),
        prompt_len,
        _length(layout.output_len, record[layout.output_len]),
        None if layout.task is None else _text(record[layout.task]),
        None if layout.session is None else _text(record[layout.session]),
        None if layout.hash_ids is None else _hash_ids(layout, record[layout.hash_ids], prompt_len),
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"{name}={value!r} is not a finite number")


def _length(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number) or not 0 <= number <= _MAX_LEN:
        raise ValueError(f"{name}={value!r} is not a whole number of tokens in [0, {_MAX_LEN}]")
    return int(number)


def _nanoseconds(name: str, value: Any) -> int:
    """Since 1970, of a date and time in ISO 8601; without a zone it is read as UTC."""
    try:
        moment = datetime.fromisoformat(value.strip())
    except (AttributeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a date and time") from None
    # A datetime holds microseconds only.
    fraction = re.search(r"[.,](\d+)", value)
    nanoseconds = int(fraction[1][:9].ljust(9, "0")) if fraction else 0
    return calendar.timegm(moment.utctimetuple()) * 10**9 + nanoseconds


def _hash_ids(layout: TraceFormat, value: Any, prompt_len: int) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"{layout.hash_ids} is not a list of whole numbers: {str(value)[:60]}")
    if len(value) > -(-prompt_len // layout.hash_block_size):
        raise ValueError(
            f"{len(value)} {layout.hash_ids} for a prompt of {prompt_len} tokens, which has fewer blocks of "
            f"{layout.hash_block_size}"
        )
    return [item & _MASK_64 for item in value]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _table(rows: list[_Row], layout: TraceFormat) -> pl.DataFrame:
    import polars as pl

    first = min((row.arrival for row in rows), default=0)
    unit_s = 1e-9 if layout.unit_s is None else layout.unit_s
    columns = {
        "arrival_s": pl.Series([float(row.arrival - first) for row in rows], dtype=pl.Float64) * unit_s,
        "prompt_len": pl.Series([row.prompt_len for row in rows], dtype=pl.Int64),
        "output_len": pl.Series([row.output_len for row in rows], dtype=pl.Int64),
    }
    if layout.task is not None:
        columns["task"] = pl.Series([row.task for row in rows], dtype=pl.String)
    if layout.session is not None:
        columns["session"] = pl.Series([row.session for row in rows], dtype=pl.String)
    if layout.hash_ids is not None:
        columns["hash_ids"] = pl.Series([row.hash_ids for row in rows], dtype=pl.List(pl.UInt64))
    return pl.DataFrame(columns)
