"""What the engine knows of each running request, beside the scheduler's table and in the same rows.

Token values, sampling parameters and noise seeds live here as columns, so that a step touches all rows with
a few array operations instead of a Python loop over requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specdec.sampling import process_logits
from specdec.scheduler.plan import IntArray, LongArray, StepPlan
from specdec.scheduler.request import SamplingParams

IntVector = NDArray[np.int64]


class RowState:
    """Columns over the rows of the scheduler's ``RequestTable``.

    Args:
        max_rows: rows of the table.
        max_model_len: most tokens of one request.
        max_drafts: most draft tokens of one row in one step.

    Attributes:
        tokens: int32 [max_rows, max_model_len + max_drafts + 1]; known tokens, then this step's drafts.
        num_prompt: int32 [max_rows], prompt tokens.
        num_known: int32 [max_rows], prompt and emitted tokens.
        seeds: uint64 [max_rows], seed of each request's noise.
        temperature, top_p, min_p, repetition_penalty, presence_penalty: float32 [max_rows].
        top_k, logprobs: int32 [max_rows]; logprobs is -1 where none are wanted.
        ignore_eos: bool [max_rows].
        position_drafted, position_accepted: int32 [max_rows, max_drafts], how often draft position j was
            verified and accepted.
    """

    def __init__(self, max_rows: int, max_model_len: int, max_drafts: int) -> None:
        self.tokens = np.zeros((max_rows, max_model_len + max_drafts + 1), np.int32)
        self.num_prompt = np.zeros(max_rows, np.int32)
        self.num_known = np.zeros(max_rows, np.int32)
        self.seeds = np.zeros(max_rows, np.uint64)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.repetition_penalty = np.ones(max_rows, np.float32)
        self.presence_penalty = np.zeros(max_rows, np.float32)
        self.logprobs = np.full(max_rows, -1, np.int32)
        self.ignore_eos = np.zeros(max_rows, np.bool_)
        self.position_drafted = np.zeros((max_rows, max_drafts), np.int32)
        self.position_accepted = np.zeros((max_rows, max_drafts), np.int32)

    def load(self, row: int, tokens: IntArray, num_prompt: int, params: SamplingParams, seed: int) -> None:
        """Fill ``row`` for a request whose known tokens are int32 [n] ``tokens``."""
        self.tokens[row, : tokens.size] = tokens
        self.num_prompt[row] = num_prompt
        self.num_known[row] = tokens.size
        self.seeds[row] = seed
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "ignore_eos",
        ):
            getattr(self, name)[row] = getattr(params, name)
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs

    def known(self, row: int) -> IntArray:
        """The known tokens of ``row``, a view."""
        return self.tokens[row, : self.num_known[row]]

    def probs(self, logits: Tensor, rows: LongArray) -> Tensor:
        """The distributions, float32 [N, V], that row ``rows[n]`` draws from given ``logits`` [N, V]."""
        return process_logits(
            logits,
            self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
        )

    def has_penalties(self, rows: LongArray) -> bool:
        return bool(
            (self.repetition_penalty[rows] != 1.0).any() or (self.presence_penalty[rows] != 0.0).any()
        )

    def write_drafts(self, rows: LongArray, drafts: NDArray[np.int64]) -> None:
        """Put drafts [R, K] behind the known tokens, where the next step's input is read from."""
        columns = self.num_known[rows][:, None] + np.arange(drafts.shape[1])
        self.tokens[rows[:, None], columns] = drafts

    def append(self, rows: LongArray, emitted: NDArray[np.int64], counts: IntArray) -> None:
        """Append the first ``counts[i]`` tokens of ``emitted`` [R, K+1] to row ``rows[i]``."""
        columns = self.num_known[rows][:, None] + np.arange(emitted.shape[1])
        self.tokens[rows[:, None], columns] = emitted
        self.num_known[rows] += counts

    def count_positions(self, rows: LongArray, num_drafted: IntArray, num_accepted: IntArray) -> None:
        """Count positions up to ``num_drafted`` [R], the depth of a tree, as drafted and some of them as accepted."""
        positions = np.arange(self.position_drafted.shape[1])
        self.position_drafted[rows] += positions < num_drafted[:, None]
        self.position_accepted[rows] += positions < num_accepted[:, None]


def ragged_arange(counts: NDArray[np.int32] | IntVector) -> IntVector:
    """Concatenation of ``arange(c)`` for c in ``counts``, int64 [sum(counts)]."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)


class StepLayout:
    """What of a :class:`StepInput` hangs neither on the tokens nor on their blocks, so that it can be made before both.

    Args:
        rows, start, counts, logit_counts: as :class:`StepInput` takes them.

    Attributes:
        rows, start: as given.
        query_start, logit_rows: as :class:`StepInput` has them.
        row_of, starts, index: int64 [T], each token's row of the table, its row's start, and its place among the row's
            tokens.
        longest: tokens of the longest row.
    """

    def __init__(self, rows: LongArray, start: IntArray, counts: IntArray, logit_counts: IntArray) -> None:
        self.rows, self.start = rows, start
        self.query_start = np.zeros(rows.size + 1, np.int32)
        np.cumsum(counts, out=self.query_start[1:])
        self.starts = np.repeat(start.astype(np.int64), counts)
        self.index = self.starts + ragged_arange(counts)
        self.row_of = np.repeat(rows, counts)
        self.longest = int((start + counts).max()) if rows.size else 0
        first = self.query_start[1:].astype(np.int64) - logit_counts
        self.logit_rows = np.repeat(first, logit_counts) + ragged_arange(logit_counts)


class StepInput:
    """The ragged token batch of one forward pass: numpy in, and no per-request Python.

    Legend: T tokens of this pass, R rows, N rows of logits.

    Args:
        rows: int64 [R], rows of the table.
        start: int32 [R], position of each row's first token.
        counts: int32 [R], tokens of each row.
        logit_counts: int32 [R], how many of each row's last tokens need logits.
        depths: int32 [T], what each token's position is beyond its row's start; ``None``: its index in the row.
        tree_mask: int64 [T, 2], see ``ForwardBatch``. The nodes of a tree are read from behind the known tokens and
            stored in the same order, whatever their positions.
        layout: of these rows, if it has been made already.

    Attributes:
        token_ids, positions, slot_mapping: int64 [T].
        query_start: int32 [R + 1].
        context_lens: int32 [R], ``start``.
        block_tables: int32 [R, max_blocks].
        logit_rows: int64 [N], indices into T.
        tree_mask: as given.
    """

    def __init__(
        self,
        state: RowState,
        block_table: IntArray,
        block_size: int,
        rows: LongArray,
        start: IntArray,
        counts: IntArray,
        logit_counts: IntArray,
        *,
        depths: IntArray | None = None,
        tree_mask: LongArray | None = None,
        layout: StepLayout | None = None,
    ) -> None:
        layout = layout or StepLayout(rows, start, counts, logit_counts)
        row_of, index = layout.row_of, layout.index
        self.query_start, self.logit_rows = layout.query_start, layout.logit_rows
        self.context_lens = start
        self.positions = index if depths is None else layout.starts + depths
        self.tree_mask = tree_mask
        self.token_ids = state.tokens[row_of, index].astype(np.int64)
        blocks = block_table[row_of, index // block_size].astype(np.int64)
        self.slot_mapping = blocks * block_size + index % block_size
        self.block_tables = np.ascontiguousarray(block_table[rows, : -(-layout.longest // block_size)])


def verification_counts(plan: StepPlan, num_drafted: IntArray) -> tuple[IntArray, IntArray]:
    """Tokens per row and logits per row of the target's pass, int32 [R] each."""
    counts = (plan.num_new + num_drafted).astype(np.int32)
    logits = np.where(plan.emits, num_drafted + 1, 0).astype(np.int32)
    return counts, logits
