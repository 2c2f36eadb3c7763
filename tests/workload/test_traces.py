"""Trace files: every format reads, every broken line is named, and the real ones are what they say."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.workload import (
    QuantileLengths,
    Quantiles,
    Requests,
    TraceFormat,
    azure_like,
    fit_lengths,
    length_errors,
    load_trace,
)
from specdec.workload import traces as traces_module
from specdec.workload.trace_formats import TRACE_FORMATS
from specdec.workload.trace_lines import read_lines

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.9951690,396,109",
    "2023-11-16 18:15:51.2224670,879,55",
)
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,s1,1.5,ChatGPT,472,18,490,Conversation log",
    "45,,2.5,GPT-4,1087,230,1317,API log",
    "118,s2,1,GPT-4,417,0,417,Conversation log",
    "120,s1,1,GPT-4,417,276,693,Conversation log",
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 1500, "output_length": 52, "hash_ids": [46, 47, 2353]}',
    '{"timestamp": 30535, "input_length": 1536, "output_length": 26, "hash_ids": [46, 47, 48]}',
    '{"timestamp": 30535, "input_length": 100, "output_length": 7, "hash_ids": [46]}',
)
SHAREGPT = ("arrival_time_ns,input_toks,output_toks", "46926808,2358,531", "347938951,1034,769")
PLAIN = ("arrival_s,prompt_len,output_len", "0,3,4", "1.5,5,6")
PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def columns(requests: Requests) -> list[tuple[float, int, int]]:
    return list(
        zip(
            requests.arrival_s.round(7).tolist(),
            requests.prompt_len.tolist(),
            requests.output_len.tolist(),
            strict=True,
        )
    )


def test_azure(tmp_path: Path):
    requests = load_trace(write(tmp_path / "azure.csv", *AZURE))
    assert columns(requests) == [(0.0, 374, 44), (4.314579, 396, 109), (4.541877, 879, 55)]
    assert (requests.max_tokens == requests.output_len).all() and requests.tasks == ("",)
    # The form of 2024: microseconds and a zone; and a file that only the slow reader takes.
    zoned = [line.replace("0,3", "+00:00,3").replace(" 1", "T1") for line in AZURE]
    slow = load_trace(write(tmp_path / "zoned.csv", *zoned))
    assert np.abs(slow.arrival_s - requests.arrival_s).max() < 1e-6


def test_burstgpt(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / "burst.csv", *BURSTGPT)
    with caplog.at_level(logging.WARNING):
        requests = load_trace(path)
    assert "dropped 1 of 4 requests" in caplog.text
    assert columns(requests) == [(0.0, 472, 18), (40.0, 1087, 230), (115.0, 417, 276)]
    assert requests.tasks == ("Conversation log", "API log") and requests.task.tolist() == [0, 1, 0]
    assert requests.session.tolist() == [0, -1, 0]
    assert load_trace(path, "burstgpt").session.tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match=r"burst\.csv, line 4: 417 prompt and 0 output tokens"):
        load_trace(path, strict=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_mooncake(tmp_path: Path, compressed: bool):
    path = write(tmp_path / "trace.jsonl", *MOONCAKE)
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    requests = load_trace(path)
    assert columns(requests) == [(0.0, 1500, 52), (3.053, 1536, 26), (3.053, 100, 7)]
    # Only full blocks of 512 have a hash: 1500 tokens have two, 1536 have three, 100 have none.
    assert requests.hash_block_size == 512 and requests.hash_start.tolist() == [0, 2, 5, 5]
    assert requests.hashes_of(0).tolist() == requests.hashes_of(1)[:2].tolist()
    assert len(set(requests.hashes.tolist())) == 3


def test_others(tmp_path: Path):
    assert columns(load_trace(write(tmp_path / "s.csv", *SHAREGPT))) == [
        (0.0, 2358, 531),
        (0.3010121, 1034, 769),
    ]
    assert columns(load_trace(write(tmp_path / "p.csv", *PLAIN))) == [(0.0, 3, 4), (1.5, 5, 6)]
    objects = [json.dumps({"arrival_s": t, "prompt_len": 2, "output_len": 3, "x": "y"}) for t in (1, 2)]
    assert columns(load_trace(write(tmp_path / "p.jsonl", *objects))) == [(0.0, 2, 3), (1.0, 2, 3)]


def test_own_format(tmp_path: Path):
    mine = TraceFormat(
        arrival="t", prompt_len="in", output_len="out", unit_s=1e-3, task="kind", session="who"
    )
    path = write(tmp_path / "mine.csv", "kind,who,t,in,out", "b,x,500,1,2", "a,,1500,3,4", "b,x,2500,5,6")
    requests = load_trace(path, mine)
    assert columns(requests) == [(0.0, 1, 2), (1.0, 3, 4), (2.0, 5, 6)]
    assert requests.tasks == ("b", "a") and requests.session.tolist() == [0, -1, 0]
    ids = TraceFormat(arrival="t", prompt_len="in", output_len="out", hash_ids="h", hash_block_size=4)
    lines = [json.dumps({"t": 0, "in": 8, "out": 1, "h": h}) for h in ([2**64 - 1, -1], [], [7])]
    requests = load_trace(write(tmp_path / "mine.jsonl", *lines), ids)
    assert requests.hash_start.tolist() == [0, 2, 2, 3]


def test_sorting_and_blank_lines(tmp_path: Path):
    path = write(tmp_path / "t.csv", PLAIN[0], "2,1,1", "", "1,2,2", "2,3,3")
    with pytest.raises(ValueError, match=r"t\.csv, line 4: arrival_s is before the one above: .*sort=True"):
        load_trace(path)
    assert columns(load_trace(path, sort=True)) == [(0.0, 2, 2), (1.0, 1, 1), (1.0, 3, 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2023-11-16 18:15:52,x,44", "ContextTokens='x' is not a finite number"),
        ("2023-11-16 18:15:52,1.5,44", "ContextTokens='1.5' is not a whole number of tokens"),
        ("2023-11-16 18:15:52,-1,44", "ContextTokens='-1' is not a whole number of tokens in"),
        ("2023-11-16 18:15:52,4,3000000000", "GeneratedTokens='3000000000' is not a whole number"),
        ("2023-11-16 18:15:52,374", "2 fields, but the header has 3"),
        ("2023-11-16 18:15:52,374,1,2", "4 fields, but the header has 3"),
        ("yesterday,374,44", "TIMESTAMP='yesterday' is not a date and time"),
        ("2023-11-16 18:15:52,,44", "ContextTokens='' is not a finite number"),
        ('"2023-11-16 18:15:52,1,44', "unexpected end of data"),
    ],
)
def test_broken_csv_lines_are_named(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "broken.csv", *AZURE, "", line, AZURE[-1].replace("51.2", "59.2"))
    with pytest.raises(ValueError, match=rf"broken\.csv, line 6: {message}"):
        load_trace(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected a JSON object, got list"),
        ('{"timestamp": 40000, "input', "Unterminated string"),
        ('{"timestamp": 40000, "input_length": 9, "output_length": 1}', "no key 'hash_ids' among timestamp"),
        ('{"timestamp": NaN, "input_length": 9, "output_length": 1, "hash_ids": []}', "timestamp=nan is not"),
        (
            '{"timestamp": true, "input_length": 9, "output_length": 1, "hash_ids": []}',
            "timestamp=True is not",
        ),
        (
            '{"timestamp": 40000, "input_length": null, "output_length": 1, "hash_ids": []}',
            "input_length=None",
        ),
        (
            '{"timestamp": 40000, "input_length": 9, "output_length": 1, "hash_ids": [1.5]}',
            "hash_ids is not a list",
        ),
        (
            '{"timestamp": 40000, "input_length": 9, "output_length": 1, "hash_ids": [null]}',
            "hash_ids is not a list",
        ),
        (
            '{"timestamp": 40000, "input_length": 9, "output_length": 1, "hash_ids": null}',
            "hash_ids is not a list",
        ),
        (
            '{"timestamp": 40000, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}',
            "2 hash_ids for a prompt",
        ),
    ],
)
def test_broken_json_lines_are_named(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "broken.jsonl", *MOONCAKE, line)
    with pytest.raises(ValueError, match=rf"broken\.jsonl, line 4: {message}"):
        load_trace(path)


def test_broken_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "missing.csv")
    with pytest.raises(ValueError, match=r"e\.csv: no known trace format has the columns \(none\)"):
        load_trace(write(tmp_path / "e.csv", ""))
    with pytest.raises(ValueError, match="no known trace format has the columns a, b"):
        load_trace(write(tmp_path / "u.csv", "a,b", "1,2"))
    with pytest.raises(ValueError, match=r"h\.csv has no requests"):
        load_trace(write(tmp_path / "h.csv", PLAIN[0]))
    with pytest.raises(ValueError, match="needs one column 'timestamp'"):
        load_trace(write(tmp_path / "m.csv", *PLAIN), "mooncake")
    with pytest.raises(ValueError, match="needs one column 'arrival_s'"):
        load_trace(write(tmp_path / "d.csv", "arrival_s,arrival_s,prompt_len,output_len", "1,2,3,4"), "plain")
    with pytest.raises(ValueError, match="did you mean burstgpt"):
        load_trace(write(tmp_path / "p.csv", *PLAIN), "burst")
    with pytest.raises(ValueError, match=r"j\.jsonl, line 1: Unterminated"):
        load_trace(write(tmp_path / "j.jsonl", '{"timestamp'))
    (tmp_path / "l.csv").write_bytes(b"arrival_s,prompt_len,output_len\n0,1,2\n\xe9,1,2\n")
    with pytest.raises(ValueError, match=r"l\.csv, line 3: .*utf-8"):
        load_trace(tmp_path / "l.csv")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"cut\.gz is a broken gzip file"):
        load_trace(tmp_path / "cut.gz")
    good = TRACE_FORMATS["plain"]
    for options in ({"hash_ids": "h"}, {"hash_block_size": 4}, {"unit_s": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            replace(good, **options)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 3000), st.integers(0, 9)), min_size=1, max_size=9
    ),
    st.sampled_from(["azure", "burstgpt", "sharegpt", "mooncake"]),
)
def test_the_fast_and_the_slow_reader_agree(rows: list[tuple[int, int, int]], name: str):
    layout, is_json = TRACE_FORMATS[name], name == "mooncake"
    records = []
    for arrival, prompt_len, output_len in rows:
        time = f"2023-11-16 18:00:{arrival % 60:02}.{arrival:07}" if layout.unit_s is None else arrival
        record: dict[str, Any] = dict(
            zip(layout.columns, (time, prompt_len, output_len, "chat"), strict=False)
        )
        if is_json:
            record["hash_ids"] = list(range(-(-prompt_len // 512)))
        records.append(record)
    header = [] if is_json else [",".join(records[0])]
    lines = [json.dumps(r) if is_json else ",".join(map(str, r.values())) for r in records]
    content = "\n".join([*header, *lines]).encode()
    fast = traces_module._read_fast(content, is_json, layout)
    slow = read_lines("x", content, is_json, layout, sort=True, strict=False)
    assert fast is not None and fast.columns == slow.columns and fast.dtypes == slow.dtypes
    assert fast.drop("arrival_s").equals(slow.drop("arrival_s"))
    assert np.allclose(fast["arrival_s"], slow["arrival_s"], rtol=1e-15, atol=0)


def test_only_broken_files_are_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traces_module, "read_lines", lambda *args, **kwargs: pytest.fail("read line by line"))
    for name, lines in (("a.csv", AZURE), ("b.csv", BURSTGPT), ("m.jsonl", MOONCAKE), ("s.csv", SHAREGPT)):
        load_trace(write(tmp_path / name, *lines))


def public(name: str) -> Path:
    path = PUBLIC / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return path


@pytest.mark.parametrize(
    ("service", "file", "num", "num_bins", "num_output_levels", "worst"),
    [("conversation", "conv", 19_366, 32, 9, 0.15), ("code", "code", 8_819, 1, 33, 0.13)],
)
def test_azure_like_is_the_fit_of_the_azure_traces(
    service: str, file: str, num: int, num_bins: int, num_output_levels: int, worst: float
):
    requests = load_trace(public(f"traces/azure2023/AzureLLMInferenceTrace_{file}.csv"))
    assert len(requests) == num
    lengths = azure_like(service)
    errors = length_errors(lengths, requests, num_samples=2_000_000)
    assert errors.worst < worst
    # All but the 1 % quantile, which is a few dozen tokens.
    assert max(abs(error) for error in errors.prompt[1:] + errors.output[1:] + errors.total[1:]) < 0.04
    assert max(map(abs, (errors.prompt_mean, errors.output_mean, errors.total_mean))) < 0.015
    fitted = fit_lengths(requests, num_bins=num_bins, num_output_levels=num_output_levels)
    assert isinstance(fitted, QuantileLengths) and len(fitted.outputs) == num_bins
    for mine, again in zip((lengths.prompt, *lengths.outputs), (fitted.prompt, *fitted.outputs), strict=True):
        assert isinstance(again, Quantiles) and mine.tokens == again.tokens
        assert np.allclose(mine.levels, again.levels, rtol=0, atol=6e-4)


def test_the_mooncake_trace():
    requests = load_trace(public("traces/mooncake/conversation_trace.jsonl.gz"))
    assert len(requests) == 12_031 and requests.arrival_s[-1] == pytest.approx(3536.999)
    counts = np.diff(requests.hash_start)
    assert (counts == requests.prompt_len // 512).all()
    seen: set[int] = set()
    num_hits = 0
    for index in range(len(requests)):
        hashes = requests.hashes_of(index).tolist()
        num_hits += next((depth for depth, value in enumerate(hashes) if value not in seen), len(hashes))
        seen.update(hashes)
    # An endless cache finds every block of a prefix seen before, so what it misses are the distinct blocks.
    assert counts.sum() - num_hits == len(seen) == len(set(requests.hashes.tolist()))
    assert 0.3 < num_hits / counts.sum() < 0.5


def test_the_sharegpt_lengths():
    requests = load_trace(public("timings/llmservingsim/sharegpt-llama-3.1-8b-300-sps10.lengths.csv"))
    assert len(requests) == 300 and requests.mean_rate_per_s == pytest.approx(10.0, rel=0.05)
