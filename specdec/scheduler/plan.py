"""The two messages of a step: the scheduler's :class:`StepPlan` and the executor's :class:`StepOutcome`.

Both are frozen records of numpy arrays over the R scheduled rows, so a trace of them is all that an exact
replay needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What to run in one step.

    Attributes:
        step: number of this plan, counting from 0.
        now_s: the time given to ``begin``.
        rows: int32 [R], rows of the request table, in admission order.
        request_ids: int64 [R].
        context: int32 [R], tokens whose KV is already in the cache.
        num_new: int32 [R], known tokens to compute: a chunk of the prompt, or 1 when decoding.
        num_drafts: int32 [R], most draft tokens to propose and verify; 0 for prefill.
        emits: bool [R], the row reaches the end of its known tokens and will emit at least one token.
        admitted: int64 [A], request ids that entered the table in this step.
        num_cached: int32 [A], tokens of each that the prefix cache already holds.
        preempted: int64 [P], request ids that left the table in this step.
        copies: int32 [C, 2], KV blocks to copy (source, destination) before computing: copy-on-write.
        wake_s: for an empty plan, when ``begin`` may decide otherwise with no new arrival; else ``inf``.
    """

    step: int
    now_s: float
    rows: IntArray
    request_ids: LongArray
    context: IntArray
    num_new: IntArray
    num_drafts: IntArray
    emits: BoolArray
    admitted: LongArray
    num_cached: IntArray
    preempted: LongArray
    copies: IntArray
    wake_s: float

    @property
    def is_empty(self) -> bool:
        return self.rows.size == 0

    @property
    def num_tokens(self) -> int:
        """Token positions the target computes: the step's share of the token budget."""
        return int(self.num_new.sum() + self.num_drafts.sum())


def _no_ints() -> IntArray:
    return np.empty(0, np.int32)


def _no_hashes() -> HashArray:
    return np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What happened in one step; arrays are over the plan's R rows.

    Attributes:
        num_drafted: int32 [R], draft tokens really proposed, at most the plan's ``num_drafts``.
        num_accepted: int32 [R], of these, accepted by the verifier.
        num_emitted: int32 [R], tokens added to the output: accepted + 1, or fewer when an end-of-sequence
            token, a stop string or ``max_tokens`` falls inside the run; 0 where ``emits`` is false.
        finished: bool [R].
        draft_s, verify_s, sample_s, overhead_s: seconds by phase.
        hashed_rows: int32 [H], rows whose output completed a block, one entry per block, in order.
        block_hashes: uint64 [H], the chained hash of each such block (see ``hash_blocks``).
    """

    num_drafted: IntArray
    num_accepted: IntArray
    num_emitted: IntArray
    finished: BoolArray
    draft_s: float = 0.0
    verify_s: float = 0.0
    sample_s: float = 0.0
    overhead_s: float = 0.0
    hashed_rows: IntArray = field(default_factory=_no_ints)
    block_hashes: HashArray = field(default_factory=_no_hashes)

    @property
    def step_s(self) -> float:
        return self.draft_s + self.verify_s + self.sample_s + self.overhead_s
