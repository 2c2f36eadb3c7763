"""Drafts that are accepted at a set rate: the target's own greedy continuation, corrupted on purpose.

For sweeps of the acceptance rate. Verification is the real one and the output stays the target's: the engine
first records the plain greedy output of each prompt, then draft j of a step is its true token with
probability α_j (given that the drafts before it were right) and a wrong token otherwise. Greedy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.drafter.base import Draft, DraftHost
from specdec.random import Stream, uniforms
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan


class SyntheticDrafter:
    """Args:
    alpha: probability that a draft token is accepted, given that those before it were.
    rates: one such probability per draft position instead; the last one serves all later positions.
    seed: of the corruption.
    """

    name = "synthetic"

    def __init__(
        self, alpha: float | None = None, rates: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        if (alpha is None) == (rates is None):
            raise ValueError("synthetic needs alpha (one acceptance rate) or rates (one per position)")
        self.rates = np.array([alpha] if rates is None else list(rates), np.float64)
        if self.rates.size == 0 or not ((self.rates >= 0.0) & (self.rates <= 1.0)).all():
            raise ValueError(f"synthetic acceptance rates must lie in [0, 1], got {self.rates.tolist()}")
        self.seed = seed
        self._references: dict[bytes, IntArray] = {}

    def bind(self, host: DraftHost) -> None:
        self._state = host.state
        self._vocab_size = host.target.config.vocab_size

    def record(self, prompt: IntArray, output: IntArray) -> None:
        """Remember the target's greedy ``output`` for ``prompt``, int32 both."""
        self._references[prompt.tobytes()] = np.concatenate([prompt, output])

    def propose(self, plan: StepPlan) -> Draft:
        width = int(plan.num_drafts.max(initial=0))
        tokens = np.zeros((plan.rows.size, width), np.int64)
        num_drafted = np.zeros(plan.rows.size, np.int32)
        rates = self.rates[np.minimum(np.arange(width), self.rates.size - 1)]
        for index in np.flatnonzero(plan.num_drafts).tolist():
            row = int(plan.rows[index])
            known = int(self._state.num_known[row])
            prompt = self._state.tokens[row, : self._state.num_prompt[row]]
            reference = self._references[prompt.tobytes()]
            count = min(int(plan.num_drafts[index]), reference.size - known)
            if count <= 0:
                continue
            key = np.array([self.seed + int(plan.request_ids[index])], np.uint64)
            noise = uniforms(key, np.array([known], np.uint64), Stream.DRAFT, width)[0]
            wrong = noise[:count] >= rates[:count]
            true = reference[known : known + count].astype(np.int64)
            tokens[index, :count] = np.where(wrong, (true + 1) % self._vocab_size, true)
            num_drafted[index] = count
        return Draft(tokens, num_drafted)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Nothing to learn: rates are given."""
