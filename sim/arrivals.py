"""How requests come to a simulated cluster: at the times of a source, or from users who wait for their answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import simpy

from sim.cluster import Cluster
from sim.pool import call_after
from sim.replica import Process, SimRequest
from specdec.workload import ClosedLoop, Requests, RequestSource

CHUNK = 8192
"""Requests that are turned from arrays into lists at once."""

_PROGRESS_EVERY = 1024

Progress = Callable[[int, float], None]
"""Called with the number of requests that have arrived and the time."""


class RequestReader:
    """Requests of a source one by one, checked chunk by chunk.

    Args:
        cluster: that they are for.
        prediction_error: standard deviation σ of the logarithm of predicted over true output length, for the order
            "sjf"; 0 predicts exactly, ``None`` not at all (the order then goes by ``max_tokens``).
        seed: of the predictions.

    Raises:
        ValueError: a negative ``prediction_error``; pools that share prefixes in blocks of different sizes.
    """

    def __init__(self, cluster: Cluster, prediction_error: float | None = None, seed: int = 0) -> None:
        if prediction_error is not None and not 0.0 <= prediction_error < math.inf:
            raise ValueError(f"prediction_error={prediction_error} must be finite and >= 0, or None")
        self._cluster = cluster
        self._prediction_error = prediction_error
        self._prediction_rng = np.random.default_rng([seed, 0x517F])
        self._longest = {name: _longest(cluster, name) for name in cluster.pools}
        schedulers = [pool.spec.replica.scheduler for pool in cluster.pools.values()]
        sizes = sorted({config.block_size for config in schedulers if config.prefix_caching})
        if len(sizes) > 1:
            raise ValueError(
                f"pools with prefix_caching have block_size {sizes}: one request has hashes of one"
            )
        self._hash_block_size = sizes[0] if sizes else 0

    def read(self, source: RequestSource | ClosedLoop) -> Iterator[SimRequest]:
        """All requests, numbered from 0.

        Raises:
            ValueError: a request that can never be served, with its number; one that arrives before its
                predecessor; or hashes that do not fit the block size.
        """
        number, last_s = 0, 0.0
        for requests in source.chunks(CHUNK):
            self._check(requests, number, last_s)
            yield from self._requests(requests, number)
            number += len(requests)
            last_s = float(requests.arrival_s[-1])

    def _requests(self, requests: Requests, number: int) -> Iterator[SimRequest]:
        if requests.hash_block_size and self._hash_block_size:
            requests = requests.with_hash_block_size(self._hash_block_size)
            hashes = (requests.hashes_of(index).tolist() for index in range(len(requests)))
        else:
            hashes = cast("list[list[int]]", [[] for _ in range(len(requests))])
        codes: list[int] = requests.task.tolist()
        columns = zip(
            requests.arrival_s.tolist(),
            requests.prompt_len.tolist(),
            requests.output_len.tolist(),
            requests.max_tokens.tolist(),
            requests.priority.tolist(),
            requests.deadline_s.tolist(),
            map(requests.tasks.__getitem__, codes),
            hashes,
            self._predictions(requests),
            strict=True,
        )
        for (
            arrival_s,
            prompt_len,
            output_len,
            max_tokens,
            priority,
            deadline_s,
            task,
            own,
            predicted,
        ) in columns:
            yield SimRequest(
                request_id=number,
                prompt_len=prompt_len,
                max_tokens=max_tokens,
                output_len=output_len,
                arrival_s=arrival_s,
                priority=priority,
                deadline_s=deadline_s,
                block_hashes=own,
                task=task,
                predicted_tokens=predicted,
            )
            number += 1

    def _predictions(self, requests: Requests) -> list[int] | list[None]:
        if self._prediction_error is None:
            return [None] * len(requests)
        factors = np.exp(self._prediction_error * self._prediction_rng.standard_normal(len(requests)))
        return np.maximum(1, np.rint(requests.output_len * factors)).astype(np.int64).tolist()

    def _check(self, requests: Requests, number: int, last_s: float) -> None:
        times_s = requests.arrival_s
        early = np.flatnonzero(np.diff(times_s, prepend=last_s) < 0.0)
        if early.size:
            raise ValueError(
                f"request {number + int(early[0])} arrives at {times_s[early[0]]} s, before its predecessor: sort "
                "the source by time"
            )
        cluster = self._cluster
        limits = [min(self._longest[name] for name in cluster.pools_of(task)) for task in requests.tasks]
        too_long = (
            requests.prompt_len.astype(np.int64) + requests.max_tokens > np.array(limits)[requests.task]
        )
        if cluster.spec.disaggregation is not None:
            too_long |= requests.prompt_len + 1 > self._longest[cluster.spec.disaggregation.prefill]
        if too_long.any():
            index = int(np.argmax(too_long))
            row = requests.slice(index, index + 1)
            cluster.check(next(self._requests(row, number + index)))
            raise AssertionError(f"request {number + index} was found too long, but the scheduler takes it")


def _longest(cluster: Cluster, pool: str) -> int:
    """Most tokens of a request that the replicas of ``pool`` can ever run: the limits of ``StepLoop.check``."""
    spec = cluster.pools[pool].spec.replica
    config, is_chunked = spec.scheduler, spec.make_loop().policy.chunked_prefill
    longest = min(config.max_model_len, config.num_blocks * config.block_size)
    return longest if is_chunked else min(longest, config.max_num_batched_tokens)


def arrive(
    env: simpy.Environment, cluster: Cluster, requests: Iterator[SimRequest], progress: Progress | None
) -> Process:
    """Submit ``requests`` at their arrival times."""
    submit, now_s = cluster.submit, env.now
    for number, request in enumerate(requests, start=1):
        if request.arrival_s > now_s:
            yield env.timeout(request.arrival_s - now_s)
            now_s = env.now
        submit(request)
        if progress and number % _PROGRESS_EVERY == 0:
            progress(number, now_s)
    cluster.exhausted()


class Users:
    """A fixed number of users: each thinks, asks, waits for the end of the answer, and thinks again.

    Args:
        source: how many there are, what they ask and how long they think.
    """

    def __init__(
        self, env: simpy.Environment, source: ClosedLoop, reader: RequestReader, progress: Progress | None
    ) -> None:
        self._env, self._progress = env, progress
        self._requests = reader.read(source)
        thoughts_s = itertools.chain.from_iterable(chunk.tolist() for chunk in source.think_chunks(CHUNK))
        self._thoughts_s: Iterator[float] = thoughts_s
        self._num_users, self._num_left = source.num_users, source.num_requests
        self._num_asked = 0
        self._cluster: Cluster | None = None

    def start(self, cluster: Cluster) -> None:
        """All begin with a thought."""
        self._cluster = cluster
        for _ in range(self._num_users):
            self.think()

    def think(self, _: SimRequest | None = None) -> None:
        """A user's last request has ended; the next one follows, unless all have been asked."""
        think_s = next(self._thoughts_s, None)
        if think_s is not None:
            call_after(self._env, think_s, self._ask)

    def _ask(self, _: simpy.Event) -> None:
        cluster, now_s = self._cluster, self._env.now
        assert cluster is not None
        request = next(self._requests)
        request.arrival_s = now_s
        request.deadline_s += now_s
        cluster.submit(request)
        self._num_asked += 1
        if self._progress and self._num_asked % _PROGRESS_EVERY == 0:
            self._progress(self._num_asked, now_s)
        if self._num_asked == self._num_left:
            cluster.exhausted()
