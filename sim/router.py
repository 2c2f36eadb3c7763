"""Which replica serves a request (:data:`ROUTERS`), and which model (:class:`ModelRouter`).

A router sees the replicas that can take requests now, never the queue behind them. It may answer ``None``: the
request then waits in the cluster until some request ends or a replica comes up.

================== ========================================================================= ==============
router             chooses                                                                   looks at state
================== ========================================================================= ==============
round_robin        one after the other                                                       no
random             any, uniformly                                                            no
power_of_two       of two random ones the one with fewer outstanding tokens (Mitzenmacher    yes
                   2001)
least_outstanding  the one with the fewest outstanding tokens                                yes
prefix_affinity    the one that has most of the prompt in its prefix cache, unless it is     yes
                   loaded much more than the least loaded
central_queue      one with a free slot; else the request waits in one queue for all (M/M/c) yes
================== ========================================================================= ==============

>>> router = make_router("power_of_two", seed=1)
>>> index = router.route(request, replicas, now_s=0.0)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sim.replica import SimRequest

_BLOCK = 4096  # uniforms drawn at once
_MASK = (1 << 64) - 1


class ReplicaView(Protocol):
    """What a router may know of a replica."""

    @property
    def num_outstanding(self) -> int:
        """Requests that wait or run there."""
        ...

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens and output limits of these requests."""
        ...

    def num_cached_blocks(self, request: SimRequest) -> int:
        """Leading blocks of the request's prompt that its prefix cache holds."""
        ...


class Router(Protocol):
    """One object serves one pool; it has a random generator of its own."""

    @property
    def looks_at_state(self) -> bool:
        """Whether the answer depends on what the replicas do; if not, they can be simulated apart."""
        ...

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        """Index of one of ``replicas``, of which there is at least one; ``None`` lets the request wait."""
        ...


class RoundRobin:
    """One after the other."""

    looks_at_state = False

    def __init__(self, *, seed: int = 0) -> None:
        self._next = 0

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        index = self._next
        if index >= len(replicas):
            index = 0
        self._next = index + 1
        return index


class Random:
    """Any of them, uniformly."""

    looks_at_state = False

    def __init__(self, *, seed: int = 0) -> None:
        self._uniforms = _uniforms(seed)

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        return int(next(self._uniforms) * len(replicas))


class PowerOfTwo:
    """The less loaded of two different random ones; of one, that one."""

    looks_at_state = True

    def __init__(self, *, seed: int = 0) -> None:
        self._uniforms = _uniforms(seed)

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        count = len(replicas)
        first = int(next(self._uniforms) * count)
        if count == 1:
            return first
        second = (first + 1 + int(next(self._uniforms) * (count - 1))) % count
        is_less = replicas[second].outstanding_tokens < replicas[first].outstanding_tokens
        return second if is_less else first


class LeastOutstanding:
    """The one with the fewest outstanding tokens, the first of equals."""

    looks_at_state = True

    def __init__(self, *, seed: int = 0) -> None:
        """Draws nothing; every router takes a seed."""

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        return _least_loaded(replicas)


class PrefixAffinity:
    """The one that holds the longest prefix of the prompt; of equals, the least loaded.

    Args:
        max_imbalance: >= 1. Where the holder has more than so many times the outstanding tokens of the least
            loaded replica, the request itself counted on both, the least loaded one is taken.
    """

    looks_at_state = True

    def __init__(self, max_imbalance: float = 2.0, *, seed: int = 0) -> None:
        if not max_imbalance >= 1.0:
            raise ValueError(f"max_imbalance={max_imbalance} must be >= 1 (inf ignores the load)")
        self.max_imbalance = max_imbalance

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        least = _least_loaded(replicas)
        if not request.block_hashes:
            return least
        best, most = least, replicas[least].num_cached_blocks(request)
        for index, replica in enumerate(replicas):
            cached = replica.num_cached_blocks(request)
            is_lighter = replica.outstanding_tokens < replicas[best].outstanding_tokens
            if cached > most or (cached == most and is_lighter):
                best, most = index, cached
        own = request.prompt_len + request.max_tokens
        limit = self.max_imbalance * (replicas[least].outstanding_tokens + own)
        return best if replicas[best].outstanding_tokens + own <= limit else least


class CentralQueue:
    """First come, first served by whichever replica has a slot free.

    Args:
        slots: requests that a replica holds at once, >= 1. With ``slots=1`` and one-step requests the cluster
            is a c-server queue: M/M/c under Poisson arrivals and exponential service.
    """

    looks_at_state = True

    def __init__(self, slots: int = 1, *, seed: int = 0) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots} must be >= 1")
        self.slots = slots

    def route(self, request: SimRequest, replicas: Sequence[ReplicaView], now_s: float) -> int | None:
        counts = [replica.num_outstanding for replica in replicas]
        fewest = min(counts)
        return counts.index(fewest) if fewest < self.slots else None


ROUTERS: dict[str, Callable[..., Router]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "power_of_two": PowerOfTwo,
    "least_outstanding": LeastOutstanding,
    "prefix_affinity": PrefixAffinity,
    "central_queue": CentralQueue,
}


def make_router(name: str, **options: Any) -> Router:
    """The router called ``name``, e.g. ``make_router("prefix_affinity", max_imbalance=1.5, seed=0)``.

    Raises:
        ValueError: unknown name (with the nearest ones), an option that the router does not have, or a value
            out of range.
    """
    if name not in ROUTERS:
        raise unknown_name("router", name, ROUTERS)
    try:
        return ROUTERS[name](**options)
    except TypeError as error:
        raise ValueError(f"router {name!r} does not take these options: {options} ({error})") from None


class ModelRouter:
    """A pool for each class of queries: a small model for simple ones, a large one for complex ones.

    A simple query may turn out too hard: with a probability by class the small model's answer is not good
    enough, and the request is asked again of ``escalate_to``. Whether that happens to a request depends on
    ``seed`` and its id alone, so it is the same whatever else is changed between two runs.

    Args:
        pools: task → name of the pool.
        default: pool of all other tasks.
        escalation: task → probability in [0, 1] that its first answer is not good enough; others never.
        escalate_to: the pool that then answers.

    Raises:
        ValueError: a probability out of range, or escalation of a task without a pool to escalate to, or to
            the pool it comes from.
    """

    def __init__(
        self,
        pools: Mapping[str, str],
        default: str,
        *,
        escalation: Mapping[str, float] | None = None,
        escalate_to: str | None = None,
        seed: int = 0,
    ) -> None:
        self.pools, self.default = dict(pools), default
        self.escalation, self.escalate_to = dict(escalation or {}), escalate_to
        self._seed = _mix64(seed & _MASK)
        for task, chance in self.escalation.items():
            if not 0.0 <= chance <= 1.0:
                raise ValueError(f"escalation of {task!r} is {chance}: give a probability in [0, 1]")
            if escalate_to is None or self.pool_of(task) == escalate_to:
                raise ValueError(
                    f"task {task!r} is served by pool {self.pool_of(task)!r} and escalates to {escalate_to!r}: name "
                    "another pool in escalate_to"
                )
        if escalate_to is not None and not self.escalation:
            raise ValueError(f"escalate_to={escalate_to!r} was given, but no task has an escalation")

    @property
    def pool_names(self) -> list[str]:
        """The pools it may name, each once."""
        named = [*self.pools.values(), self.default, *([self.escalate_to] if self.escalate_to else [])]
        return list(dict.fromkeys(named))

    def pool_of(self, task: str) -> str:
        """Where a request of ``task`` goes first."""
        return self.pools.get(task, self.default)

    def escalates(self, request: SimRequest) -> bool:
        """Whether the first answer to ``request`` is not good enough."""
        chance = self.escalation.get(request.task, 0.0)
        return chance > 0.0 and _mix64(self._seed + request.request_id & _MASK) < chance * 2.0**64


def unknown_name(kind: str, name: object, known: Mapping[str, object]) -> ValueError:
    """The error for an unknown ``name`` of a ``kind``, listing the nearest and all known names."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(sorted(known))}")


def _least_loaded(replicas: Sequence[ReplicaView]) -> int:
    loads = [replica.outstanding_tokens for replica in replicas]
    return loads.index(min(loads))


def _uniforms(seed: int) -> Iterator[float]:
    """Endless uniforms in [0, 1) as plain floats."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.random(_BLOCK).tolist()


def _mix64(value: int) -> int:
    """SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014) of a plain integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
