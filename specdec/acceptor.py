"""From the target's logits to accepted drafts and next tokens, for all rows of a step at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from specdec_kernels.ops import TORCH, Ops
from torch import Tensor

from specdec.device_verifier import DeviceVerifier
from specdec.drafter.base import Draft
from specdec.names import unknown_name
from specdec.output import TokenLogprobs
from specdec.random import Stream, uniforms
from specdec.rows import RowState
from specdec.sampling import PenaltyRow, apply_penalties, greatest, top_logprobs
from specdec.scheduler.plan import IntArray, LongArray, StepPlan
from specdec.tree import Tree
from specdec.verify import descend, verify_chains, verify_greedy, verify_greedy_trees, verify_tree

RULES = {
    "token": ("token", "recursive"),
    "recursive": ("token", "recursive"),
    "block": ("block", "traversal"),
    "traversal": ("block", "traversal"),
}
"""Verification rules by name: how chains are verified, and trees. Recursive verification of a chain is token
verification, traversal of a chain is block verification."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What verification decided, over the plan's R rows.

    Attributes:
        num_accepted: int32 [R].
        path: int64 [R, K], places of the accepted tokens in the draft, in order; then anything.
        emitted: int64 [R, K + 1], the accepted tokens followed by the next one.
        logit_start: int64 [R], where a row's logits begin, -1 if it does not emit.
        logprobs: by index into R, one entry per emitted token, for rows that asked.
    """

    num_accepted: IntArray
    path: LongArray
    emitted: LongArray
    logit_start: LongArray
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Acceptor:
    """Applies a verification rule.

    Args:
        rule: how sampled rows verify, one of ``RULES``; greedy rows always take the argmax.
        state: sampling parameters and known tokens by row.
        ops: the runner's; those that verify do so where the logits are.
    """

    def __init__(self, rule: str, state: RowState, ops: Ops = TORCH) -> None:
        if rule not in RULES:
            raise unknown_name("verification rule", rule, RULES)
        self.rule = rule
        self._chain_rule, self._tree_rule = RULES[rule]
        self._state = state
        self._device = DeviceVerifier(ops, state, *RULES[rule]) if ops.verify else None

    def select(self, plan: StepPlan, draft: Draft, logits: Tensor) -> Selection:
        """Verify ``draft`` with ``logits`` float32 [N, V], the N = sum(num_drafted + 1) rows of emitting rows.

        Raises:
            ValueError: NaN logits, naming the requests.
        """
        size, width = plan.rows.size, draft.tokens.shape[1]
        chosen = Selection(
            num_accepted=np.zeros(size, np.int32),
            path=np.tile(np.arange(width), (size, 1)),
            emitted=np.zeros((size, width + 1), np.int64),
            logit_start=np.full(size, -1, np.int64),
        )
        emitting = np.flatnonzero(plan.emits)
        if emitting.size == 0:
            return chosen
        counts = draft.num_drafted[emitting] + 1
        chosen.logit_start[emitting] = np.cumsum(counts) - counts
        penalised = self._penalise(plan, draft, emitting, chosen.logit_start, logits)
        greedy = self._state.temperature[plan.rows[emitting]] == 0
        next_token = np.zeros(size, np.int64)
        parts = [some for some in (emitting[greedy], emitting[~greedy]) if some.size]
        if self._device:
            for some in parts:
                next_token[some] = self._verify_on_device(plan, draft, some, penalised, chosen)
        else:
            argmax, peaks = greatest(logits)
            self._check_finite(plan, emitting, counts, peaks)
            if penalised is not logits:
                argmax, _ = greatest(penalised)
            for some in parts:
                if self._state.temperature[plan.rows[some[0]]] == 0:
                    next_token[some] = self._verify_greedy(draft, some, argmax, chosen)
                else:
                    next_token[some] = self._verify_sampled(plan, draft, some, penalised, chosen)
        chosen.emitted[:, :width] = np.take_along_axis(draft.tokens, chosen.path, axis=1)
        chosen.emitted[emitting, chosen.num_accepted[emitting]] = next_token[emitting]
        self._log_probs(plan, draft, emitting, logits, chosen)
        return chosen

    def _verify_on_device(
        self, plan: StepPlan, draft: Draft, some: LongArray, logits: Tensor, chosen: Selection
    ) -> LongArray:
        """:meth:`_verify_greedy` or :meth:`_verify_sampled`, by what the rows ``some`` are."""
        assert self._device is not None
        if self._state.temperature[plan.rows[some[0]]] == 0:
            outcome = self._device.greedy(draft, some, chosen.logit_start, logits)
        else:
            outcome = self._device.sampled(plan, draft, some, chosen.logit_start, logits)
        chosen.path[some], chosen.num_accepted[some], next_token = outcome
        if (next_token < 0).any():
            raise _unusable(plan, some[next_token < 0])
        return next_token

    def _verify_greedy(self, draft: Draft, some: LongArray, best: LongArray, chosen: Selection) -> LongArray:
        """Fill the accepted part of ``chosen`` for the rows ``some`` of the plan, given the likeliest token by row of
        logits, int64 [N]; the token that follows each."""
        argmax = best[_positions(draft, some, chosen.logit_start)]
        tokens, num_drafted = draft.tokens[some], draft.num_drafted[some]
        if draft.parents is None:
            chosen.num_accepted[some], next_token = verify_greedy(argmax, tokens, num_drafted)
            return next_token
        path, accepted, next_token = verify_greedy_trees(argmax, tokens, draft.parents[some], num_drafted)
        chosen.path[some], chosen.num_accepted[some] = path, accepted
        return next_token

    def _verify_sampled(
        self, plan: StepPlan, draft: Draft, some: LongArray, logits: Tensor, chosen: Selection
    ) -> LongArray:
        """:meth:`_verify_greedy` for rows that sample."""
        if draft.parents is not None:
            return self._verify_sampled_trees(plan, draft, some, logits, chosen)
        state, rows, width = self._state, plan.rows[some], draft.tokens.shape[1]
        flat = _positions(draft, some, chosen.logit_start)
        needed = np.unique(flat)
        owner = np.zeros(logits.shape[0], np.int64)
        owner[flat] = rows[:, None]
        probs = state.probs(logits[torch.from_numpy(needed)], owner[needed]).numpy(force=True)
        counters = state.num_known[rows].astype(np.uint64)
        chosen.num_accepted[some], next_token = verify_chains(
            self._chain_rule,
            probs[np.searchsorted(needed, flat)],
            None if draft.probs is None else draft.probs[some],
            draft.tokens[some],
            draft.num_drafted[some],
            uniforms(state.seeds[rows], counters, Stream.ACCEPT, max(width, 1))[:, :width],
            uniforms(state.seeds[rows], counters, Stream.RESIDUAL, 1)[:, 0],
        )
        return next_token

    def _verify_sampled_trees(
        self, plan: StepPlan, draft: Draft, some: LongArray, logits: Tensor, chosen: Selection
    ) -> LongArray:
        assert draft.parents is not None
        probs, state, next_token = draft.probs, self._state, np.zeros(some.size, np.int64)
        for place, index in enumerate(some.tolist()):
            row, count = int(plan.rows[index]), int(draft.num_drafted[index])
            start = int(chosen.logit_start[index])
            seed, counter = state.seeds[[row]], state.num_known[[row]].astype(np.uint64)
            accept = uniforms(seed, counter, Stream.ACCEPT, max(count, 1))[0, :count]
            # The noise of the next token is that of a chain, so a row without drafts need not know which it was.
            noise = np.append(accept, uniforms(seed, counter, Stream.RESIDUAL, 1)[0])
            parents, tokens = draft.parents[index, :count].tolist(), draft.tokens[index, :count]

            def laws(first: int, last: int, row: int = row, start: int = start) -> NDArray[np.float32]:
                part = logits[start + first : start + last]
                return state.probs(part, np.full(last - first, row)).numpy(force=True)

            if probs is None:
                path, next_token[place] = descend(
                    parents, tokens.tolist(), lambda entry, laws=laws: laws(entry, entry + 1)[0], noise
                )
            else:
                path, next_token[place] = verify_tree(
                    self._tree_rule,
                    Tree(parents),
                    tokens,
                    laws(0, count + 1),
                    probs[index, : count + 1],
                    noise,
                )
            chosen.path[index, : len(path)] = path
            chosen.num_accepted[index] = len(path)
        return next_token

    def _check_finite(
        self, plan: StepPlan, emitting: LongArray, counts: NDArray[np.int32], peaks: NDArray[np.float32]
    ) -> None:
        """A row's greatest logit is NaN if any is, and infinite if the row has no law."""
        bad = ~np.isfinite(peaks)
        if bad.any():
            raise _unusable(plan, np.unique(np.repeat(emitting, counts)[bad]))

    def _penalise(
        self, plan: StepPlan, draft: Draft, emitting: LongArray, logit_start: LongArray, logits: Tensor
    ) -> Tensor:
        """Logits after repetition and presence penalties; each draft position has its own history."""
        state = self._state
        if not state.has_penalties(plan.rows[emitting]):
            return logits
        histories: list[PenaltyRow] = []
        repetition, presence = np.ones(logits.shape[0]), np.zeros(logits.shape[0])
        for index in emitting.tolist():
            row, count, start = int(plan.rows[index]), int(draft.num_drafted[index]), int(logit_start[index])
            repetition[start : start + count + 1] = state.repetition_penalty[row]
            presence[start : start + count + 1] = state.presence_penalty[row]
            known, num_prompt = state.known(row), int(state.num_prompt[row])
            parents = range(-1, count - 1) if draft.parents is None else draft.parents[index, :count].tolist()
            branches: list[list[int]] = [[]]
            for parent, token in zip(parents, draft.tokens[index, :count].tolist(), strict=True):
                branches.append([*branches[parent + 1], token])
            histories += [
                PenaltyRow(start + place, known, num_prompt, np.array(branch, np.int64))
                for place, branch in enumerate(branches)
            ]
        penalised = logits.clone()
        apply_penalties(penalised, histories, repetition, presence)
        return penalised

    def _log_probs(
        self, plan: StepPlan, draft: Draft, emitting: LongArray, logits: Tensor, chosen: Selection
    ) -> None:
        """Fill ``chosen.logprobs``."""
        wanted = self._state.logprobs[plan.rows]
        for index in emitting[wanted[emitting] >= 0].tolist():
            count = int(chosen.num_accepted[index])
            # A token's law stands at the place of the token before it.
            places = chosen.logit_start[index] + np.append(0, chosen.path[index, :count] + 1)
            tokens = chosen.emitted[index, : count + 1]
            values = top_logprobs(logits[torch.from_numpy(places)], tokens, int(wanted[index]))
            chosen.logprobs[index] = [
                TokenLogprobs(
                    token_id=token, logprob=logprob, top=tuple(zip(top_ids, top_values, strict=True))
                )
                for token, logprob, top_values, top_ids in zip(
                    tokens.tolist(), *(part.tolist() for part in values), strict=True
                )
            ]


def _unusable(plan: StepPlan, some: LongArray) -> ValueError:
    ids = ", ".join(map(str, plan.request_ids[some].tolist()))
    return ValueError(
        f"the model produced NaN logits for request {ids} in step {plan.step}: check the weights, or try "
        "dtype='float32'"
    )


def _positions(draft: Draft, some: LongArray, logit_start: LongArray) -> LongArray:
    """int64 [n, K + 1]: where the logits after the last known token and after each draft of the rows ``some`` are.

    Those beyond a row's drafts repeat the last one and are not read.
    """
    places = np.minimum(np.arange(draft.tokens.shape[1] + 1), draft.num_drafted[some][:, None])
    return logit_start[some][:, None] + places
