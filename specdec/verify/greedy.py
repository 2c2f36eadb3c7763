"""Greedy verification: keep drafts while they are the target's argmax."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.verify.base import IntArray


def verify_greedy(
    target_argmax: IntArray, draft_tokens: IntArray, num_drafts: IntArray
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Speculative decoding at temperature 0; the output is what the target alone would produce.

    Args:
        target_argmax: [B, K+1], the target's most likely token after each prefix.
        draft_tokens: [B, K]; entries past ``num_drafts`` are not read.
        num_drafts: [B].

    Returns:
        num_accepted int32 [B] and next_token int64 [B], the target's own token after the accepted drafts.
    """
    drafted = np.arange(draft_tokens.shape[1]) < num_drafts[:, None]
    matches = (draft_tokens == target_argmax[:, :-1]) & drafted
    num_accepted = np.cumprod(matches, axis=1).sum(axis=1)
    next_token = target_argmax[np.arange(num_accepted.size), num_accepted]
    return num_accepted.astype(np.int32), next_token.astype(np.int64)
