"""Token-by-token verification: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., 2302.01318.

Draft x is accepted with probability min(1, target_probs[x] / draft_probs[x]). The first rejection ends the
step, and the next token comes from norm((target_probs − draft_probs)⁺).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.verify.base import ChainRule, Chains
from specdec.verify.numerics import Array


def thresholds(chains: Chains) -> Array:
    """Probability [B, K] that each draft is accepted, given that those before it were."""
    return np.minimum(chains.ratios(), 1)


def accept(chains: Chains, uniforms: Array) -> tuple[NDArray[np.int64], None]:
    """Drafts before the first whose uniform reaches its threshold.

    ``uniform < threshold`` and not ``<=``: a uniform may be exactly 0, and threshold 0 must never accept.
    """
    accepted = (uniforms < thresholds(chains)) & chains.drafted
    return np.cumprod(accepted, axis=1).sum(axis=1), None


RULE = ChainRule(thresholds, accept)
