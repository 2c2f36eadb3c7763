"""What a cluster consists of: frozen descriptions, checked when made, from which replicas are built.

>>> spec = ReplicaSpec(SchedulerConfig(num_blocks=4096), cost_model, policy="chunked")
>>> cluster = ClusterSpec.of(spec, num_replicas=8, router="power_of_two")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import simpy

from sim.acceptance import make_acceptance
from sim.remote_draft import RemoteDraft
from sim.replica import Replica, SimRequest, StepTimes
from sim.router import ModelRouter, Router, make_router
from specdec.scheduler import SchedulerConfig, StepLoop, make_controller, make_policy
from specdec.trace import TraceWriter

Choice = str | Mapping[str, Any]
"""A name, or a mapping of ``name`` and options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Admission control: what a request must not exceed when it arrives, or it is rejected.

    Args:
        max_outstanding: requests in the pool, running, waiting and held.
        max_outstanding_tokens: their prompt tokens and output limits together, the newcomer's included.
        max_outstanding_per_replica, max_outstanding_tokens_per_replica: the same of the replica it is routed to.
        max_waiting_per_replica: requests in that replica's queue.

    A request that was let in once is not rejected later, when it is retried, escalated or handed on.

    Raises:
        ValueError: a limit < 1.
    """

    max_outstanding: int | None = None
    max_outstanding_tokens: int | None = None
    max_outstanding_per_replica: int | None = None
    max_outstanding_tokens_per_replica: int | None = None
    max_waiting_per_replica: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1, or None for no limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """As many replicas as the requests in the pool need.

    Every ``interval_s`` the pool wants ceil(outstanding / ``target_outstanding``) replicas. A new one takes
    requests after ``cold_start_s``; of too many the youngest finish what they have and leave.

    Raises:
        ValueError: a value out of range.
    """

    target_outstanding: float
    min_replicas: int
    max_replicas: int
    interval_s: float = 10.0
    cold_start_s: float = 60.0

    def __post_init__(self) -> None:
        _check_seconds("interval_s", self.interval_s)
        _check_seconds("target_outstanding", self.target_outstanding)
        _check_seconds("cold_start_s", self.cold_start_s, allow_zero=True)
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"1 <= min_replicas={self.min_replicas} <= max_replicas={self.max_replicas} must hold"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Replicas fail and come back; times are exponential, of each replica on its own.

    The requests of a failed replica lose their progress and are sent again, up to ``max_retries`` times each;
    one failure more, and they count as failed.

    Raises:
        ValueError: a time that is not positive, or a negative number of retries.
    """

    mean_time_to_failure_s: float
    mean_repair_s: float
    max_retries: int = 3

    def __post_init__(self) -> None:
        _check_seconds("mean_time_to_failure_s", self.mean_time_to_failure_s)
        _check_seconds("mean_repair_s", self.mean_repair_s)
        if self.max_retries < 0:
            raise ValueError(f"max_retries={self.max_retries} must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregation:
    """A prompt is computed in one pool, the answer in another, and the KV moves between (DistServe, OSDI 2024).

    The first token comes from the prefill pool. Then ``kv_bytes_per_token`` · prompt length move over the link
    of the prefill replica, one transfer after the other, and arrive ``link_latency_s`` later. Blocks are given
    back when the transfer is queued; a transfer survives a failure of its source.

    Args:
        prefill, decode: names of the pools.
        kv_bytes_per_token: see ``ModelShape.kv_bytes_per_token``.
        link_bytes_per_s: of each prefill replica.
        link_latency_s: of one transfer.

    Raises:
        ValueError: a value out of range, or one pool for both.
    """

    kv_bytes_per_token: float
    link_bytes_per_s: float
    link_latency_s: float = 0.0
    prefill: str = "prefill"
    decode: str = "decode"

    def __post_init__(self) -> None:
        _check_seconds("kv_bytes_per_token", self.kv_bytes_per_token)
        _check_seconds("link_bytes_per_s", self.link_bytes_per_s)
        _check_seconds("link_latency_s", self.link_latency_s, allow_zero=True)
        if self.prefill == self.decode:
            raise ValueError(f"prefill and decode are both pool {self.prefill!r}: disaggregation needs two")


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One replica: its scheduler, its speed and its luck with drafts.

    Args:
        scheduler: limits.
        cost_model: seconds of a step.
        policy: batching policy, as ``make_policy`` takes it.
        speculation: draft-length controller, as ``make_controller`` takes it.
        acceptance: acceptance model, as ``make_acceptance`` takes it; needed unless speculation is off.
        swap_block_s: seconds to move one KV block from or to host memory.
        draft_cost_model: of a draft model on a device of its own; its ``draft_s`` replaces the cost model's.
        draft_round_trip_s: network time per step that drafts, from and to that device.
        tensor_parallel: devices that share the target.
        chips: devices that are paid for, a draft's own included; by default ``tensor_parallel``.

    Raises:
        ValueError: an unknown name or option, a value out of range, or options that exclude each other.
    """

    scheduler: SchedulerConfig
    cost_model: StepTimes
    policy: Choice = "chunked"
    speculation: Choice = "off"
    acceptance: Choice | None = None
    swap_block_s: float = 0.0
    draft_cost_model: StepTimes | None = None
    draft_round_trip_s: float = 0.0
    tensor_parallel: int = 1
    chips: int | None = None

    def __post_init__(self) -> None:
        make_policy(**named(self.policy))
        controller = make_controller(**named(self.speculation))
        self._check_numbers()
        if self.acceptance is not None:
            make_acceptance(**named(self.acceptance))
        elif controller.max_drafts:
            raise ValueError(f"speculation={self.speculation!r} needs an acceptance model: give acceptance")
        if self.draft_cost_model is not None and controller.max_drafts == 0:
            raise ValueError(f"draft_cost_model was given, but speculation={self.speculation!r} never drafts")
        if self.draft_cost_model is None and self.draft_round_trip_s:
            raise ValueError(
                f"draft_round_trip_s={self.draft_round_trip_s} was given without a draft_cost_model: a draft on "
                "the target's device has no network between"
            )

    def _check_numbers(self) -> None:
        for name in ("swap_block_s", "draft_round_trip_s"):
            _check_seconds(name, getattr(self, name), allow_zero=True)
        if self.tensor_parallel < 1 or (self.chips is not None and self.chips < self.tensor_parallel):
            raise ValueError(f"1 <= tensor_parallel={self.tensor_parallel} <= chips={self.chips} must hold")
        metadata = cast("Mapping[str, Any]", getattr(self.cost_model, "metadata", {}))
        made_for = metadata.get("tensor_parallel", self.tensor_parallel)
        if made_for != self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel}, but the cost model was made for {made_for} devices"
            )

    @property
    def num_chips(self) -> int:
        """Devices to pay for."""
        return self.tensor_parallel if self.chips is None else self.chips

    @property
    def speculates(self) -> bool:
        return make_controller(**named(self.speculation)).max_drafts > 0

    def make_loop(self) -> StepLoop:
        """A scheduler with nothing to do."""
        return StepLoop(
            self.scheduler, make_policy(**named(self.policy)), make_controller(**named(self.speculation))
        )

    def build(
        self,
        env: simpy.Environment,
        seed: int,
        on_finish: Callable[[SimRequest], None] | None = None,
        trace: TraceWriter | None = None,
    ) -> Replica:
        """An idle replica."""
        cost_model = self.cost_model
        if self.draft_cost_model is not None:
            cost_model = RemoteDraft(cost_model, self.draft_cost_model, self.draft_round_trip_s)
        return Replica(
            env,
            self.make_loop(),
            cost_model,
            make_acceptance(**named(self.acceptance or {"name": "constant", "alpha": 0.0})),
            seed=seed,
            swap_block_s=self.swap_block_s,
            on_finish=on_finish,
            trace=trace,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Equal replicas behind a router.

    Args:
        replica: each of them.
        num_replicas: at the start.
        router: as ``make_router`` takes it.
        limits: admission control.
        autoscaling, failures: if any.

    Raises:
        ValueError: a value out of range, or a router that the replicas cannot serve.
    """

    replica: ReplicaSpec
    num_replicas: int = 1
    router: Choice = "round_robin"
    limits: Limits | None = None
    autoscaling: Autoscaling | None = None
    failures: Failures | None = None

    def __post_init__(self) -> None:
        self.make_router(0)
        if self.num_replicas < 1:
            raise ValueError(f"num_replicas={self.num_replicas} must be >= 1")
        scaling = self.autoscaling
        if scaling and not scaling.min_replicas <= self.num_replicas <= scaling.max_replicas:
            raise ValueError(
                f"num_replicas={self.num_replicas} is not within autoscaling's min_replicas={scaling.min_replicas} "
                f"and max_replicas={scaling.max_replicas}"
            )
        name, scheduler = named(self.router)["name"], self.replica.scheduler
        if name == "prefix_affinity" and not scheduler.prefix_caching:
            raise ValueError("router 'prefix_affinity' needs prefix_caching=True: there is no prefix to find")

    def make_router(self, seed: int) -> Router:
        """The pool's router."""
        options: dict[str, Any] = {"seed": seed} | named(self.router)
        return make_router(**options)

    def coupling(self) -> str | None:
        """Why these replicas cannot be simulated apart from each other, if so."""
        if self.make_router(0).looks_at_state:
            return f"router {named(self.router)['name']!r} looks at the state of all replicas"
        if self.limits and (self.limits.max_outstanding or self.limits.max_outstanding_tokens):
            return "a limit over all replicas of a pool counts them together"
        if self.autoscaling:
            return "autoscaling counts the requests of all replicas"
        return "after a failure other replicas take the requests over" if self.failures else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Pools of replicas and how a request goes through them.

    Args:
        pools: by name. With one pool, every request goes there.
        model_routing: arguments of :class:`ModelRouter` but the seed: a pool for each class of queries.
        disaggregation: prefill and decode in different pools.

    Raises:
        ValueError: pools that nothing leads to or that do not exist, or features that exclude each other.
    """

    pools: Mapping[str, PoolSpec]
    model_routing: Mapping[str, Any] | None = None
    disaggregation: Disaggregation | None = None

    def __post_init__(self) -> None:
        if self.model_routing is not None and self.disaggregation is not None:
            raise ValueError("model_routing and disaggregation cannot be combined: choose one")
        if self.disaggregation is not None:
            reached = [self.disaggregation.prefill, self.disaggregation.decode]
            feature = "disaggregation"
        elif self.model_routing is not None:
            reached, feature = self.make_model_router(0).pool_names, "model_routing"
        else:
            reached, feature = list(self.pools)[:1], "a cluster without model_routing or disaggregation"
        if not reached or set(reached) != set(self.pools):
            raise ValueError(f"{feature} uses the pools {reached}, but the cluster has {list(self.pools)}")
        decode = self.disaggregation.decode if self.disaggregation else None
        for name, pool in self.pools.items():
            swap_s, preemption = pool.replica.swap_block_s, pool.replica.scheduler.preemption
            if swap_s and preemption != "swap" and name != decode:
                raise ValueError(
                    f"pool {name!r}: swap_block_s={swap_s} was given, but preemption={preemption!r} never swaps"
                )
        if self.disaggregation and self.pools[self.disaggregation.prefill].replica.speculates:
            raise ValueError(
                f"pool {self.disaggregation.prefill!r} has speculation, but with disaggregation a prefill pool emits "
                "first tokens only: use speculation='off' there"
            )

    @classmethod
    def of(cls, replica: ReplicaSpec, num_replicas: int = 1, **pool: Any) -> ClusterSpec:
        """One pool, ``main``; ``pool`` are further arguments of :class:`PoolSpec`."""
        return cls(pools={"main": PoolSpec(replica=replica, num_replicas=num_replicas, **pool)})

    def make_model_router(self, seed: int) -> ModelRouter:
        """The router between pools.

        Raises:
            ValueError: wrong arguments in ``model_routing``.
        """
        options: dict[str, Any] = {"seed": seed} | dict(self.model_routing or {})
        try:
            return ModelRouter(**options)
        except TypeError as error:
            raise ValueError(f"model_routing does not take these options: {options} ({error})") from None

    def coupling(self) -> str | None:
        """Why the replicas cannot be simulated apart from each other, if so."""
        if self.disaggregation:
            return "disaggregation hands requests from pool to pool"
        if self.model_routing and self.model_routing.get("escalation"):
            return "escalation hands requests from pool to pool"
        return next((reason for pool in self.pools.values() if (reason := pool.coupling())), None)


def named(choice: Choice) -> dict[str, Any]:
    """A choice as keyword arguments.

    Raises:
        ValueError: a mapping without a name.
    """
    options = {"name": choice} if isinstance(choice, str) else dict(choice)
    if "name" not in options:
        raise ValueError(f"{options} has no name: give a name, or a mapping of name and options")
    return options


def _check_seconds(name: str, value: float, *, allow_zero: bool = False) -> None:
    if not (0.0 < value < math.inf or (allow_zero and value == 0.0)):
        raise ValueError(f"{name}={value} must be a finite number {'>=' if allow_zero else '>'} 0")
