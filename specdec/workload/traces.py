"""Recorded request traces: times, lengths, sometimes prefix blocks. Nothing but numbers, so no prompts.

The known formats are in ``trace_formats``; others are described by a ``TraceFormat``. Polars reads a sound file;
what it cannot read is read line by line, to say which line is broken.

>>> load_trace("conversation_trace.jsonl.gz").scale_rate(2.0)
>>> load_trace("mine.csv", TraceFormat(arrival="t", prompt_len="in", output_len="out", unit_s=1e-3))
"""

from __future__ import annotations

import gzip
import io
import logging
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.workload.hashing import chain_hashes
from specdec.workload.requests import Requests
from specdec.workload.trace_formats import TraceFormat, trace_format
from specdec.workload.trace_lines import read_lines

if TYPE_CHECKING:
    import polars as pl

_log = logging.getLogger(__name__)


def load_trace(
    path: str | Path, format: str | TraceFormat = "auto", *, sort: bool = False, strict: bool = False
) -> Requests:
    """Requests of a trace file, with times from its first arrival on.

    Args:
        path: of the file; what its bytes begin with says whether it is compressed, and JSON lines or CSV.
        format: one of ``TRACE_FORMATS``, a ``TraceFormat``, or ``"auto"``: the known format with the most
            columns in the file's header or first object.
        sort: put the requests in the order of their times, which else is an error if they are not.
        strict: refuse requests with an empty prompt or output (a failed request, in BurstGPT) instead of
            dropping them; how many were dropped is logged as a warning.

    Returns:
        ``max_tokens`` is the output's length. Of ``hash_ids``, those of full blocks of the prompt are kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown format, or a broken or unsorted line, named by file and line number.
    """
    content = _content(Path(path))
    is_json = content.lstrip()[:1] == b"{"
    layout = trace_format(str(path), content, is_json, format)
    table = _read_fast(content, is_json, layout)
    if table is None or not _is_sound(table, layout, sort=sort, strict=strict):
        table = read_lines(str(path), content, is_json, layout, sort=sort, strict=strict)
    if sort:
        table = table.sort("arrival_s", maintain_order=True)
    useful = table.filter((table["prompt_len"] > 0) & (table["output_len"] > 0))
    if dropped := len(table) - len(useful):
        _log.warning(
            "%s: dropped %d of %d requests with an empty prompt or output", path, dropped, len(table)
        )
    if useful.is_empty():
        raise ValueError(f"{path} has no requests")
    return _requests(useful, layout)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a broken gzip file: {error}") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _read_fast(content: bytes, is_json: bool, layout: TraceFormat) -> pl.DataFrame | None:
    """The table that ``read_lines`` gives, or ``None`` if polars cannot read it."""
    import polars as pl

    types: dict[str, Any] = {
        layout.arrival: pl.String if layout.unit_s is None else pl.Float64,
        layout.prompt_len: pl.Int64,
        layout.output_len: pl.Int64,
    }
    types |= {name: pl.String for name in (layout.task, layout.session) if name is not None}
    if layout.hash_ids is not None:
        types[layout.hash_ids] = pl.List(pl.UInt64)
    arrival, unit_s = pl.col(layout.arrival), layout.unit_s
    if unit_s is None:
        utc = arrival.str.replace(r"(\+00:00|Z)$", "")
        arrival, unit_s = utc.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns").dt.epoch("ns"), 1e-9
    columns = {"prompt_len": layout.prompt_len, "output_len": layout.output_len}
    optional = {"task": layout.task, "session": layout.session, "hash_ids": layout.hash_ids}
    columns |= {name: column for name, column in optional.items() if column is not None}
    try:
        if is_json:
            table = pl.read_ndjson(io.BytesIO(content), schema=types)
        else:
            table = pl.read_csv(io.BytesIO(content), columns=list(types), schema_overrides=types)
        # The difference first: nanoseconds since 1970 do not fit a float.
        return table.select(
            ((arrival - arrival.min()).cast(pl.Float64) * unit_s).alias("arrival_s"),
            **{name: pl.col(column) for name, column in columns.items()},
        )
    except pl.exceptions.PolarsError:
        return None


def _is_sound(table: pl.DataFrame, layout: TraceFormat, *, sort: bool, strict: bool) -> bool:
    """Whether ``read_lines`` would not object."""
    times_s, lengths = table["arrival_s"], (table["prompt_len"], table["output_len"])
    if any(column.null_count() for column in (times_s, *lengths)) or not times_s.is_finite().all():
        return False
    if not sort and not times_s.is_sorted():
        return False
    if not all(column.is_between(int(strict), np.iinfo(np.int32).max).all() for column in lengths):
        return False
    if layout.hash_ids is None:
        return True
    ids, size = table["hash_ids"], layout.hash_block_size
    if ids.null_count() or ids.explode().null_count() > (ids.list.len() == 0).sum():
        return False
    return bool((ids.list.len() <= (table["prompt_len"] + size - 1) // size).all())


def _requests(table: pl.DataFrame, layout: TraceFormat) -> Requests:
    import polars as pl

    columns: dict[str, Any] = {}
    if layout.task is not None:
        tasks = table["task"].fill_null("")
        names = tasks.unique(maintain_order=True)
        columns |= {"tasks": tuple(names), "task": tasks.cast(pl.Enum(names)).to_physical().to_numpy()}
    if layout.session is not None:
        ranks = table["session"].replace("", None).rank("dense").cast(pl.Int64)
        columns["session"] = (ranks - 1).fill_null(-1).to_numpy()
    if layout.hash_ids is not None:
        num_full = pl.col("prompt_len") // layout.hash_block_size
        ids = table.select(pl.col("hash_ids").list.head(num_full)).to_series()
        start = np.concatenate(([0], np.cumsum(ids.list.len().to_numpy().astype(np.int64))))
        flat = ids.explode().drop_nulls().to_numpy()  # an empty list explodes to a null
        columns |= {
            "hash_block_size": layout.hash_block_size,
            "hash_start": start,
            "hashes": chain_hashes(flat.astype(np.uint64), start),
        }
    lengths = (table["prompt_len"].to_numpy(), table["output_len"].to_numpy())
    return Requests.build(table["arrival_s"].to_numpy(), *lengths, **columns)
