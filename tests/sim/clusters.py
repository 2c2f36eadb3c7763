"""Small clusters for tests: step times that can be computed by hand, sources that can be written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from sim.cluster import Cluster, ClusterFigures, ClusterSpec, ReplicaSpec
from sim.replica import SimRequest
from sim.step_features import StepCost, StepFeatures
from specdec.scheduler import SchedulerConfig
from specdec.workload import Requests

TOKENS_PER_SERVICE = 10_000
LIMITS: dict[str, Any] = dict(
    max_num_seqs=8, max_num_batched_tokens=64, num_blocks=256, block_size=4, max_model_len=256
)

DRAFTS: dict[str, Any] = dict(
    speculation={"name": "fixed", "max_drafts": 4}, acceptance={"name": "constant", "alpha": 0.6}
)


@dataclass(frozen=True)
class LinearTimes:
    """Seconds per step, per token of the target, and per pass of the drafter."""

    step_s: float = 1e-2
    token_s: float = 0.0
    draft_s: float = 0.0

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        verify_s = self.step_s + self.token_s * features.num_tokens
        return StepCost(self.draft_s * features.draft_steps, verify_s, 0.0, 0.0, 0.0)


class CountingTimes:
    """:class:`LinearTimes` that counts what it is asked for, and calls ``watch`` at every step."""

    def __init__(self, step_s: float = 1e-2, token_s: float = 0.0) -> None:
        self._times = LinearTimes(step_s, token_s)
        self.num_steps = 0
        self.prefill_tokens = 0.0
        self.watch: Callable[[StepFeatures[float]], None] | None = None

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        self.num_steps += 1
        self.prefill_tokens += features.prefill_tokens
        if self.watch:
            self.watch(features)
        return self._times.predict_scalar(features)


@dataclass(frozen=True)
class ServiceLengths:
    """Prompts whose computation takes exponential or constant time, answered by one token."""

    is_exponential: bool

    def sample(self, rng: np.random.Generator, num: int) -> tuple[Any, Any]:
        tokens = (
            rng.exponential(TOKENS_PER_SERVICE, num) if self.is_exponential else [TOKENS_PER_SERVICE] * num
        )
        return np.ceil(tokens).astype(np.int32), np.ones(num, np.int32)


@dataclass(frozen=True)
class ListSource:
    """Requests written down."""

    requests: Requests

    def chunks(self, size: int) -> Iterator[Requests]:
        for start in range(0, len(self.requests), size):
            yield self.requests.slice(start, start + size)


def server(service_s: float = 1.0) -> ReplicaSpec:
    """Serves one request at a time, in a step whose time is in proportion to the prompt."""
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=1_000_000,
        num_blocks=1,
        block_size=1_000_000,
        max_model_len=1_000_000,
        prefix_caching=False,
    )
    return ReplicaSpec(config, LinearTimes(0.0, service_s / TOKENS_PER_SERVICE), policy="continuous")


def small_replica(times: Any = None, **options: Any) -> ReplicaSpec:
    """A replica of few blocks; ``options`` of the scheduler and of :class:`ReplicaSpec`."""
    known = {key: options.pop(key) for key in list(options) if key in SchedulerConfig.__dataclass_fields__}
    return ReplicaSpec(SchedulerConfig(**(LIMITS | known)), times or LinearTimes(), **options)


def some_requests(num: int, rate_per_s: float, seed: int = 0, tasks: Sequence[str] = ("",)) -> ListSource:
    """Poisson arrivals with uniform lengths up to 60 and 20 tokens, tasks in turn."""
    rng = np.random.default_rng(seed)
    requests = Requests.build(
        np.cumsum(rng.exponential(1.0 / rate_per_s, num)),
        rng.integers(1, 61, num),
        rng.integers(1, 21, num),
        max_tokens=20,
        task=np.arange(num) % len(tasks),
        tasks=tasks,
    )
    return ListSource(requests)


def one(
    number: int = 0, arrival_s: float = 0.0, prompt_len: int = 8, output_len: int = 4, task: str = ""
) -> SimRequest:
    return SimRequest(
        request_id=number,
        prompt_len=prompt_len,
        max_tokens=output_len,
        output_len=output_len,
        arrival_s=arrival_s,
        task=task,
    )


def run_cluster(
    spec: ClusterSpec, requests: Sequence[SimRequest], prepare: Callable[[Cluster], None]
) -> tuple[list[SimRequest], ClusterFigures]:
    """Those requests that ended; ``prepare`` sees the cluster before it starts."""
    env = simpy.Environment()
    ended: list[SimRequest] = []
    cluster = Cluster(env, spec, seed=0, on_end=ended.append)
    prepare(cluster)

    def arrivals() -> Iterator[simpy.Event]:
        for request in requests:
            yield env.timeout(request.arrival_s - env.now)
            cluster.submit(request)
        cluster.exhausted()

    env.process(arrivals())
    while env.peek() <= cluster.end_s and env.peek() < math.inf:
        env.step()
    return ended, cluster.close()
