"""Block verification: Sun et al., "Block verification accelerates speculative decoding", arXiv 2403.10444.

Path ratio P₀ = 1, Pᵢ = min(1, Pᵢ₋₁ · target(xᵢ) / draft(xᵢ)). With Zᵢ = Σ (Pᵢ · target − draft)⁺ over the
distributions after draft i, the threshold is hᵢ = Zᵢ / (Zᵢ + 1 − Pᵢ), and P at the last draft. The *largest*
i with uᵢ < hᵢ is kept: a failure does not end the search. The next token comes from
norm((Pᵢ · target − draft)⁺), or from the target after the last draft.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.verify.base import ChainRule, Chains, positive_part, require_no_nan
from specdec.verify.numerics import Array, row_sums, widen


def path_ratios(chains: Chains) -> Array:
    """P [B, K+1], with column 0 the empty path's 1; 0 past the drafts."""
    steps = chains.ratios()
    columns = [np.ones(steps.shape[0], steps.dtype)]
    for ratio in steps.T:
        columns.append(np.minimum(columns[-1] * ratio, 1))
    return np.stack(columns, axis=1)


def thresholds(chains: Chains) -> Array:
    """h [B, K] of drafts 1 to K; 0 where there is no draft."""
    ratios = path_ratios(chains)
    values = np.zeros_like(ratios[:, 1:])
    for column in range(values.shape[1]):
        rows = np.flatnonzero(chains.drafted[:, column])
        values[rows, column] = _thresholds_after(chains, column + 1, rows, ratios[rows, column + 1])
    return values


def accept(chains: Chains, uniforms: Array) -> tuple[NDArray[np.int64], Array]:
    """The largest i with uᵢ < hᵢ, and its P. Searched from the end, so few thresholds are computed.

    hᵢ ≤ Pᵢ because Zᵢ ≤ Pᵢ, so a row whose uniform reaches Pᵢ fails without the sum over the vocabulary.
    """
    ratios = path_ratios(chains)
    num_accepted = np.zeros(chains.num_drafts.size, np.int64)
    for num in range(ratios.shape[1] - 1, 0, -1):
        open_rows = chains.drafted[:, num - 1] & (num_accepted == 0)
        rows = np.flatnonzero(open_rows & (uniforms[:, num - 1] < ratios[:, num]))
        values = _thresholds_after(chains, num, rows, ratios[rows, num])
        num_accepted[rows[uniforms[rows, num - 1] < values]] = num
    return num_accepted, ratios[np.arange(num_accepted.size), num_accepted]


def _thresholds_after(chains: Chains, num: int, rows: NDArray[np.int64], ratio: Array) -> Array:
    """h after ``num`` drafts for ``rows`` [n], with ``ratio`` [n] their P."""
    values = ratio.copy()
    inner = np.flatnonzero((chains.num_drafts[rows] > num) & (ratio < 1))
    if inner.size:
        mass = _residual_mass(chains, num, rows[inner], ratio[inner])
        require_no_nan(mass, rows[inner])
        values[inner] = mass / (mass + 1 - ratio[inner])
    return values


def _residual_mass(chains: Chains, num: int, rows: NDArray[np.int64], ratio: Array) -> Array:
    """Z [n] = Σ (P · target − draft)⁺ after ``num`` drafts."""
    if chains.draft_probs is None:
        next_draft = chains.draft_tokens[rows, num]
        return ratio * (1 - widen(chains.target_probs[rows, num, next_draft]))
    part = positive_part(chains.target_probs[rows, num], chains.draft_probs[rows, num], ratio)
    return row_sums(part)


RULE = ChainRule(thresholds, accept)
