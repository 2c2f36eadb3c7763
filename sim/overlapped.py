"""A replica whose engine plans each step while the one before it runs, as vLLM does by default (async scheduling).

The plan of a step is made when the step before it starts, so whoever arrives during a step is seen at its end, waits
out the step that is planned already, and joins the one after it:

    step n runs        | step n + 1 runs                         | step n + 2 runs, with the newcomer
    a request arrives  ^ it is seen here, and n + 2 is planned   ^

An idle engine sees an arrival at once. What a step emits and which blocks it frees is known at its end here, one step
earlier than such an engine knows; with lengths known beforehand, as in benchmarks, that shifts admissions under
memory pressure by one step.
"""

from __future__ import annotations

from typing import Any

from sim.replica import Process, Replica, SimRequest


class OverlappedReplica(Replica):
    """See the module. Takes the arguments of :class:`sim.replica.Replica`, but goes step by step.

    Args:
        plans_ahead: false for an engine that plans a step when the one before it has ended; then this class only
            adds the times at which requests are seen.

    Attributes:
        seen_s: when the engine first saw each request, by request id: what vLLM records as ``queued_ts``.
    """

    def __init__(self, *args: Any, plans_ahead: bool = True, **options: Any) -> None:
        super().__init__(*args, **options, fast_forward=False)
        self._plans_ahead = plans_ahead
        self.seen_s: dict[int, float] = {}
        self._arrived: list[SimRequest] = []
        self._seen: list[SimRequest] = []

    def submit(self, request: SimRequest) -> None:
        self.loop.check(request)
        if self._is_idle:
            self.seen_s[request.request_id] = self.env.now
            super().submit(request)
        else:
            self._arrived.append(request)

    def _step(self) -> Process:
        self._look()
        yield from super()._step()

    def _look(self) -> None:
        """The step in progress ends: see who came during it, and admit to the queue who was seen one step ago."""
        for request in self._arrived:
            self.seen_s[request.request_id] = self.now_s
        joining, self._seen, self._arrived = self._seen, self._arrived, []
        if not self._plans_ahead or (not joining and not self.loop.has_work):  # nothing was planned ahead
            joining, self._seen = joining + self._seen, []
        for request in joining:
            super().submit(request)
