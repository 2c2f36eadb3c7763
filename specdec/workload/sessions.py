"""Conversations: each turn's prompt is everything said so far and a new question.

A session's tokens form one stream: system prompt, question, answer, question, … A turn's prompt is the stream up
to its question, and its hashes name the full blocks of prompt and answer, so the next turn finds all of them in
a prefix cache. The system prompt is the same for all sessions, the rest is a session's own.

>>> source = SessionSource(Poisson(0.5), FixedLengths(80, 200), num_sessions=1000, seed=0)
>>> for requests in source.chunks(4096): ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.workload.arrivals import ArrivalProcess, FloatArray, arrival_chunks, regroup
from specdec.workload.hashing import HashArray, pair_hash
from specdec.workload.lengths import LengthDistribution
from specdec.workload.requests import Requests
from specdec.workload.tasks import TaskMix

_SESSION_BLOCK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionShape:
    """What conversations look like besides the lengths of their turns.

    Args:
        turn_weights: [most turns] >= 0; session lengths of 1, 2, … turns are drawn in proportion.
        think_time_s: mean (exponential) between an answer's end and the next question, >= 0.
        s_per_output_token: assumed seconds per token of an answer, since arrivals are fixed before it is known
            how fast the answers come: a turn follows its predecessor by this time and the thought.
        system_prompt_len: tokens that begin every prompt, the same for all sessions.
        max_context_len: a session ends before the turn whose prompt and answer together would be longer.
        hash_block_size: tokens per hashed block.

    Raises:
        ValueError: a value outside of its range.
    """

    turn_weights: tuple[float, ...] = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)
    think_time_s: float = 30.0
    s_per_output_token: float = 0.0
    system_prompt_len: int = 0
    max_context_len: int = 131_072
    hash_block_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "turn_weights", tuple(self.turn_weights))
        weights = self.turn_weights
        if not weights or not all(0.0 <= weight < math.inf for weight in weights) or sum(weights) == 0.0:
            raise ValueError(f"turn_weights={weights} must be finite numbers >= 0, not all 0")
        for name in ("think_time_s", "s_per_output_token"):
            if not 0.0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} must be a finite number >= 0")
        for name, least in (("system_prompt_len", 0), ("max_context_len", 2), ("hash_block_size", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value} must be >= {least}")


def multi_turn(
    starts_s: FloatArray,
    lengths: LengthDistribution | TaskMix,
    shape: SessionShape,
    rng: np.random.Generator,
    *,
    first_session: int = 0,
    hash_seed: int = 0,
) -> Requests:
    """All turns of the sessions that start at ``starts_s``, in the order of arrival.

    Args:
        starts_s: float64 [S], seconds, rising: arrival of each session's first turn.
        lengths: of a turn's question and answer, drawn anew each turn; of a mix, a session keeps its class.
        shape: of the sessions.
        rng: for turns, lengths and think times.
        first_session: number of the first session; the others follow.
        hash_seed: workloads with different ones share no prefix.

    Raises:
        ValueError: see ``Requests.validate``.
    """
    mix = TaskMix.of(lengths)
    weights = np.array(shape.turn_weights)
    num_turns = 1 + rng.choice(weights.size, starts_s.size, p=weights / weights.sum())
    session = np.repeat(np.arange(starts_s.size), num_turns)
    first = np.cumsum(num_turns) - num_turns
    task = np.repeat(mix.draw_tasks(rng, starts_s.size), num_turns)
    question, answer = mix.draw_lengths(rng, task)

    gaps_s = rng.exponential(shape.think_time_s, session.size)
    gaps_s[1:] += shape.s_per_output_token * answer[:-1]
    gaps_s[first] = 0.0
    arrival_s = starts_s[session] + _running_sums(gaps_s, first, num_turns)
    context_len = shape.system_prompt_len + _running_sums(
        question + answer.astype(np.int64), first, num_turns
    )

    kept = np.flatnonzero(context_len <= shape.max_context_len)
    rows = kept[np.argsort(arrival_s[kept], kind="stable")]
    numbers = session[rows] + first_session
    hash_start, hashes = _hashes(shape, hash_seed, numbers, context_len[rows])
    return mix.build(
        arrival_s[rows],
        task[rows],
        (context_len - answer)[rows],
        answer[rows],
        session=numbers,
        hash_block_size=shape.hash_block_size,
        hash_start=hash_start,
        hashes=hashes,
    )


@dataclass(frozen=True, slots=True)
class SessionSource:
    """A stream of sessions; see :func:`multi_turn`. Its requests are more than ``num_sessions``.

    Args:
        process: of the sessions' starts.
        lengths: of a turn's question and answer.
        num_sessions: >= 1.
        seed: of everything drawn, hashes too.
        shape: of the sessions.

    Raises:
        ValueError: ``num_sessions`` < 1.
    """

    process: ArrivalProcess
    lengths: LengthDistribution | TaskMix
    num_sessions: int
    seed: int
    shape: SessionShape = SessionShape()

    def __post_init__(self) -> None:
        if self.num_sessions < 1:
            raise ValueError(f"num_sessions={self.num_sessions} must be >= 1")

    def chunks(self, size: int) -> Iterator[Requests]:
        return regroup(self._blocks(), size, Requests.concat, Requests.slice)

    def _blocks(self) -> Iterator[Requests]:
        start_rng, turn_rng = np.random.default_rng(self.seed).spawn(2)
        pending: list[Requests] = []
        num_before = 0
        for starts_s in arrival_chunks(self.process, self.num_sessions, start_rng, size=_SESSION_BLOCK):
            turns = multi_turn(
                starts_s, self.lengths, self.shape, turn_rng, first_session=num_before, hash_seed=self.seed
            )
            num_before += starts_s.size
            for waiting in pending:
                # Nothing that is yet to be drawn arrives before the sessions of this block.
                num_due = int(np.searchsorted(waiting.arrival_s, starts_s[0], side="right"))
                yield waiting.head(num_due)
                turns = Requests.merge([waiting.slice(num_due, len(waiting)), turns])
            pending = [turns]
        yield from pending


def _running_sums(values: NDArray[Any], first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
    """Running sums that begin anew at each of ``first``, where groups of ``counts`` begin."""
    sums = np.cumsum(values)
    return sums - np.repeat(sums[first] - values[first], counts)


def _hashes(
    shape: SessionShape, seed: int, session: NDArray[np.int64], context_len: NDArray[np.int64]
) -> tuple[NDArray[np.int64], HashArray]:
    """``hash_start`` and ``hashes``: what a block is called depends on its place and its session, or on its
    place alone within the system prompt. A place in one stream says all that comes before it."""
    counts = context_len // shape.hash_block_size
    start = np.concatenate(([0], np.cumsum(counts)))
    place = (np.arange(start[-1]) - np.repeat(start[:-1], counts)).astype(np.uint64)
    seeds = np.array([seed], np.uint64)
    own = np.repeat(pair_hash(seeds, session.astype(np.uint64) + np.uint64(1)), counts)
    common = pair_hash(seeds, np.zeros(1, np.uint64))
    is_common = place < shape.system_prompt_len // shape.hash_block_size
    return start, pair_hash(np.where(is_common, common, own), place)
