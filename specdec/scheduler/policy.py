"""Batching policies and queue orders: who may join the batch, when, and in which order.

========== ============================================== ============== ==============
policy     a waiting request joins                        prefill        budget goes to
========== ============================================== ============== ==============
static     an idle engine, once the batch is full         whole prompts  prefill first
dynamic    an idle engine, full batch or window over      whole prompts  prefill first
continuous any step (Orca, OSDI 2022)                     whole prompts  prefill first
chunked    any step (Sarathi-Serve, OSDI 2024)            in chunks      decode first
========== ============================================== ============== ==============

Static and dynamic batches run to completion. ``decode_first`` turns the last column around for any policy. An
order gives each request a key that never changes, so a preempted request returns to its old place in the queue.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from specdec.names import unknown_name
from specdec.scheduler.request import Request

OrderKey = tuple[float, float]
ORDERS: dict[str, Callable[[Request], OrderKey]] = {
    "fcfs": lambda r: (r.arrival_s, 0.0),
    "sjf": lambda r: (float(r.predicted_tokens or r.max_tokens) + r.prompt_len, r.arrival_s),
    "priority": lambda r: (float(r.priority), r.arrival_s),
    "edf": lambda r: (r.deadline_s, r.arrival_s),
}


def order_key(order: str, ageing_s: float = math.inf) -> Callable[[Request], OrderKey]:
    """The key of ``order``; with ``ageing_s``, waiting so long raises a request's priority by one.

    Everybody ages at the same pace, so who goes first never changes with time: priority − age / ageing_s orders
    as priority + arrival / ageing_s does.

    Raises:
        ValueError: unknown order (with the nearest ones), or ageing that is not positive or not for "priority".
    """
    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)
    if not ageing_s > 0.0:
        raise ValueError(f"ageing_s={ageing_s} must be > 0 seconds (inf turns ageing off)")
    if ageing_s == math.inf:
        return ORDERS[order]
    if order != "priority":
        raise ValueError(
            f"ageing_s={ageing_s} was given, but only the order 'priority' has it, not {order!r}"
        )
    return lambda r: (r.priority + r.arrival_s / ageing_s, r.arrival_s)


class WaitingQueue:
    """Waiting requests in the order of their keys; ties go to the smaller request id."""

    def __init__(self, order: str, ageing_s: float = math.inf) -> None:
        self.key = order_key(order, ageing_s)
        self._heap: list[tuple[OrderKey, int, Request]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (self.key(request), request.request_id, request))

    @property
    def head(self) -> Request:
        return self._heap[0][2]

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[2]

    def discard(self, request_id: int) -> Request | None:
        """Take a request out, wherever it stands, and return it; takes time linear in the queue."""
        found = next((entry[2] for entry in self._heap if entry[1] == request_id), None)
        if found is not None:
            self._heap = [entry for entry in self._heap if entry[1] != request_id]
            heapq.heapify(self._heap)
        return found

    def oldest_arrival_s(self) -> float:
        return min(entry[2].arrival_s for entry in self._heap)


class BatchPolicy(Protocol):
    """What distinguishes one batching policy from another."""

    @property
    def chunked_prefill(self) -> bool:
        """Prompts may be computed in chunks, after decodes had their share of the token budget."""
        ...

    @property
    def joins_running(self) -> bool:
        """Requests may join while others run."""
        ...

    @property
    def decode_first(self) -> bool:
        """Decodes take their share of the token budget before prompts do."""
        ...

    def is_open(
        self, queue: WaitingQueue, num_running: int, max_num_seqs: int, draining: bool, now_s: float
    ) -> bool:
        """Whether waiting requests may be admitted now; the queue is not empty."""
        ...

    def wake_s(self, queue: WaitingQueue) -> float:
        """When a closed, idle policy opens without a new arrival; ``inf`` if never."""
        ...


@dataclass(frozen=True, slots=True)
class StaticBatching:
    """Wait for a full batch (or the end of arrivals), then run it to completion."""

    chunked_prefill: bool = field(default=False, init=False)
    joins_running: bool = field(default=False, init=False)
    decode_first: bool = False

    def is_open(
        self, queue: WaitingQueue, num_running: int, max_num_seqs: int, draining: bool, now_s: float
    ) -> bool:
        return num_running == 0 and (draining or len(queue) >= max_num_seqs)

    def wake_s(self, queue: WaitingQueue) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """Wait for a full batch or until the oldest request has waited ``window_s``; then run to completion."""

    window_s: float = 0.05
    chunked_prefill: bool = field(default=False, init=False)
    joins_running: bool = field(default=False, init=False)
    decode_first: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.window_s < math.inf:
            raise ValueError(f"window_s={self.window_s} must be a finite number of seconds >= 0")

    def is_open(
        self, queue: WaitingQueue, num_running: int, max_num_seqs: int, draining: bool, now_s: float
    ) -> bool:
        return num_running == 0 and (len(queue) >= max_num_seqs or now_s >= self.wake_s(queue))

    def wake_s(self, queue: WaitingQueue) -> float:
        return queue.oldest_arrival_s() + self.window_s


@dataclass(frozen=True, slots=True)
class ContinuousBatching:
    """Admit at any step; a prompt is computed whole, in one step, before decodes take the rest."""

    chunked_prefill: bool = field(default=False, init=False)
    joins_running: bool = field(default=True, init=False)
    decode_first: bool = False

    def is_open(
        self, queue: WaitingQueue, num_running: int, max_num_seqs: int, draining: bool, now_s: float
    ) -> bool:
        return True

    def wake_s(self, queue: WaitingQueue) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class ChunkedPrefill(ContinuousBatching):
    """Admit at any step; decodes go first and prompts fill what is left of the token budget in chunks."""

    chunked_prefill: bool = field(default=True, init=False)
    decode_first: bool = True


POLICIES: dict[str, Callable[..., BatchPolicy]] = {
    "static": StaticBatching,
    "dynamic": DynamicBatching,
    "continuous": ContinuousBatching,
    "chunked": ChunkedPrefill,
}


def make_policy(name: str, **options: Any) -> BatchPolicy:
    """The policy called ``name``, e.g. ``make_policy("dynamic", window_s=0.1)``; ``None`` leaves a default.

    Raises:
        ValueError: unknown name (with the nearest ones), or an option the policy does not have.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return POLICIES[name](**given)
    except TypeError:
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ValueError(f"{shown} was given, but the policy {name!r} has no such option") from None
