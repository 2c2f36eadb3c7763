"""From the target's logits to accepted drafts and next tokens, for all rows of a step at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafter.base import Draft
from specdec.output import TokenLogprobs
from specdec.random import Stream, uniforms
from specdec.rows import RowState
from specdec.sampling import PenaltyRow, apply_penalties, find_nan_rows, top_logprobs
from specdec.scheduler.plan import IntArray, StepPlan
from specdec.verify import chain_rule, verify_chains, verify_greedy


@dataclass(frozen=True, slots=True)
class Selection:
    """What verification decided, over the plan's R rows.

    Attributes:
        num_accepted: int32 [R].
        emitted: int64 [R, K + 1], the accepted drafts followed by the next token.
        logprobs: by index into R, one entry per emitted token, for rows that asked.
    """

    num_accepted: IntArray
    emitted: NDArray[np.int64]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Acceptor:
    """Applies a verification rule.

    Args:
        rule: how sampled rows verify ("token" or "block"); greedy rows always take the argmax.
        state: sampling parameters and known tokens by row.
    """

    def __init__(self, rule: str, state: RowState) -> None:
        chain_rule(rule)
        self.rule = rule
        self._state = state

    def select(self, plan: StepPlan, draft: Draft, logits: Tensor) -> Selection:
        """Verify ``draft`` with ``logits`` float32 [N, V], the N = sum(num_drafted + 1) rows of emitting rows.

        Raises:
            ValueError: NaN logits, naming the requests.
        """
        width = draft.tokens.shape[1]
        num_accepted = np.zeros(plan.rows.size, np.int32)
        emitted = np.zeros((plan.rows.size, width + 1), np.int64)
        emitting = np.flatnonzero(plan.emits)
        if emitting.size == 0:
            return Selection(num_accepted, emitted)
        counts = draft.num_drafted[emitting] + 1
        starts = np.cumsum(counts) - counts
        self._check_finite(plan, emitting, counts, logits)
        penalised = self._penalise(plan, draft, emitting, starts, logits)
        # Row b's logits for draft position j; positions beyond its drafts repeat the last one and are unused.
        flat = starts[:, None] + np.minimum(np.arange(width + 1), counts[:, None] - 1)
        greedy = self._state.temperature[plan.rows[emitting]] == 0
        next_token = np.zeros(emitting.size, np.int64)
        for mask, verify in ((greedy, self._verify_greedy), (~greedy, self._verify_sampled)):
            if mask.any():
                some = emitting[mask]
                num_accepted[some], next_token[mask] = verify(plan, draft, some, flat[mask], penalised)
        emitted[:, :width] = draft.tokens
        emitted[emitting, num_accepted[emitting]] = next_token
        logprobs = self._logprobs(plan, emitting, starts, num_accepted, emitted, logits)
        return Selection(num_accepted, emitted, logprobs)

    def _verify_greedy(
        self, plan: StepPlan, draft: Draft, some: NDArray[np.int64], flat: NDArray[np.int64], logits: Tensor
    ) -> tuple[IntArray, NDArray[np.int64]]:
        argmax = logits.argmax(dim=-1).numpy(force=True)
        return verify_greedy(argmax[flat], draft.tokens[some], draft.num_drafted[some])

    def _verify_sampled(
        self, plan: StepPlan, draft: Draft, some: NDArray[np.int64], flat: NDArray[np.int64], logits: Tensor
    ) -> tuple[IntArray, NDArray[np.int64]]:
        state, rows = self._state, plan.rows[some]
        needed = np.unique(flat)
        owner = np.zeros(logits.shape[0], np.int64)
        owner[flat] = rows[:, None]
        probs = state.probs(logits[torch.from_numpy(needed)], owner[needed]).numpy(force=True)
        target_probs = probs[np.searchsorted(needed, flat)]
        counters = state.num_known[rows].astype(np.uint64)
        width = draft.tokens.shape[1]
        return verify_chains(
            self.rule,
            target_probs,
            None if draft.probs is None else draft.probs[some],
            draft.tokens[some],
            draft.num_drafted[some],
            uniforms(state.seeds[rows], counters, Stream.ACCEPT, max(width, 1))[:, :width],
            uniforms(state.seeds[rows], counters, Stream.RESIDUAL, 1)[:, 0],
        )

    def _check_finite(
        self, plan: StepPlan, emitting: NDArray[np.int64], counts: NDArray[np.int32], logits: Tensor
    ) -> None:
        bad = find_nan_rows(logits)
        if len(bad):
            ids = np.unique(np.repeat(plan.request_ids[emitting], counts)[np.asarray(bad)])
            raise ValueError(
                f"the model produced NaN logits for request {', '.join(map(str, ids))} in step {plan.step}: check "
                "the weights, or try dtype='float32'"
            )

    def _penalise(
        self,
        plan: StepPlan,
        draft: Draft,
        emitting: NDArray[np.int64],
        starts: NDArray[np.int64],
        logits: Tensor,
    ) -> Tensor:
        """Logits after repetition and presence penalties; each draft position has its own history."""
        state = self._state
        if not state.has_penalties(plan.rows[emitting]):
            return logits
        histories: list[PenaltyRow] = []
        repetition, presence = np.ones(logits.shape[0]), np.zeros(logits.shape[0])
        for index, start in zip(emitting.tolist(), starts.tolist(), strict=True):
            row, count = int(plan.rows[index]), int(draft.num_drafted[index]) + 1
            repetition[start : start + count] = state.repetition_penalty[row]
            presence[start : start + count] = state.presence_penalty[row]
            known, num_prompt = state.known(row), int(state.num_prompt[row])
            histories += [
                PenaltyRow(start + position, known, num_prompt, draft.tokens[index, :position])
                for position in range(count)
            ]
        penalised = logits.clone()
        apply_penalties(penalised, histories, repetition, presence)
        return penalised

    def _logprobs(
        self,
        plan: StepPlan,
        emitting: NDArray[np.int64],
        starts: NDArray[np.int64],
        num_accepted: IntArray,
        emitted: NDArray[np.int64],
        logits: Tensor,
    ) -> dict[int, list[TokenLogprobs]]:
        wanted = self._state.logprobs[plan.rows[emitting]]
        found: dict[int, list[TokenLogprobs]] = {}
        for place in np.flatnonzero(wanted >= 0).tolist():
            index, start = int(emitting[place]), int(starts[place])
            count = int(num_accepted[index]) + 1
            tokens = emitted[index, :count]
            chosen, values, ids = top_logprobs(logits[start : start + count], tokens, int(wanted[place]))
            found[index] = [
                TokenLogprobs(
                    token_id=token, logprob=logprob, top=tuple(zip(top_ids, top_values, strict=True))
                )
                for token, logprob, top_ids, top_values in zip(
                    tokens.tolist(), chosen.tolist(), ids.tolist(), values.tolist(), strict=True
                )
            ]
        return found
