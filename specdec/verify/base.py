"""What chain rules share: the batch of draft chains and the residual distribution at the stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.verify.numerics import Array, is_nan, widen

IntArray = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Chains:
    """A batch of draft chains. Legend: B rows, K most drafts of a row, V vocabulary.

    Attributes:
        target_probs: [B, K+1, V], distribution after each prefix; entries past ``num_drafts`` are not read.
        draft_probs: [B, K, V], what each draft token was drawn from; None for deterministic drafts.
        draft_tokens: int64 [B, K], 0 where there is no draft.
        num_drafts: int64 [B].
        drafted: bool [B, K], where there is a draft.
    """

    target_probs: Array
    draft_probs: Array | None
    draft_tokens: NDArray[np.int64]
    num_drafts: NDArray[np.int64]
    drafted: NDArray[np.bool_]

    @classmethod
    def build(
        cls, target_probs: Array, draft_probs: Array | None, draft_tokens: IntArray, num_drafts: IntArray
    ) -> Chains:
        """Check the shapes and blank the padding; see :func:`specdec.verify.verify_chains` for arguments."""
        num_rows, num_positions, vocab_size = target_probs.shape
        width = num_positions - 1
        assert draft_tokens.shape == (num_rows, width), (draft_tokens.shape, target_probs.shape)
        assert draft_probs is None or draft_probs.shape == (num_rows, width, vocab_size), draft_probs.shape
        assert num_drafts.shape == (num_rows,), num_drafts.shape
        if num_rows and not (num_drafts.min() >= 0 and num_drafts.max() <= width):
            raise ValueError(f"num_drafts={num_drafts.tolist()} must lie in [0, {width}]")
        drafted = np.arange(width) < num_drafts[:, None]
        tokens = np.where(drafted, draft_tokens, 0).astype(np.int64)
        outside = ((tokens < 0) | (tokens >= vocab_size)).any(axis=1)
        if outside.any():
            rows = np.flatnonzero(outside).tolist()
            raise ValueError(f"draft tokens of rows {rows} lie outside the vocabulary of {vocab_size}")
        return cls(target_probs, draft_probs, tokens, num_drafts.astype(np.int64), drafted)

    def drafted_target_probs(self) -> Array:
        """Target probability of each draft token, [B, K]; 0 where there is no draft."""
        values = _gather(self.target_probs[:, :-1], self.draft_tokens)
        return np.where(self.drafted, widen(values), 0)

    def ratios(self) -> Array:
        """target_probs / draft_probs at the draft tokens, [B, K]; 0 where there is no draft.

        Raises:
            ValueError: naming rows with NaN, or whose draft token has draft probability zero: then the draft
                distribution is not the one that the token was drawn from.
        """
        target = self.drafted_target_probs()
        draft = self._drafted_draft_probs()
        require_no_nan((target + draft).sum(axis=1), np.arange(target.shape[0]))
        impossible = (draft <= 0).any(axis=1)
        if impossible.any():
            rows = np.flatnonzero(impossible).tolist()
            raise ValueError(
                f"draft tokens of rows {rows} have draft probability 0: pass the very distribution that the "
                "drafter sampled from, or None for deterministic drafts"
            )
        return np.where(self.drafted, target / draft, 0)

    def _drafted_draft_probs(self) -> Array:
        if self.draft_probs is None:
            exact = self.target_probs.dtype == object
            return np.ones(self.draft_tokens.shape, object if exact else np.float64)
        return np.where(self.drafted, widen(_gather(self.draft_probs, self.draft_tokens)), 1)


@dataclass(frozen=True, slots=True)
class ChainRule:
    """An acceptance rule for chains.

    Attributes:
        thresholds: chains to [B, K]; h_i of draft i + 1 in the rule's own sense, 0 where there is no draft.
        accept: (chains, uniforms [B, K]) to the accepted drafts int64 [B] and the scale [B] of
            ``target_probs`` in the residual (None for 1 in every row).
    """

    thresholds: Callable[[Chains], Array]
    accept: Callable[[Chains, Array], tuple[NDArray[np.int64], Array | None]]


def positive_part(target_probs: Array, draft_probs: Array, scale: Array | None) -> Array:
    """(scale · target_probs − draft_probs)⁺ for [n, V] rows and scale [n]."""
    scaled = target_probs if scale is None else target_probs * scale[:, None].astype(target_probs.dtype)
    difference = scaled - draft_probs
    return np.maximum(difference, 0, out=difference)


def residual(chains: Chains, num_accepted: IntArray, scale: Array | None) -> Array:
    """Unnormalised distribution [B, V] of the token after ``num_accepted`` [B] drafts.

    The target's where all drafts were accepted, else (scale · target_probs − draft_probs)⁺. With deterministic
    drafts that is proportional to the target without the draft token.
    """
    weights = chains.target_probs[np.arange(num_accepted.size), num_accepted]
    rejected = np.flatnonzero(num_accepted < chains.num_drafts)
    stop = num_accepted[rejected]
    if chains.draft_probs is None:
        weights[rejected, chains.draft_tokens[rejected, stop]] = 0
    else:
        row_scale = None if scale is None else scale[rejected]
        weights[rejected] = positive_part(weights[rejected], chains.draft_probs[rejected, stop], row_scale)
    # In exact arithmetic a rejection has residual mass. In floats two distributions that differ by rounding
    # only can reject with none left; their residual is then below the resolution, and the target stands in.
    empty = rejected[weights.sum(axis=1)[rejected] == 0]
    weights[empty] = chains.target_probs[empty, num_accepted[empty]]
    return weights


def require_no_nan(values: Array, rows: NDArray[np.int64]) -> None:
    """Raise ValueError naming those of ``rows`` [n] whose ``values`` [n] are NaN."""
    bad = is_nan(values)
    if bad.any():
        raise ValueError(
            f"probabilities of rows {rows[bad].tolist()} are NaN: check the logits of these rows"
        )


def _gather(probs: Array, tokens: NDArray[np.int64]) -> Array:
    """probs [B, K, V] at tokens [B, K], touching only those entries."""
    num_rows, width = tokens.shape
    return probs[np.arange(num_rows)[:, None], np.arange(width), tokens]
