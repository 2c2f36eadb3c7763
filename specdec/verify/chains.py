"""Verification of a batch of draft chains under a named rule."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.names import unknown_name
from specdec.verify import block, token
from specdec.verify.base import ChainRule, Chains, IntArray, residual
from specdec.verify.numerics import Array, inverse_cdf

CHAIN_RULES: dict[str, ChainRule] = {"token": token.RULE, "block": block.RULE}
"""Lossless rules for sampling. ``verify_greedy`` is apart: it needs the target's argmax only."""


def chain_rule(name: str) -> ChainRule:
    """The rule called ``name``.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    if name not in CHAIN_RULES:
        raise unknown_name("verification rule", name, CHAIN_RULES)
    return CHAIN_RULES[name]


def verify_chains(
    rule: str,
    target_probs: Array,
    draft_probs: Array | None,
    draft_tokens: IntArray,
    num_drafts: IntArray,
    accept_uniforms: NDArray[Any],
    residual_uniforms: NDArray[Any],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Accept a prefix of each row's drafts and draw the token that follows it.

    The emitted tokens (accepted drafts, then ``next_token``) follow the target's joint law exactly, provided
    that the drafts were drawn from ``draft_probs`` and the three kinds of noise are independent. A row without
    drafts samples plainly from ``target_probs[:, 0]``.

    Args:
        rule: "token" or "block".
        target_probs: [B, K+1, V], the target's distribution before and after each draft, as sampled from:
            after temperature, filters and penalties. float32, float64 or object (``Fraction``).
        draft_probs: [B, K, V], the distribution that each draft was drawn from; None when the drafts are a
            deterministic function of the prefix (n-gram lookup, argmax).
        draft_tokens: integers [B, K]. Entries past ``num_drafts`` are not read, here and in the probabilities.
        num_drafts: integers [B] in [0, K].
        accept_uniforms: [B, K] in [0, 1).
        residual_uniforms: [B] in [0, 1).

    Returns:
        num_accepted int32 [B] and next_token int64 [B].

    Raises:
        ValueError: for an unknown rule; naming rows whose probabilities are NaN or all zero, whose drafts are
            outside the vocabulary, or whose drafts have draft probability 0.
    """
    decide = chain_rule(rule).accept
    chains = Chains.build(target_probs, draft_probs, draft_tokens, num_drafts)
    num_accepted, scale = decide(chains, accept_uniforms)
    next_token = inverse_cdf(residual(chains, num_accepted, scale), residual_uniforms)
    return num_accepted.astype(np.int32), next_token
