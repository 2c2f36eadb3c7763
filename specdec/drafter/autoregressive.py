"""Drafting with a model: one pass for the first token, then one for each further token or level, rows batched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.drafter.draft_tree import TreeDraft, breadth_first
from specdec.random import Stream, uniforms
from specdec.rows import StepInput
from specdec.sampling import sample_from_probs
from specdec.scheduler.plan import IntArray, LongArray, StepOutcome, StepPlan
from specdec.tree import make_tree


class AutoregressiveDrafter(ABC):
    """A drafter that runs a decoder over the paged KV blocks of the rows it drafts for.

    Args:
        tree: what is drafted, as ``specdec.tree.make_tree`` takes it; rows that may draft fewer nodes get its first
            ones. ``None``: chains.
    """

    name: str
    captures: Sequence[int] = ()

    def __init__(self, tree: str | Mapping[str, Any] | None = None) -> None:
        self.tree = None if tree is None else breadth_first(make_tree(tree))

    def bind(self, host: DraftHost) -> None:
        self._host = host

    @abstractmethod
    def forward(self, batch: StepInput) -> Tensor:
        """Logits float32 [N, V] for the batch."""

    @abstractmethod
    def first_input(self, plan: StepPlan) -> tuple[IntArray, IntArray]:
        """Where the first pass starts and how many known tokens it feeds, int32 [R] each; 0 skips a row."""

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:  # noqa: B027
        """Nothing to learn by default."""

    def propose(self, plan: StepPlan) -> Draft:
        state = self._host.state
        width = int(plan.num_drafts.max(initial=0))
        start, counts = self.first_input(plan)
        fed = np.flatnonzero(counts)
        if fed.size == 0:
            return Draft.none(plan.rows.size)
        if self.tree is not None:
            wants = (plan.num_drafts[fed] > 0).astype(np.int32)
            logits = self.forward(self._input(plan.rows[fed], start[fed], counts[fed], wants))
            return TreeDraft(self._host, plan, self.tree).grow(logits, self.forward)
        tokens = np.zeros((plan.rows.size, width), np.int64)
        probs: np.ndarray | None = None
        if width and (state.temperature[plan.rows[plan.num_drafts > 0]] > 0).any():
            vocab_size = self._host.target.config.vocab_size
            probs = np.zeros((plan.rows.size, width, vocab_size), np.float32)
        wants = plan.num_drafts[fed] > 0
        logits = self.forward(self._input(plan.rows[fed], start[fed], counts[fed], wants.astype(np.int32)))
        drafting = fed[wants]
        for index in range(width):
            rows = plan.rows[drafting]
            chosen = self._choose(logits, rows, index, None if probs is None else probs[:, index], drafting)
            tokens[drafting, index] = chosen
            known = state.num_known[rows]
            state.tokens[rows, known + index] = chosen
            more = plan.num_drafts[drafting] > index + 1
            drafting = drafting[more]
            if drafting.size == 0:
                break
            ones = np.ones(drafting.size, np.int32)
            logits = self.forward(self._input(plan.rows[drafting], (known + index)[more], ones, ones))
        return Draft(tokens, plan.num_drafts.copy(), probs)

    def _input(self, rows: LongArray, start: IntArray, counts: IntArray, logits: IntArray) -> StepInput:
        host = self._host
        return StepInput(host.state, host.table.block_table, host.block_size, rows, start, counts, logits)

    def _choose(
        self, logits: Tensor, rows: LongArray, index: int, probs: np.ndarray | None, drafting: np.ndarray
    ) -> np.ndarray:
        """Next draft token of each row: the argmax, or for sampled rows a draw that fills ``probs`` [R, V].

        Penalties are not applied: any distribution will do, as long as it is the one reported.
        """
        chosen = logits.argmax(dim=-1).numpy(force=True)
        state = self._host.state
        sampled = np.flatnonzero(state.temperature[rows] > 0)
        if sampled.size == 0:
            return chosen
        assert probs is not None
        some = rows[sampled]
        law = state.probs(logits[torch.from_numpy(sampled)], some)
        noise = uniforms(state.seeds[some], state.num_known[some].astype(np.uint64), Stream.DRAFT, index + 1)
        chosen[sampled] = sample_from_probs(law, noise[:, index])
        probs[drafting[sampled]] = law.numpy(force=True)
        return chosen
