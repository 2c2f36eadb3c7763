"""The struct of arrays: what it promises is checked, and every operation keeps it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.workload import Requests
from specdec.workload.hashing import chain_hashes, split_hashes
from tests.helpers.workloads import same_requests


@st.composite
def request_lists(draw: st.DrawFn, block_size: int = 4) -> Requests:
    num = draw(st.integers(1, 12))
    ints = lambda low, high: st.lists(st.integers(low, high), min_size=num, max_size=num)  # noqa: E731
    prompt_len, output_len = np.array(draw(ints(1, 40))), np.array(draw(ints(1, 40)))
    counts = np.minimum(draw(ints(0, 12)), (prompt_len + output_len) // block_size)
    start = np.concatenate(([0], np.cumsum(counts)))
    return Requests.build(
        np.cumsum(draw(ints(0, 5))),
        prompt_len,
        output_len,
        max_tokens=output_len + draw(ints(0, 5)),
        task=draw(ints(0, 1)),
        tasks=draw(st.sampled_from([("a", "b"), ("b", "a"), ("c", "a")])),
        priority=draw(ints(-2, 2)),
        deadline_s=[draw(st.sampled_from([50.0, math.inf])) for _ in range(num)],
        session=draw(ints(-1, 3)),
        hash_block_size=block_size,
        hash_start=start,
        hashes=np.arange(1, start[-1] + 1),
    )


def rows(requests: Requests) -> list[tuple[Any, ...]]:
    """One tuple per request, with names for tasks and lists of hashes."""
    return [
        (
            requests.arrival_s[i],
            requests.prompt_len[i],
            requests.output_len[i],
            requests.max_tokens[i],
            requests.tasks[requests.task[i]],
            requests.priority[i],
            requests.deadline_s[i],
            requests.session[i],
            requests.hashes_of(i).tolist(),
        )
        for i in range(len(requests))
    ]


def test_build_fills_in_what_is_not_given():
    requests = Requests.build([0, 1], [3, 4], 5)
    assert rows(requests) == [(0, 3, 5, 5, "", 0, math.inf, -1, []), (1, 4, 5, 5, "", 0, math.inf, -1, [])]
    dtypes = "float64 int32 int32 int32 int16 int16 float64 int64 int64 uint64".split()
    names = "arrival_s prompt_len output_len max_tokens task priority deadline_s session hash_start hashes".split()
    assert [str(getattr(requests, name).dtype) for name in names] == dtypes
    assert len(Requests.build([], [], [])) == 0
    assert Requests.build([0, 1], 3.0, 5).prompt_len.tolist() == [3, 3]


@given(request_lists(), st.integers(-15, 15), st.integers(-15, 15))
def test_slices_are_those_of_a_list(requests: Requests, start: int, stop: int):
    part = requests.slice(start, stop)
    part.validate()
    assert rows(part) == rows(requests)[start:stop]
    assert rows(requests.head(abs(start))) == rows(requests)[: abs(start)]


@given(request_lists(), request_lists())
def test_merge_and_concat(first: Requests, second: Requests):
    merged = Requests.merge([first, second])
    merged.validate()
    assert rows(merged) == sorted(rows(first) + rows(second), key=lambda row: row[0])
    later = second.with_arrivals(second.arrival_s + first.arrival_s[-1])
    assert rows(Requests.concat([first, later])) == rows(first) + rows(later)


@given(request_lists(), st.integers(1, 11))
def test_concat_undoes_slicing(requests: Requests, size: int):
    parts = [requests.slice(start, start + size) for start in range(0, len(requests), size)]
    assert same_requests(Requests.concat(parts), requests)


def test_rates_and_times():
    requests = Requests.build([1.0, 2.0, 5.0], 3, 4, deadline_s=[3.0, math.inf, 6.0])
    assert requests.mean_rate_per_s == 0.5
    faster = requests.scale_rate(2.0)
    assert faster.arrival_s.tolist() == [0.5, 1.0, 2.5] and faster.mean_rate_per_s == 1.0
    assert faster.deadline_s.tolist() == [2.5, math.inf, 3.5]
    assert requests.with_arrivals([0, 0, 0]).mean_rate_per_s == math.inf
    assert math.isnan(requests.head(1).mean_rate_per_s)


def test_a_limit_cuts_outputs():
    limited = Requests.build([0, 1], 3, [4, 40]).with_max_tokens(10)
    assert (limited.output_len.tolist(), limited.max_tokens.tolist()) == ([4, 10], [10, 10])


def test_smaller_hash_blocks():
    requests = Requests.build(
        [0, 0], [9, 9], 8, hash_block_size=4, hash_start=[0, 3, 5], hashes=[5, 6, 7, 5, 8]
    )
    assert requests.num_prompt_hashes.tolist() == [2, 2]
    halves = requests.with_hash_block_size(2)
    halves.validate()
    first, second = halves.hashes_of(0).tolist(), halves.hashes_of(1).tolist()
    assert (len(first), len(second), len({*first, *second})) == (6, 4, 8)
    assert first[:2] == second[:2]
    assert halves.num_prompt_hashes.tolist() == [4, 4]
    assert requests.with_hash_block_size(4) is requests
    assert not len(Requests.build(0, 3, 4).with_hash_block_size(16).hashes)
    for block_size in (3, 8, 0):
        with pytest.raises(ValueError, match=f"blocks of {block_size}"):
            requests.with_hash_block_size(block_size)


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8))
def test_chained_hashes_are_equal_if_and_only_if_prefixes_are(sequences: list[list[int]]):
    start = np.cumsum([0, *map(len, sequences)])
    flat = np.array([item for sequence in sequences for item in sequence], np.uint64)
    hashes = chain_hashes(flat, start)
    assert hashes.all()
    name_of = {}
    for sequence, begin in zip(sequences, start.tolist(), strict=False):
        for depth in range(len(sequence)):
            name_of.setdefault(tuple(sequence[: depth + 1]), set()).add(int(hashes[begin + depth]))
    names = [name for names in name_of.values() for name in names]
    assert len(set(names)) == len(names) == len(name_of)


def test_split_hashes_differ():
    parts = split_hashes(np.arange(1, 1000, dtype=np.uint64), 32)
    assert len(np.unique(parts)) == parts.size == 999 * 32 and parts.all()


GOOD = {"arrival_s": [0.0, 1.0], "prompt_len": [3, 4], "output_len": [5, 6]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arrival_s": [1.0, 0.5]}, r"arrival_s=0.5 of request 1 is before its predecessor's 1.0"),
        ({"arrival_s": [-1.0, 0.5]}, r"arrival_s=-1.0 of request 0 must be finite and >= 0"),
        ({"arrival_s": [0.0, math.nan]}, r"arrival_s=nan of request 1"),
        ({"arrival_s": [0.0, math.inf]}, r"arrival_s=inf of request 1"),
        ({"prompt_len": [3, 0]}, r"prompt_len=0 of request 1 must be >= 1"),
        ({"prompt_len": [3, 2**31]}, r"prompt_len=2147483648 of request 1 must be in"),
        ({"prompt_len": [3, 2.5]}, r"prompt_len must be whole numbers"),
        ({"prompt_len": [3, math.nan]}, r"prompt_len must be whole numbers"),
        ({"prompt_len": [3, 4, 5]}, r"prompt_len has the shape \(3,\), not \(2,\)"),
        ({"output_len": [0, 6]}, r"output_len=0 of request 0 must be >= 1"),
        ({"max_tokens": [5, 5]}, r"max_tokens=5 of request 1 must be >= output_len"),
        ({"task": [0, 1]}, r"task=1 of request 1 must be an index into tasks"),
        ({"deadline_s": [math.nan, 1]}, r"deadline_s=nan of request 0"),
        ({"session": [-2, 1]}, r"session=-2 of request 0"),
        ({"hashes": [1], "hash_start": [0, 1, 1]}, r"hash_block_size=0 must be >= 1"),
        ({"hashes": [1], "hash_start": [0, 1], "hash_block_size": 4}, r"hash_start must be 3 rising"),
        ({"hashes": [1], "hash_start": [0, 1, 2], "hash_block_size": 4}, r"hashes has the shape"),
        ({"hashes": [0], "hash_start": [0, 1, 1], "hash_block_size": 4}, r"hashes must not be 0"),
        ({"hashes": [1, 2, 3], "hash_start": [0, 3, 3], "hash_block_size": 4}, r"hash count=3 of request 0"),
    ],
)
def test_broken_promises_are_named(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Requests.build(**(GOOD | changed))


def test_bad_input():
    requests = Requests.build(**GOOD)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor="):
            requests.scale_rate(factor)
    with pytest.raises(ValueError, match="shape"):
        requests.with_arrivals([1.0])
    with pytest.raises(ValueError, match="max_tokens=0"):
        requests.with_max_tokens(0)
    with pytest.raises(ValueError, match="num=-1"):
        requests.head(-1)
    with pytest.raises(ValueError, match="before its predecessor"):
        Requests.concat([requests, requests])
    with pytest.raises(ValueError, match="no requests to join"):
        Requests.merge([])
    hashed = [Requests.build(0, 8, 1, hash_block_size=b, hash_start=[0, 1], hashes=[1]) for b in (4, 8)]
    with pytest.raises(ValueError, match=r"blocks of \[4, 8\] tokens"):
        Requests.concat(hashed)
