"""Drafts that are accepted at a set rate: the target's own greedy continuation, corrupted on purpose.

For sweeps of the acceptance rate. Verification is the real one and the output stays the target's: the engine
first records the plain greedy output of each prompt, then draft j of a step is its true token with
probability α_j (given that the drafts before it were right) and a wrong token otherwise. Greedy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.random import Stream, uniforms
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan


class SyntheticDrafter:
    """Args:
    alpha: probability that a draft token is accepted, given that those before it were.
    rates: one such probability per draft position instead; the last one serves all later positions.
    width: siblings at each depth, one of them right where the draft of that depth is: a tree, of which all further
        nodes hang on the right sibling (or where there is none, on the first).
    seed: of the corruption.
    """

    name = "synthetic"
    captures: Sequence[int] = ()

    def __init__(
        self,
        alpha: float | None = None,
        rates: Sequence[float] | None = None,
        width: int = 1,
        seed: int = 0,
    ) -> None:
        if (alpha is None) == (rates is None):
            raise ValueError("synthetic needs alpha (one acceptance rate) or rates (one per position)")
        self.rates = np.array([alpha] if rates is None else list(rates), np.float64)
        if self.rates.size == 0 or not ((self.rates >= 0.0) & (self.rates <= 1.0)).all():
            raise ValueError(f"synthetic acceptance rates must lie in [0, 1], got {self.rates.tolist()}")
        if width < 1:
            raise ValueError(f"synthetic width={width} must be >= 1")
        self.width = width
        self.seed = seed
        self._references: dict[bytes, IntArray] = {}

    def bind(self, host: DraftHost) -> None:
        self._state = host.state
        self._vocab_size = host.target.config.vocab_size

    def record(self, prompt: IntArray, output: IntArray) -> None:
        """Remember the target's greedy ``output`` for ``prompt``, int32 both; of several, the longest, which the others
        begin."""
        known = self._references.get(prompt.tobytes())
        if known is None or known.size < prompt.size + output.size:
            self._references[prompt.tobytes()] = np.concatenate([prompt, output])

    def propose(self, plan: StepPlan) -> Draft:
        most = int(plan.num_drafts.max(initial=0))
        depth = -(-most // self.width)
        tokens = np.zeros((plan.rows.size, most), np.int64)
        parents = np.full((plan.rows.size, most), -1, np.int32)
        num_drafted = np.zeros(plan.rows.size, np.int32)
        rates = self.rates[np.minimum(np.arange(depth), self.rates.size - 1)]
        for index in np.flatnonzero(plan.num_drafts).tolist():
            row = int(plan.rows[index])
            known = int(self._state.num_known[row])
            prompt = self._state.tokens[row, : self._state.num_prompt[row]]
            reference = self._references[prompt.tobytes()]
            true = reference[known : known + depth].astype(np.int64)
            count = min(int(plan.num_drafts[index]), true.size * self.width)
            if count <= 0:
                continue
            key = np.array([self.seed + int(plan.request_ids[index])], np.uint64)
            noise = uniforms(key, np.array([known], np.uint64), Stream.DRAFT, 2 * depth)[0]
            is_right = noise[: true.size] < rates[: true.size]
            place = np.where(is_right, (noise[depth : depth + true.size] * self.width).astype(np.int64), 0)
            # Siblings are the tokens that follow the true one, which itself stands at its place, or nowhere.
            siblings = np.arange(self.width) - place[:, None] + np.where(is_right, 0, 1)[:, None]
            tokens[index, :count] = ((true[:, None] + siblings) % self._vocab_size).ravel()[:count]
            hangs_on = np.append(-1, np.arange(true.size - 1) * self.width + place[:-1])
            parents[index, :count] = np.repeat(hangs_on, self.width)[:count]
            num_drafted[index] = count
        return Draft(tokens, num_drafted, parents=None if self.width == 1 else parents)

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Nothing to learn: rates are given."""
