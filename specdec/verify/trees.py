"""Verification of draft trees under a named rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.names import unknown_name
from specdec.tree.topology import ROOT, Tree
from specdec.verify import one_hot, recursive, traversal
from specdec.verify.base import IntArray, require_no_nan
from specdec.verify.chains import CHAIN_RULES, verify_chains
from specdec.verify.greedy import verify_greedy_tree
from specdec.verify.numerics import Array, inverse_cdf
from specdec.verify.tree_base import TreeDrafts, TreeRule

TREE_RULES: dict[str, TreeRule] = {
    "recursive": recursive.RULE,
    "one_hot": one_hot.RULE,
    "traversal": traversal.RULE,
}
"""Lossless rules for sampling in trees."""

RULES = ("greedy", *CHAIN_RULES, *TREE_RULES)
"""All that ``verify`` takes."""


def verify(
    rule: str,
    tree: Tree,
    tokens: ArrayLike,
    target_probs: Array,
    draft_probs: Array | None,
    generator: np.random.Generator,
) -> tuple[list[int], int]:
    """Accept a path of one draft tree and draw the token that follows it, with noise from ``generator``.

    Takes len(tree) + 1 uniforms from the generator whatever the rule; see :func:`verify_tree` for the rest.
    """
    return verify_tree(rule, tree, tokens, target_probs, draft_probs, generator.random(len(tree) + 1))


def verify_tree(
    rule: str,
    tree: Tree,
    tokens: ArrayLike,
    target_probs: Array,
    draft_probs: Array | None,
    uniforms: NDArray[Any],
) -> tuple[list[int], int]:
    """Accept a path of one draft tree of n nodes and draw the token that follows it.

    The emitted tokens (the path's, then ``next_token``) follow the target's joint law exactly, provided that the
    drafts are what the rule takes them for and the uniforms are independent of what drew them. "greedy" gives what
    the target's argmax gives.

    Args:
        rule: one of RULES. "token" and "block" take chains; "recursive" and "traversal" take siblings drawn
            without replacement; "one_hot" and "greedy" take any children.
        tree: n nodes.
        tokens: integers [n].
        target_probs: [n+1, V], the target's distribution as sampled from, after temperature, filters and
            penalties: row 0 after the root, row i + 1 after node i. float32, float64 or object (``Fraction``).
        draft_probs: [n+1, V], likewise: what the children of the root and of node i were drawn from, before any
            sibling was removed. Rows of leaves are not read. None for deterministic drafts. "greedy" and
            "one_hot" ignore it.
        uniforms: [n + 1] in [0, 1): one per node, and the last for ``next_token``.

    Returns:
        path, the accepted nodes from the root down, and next_token.

    Raises:
        ValueError: an unknown rule; "token" or "block" on a tree that branches; "recursive" or "traversal"
            without ``draft_probs``; shapes that do not fit; tokens outside the vocabulary; siblings with the same
            token; drafts of draft probability 0; probabilities that are NaN or all zero.
    """
    last, next_token = verify_trees(
        rule,
        tree,
        np.asarray(tokens)[None],
        target_probs[None],
        None if draft_probs is None else draft_probs[None],
        np.asarray(uniforms)[None],
    )
    return tree.path(int(last[0])), int(next_token[0])


def verify_trees(
    rule: str,
    tree: Tree,
    tokens: IntArray,
    target_probs: Array,
    draft_probs: Array | None,
    uniforms: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """:func:`verify_tree` for B rows that share one tree: all arrays have a leading axis B.

    A row's result does not depend on the other rows. Whole rows of probabilities are copied, and widened to
    float64, only at visited nodes.

    Returns:
        last int64 [B], the last accepted node, −1 where none is (``tree.path`` gives the path); and
        next_token int64 [B].
    """
    if rule not in RULES:
        raise unknown_name("verification rule", rule, RULES)
    if rule in CHAIN_RULES and not tree.is_chain:
        raise ValueError(
            f"rule {rule!r} verifies chains, but the tree with parents {list(tree.parents)} branches: use "
            "'recursive' or 'traversal' for sampled siblings, 'one_hot' for deterministic ones"
        )
    if rule == "greedy" or (rule in TREE_RULES and not TREE_RULES[rule].needs_draft_probs):
        draft_probs = None
    elif rule in TREE_RULES and draft_probs is None:
        raise ValueError(
            f"rule {rule!r} needs draft_probs, the distributions that the children were drawn from: use "
            "'one_hot' for deterministic children"
        )
    drafts = TreeDrafts.build(tree, tokens, target_probs, draft_probs)
    if uniforms.shape != (len(drafts.tokens), len(tree) + 1):
        raise ValueError(
            f"uniforms have shape {uniforms.shape}: a tree of {len(tree)} nodes needs {len(tree) + 1} per row"
        )
    if rule == "greedy":
        return _verify_greedy(drafts)
    if rule in CHAIN_RULES:
        return _verify_chain(rule, drafts, uniforms)
    last = np.full(len(drafts.tokens), ROOT, np.int64)
    next_token = np.zeros_like(last)
    for stop in TREE_RULES[rule].accept(drafts, uniforms):
        last[stop.rows] = stop.node
        next_token[stop.rows] = inverse_cdf(stop.weights, uniforms[stop.rows, -1])
    return last, next_token


def _verify_chain(
    rule: str, drafts: TreeDrafts, uniforms: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    num_rows, length = drafts.tokens.shape
    num_accepted, next_token = verify_chains(
        rule,
        drafts.target_probs,
        None if drafts.draft_probs is None else drafts.draft_probs[:, :-1],
        drafts.tokens,
        np.full(num_rows, length),
        uniforms[:, :-1],
        uniforms[:, -1],
    )
    return num_accepted.astype(np.int64) - 1, next_token


def _verify_greedy(drafts: TreeDrafts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    last = np.full(len(drafts.tokens), ROOT, np.int64)
    next_token = np.zeros_like(last)
    for row, (tokens, probs) in enumerate(zip(drafts.tokens, drafts.target_probs, strict=True)):
        path, next_token[row] = verify_greedy_tree(drafts.tree, tokens, partial(_argmax, probs))
        last[row] = path[-1] if path else ROOT
    return last, next_token


def _argmax(probs: Array, entry: int) -> int:
    """Argmax of row ``entry`` of [n, V]."""
    token = int(probs[entry].argmax())
    require_no_nan(probs[entry, token : token + 1], np.array([entry]))  # NaN counts as the largest
    return token
