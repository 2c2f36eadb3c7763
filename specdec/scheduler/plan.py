"""The two messages of a step: the scheduler's :class:`StepPlan` and the executor's :class:`StepOutcome`.

Both are immutable records of numpy arrays over the R scheduled rows, so a trace of them is all that an exact
replay needs. They are named tuples because millions are made, and a frozen dataclass takes nearly twice as long.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]
BoolArray = NDArray[np.bool_]


def _constant(dtype: type[np.generic], *shape: int) -> NDArray[np.generic]:
    array = np.zeros(shape or (0,), dtype)
    array.setflags(write=False)
    return array


# Shared by the many records that have nothing to say in a field; read-only.
NO_INTS: IntArray = _constant(np.int32)  # pyright: ignore[reportAssignmentType]
NO_IDS: LongArray = _constant(np.int64)  # pyright: ignore[reportAssignmentType]
NO_HASHES: HashArray = _constant(np.uint64)  # pyright: ignore[reportAssignmentType]
NO_COPIES: IntArray = _constant(np.int32, 0, 2)  # pyright: ignore[reportAssignmentType]


class StepPlan(NamedTuple):
    """What to run in one step.

    Attributes:
        step: number of this plan, counting from 0.
        now_s: the time given to ``begin``.
        rows: int64 [R], rows of the request table, in admission order.
        request_ids: int64 [R].
        context: int32 [R], tokens whose KV is already in the cache.
        num_new: int32 [R], known tokens to compute: a chunk of the prompt, or 1 when decoding.
        num_drafts: int32 [R], most draft tokens to propose and verify; 0 for prefill.
        emits: bool [R], the row reaches the end of its known tokens and will emit at least one token.
        admitted: int64 [A], request ids that entered the table in this step.
        num_cached: int32 [A], tokens of each whose KV exists already, in the prefix cache or swapped out.
        preempted: int64 [P], request ids that left the table in this step.
        copies: int32 [C, 2], KV blocks to copy (source, destination) before computing: copy-on-write.
        swapped_out: int64 [S], the preempted requests whose KV goes to host memory, before anything is written.
        swapped_out_blocks: int64 [sum], the blocks of each, one request after the other.
        swapped_in: int64 [W], the admitted requests whose KV comes back, to the first blocks of their rows.
        wake_s: for an empty plan, when ``begin`` may decide otherwise with no new arrival; else ``inf``.
    """

    step: int
    now_s: float
    rows: LongArray
    request_ids: LongArray
    context: IntArray
    num_new: IntArray
    num_drafts: IntArray
    emits: BoolArray
    admitted: LongArray = NO_IDS
    num_cached: IntArray = NO_INTS
    preempted: LongArray = NO_IDS
    copies: IntArray = NO_COPIES
    swapped_out: LongArray = NO_IDS
    swapped_out_blocks: LongArray = NO_IDS
    swapped_in: LongArray = NO_IDS
    wake_s: float = math.inf

    @property
    def is_empty(self) -> bool:
        return self.rows.size == 0

    @property
    def num_tokens(self) -> int:
        """Token positions the target computes: the step's share of the token budget."""
        return int(self.num_new.sum() + self.num_drafts.sum())


class StepOutcome(NamedTuple):
    """What happened in one step; arrays are over the plan's R rows.

    Attributes:
        num_drafted: int32 [R], draft tokens really proposed, at most the plan's ``num_drafts``.
        num_accepted: int32 [R], of these, accepted by the verifier.
        num_emitted: int32 [R], tokens added to the output: accepted + 1, or fewer when an end-of-sequence
            token, a stop string or ``max_tokens`` falls inside the run; 0 where ``emits`` is false.
        finished: bool [R].
        draft_s, verify_s, sample_s, overhead_s: seconds by phase.
        hashed_rows: int64 [H], rows whose output completed a block, one entry per block, in order.
        block_hashes: uint64 [H], the chained hash of each such block (see ``hash_blocks``).
        tree_depths: int32 [R], depth of each row's draft tree, the most tokens of it that could be accepted; ``None``
            for chains, whose depth is ``num_drafted``.
    """

    num_drafted: IntArray
    num_accepted: IntArray
    num_emitted: IntArray
    finished: BoolArray
    draft_s: float = 0.0
    verify_s: float = 0.0
    sample_s: float = 0.0
    overhead_s: float = 0.0
    hashed_rows: LongArray = NO_IDS
    block_hashes: HashArray = NO_HASHES
    tree_depths: IntArray | None = None

    @property
    def draft_depths(self) -> IntArray:
        """int32 [R], most tokens of each row's draft that could be accepted."""
        return self.num_drafted if self.tree_depths is None else self.tree_depths

    @property
    def step_s(self) -> float:
        return self.draft_s + self.verify_s + self.sample_s + self.overhead_s
