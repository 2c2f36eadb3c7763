"""Prefill here, decode there: the KV of a prompt moves over a link between two pools."""

from __future__ import annotations

import simpy

from sim.cluster_spec import Disaggregation
from sim.pool import Member, Pool, call_after
from sim.replica import SimRequest


class KvTransfers:
    """Makes two requests of one, with the same object: a prompt with one token, then the rest with KV present.

    The decode pool's scheduler sees KV that waits outside the device, as after a swap: it admits the request when
    blocks are free and computes no prompt token. Loading costs ``swap_block_s`` of the decode replica per block.

    Args:
        decode: the pool that continues.

    Attributes:
        moving: requests on a link, by id.
        num_transfers, num_bytes, total_s: done transfers; seconds from the first token to the arrival.
    """

    def __init__(self, env: simpy.Environment, spec: Disaggregation, decode: Pool) -> None:
        self.moving: dict[int, SimRequest] = {}
        self.num_transfers, self.num_bytes, self.total_s = 0, 0.0, 0.0
        self._env, self._spec, self._decode = env, spec, decode
        self._whole: dict[int, tuple[int, int]] = {}
        self._link_free_s: dict[int, float] = {}

    def cut(self, request: SimRequest) -> None:
        """Make ``request`` end after its first token."""
        self._whole[request.request_id] = request.max_tokens, request.output_len
        request.max_tokens = request.output_len = 1

    def restore(self, request: SimRequest) -> None:
        """Undo :meth:`cut` if it was not undone yet."""
        lengths = self._whole.pop(request.request_id, None)
        if lengths is not None:
            request.max_tokens, request.output_len = lengths

    def hand_over(self, member: Member, request: SimRequest) -> bool:
        """The prompt is computed; whether there is more to generate."""
        self.restore(request)
        if request.output_len == 1:
            return False
        now_s, spec = self._env.now, self._spec
        num_bytes = spec.kv_bytes_per_token * request.prompt_len
        sent_s = max(now_s, self._link_free_s.get(member.number, 0.0)) + num_bytes / spec.link_bytes_per_s
        self._link_free_s[member.number] = sent_s
        request.num_swapped = request.prompt_len
        self.moving[request.request_id] = request
        self.num_transfers += 1
        self.num_bytes += num_bytes
        delay_s = sent_s + spec.link_latency_s - now_s
        self.total_s += delay_s
        call_after(self._env, delay_s, self._arrive, request)
        return True

    def _arrive(self, event: simpy.Event) -> None:
        request: SimRequest = event.value  # pyright: ignore[reportAssignmentType]
        del self.moving[request.request_id]
        self._decode.send(request)
