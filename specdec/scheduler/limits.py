"""Limits and options of one replica's scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specdec.names import unknown_name

PREEMPTIONS = ("recompute", "swap")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one replica.

    Args:
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most token positions the target computes in one step, drafts included.
        num_blocks: KV blocks.
        block_size: tokens per block.
        max_model_len: most tokens of one request, prompt included.
        prefix_caching: share KV blocks between requests with a common prefix.
        watermark: share of the blocks that an admission must leave free while others run, so that a newcomer
            is not preempted in the next step.
        order: order of the waiting queue.
        ageing_s: under the order "priority", waiting so long raises a request's priority by one; ``inf`` never.
        preemption: "recompute" drops a preempted request's KV; "swap" keeps it in host memory while there is room.
        num_swap_blocks: KV blocks in host memory, for "swap".
        num_scheduler_steps: requests may join a running batch at every so-manyth step only (multi-step scheduling:
            the executor then plans ahead and saves its overhead between).
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    num_blocks: int = 1024
    block_size: int = 16
    max_model_len: int = 2048
    prefix_caching: bool = True
    watermark: float = 0.01
    order: str = "fcfs"
    ageing_s: float = math.inf
    preemption: str = "recompute"
    num_swap_blocks: int = 0
    num_scheduler_steps: int = 1

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_blocks",
            "block_size",
            "max_model_len",
            "num_scheduler_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.preemption not in PREEMPTIONS:
            raise unknown_name("preemption", self.preemption, PREEMPTIONS)
        if (self.preemption == "swap") != (self.num_swap_blocks > 0):
            raise ValueError(
                f"num_swap_blocks={self.num_swap_blocks} does not fit preemption={self.preemption!r}: swapping needs "
                "host blocks, recomputing has none"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every running request needs at least one token per step"
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark={self.watermark} must be in [0, 1)")
