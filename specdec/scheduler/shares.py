"""Who gets how many tokens of a step's budget, among the rows that run already."""

from __future__ import annotations

import numpy as np

from specdec.scheduler.plan import IntArray
from specdec.scheduler.policy import BatchPolicy
from specdec.scheduler.speculation import fit_drafts


def share(policy: BatchPolicy, budget: int, pending: IntArray, drafts: IntArray) -> tuple[IntArray, int]:
    """Known tokens to compute for each row, int32 [R], and the budget that is left for newcomers.

    Unless ``policy`` decodes first, decoding rows have none yet: :func:`give_decodes` comes after the newcomers.

    Args:
        budget: tokens of the step.
        pending: int32 [R], known tokens that are not computed; 1 when decoding.
        drafts: int32 [R], wanted; cut in place to what the budget allows.
    """
    new = np.zeros(pending.size, np.int32)
    if policy.decode_first:
        budget = give_decodes(pending, new, drafts, budget)
    return new, _give_prefills(policy, pending, new, budget)


def give_decodes(pending: IntArray, new: IntArray, drafts: IntArray, budget: int) -> int:
    """One token to each decoding row in order, then drafts evenly, in place; the budget that is left."""
    decode = pending == 1
    wanted = int(np.count_nonzero(decode)) + int(drafts.sum())
    if wanted <= budget:
        new += decode
        return budget - wanted
    decoding = np.flatnonzero(decode)
    served = decoding[:budget]
    drafts[decoding[budget:]] = 0
    new[served] = 1
    drafts[served] = fit_drafts(drafts[served], budget - served.size)
    return budget - served.size - int(drafts[served].sum())


def _give_prefills(policy: BatchPolicy, pending: IntArray, new: IntArray, budget: int) -> int:
    """Tokens to rows whose prompt is not computed yet, in order; the budget that is left."""
    for index in np.flatnonzero(pending > 1).tolist():
        tokens = int(pending[index])
        if tokens > budget and not policy.chunked_prefill:
            break
        new[index] = min(tokens, budget)
        budget -= int(new[index])
        if budget == 0:
            break
    return budget
