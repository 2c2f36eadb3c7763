"""Verification: which draft tokens are kept, and which token follows them.

Every rule is a pure function of (target_probs, draft_probs, draft_tokens, uniforms) and leaves the output
distribution equal to the target's. The arithmetic is the same for float arrays and for object arrays of
``fractions.Fraction``, so the exact enumeration in the tests runs the code that the engine runs.

>>> num_accepted, next_token = verify_chains("token", target_probs, draft_probs, draft_tokens, num_drafts,
...                                          accept_uniforms, residual_uniforms)
>>> path, next_token = verify("traversal", tree, tokens, target_probs, draft_probs, generator)
"""

from specdec.verify.chains import CHAIN_RULES, chain_rule, verify_chains
from specdec.verify.greedy import verify_greedy, verify_greedy_tree, verify_greedy_trees
from specdec.verify.one_hot import descend
from specdec.verify.trees import RULES, TREE_RULES, verify, verify_tree, verify_trees

__all__ = [
    "CHAIN_RULES",
    "RULES",
    "TREE_RULES",
    "chain_rule",
    "descend",
    "verify",
    "verify_chains",
    "verify_greedy",
    "verify_greedy_tree",
    "verify_greedy_trees",
    "verify_tree",
    "verify_trees",
]
