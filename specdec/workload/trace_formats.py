"""What the columns of trace files are called, and which format a file has.

================ ===== ===============================================================================
format           file  columns
================ ===== ===============================================================================
azure            CSV   TIMESTAMP (date and time), ContextTokens, GeneratedTokens (Splitwise, ISCA 2024)
burstgpt         CSV   Timestamp (s), Request tokens, Response tokens, Log Type (arXiv 2401.17644)
burstgpt_session CSV   the same and Session ID
mooncake         JSON  timestamp (ms), input_length, output_length, hash_ids of 512 tokens (FAST 2025)
sharegpt         CSV   arrival_time_ns, input_toks, output_toks (LLMServingSim's ShareGPT runs)
plain            any   arrival_s, prompt_len, output_len
================ ===== ===============================================================================
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass

from specdec.names import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """What the columns of a CSV file, or the keys of JSON lines, are called.

    Args:
        arrival: time of arrival, numbers or date and time.
        prompt_len, output_len: tokens.
        unit_s: seconds per unit of ``arrival``; ``None`` for date and time.
        task: a text that names the request's class.
        session: any text or number that requests of one conversation share; empty or null for none.
        hash_ids: list of block ids (JSON only), equal where the prompts' blocks are.
        hash_block_size: tokens per id.
    """

    arrival: str
    prompt_len: str
    output_len: str
    unit_s: float | None = 1.0
    task: str | None = None
    session: str | None = None
    hash_ids: str | None = None
    hash_block_size: int = 0

    def __post_init__(self) -> None:
        if self.unit_s is not None and not 0.0 < self.unit_s < math.inf:
            raise ValueError(f"unit_s={self.unit_s} must be a finite number > 0, or None for date and time")
        if (self.hash_ids is not None) != (self.hash_block_size >= 1):
            raise ValueError(
                f"hash_ids={self.hash_ids!r} and hash_block_size={self.hash_block_size}: give both or neither"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns that are read."""
        names = (self.arrival, self.prompt_len, self.output_len, self.task, self.session, self.hash_ids)
        return tuple(name for name in names if name is not None)


TRACE_FORMATS: dict[str, TraceFormat] = {
    "azure": TraceFormat(
        arrival="TIMESTAMP", prompt_len="ContextTokens", output_len="GeneratedTokens", unit_s=None
    ),
    "burstgpt": TraceFormat(
        arrival="Timestamp", prompt_len="Request tokens", output_len="Response tokens", task="Log Type"
    ),
    "burstgpt_session": TraceFormat(
        arrival="Timestamp",
        prompt_len="Request tokens",
        output_len="Response tokens",
        task="Log Type",
        session="Session ID",
    ),
    "mooncake": TraceFormat(
        arrival="timestamp",
        prompt_len="input_length",
        output_len="output_length",
        unit_s=1e-3,
        hash_ids="hash_ids",
        hash_block_size=512,
    ),
    "sharegpt": TraceFormat(
        arrival="arrival_time_ns", prompt_len="input_toks", output_len="output_toks", unit_s=1e-9
    ),
    "plain": TraceFormat(arrival="arrival_s", prompt_len="prompt_len", output_len="output_len"),
}


def trace_format(path: str, content: bytes, is_json: bool, format: str | TraceFormat) -> TraceFormat:
    """The format of a file's ``content``; see ``load_trace``.

    Raises:
        ValueError: an unknown format, or a file that lacks a column of it, or all of a known format's.
    """
    if isinstance(format, str) and format != "auto" and format not in TRACE_FORMATS:
        raise unknown_name("trace format", format, ["auto", *TRACE_FORMATS])
    header = _header(path, content, is_json)
    if isinstance(format, str) and format == "auto":
        known = [layout for layout in TRACE_FORMATS.values() if set(layout.columns) <= set(header)]
        if not known:
            raise ValueError(
                f"{path}: no known trace format has the columns {', '.join(header) or '(none)'}: "
                "describe them with a TraceFormat"
            )
        layout = max(known, key=lambda layout: len(layout.columns))
    else:
        layout = TRACE_FORMATS[format] if isinstance(format, str) else format
    for name in layout.columns:
        if header.count(name) != 1:
            raise ValueError(f"{path}: needs one column {name!r}, has {', '.join(header) or '(none)'}")
    if layout.hash_ids is not None and not is_json:
        raise ValueError(f"{path}: hash_ids={layout.hash_ids!r} are lists, which CSV does not have")
    return layout


def _header(path: str, content: bytes, is_json: bool) -> list[str]:
    """Columns of a CSV file, or the keys of its first object."""
    leading = len(content) - len(content.lstrip())
    number = content[:leading].count(b"\n") + 1
    first = content[leading:].split(b"\n", 1)[0]
    try:
        return list(json.loads(first.decode())) if is_json else next(csv.reader([first.decode()]), [])
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
