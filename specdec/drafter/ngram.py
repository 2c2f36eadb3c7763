"""Prompt lookup: continue as the text did the last time it contained the same n-gram.

Method: Saxena 2023, "Prompt Lookup Decoding". The longest n-gram (``max_ngram`` down to ``min_ngram``) that
ends the known tokens is searched among them, the latest match wins, and what followed is proposed. If the
match is so recent that the continuation runs into the end, it repeats with the period of the match.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan


class NgramDrafter:
    """All rows are searched at once, with a few array operations per n.

    Args:
        max_ngram: longest n-gram to look for.
        min_ngram: shortest.
    """

    name = "ngram"
    captures: Sequence[int] = ()

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"ngram needs 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def bind(self, host: DraftHost) -> None:
        self._state = host.state

    def propose(self, plan: StepPlan) -> Draft:
        width = int(plan.num_drafts.max(initial=0))
        if width == 0:
            return Draft.none(plan.rows.size)
        tokens = np.zeros((plan.rows.size, width), np.int64)
        num_drafted = np.zeros(plan.rows.size, np.int32)
        wanting = np.flatnonzero(plan.num_drafts)
        rows = plan.rows[wanting]
        known = self._state.num_known[rows]
        history = self._state.tokens[rows, : int(known.max())]
        match_end = latest_match(history, known, self.min_ngram, self.max_ngram)
        found = match_end >= 0
        wanting, history, match_end, known = wanting[found], history[found], match_end[found], known[found]
        period = known - 1 - match_end
        columns = match_end[:, None] + 1 + np.arange(width) % period[:, None]
        tokens[wanting] = np.take_along_axis(history, columns, axis=1)
        num_drafted[wanting] = plan.num_drafts[wanting]
        return Draft(tokens, num_drafted)

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Nothing to learn: the known tokens are the only state."""


def latest_match(history: IntArray, known: IntArray, min_ngram: int, max_ngram: int) -> NDArray[np.int64]:
    """Where the final n-gram of each row occurred before: index of its last token, or -1.

    Longer n-grams win over later matches.

    Args:
        history: int32 [R, W], known tokens, of which the first ``known[r]`` count.
        known: int32 [R], >= 1.

    Returns:
        int64 [R].
    """
    num_rows, width = history.shape
    columns = np.arange(width)
    match_end = np.full(num_rows, -1, np.int64)
    ends_here = columns < known[:, None] - 1
    for n in range(1, max_ngram + 1):
        last = np.take_along_axis(history, np.maximum(known - n, 0)[:, None].astype(np.int64), axis=1)
        same = np.zeros_like(ends_here)
        same[:, n - 1 :] = history[:, : width - n + 1] == last
        ends_here &= same
        ends_here[known < n + 1] = False
        latest = width - 1 - np.argmax(ends_here[:, ::-1], axis=1)
        found = ends_here.any(axis=1)
        if not found.any():
            break
        if n >= min_ngram:
            match_end = np.where(found, latest, match_end)
    return match_end
