"""Verification: which draft tokens are kept, and which token follows them.

Every rule is a pure function of (target_probs, draft_probs, draft_tokens, uniforms) and leaves the output
distribution equal to the target's. The arithmetic is the same for float arrays and for object arrays of
``fractions.Fraction``, so the exact enumeration in the tests runs the code that the engine runs.

>>> num_accepted, next_token = verify_chains("token", target_probs, draft_probs, draft_tokens, num_drafts,
...                                          accept_uniforms, residual_uniforms)
"""

from specdec.verify.chains import CHAIN_RULES, chain_rule, verify_chains
from specdec.verify.greedy import verify_greedy

__all__ = ["CHAIN_RULES", "chain_rule", "verify_chains", "verify_greedy"]
