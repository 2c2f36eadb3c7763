"""A pool: equal replicas behind one router, and what the cluster keeps of each (:class:`Member`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import simpy

from sim.books import Backlog, Books
from sim.cluster_spec import PoolSpec
from sim.replica import Replica, SimRequest
from specdec.trace import TraceWriter


class Owner(Protocol):
    """What a pool needs of its cluster."""

    env: simpy.Environment
    seed: int
    max_outstanding: int
    is_exhausted: bool
    traces: Mapping[str, TraceWriter]

    def new_number(self) -> int:
        """A number for a new replica."""
        ...

    def books_of(self, number: int) -> Books | None:
        """The books that the replica writes to; ``None`` if it is simulated elsewhere."""
        ...

    def end(self, books: Books, request: SimRequest) -> None:
        """``request`` has its answer."""
        ...

    def overload(self, reason: str) -> None:
        """More requests wait than is sensible."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFigures:
    """What one replica did.

    Attributes:
        num_steps: without those of a stretch of equal steps that a failure or the end of the run cut short.
        busy_s: in steps, also in those that were cut short.
        growth: requests per arrival by which its queue grows; 0 if not significantly.
        launched_s, retired_s: when it is paid for; ``inf`` until the end.
    """

    name: str
    number: int
    num_chips: int
    num_submitted: int
    num_finished: int
    num_steps: int
    num_failures: int
    busy_s: float
    growth: float
    launched_s: float
    retired_s: float


class Member:
    """One replica of a pool over its life, through failures; a ``ReplicaView`` for routers.

    Attributes:
        num_outstanding, outstanding_tokens: requests here, and their prompts and output limits.
        replica: the running one; ``None`` if another process simulates it.
    """

    def __init__(self, pool: Pool, *, is_warm: bool) -> None:
        owner = pool.owner
        self.pool = pool
        self.number = owner.new_number()
        self.name = f"{pool.name}-{len(pool.members)}"
        self.num_outstanding = self.outstanding_tokens = 0
        self.num_submitted = self.num_finished = self.num_failures = 0
        self.backlog = Backlog()
        self.launched_s, self.retired_s = owner.env.now, math.inf
        self.is_warm, self.is_up, self.is_draining = is_warm, True, False
        self._past_busy_s, self._past_steps = 0.0, 0
        books = owner.books_of(self.number)
        self.books = books or Books(None)
        self.replica = self._build() if books else None

    @property
    def is_available(self) -> bool:
        """Whether a router may choose it."""
        return self.is_warm and self.is_up and not self.is_draining

    def num_cached_blocks(self, request: SimRequest) -> int:
        assert self.replica is not None
        pool = self.replica.loop.pool
        return len(pool.match(request.block_hashes[: request.prompt_len // pool.block_size]))

    def accept(self, request: SimRequest) -> None:
        """``request`` is handed to this replica, now."""
        replica, backlog = self.replica, self.backlog
        assert replica is not None, f"{self.name} is simulated elsewhere"
        self.num_submitted += 1
        self.num_outstanding += 1
        self.outstanding_tokens += request.prompt_len + request.max_tokens
        backlog.num_seen += 1
        if backlog.num_seen == backlog.due:
            backlog.sample(replica.loop.num_waiting, self.num_finished)
        if self.num_outstanding > self.pool.owner.max_outstanding:
            self.pool.owner.overload(
                f"{self.name} has more than max_outstanding={self.pool.owner.max_outstanding} requests"
            )
        replica.submit(request)

    def finish(self, request: SimRequest) -> None:
        """The replica is done with ``request``, now."""
        pool = self.pool
        self.num_finished += 1
        self.num_outstanding -= 1
        self.outstanding_tokens -= request.prompt_len + request.max_tokens
        if pool.go_on is None or not pool.go_on(self, request):
            pool.owner.end(self.books, request)
        if pool.held:
            pool.dispatch()
        if self.is_draining and not self.num_outstanding:
            self._retire()

    def drain(self) -> None:
        """Take no more requests, finish those it has, and leave."""
        self.is_draining = True
        self.pool.refresh()
        self.stop_waiting()
        if not self.num_outstanding:
            self._retire()

    def stop_waiting(self) -> None:
        """Policies that wait for a full batch stop doing so: few or no requests will come."""
        if self.replica is not None and self.is_up:
            self.replica.drain()

    def fail(self) -> list[SimRequest]:
        """It breaks down now; the requests that it had, in its order."""
        assert self.replica is not None
        self._past_busy_s, self._past_steps = self._busy_s(self.replica.env.now), self._num_steps()
        self.is_up = False
        self.num_failures += 1
        self.num_outstanding = self.outstanding_tokens = 0
        lost = self.replica.stop()
        self.pool.refresh()
        if self.is_draining:
            self._retire()
        return lost

    def repair(self) -> None:
        """It comes back empty."""
        self.is_up = True
        self.replica = self._build()
        self._ready()

    def warm_up(self) -> None:
        """Its cold start is over."""
        self.is_warm = True
        self._ready()

    def close(self) -> list[SimRequest]:
        """The run is over; the requests that are still here."""
        return self.replica.stop() if self.replica is not None and self.is_up else []

    def figures(self, now_s: float) -> ReplicaFigures:
        """What it did until ``now_s``; call it before :meth:`close`."""
        return ReplicaFigures(
            name=self.name,
            number=self.number,
            num_chips=self.pool.spec.replica.num_chips,
            num_submitted=self.num_submitted,
            num_finished=self.num_finished,
            num_steps=self._num_steps(),
            num_failures=self.num_failures,
            busy_s=self._busy_s(now_s),
            growth=self.backlog.growth(),
            launched_s=self.launched_s,
            retired_s=self.retired_s,
        )

    def _build(self) -> Replica:
        owner = self.pool.owner
        seed = derived_seed(owner.seed, self.number, self.num_failures)
        return self.pool.spec.replica.build(owner.env, seed, self.finish, owner.traces.get(self.name))

    def _ready(self) -> None:
        if self.pool.owner.is_exhausted:
            self.stop_waiting()
        self.pool.refresh()
        self.pool.dispatch()

    def _retire(self) -> None:
        self.retired_s = min(self.retired_s, self.pool.owner.env.now)

    def _busy_s(self, now_s: float) -> float:
        replica, busy_s = self.replica, self._past_busy_s
        if replica is None or not self.is_up:
            return busy_s
        # Rows are taken out when the step that ends them is over, so rows mean that a step is under way.
        running_s = max(0.0, now_s - replica.now_s) if replica.loop.num_running else 0.0
        return busy_s + replica.busy_s + running_s

    def _num_steps(self) -> int:
        return self._past_steps + (self.replica.num_steps if self.replica is not None and self.is_up else 0)


class Pool:
    """Members behind a router.

    Attributes:
        available: those that can take a request now.
        held: requests that no member can take yet, first come first served.
        backlog: how many are held, over time.
        go_on: asked about each request that a member is done with: whether it goes on elsewhere.
    """

    def __init__(self, owner: Owner, name: str, spec: PoolSpec, router_seed: int) -> None:
        self.owner, self.name, self.spec = owner, name, spec
        self.router = spec.make_router(router_seed)
        self.members: list[Member] = []
        self.available: list[Member] = []
        self.held: deque[SimRequest] = deque()
        self.backlog = Backlog()
        self.go_on: Callable[[Member, SimRequest], bool] | None = None
        for _ in range(spec.num_replicas):
            self.launch(is_warm=True)

    @property
    def num_outstanding(self) -> int:
        """Requests here, held ones included."""
        return len(self.held) + sum(member.num_outstanding for member in self.members)

    def launch(self, *, is_warm: bool) -> Member:
        """One more replica; a cold one takes requests after ``warm_up``."""
        member = Member(self, is_warm=is_warm)
        self.members.append(member)
        self.refresh()
        return member

    def refresh(self) -> None:
        """Some member's availability has changed."""
        self.available = [member for member in self.members if member.is_available]

    def choose(self, request: SimRequest) -> Member | None:
        """Where ``request`` goes now; ``None`` if it has to be held."""
        if not self.available:
            return None
        index = self.router.route(request, self.available, self.owner.env.now)
        return None if index is None else self.available[index]

    def send(self, request: SimRequest) -> None:
        """A request that the cluster already has comes here."""
        member = None if self.held else self.choose(request)
        if member is not None:
            member.accept(request)
        else:
            self.hold(request)

    def hold(self, request: SimRequest) -> None:
        """Nobody can take ``request`` yet."""
        self.held.append(request)
        self.backlog.num_seen += 1
        if self.backlog.num_seen == self.backlog.due:
            self.backlog.sample(len(self.held), sum(member.num_finished for member in self.members))
        limit = self.owner.max_outstanding
        if len(self.held) > limit * len(self.members):
            self.owner.overload(
                f"pool {self.name!r} holds more than max_outstanding={limit} requests per replica"
            )

    def dispatch(self) -> None:
        """Hand out held requests while somebody takes them."""
        while self.held:
            member = self.choose(self.held[0])
            if member is None:
                return
            member.accept(self.held.popleft())

    def refuses(self, request: SimRequest, member: Member | None) -> bool:
        """Whether ``request`` exceeds a limit where ``member`` would get it."""
        limits = self.spec.limits
        if limits is None:
            return False
        own = request.prompt_len + request.max_tokens
        return any(limit is not None and value > limit for value, limit in self._loads(member, own))

    def _loads(self, member: Member | None, own: int) -> Iterator[tuple[int, int | None]]:
        """What each limit would compare with, the newcomer of ``own`` tokens included."""
        limits = self.spec.limits
        assert limits is not None
        if limits.max_outstanding is not None:
            yield self.num_outstanding + 1, limits.max_outstanding
        if limits.max_outstanding_tokens is not None:
            held = sum(request.prompt_len + request.max_tokens for request in self.held)
            tokens = held + sum(member.outstanding_tokens for member in self.members)
            yield tokens + own, limits.max_outstanding_tokens
        if member is not None:
            assert member.replica is not None
            yield member.num_outstanding + 1, limits.max_outstanding_per_replica
            yield member.outstanding_tokens + own, limits.max_outstanding_tokens_per_replica
            yield member.replica.loop.num_waiting + 1, limits.max_waiting_per_replica


def call_after(
    env: simpy.Environment, delay_s: float, callback: Callable[[simpy.Event], None], value: object = None
) -> None:
    """Call ``callback`` with an event that bears ``value``, after ``delay_s``; cheaper than a process."""
    timeout = env.timeout(delay_s, value=value)
    callbacks = cast("list[Callable[[simpy.Event], None]]", timeout.callbacks)  # pyright: ignore[reportUnknownMemberType]
    callbacks.append(callback)


def derived_seed(*key: int) -> int:
    """A seed in [0, 2**64) of its own for each key of numbers >= 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
