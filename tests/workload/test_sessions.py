"""Conversations: every turn begins with all that was said before, and its hashes say so."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.workload import (
    FixedLengths,
    LognormalLengths,
    Poisson,
    SessionShape,
    SessionSource,
    TaskMix,
    collect,
    multi_turn,
)

LENGTHS = LognormalLengths(
    prompt_median=20, prompt_sigma=1, output_median=15, output_sigma=1, max_prompt_len=300
)
MIX = TaskMix({"a": (1.0, LENGTHS), "b": (1.0, FixedLengths(3, 4))})


@settings(max_examples=40)
@given(
    system_prompt_len=st.sampled_from([0, 7, 32]),
    hash_block_size=st.sampled_from([1, 5, 16]),
    max_context_len=st.sampled_from([200, 100_000]),
    seed=st.integers(0, 2**32),
)
def test_a_turn_contains_the_turns_before(
    system_prompt_len: int, hash_block_size: int, max_context_len: int, seed: int
):
    shape = SessionShape(
        turn_weights=(1, 1, 1, 1),
        system_prompt_len=system_prompt_len,
        hash_block_size=hash_block_size,
        max_context_len=max_context_len,
    )
    starts_s = np.sort(np.random.default_rng(seed).uniform(0, 100, 12))
    requests = multi_turn(starts_s, MIX, shape, np.random.default_rng(seed), first_session=5)
    requests.validate()
    context_len = requests.prompt_len + requests.output_len
    assert context_len.max() <= max_context_len and requests.prompt_len.min() > system_prompt_len
    assert (np.diff(requests.hash_start) == context_len // hash_block_size).all()
    first_turns = {}
    for session in np.unique(requests.session):
        turns = np.flatnonzero(requests.session == session)
        first_turns[int(session)] = requests.hashes_of(turns[0]).tolist()
        assert requests.arrival_s[turns[0]] == starts_s[session - 5]
        assert len(set(requests.task[turns])) == 1 and len(turns) <= 4
        for before, after in itertools.pairwise(turns.tolist()):
            assert requests.prompt_len[after] > context_len[before]
            known = requests.hashes_of(before).tolist()
            assert requests.hashes_of(after)[: len(known)].tolist() == known
    # Different sessions share the full blocks of the system prompt and nothing else.
    num_common = system_prompt_len // hash_block_size
    common = {tuple(hashes[:num_common]) for hashes in first_turns.values()}
    own = [value for hashes in first_turns.values() for value in hashes[num_common:]]
    assert len(common) <= 1 and len(set(own)) == len(own)


def test_turns_and_gaps_have_their_means():
    shape = SessionShape(turn_weights=(1, 2, 1), think_time_s=10.0, s_per_output_token=0.5)
    source = SessionSource(Poisson(1.0), FixedLengths(10, 4), 20_000, seed=1, shape=shape)
    requests = collect(source)
    # The number of turns has mean 2 and variance 1/2.
    assert abs(len(requests) / 20_000 - 2.0) < 4 * math.sqrt(0.5 / 20_000)
    order = np.lexsort((requests.arrival_s, requests.session))
    same = np.diff(requests.session[order]) == 0
    gaps_s = np.diff(requests.arrival_s[order])[same]
    assert gaps_s.min() >= 2.0
    assert abs(gaps_s.mean() - 12.0) < 4 * 10.0 / math.sqrt(gaps_s.size)
    assert requests.prompt_len[order][:-1][same].max() <= 10 + 14 < requests.prompt_len.max() == 38


def test_seeds_share_no_prefix():
    shape = SessionShape(system_prompt_len=64)
    first, second = (
        set(collect(SessionSource(Poisson(1.0), LENGTHS, 50, seed=seed, shape=shape)).hashes.tolist())
        for seed in (1, 2)
    )
    assert first.isdisjoint(second)
