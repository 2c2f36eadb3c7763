"""A cluster in virtual time: requests are let in, routed, served, retried and handed on; none gets lost.

>>> env = simpy.Environment()
>>> cluster = Cluster(env, ClusterSpec.of(replica_spec, num_replicas=2), seed=0)
>>> cluster.submit(SimRequest(request_id=0, prompt_len=100, max_tokens=50, output_len=20))
>>> cluster.exhausted()
>>> while env.peek() <= cluster.end_s:
...     env.step()
>>> cluster.close().books[0].num_finished
1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import simpy

from sim.books import Books
from sim.cluster_spec import (
    Autoscaling,
    ClusterSpec,
    Disaggregation,
    Failures,
    Limits,
    PoolSpec,
    ReplicaSpec,
)
from sim.disaggregation import KvTransfers
from sim.lifecycle import autoscale, fail_and_repair
from sim.pool import Member, Pool, ReplicaFigures, derived_seed
from sim.replica import SimRequest
from specdec.metrics import Slo
from specdec.trace import TraceWriter

__all__ = [
    "Autoscaling",
    "Cluster",
    "ClusterFigures",
    "ClusterSpec",
    "Disaggregation",
    "Failures",
    "Limits",
    "PoolSpec",
    "ReplicaSpec",
]

MAX_OUTSTANDING = 50_000
"""Requests on one replica at which a run counts as overloaded."""

# Keys of seeds; replicas use their own numbers.
_ROUTER, _FAILURE, _MODEL_ROUTER = 1 << 32, 1 << 33, 1 << 34


@dataclass(frozen=True, slots=True)
class ClusterFigures:
    """A finished run of a cluster, or of the part of it that one process simulated.

    Attributes:
        end_s: when it ended.
        books: of each replica, or one for all where replicas hand requests to each other.
        replicas: in the order of their numbers.
        overloaded: why the run was stopped, if it was.
        held_growth: by pool, growth of what is held, as of ``ReplicaFigures.growth``.
        num_in_flight: requests that were still inside.
        transfers: number, bytes and seconds of the KV transfers of a disaggregated cluster.
    """

    end_s: float
    books: list[Books]
    replicas: list[ReplicaFigures]
    overloaded: str | None
    held_growth: dict[str, float]
    num_in_flight: int
    transfers: tuple[int, float, float] | None


class Cluster:
    """The replicas of a :class:`ClusterSpec` and the way of each request through them.

    Args:
        env: virtual time, at 0.
        spec: description.
        seed: of everything drawn here.
        slo: that goodput is counted under.
        on_end: called with each request that finished, was rejected or failed.
        until_s: when the run ends at the latest.
        max_outstanding: requests on one replica (or held, per replica) at which the run stops as overloaded.
        traces: name of a replica (``<pool>-<index>``) → where its steps are recorded.
        is_mine: numbers of the replicas to simulate; routing is done for all. Only where ``spec.coupling()`` is None.

    Attributes:
        end_s: time up to which events are to be processed: earlier than ``until_s`` once the work is done or the load
            is too high.
        num_in_flight: requests inside.
    """

    def __init__(
        self,
        env: simpy.Environment,
        spec: ClusterSpec,
        *,
        seed: int = 0,
        slo: Slo | None = None,
        on_end: Callable[[SimRequest], None] | None = None,
        until_s: float = math.inf,
        max_outstanding: int = MAX_OUTSTANDING,
        traces: Mapping[str, TraceWriter] | None = None,
        is_mine: Callable[[int], bool] = lambda number: True,
    ) -> None:
        if max_outstanding < 1:
            raise ValueError(f"max_outstanding={max_outstanding} must be >= 1 request per replica")
        self.env, self.spec, self.seed = env, spec, seed
        self.max_outstanding, self.traces = max_outstanding, traces or {}
        self.end_s = until_s
        self.is_exhausted = False
        self.overloaded: str | None = None
        self.num_in_flight = 0
        self._on_end, self._slo, self._is_mine = on_end, slo, is_mine
        self._is_coupled = spec.coupling() is not None
        self._shared = Books(slo)
        self._books: list[Books] = [self._shared] if self._is_coupled else []
        self._num_replicas = 0
        self._num_tries: dict[int, int] = {}
        self.pools = {
            name: Pool(self, name, pool, derived_seed(seed, _ROUTER + index))
            for index, (name, pool) in enumerate(spec.pools.items())
        }
        self._entry = next(iter(self.pools.values()))
        self._transfers: KvTransfers | None = None
        self._connect()
        self._start_processes()

    def _connect(self) -> None:
        """Lead requests from pool to pool."""
        self._model_router = None
        if self.spec.model_routing is not None:
            self._model_router = self.spec.make_model_router(derived_seed(self.seed, _MODEL_ROUTER))
            if self._model_router.escalation:
                for name, pool in self.pools.items():
                    pool.go_on = self._escalate if name != self._model_router.escalate_to else None
        if self.spec.disaggregation is not None:
            self._entry = self.pools[self.spec.disaggregation.prefill]
            decode = self.pools[self.spec.disaggregation.decode]
            self._transfers = KvTransfers(self.env, self.spec.disaggregation, decode)
            self._entry.go_on = self._transfers.hand_over

    def _start_processes(self) -> None:
        for pool in self.pools.values():
            for member in pool.members:
                self._watch(member)
            if pool.spec.autoscaling:
                self.env.process(autoscale(self.env, pool, pool.spec.autoscaling, self._watch))

    def _watch(self, member: Member) -> None:
        failures = member.pool.spec.failures
        if failures:
            seed = derived_seed(self.seed, _FAILURE + member.number)
            self.env.process(fail_and_repair(self.env, member, failures, seed, self.retry))

    def new_number(self) -> int:
        """A number for a new replica."""
        self._num_replicas += 1
        return self._num_replicas - 1

    def books_of(self, number: int) -> Books | None:
        """The books that the replica writes to; ``None`` if it is simulated elsewhere."""
        if self._is_coupled:
            return self._shared
        if not self._is_mine(number):
            return None
        self._books.append(Books(self._slo))
        return self._books[-1]

    def check(self, request: SimRequest) -> None:
        """See that ``request`` can run wherever it may go, before any work starts.

        Raises:
            ValueError: it can never run there; see ``StepLoop.check``.
        """
        for name in self.pools_of(request.task):
            self.pools[name].spec.replica.make_loop().check(request)
        if self.spec.disaggregation is not None:
            self._entry.spec.replica.make_loop().check(replace(request, max_tokens=1, output_len=1))

    def pools_of(self, task: str) -> list[str]:
        """Names of the pools that have to fit a request of ``task`` as a whole."""
        if self.spec.disaggregation is not None:
            return [self.spec.disaggregation.decode]
        router = self._model_router
        if router is None:
            return [self._entry.name]
        escalates = router.escalation.get(task, 0.0) > 0.0 and router.escalate_to is not None
        return [router.pool_of(task), *([router.escalate_to] if escalates and router.escalate_to else [])]

    def submit(self, request: SimRequest) -> None:
        """A request arrives, now, and is let in or rejected.

        Raises:
            ValueError: it can never run here.
        """
        router, now_s = self._model_router, self.env.now
        pool = self._entry if router is None else self.pools[router.pool_of(request.task)]
        member = None if pool.held else pool.choose(request)
        if member is None:
            books = self._shared
        elif member.replica is None:
            return
        else:
            books = member.books
        books.num_submitted += 1
        if pool.spec.limits is not None and pool.refuses(request, member):
            books.num_rejected += 1
            if self._on_end:
                self._on_end(request)
            return
        self.num_in_flight += 1
        books.little.change(now_s, 1)
        if self._transfers is not None:
            self._transfers.cut(request)
        if member is not None:
            member.accept(request)
        else:
            pool.hold(request)

    def exhausted(self) -> None:
        """No request will arrive any more: the run ends with the last one inside."""
        self.is_exhausted = True
        for pool in self.pools.values():
            for member in pool.members:
                member.stop_waiting()
        if not self.num_in_flight:
            self.end_s = min(self.end_s, self.env.now)

    def end(self, books: Books, request: SimRequest) -> None:
        """``request`` has its answer."""
        books.finish(request, self.env.now)
        self._leave(request)

    def overload(self, reason: str) -> None:
        """Stop the run: more requests wait than is sensible."""
        self.overloaded = self.overloaded or reason
        self.end_s = min(self.end_s, self.env.now)

    def _leave(self, request: SimRequest) -> None:
        self.num_in_flight -= 1
        if self._num_tries:
            self._num_tries.pop(request.request_id, None)
        if self._on_end:
            self._on_end(request)
        if self.is_exhausted and not self.num_in_flight:
            self.end_s = min(self.end_s, self.env.now)

    def _escalate(self, member: Member, request: SimRequest) -> bool:
        """Ask the large model where the small one's answer is not good enough."""
        router = self._model_router
        assert router is not None and router.escalate_to is not None
        if not router.escalates(request):
            return False
        member.books.num_escalated += 1
        member.books.discarded_tokens += request.prompt_len + request.num_generated
        self.pools[router.escalate_to].send(_renewed(request))
        return True

    def retry(self, pool: Pool, request: SimRequest) -> None:
        """A replica of ``pool`` failed under ``request``."""
        assert pool.spec.failures is not None
        tries = self._num_tries[request.request_id] = self._num_tries.get(request.request_id, 0) + 1
        if self._transfers is not None:
            self._transfers.restore(request)
        if tries > pool.spec.failures.max_retries:
            self._shared.fail(request, self.env.now)
            self._leave(request)
            return
        self._shared.num_retried += 1
        again = _renewed(request)
        if self._transfers is not None:
            self._transfers.cut(again)
            pool = self._entry
        pool.send(again)

    def close(self) -> ClusterFigures:
        """The run is over, at ``end_s``.

        Raises:
            AssertionError: a request was lost or counted twice, or Little's law does not hold.
        """
        now_s = self.end_s if self.end_s < math.inf else self.env.now
        members = [member for pool in self.pools.values() for member in pool.members]
        mine = sorted((m for m in members if m.replica is not None), key=lambda member: member.number)
        figures = [member.figures(now_s) for member in mine]
        left = {member.number: member.close() for member in mine}
        elsewhere = [request for pool in self.pools.values() for request in pool.held]
        if self._transfers is not None:
            elsewhere += self._transfers.moving.values()
        if self._is_coupled:
            inside = [request for requests in left.values() for request in requests] + elsewhere
            self._shared.close(now_s, inside)
        else:
            assert not elsewhere, "a request is held although replicas are simulated apart"
            for member in mine:
                member.books.close(now_s, left[member.number])
        num_inside = sum(len(requests) for requests in left.values()) + len(elsewhere)
        assert num_inside == self.num_in_flight, f"{num_inside} requests inside, {self.num_in_flight} counted"
        moved = self._transfers
        return ClusterFigures(
            end_s=now_s,
            books=self._books,
            replicas=figures,
            overloaded=self.overloaded,
            held_growth={name: pool.backlog.growth() for name, pool in self.pools.items()},
            num_in_flight=num_inside,
            transfers=None if moved is None else (moved.num_transfers, moved.num_bytes, moved.total_s),
        )


def _renewed(request: SimRequest) -> SimRequest:
    """The same request as if nothing had been done for it."""
    return SimRequest(
        request_id=request.request_id,
        prompt_len=request.prompt_len,
        max_tokens=request.max_tokens,
        output_len=request.output_len,
        arrival_s=request.arrival_s,
        priority=request.priority,
        deadline_s=request.deadline_s,
        predicted_tokens=request.predicted_tokens,
        block_hashes=request.block_hashes,
        task=request.task,
    )
