"""Verification where the logits are: on a GPU, with one wait for the host, when the accepted counts are read.

The kernels follow the rules of ``specdec.verify`` and take the same noise, so requests get the tokens that verification
on the host gives them; only where a uniform lies within rounding of a threshold may they differ.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from specdec_kernels.ops import Ops
from torch import Tensor

from specdec.drafter.base import Draft
from specdec.random import Stream, uniforms
from specdec.rows import RowState, ragged_arange
from specdec.scheduler.plan import IntArray, LongArray, StepPlan

Outcome = tuple[LongArray, IntArray, LongArray]
"""Path int64 [n, K], num_accepted int32 [n] and next_token int64 [n]; −1 where no token could be drawn."""


class DeviceVerifier:
    """Args:
    ops: Triton's.
    state: sampling parameters and known tokens by row.
    chain_rule, tree_rule: for sampled rows, see ``specdec.verify``; trees of deterministic drafts are "one_hot".
    """

    def __init__(self, ops: Ops, state: RowState, chain_rule: str, tree_rule: str) -> None:
        assert ops.verify and ops.verify_greedy and ops.filtered_probs
        self._verify, self._verify_greedy, self._probs = ops.verify, ops.verify_greedy, ops.filtered_probs
        self._state, self._chain_rule, self._tree_rule = state, chain_rule, tree_rule

    def greedy(self, draft: Draft, some: LongArray, logit_start: LongArray, logits: Tensor) -> Outcome:
        """Rows ``some`` of the plan, whose logits begin at ``logit_start[some]`` of ``logits`` [N, V]."""
        return _on_host(self._verify_greedy(*_drafts(draft, some, logit_start, logits.device), logits))

    def sampled(
        self, plan: StepPlan, draft: Draft, some: LongArray, logit_start: LongArray, logits: Tensor
    ) -> Outcome:
        """:meth:`greedy` for rows that sample."""
        state, rows, device, width = self._state, plan.rows[some], logits.device, draft.tokens.shape[1]
        owner = np.zeros(logits.shape[0], np.int64)
        counts = draft.num_drafted[some] + 1
        # Greedy rows' logits are among them; their laws are not read.
        owner[np.repeat(logit_start[some], counts) + ragged_arange(counts)] = np.repeat(rows, counts)
        probs = self._probs(
            logits,
            *(
                torch.from_numpy(column[owner]).to(device)
                for column in (state.temperature, state.top_k, state.top_p, state.min_p)
            ),
        )
        laws, starts = None, None
        if draft.probs is not None:
            chosen = torch.from_numpy(np.ascontiguousarray(draft.probs[some])).to(device)
            starts = torch.arange(some.size, device=device) * chosen.shape[1]
            laws = chosen.flatten(0, 1)
        rule = self._chain_rule if draft.parents is None else self._tree_rule
        counters = state.num_known[rows].astype(np.uint64)
        accept = uniforms(state.seeds[rows], counters, Stream.ACCEPT, max(width, 1))[:, :width]
        residual = uniforms(state.seeds[rows], counters, Stream.RESIDUAL, 1)[:, 0]
        tokens, parents, num_drafted, start = _drafts(draft, some, logit_start, device)
        return _on_host(
            self._verify(
                rule if draft.parents is None or laws is not None else "one_hot",
                tokens,
                parents,
                num_drafted,
                start,
                probs,
                laws,
                starts,
                torch.from_numpy(np.ascontiguousarray(accept)).to(device),
                torch.from_numpy(residual.copy()).to(device),
            )
        )


def _drafts(
    draft: Draft, some: LongArray, logit_start: LongArray, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    def put(array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    parents = None if draft.parents is None else put(draft.parents[some].astype(np.int32))
    return put(draft.tokens[some]), parents, put(draft.num_drafted[some]), put(logit_start[some])


def _on_host(outcome: tuple[Tensor, Tensor, Tensor]) -> Outcome:
    """One copy of all three."""
    accepted, path, next_token = outcome
    packed = torch.cat([path, accepted[:, None].long(), next_token[:, None]], dim=1).cpu().numpy()
    return packed[:, :-2], packed[:, -2].astype(np.int32), packed[:, -1]
