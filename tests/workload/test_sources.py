"""Streams: chunks are the whole, repeated traces go on where they ended, users think and ask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from specdec.workload import (
    ClosedLoop,
    FixedLengths,
    Gamma,
    LognormalLengths,
    Poisson,
    Requests,
    RequestSource,
    SessionShape,
    SessionSource,
    SyntheticSource,
    TaskClass,
    TaskMix,
    TraceSource,
    collect,
)
from tests.helpers.workloads import same_requests

LENGTHS = LognormalLengths(prompt_median=90, prompt_sigma=1, output_median=30, output_sigma=1)
MIX = TaskMix({"short": (1.0, FixedLengths(2, 3)), "long": TaskClass(2.0, LENGTHS, 1, 5.0)})
TRACE = Requests.build(
    [0.0, 1.0, 4.0],
    [8, 9, 10],
    [1, 2, 3],
    session=[0, -1, 1],
    deadline_s=[2.0, math.inf, 5.0],
    hash_block_size=4,
    hash_start=[0, 2, 4, 5],
    hashes=[1, 2, 1, 3, 1],
)
SOURCES = (
    SyntheticSource(Gamma(5.0, 2.0), MIX, 70_001, seed=3),
    SyntheticSource(Poisson(5.0), LENGTHS, 1_000, seed=3, max_tokens=50),
    TraceSource(TRACE, 20_000, rate_factor=2.0),
    ClosedLoop(4, 1.0, MIX, 70_001, seed=3),
    SessionSource(Poisson(5.0), MIX, 5_000, seed=3, shape=SessionShape(system_prompt_len=40)),
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_chunks_are_the_whole(source: RequestSource):
    whole = collect(source)
    whole.validate()
    for size in (997, 65_536, 10**6):
        chunks = list(source.chunks(size))
        assert {len(chunk) for chunk in chunks[:-1]} <= {size} and 0 < len(chunks[-1]) <= size
        assert same_requests(Requests.concat(chunks), whole)
    with pytest.raises(ValueError, match="size=0"):
        source.chunks(0)


def test_synthetic_source():
    requests = collect(SOURCES[0])
    assert len(requests) == 70_001 and requests.tasks == ("short", "long")
    assert not same_requests(requests, collect(SyntheticSource(Gamma(5.0, 2.0), MIX, 70_001, seed=4)))
    limited = collect(SOURCES[1])
    assert (limited.max_tokens == 50).all() and limited.output_len.max() == 50


def test_a_trace_as_it_is_cut_and_repeated():
    assert same_requests(collect(TraceSource(TRACE)), TRACE)
    assert same_requests(collect(TraceSource(TRACE, 2)), TRACE.head(2))
    twice = collect(TraceSource(TRACE, 5, rate_factor=2.0))
    # Two gaps in 2 s at the doubled rate, so the next round begins 1 s after the last request.
    assert twice.arrival_s.tolist() == [0.0, 0.5, 2.0, 3.0, 3.5]
    assert twice.deadline_s.tolist() == [2.0, math.inf, 3.0, 5.0, math.inf]
    assert twice.session.tolist() == [0, -1, 1, 2, -1]
    first, second = twice.hashes[:5].tolist(), twice.hashes[5:].tolist()
    assert first == [1, 2, 1, 3, 1] and second[0] == second[2] and len({*first, *second}) == 6
    same = collect(TraceSource(TRACE, 6, repeat_hashes=True))
    assert same.hashes.tolist() == first * 2


def test_closed_loop():
    users = ClosedLoop(num_users=4, think_time_s=2.0, lengths=LENGTHS, num_requests=70_001, seed=3)
    think_s = np.concatenate(list(users.think_chunks(997)))
    assert think_s.shape == (70_001,) and (think_s == np.concatenate(list(users.think_chunks(10**6)))).all()
    assert abs(think_s.mean() - 2.0) < 4 * 2.0 / math.sqrt(70_001)
    assert not collect(users).arrival_s.any()
    constant = ClosedLoop(4, 2.0, LENGTHS, 5, seed=3, think_time="constant")
    assert [chunk.tolist() for chunk in constant.think_chunks(3)] == [[2.0] * 3, [2.0] * 2]


BAD: list[tuple[Any, str]] = [
    (lambda: SyntheticSource(Poisson(1.0), LENGTHS, 0, seed=0), "num_requests=0"),
    (lambda: SyntheticSource(Poisson(1.0), LENGTHS, 1, seed=0, max_tokens=0), "max_tokens=0"),
    (lambda: TraceSource(TRACE.head(0)), "no requests"),
    (lambda: TraceSource(TRACE, 0), "num_requests=0"),
    (lambda: TraceSource(TRACE, rate_factor=0.0), "rate_factor=0.0"),
    (lambda: ClosedLoop(0, 1.0, LENGTHS, 1, seed=0), "num_users=0"),
    (lambda: ClosedLoop(1, -1.0, LENGTHS, 1, seed=0), "think_time_s=-1.0"),
    (lambda: ClosedLoop(1, 1.0, LENGTHS, 1, seed=0, think_time="const"), "did you mean constant"),
    (lambda: SessionSource(Poisson(1.0), LENGTHS, 0, seed=0), "num_sessions=0"),
    (lambda: SessionShape(turn_weights=()), r"turn_weights=\(\)"),
    (lambda: SessionShape(turn_weights=(0.0,)), "not all 0"),
    (lambda: SessionShape(think_time_s=math.nan), "think_time_s=nan"),
    (lambda: SessionShape(hash_block_size=0), "hash_block_size=0"),
    (lambda: SessionShape(system_prompt_len=-1), "system_prompt_len=-1"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
