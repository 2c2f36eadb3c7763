"""Greedy verification of chains and trees: keep drafts while they are the target's argmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from specdec.tree.topology import ROOT, Tree
from specdec.verify.base import IntArray
from specdec.verify.tree_base import check_siblings


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


def verify_greedy_tree(
    tree: Tree, tokens: IntArray, target_argmax: Callable[[int], int] | IntArray
) -> tuple[list[int], int]:
    """Greedy verification of one draft tree: from the root, step to the child that is the target's argmax.

    Args:
        tree: n nodes.
        tokens: [n].
        target_argmax: [n + 1], the target's most likely token after the root and after each node; or a function
            from such an entry to it, called for visited nodes only.

    Returns:
        path, the accepted nodes from the root down, and the target's own token after them.

    Raises:
        ValueError: siblings with the same token.
    """
    check_siblings(tree, tokens[None])
    path: list[int] = []
    node = ROOT
    while True:
        token = int(target_argmax(node + 1) if callable(target_argmax) else target_argmax[node + 1])
        matching = [child for child in tree.children_of(node) if tokens[child] == token]
        if not matching:
            return path, token
        node = matching[0]
        path.append(node)


def verify_greedy_trees(
    target_argmax: IntArray, tokens: IntArray, parents: IntArray, num_drafted: IntArray
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """:func:`verify_greedy_tree` for B rows, each with a tree of its own.

    Args:
        target_argmax: [B, K + 1], the target's most likely token after the root and after each node.
        tokens, parents: [B, K], nodes and their parents, −1 for the root; entries past ``num_drafted`` are not read.
            Siblings have different tokens.
        num_drafted: [B].

    Returns:
        path int64 [B, K], of which the first num_accepted int32 [B] entries are the accepted nodes, and next_token
        int64 [B].
    """
    num_rows, width = tokens.shape
    usable = np.arange(width) < num_drafted[:, None]
    rows, node = np.arange(num_rows), np.full(num_rows, ROOT)
    path, num_accepted = np.zeros((num_rows, width), np.int64), np.zeros(num_rows, np.int32)
    for depth in range(width):
        agrees = usable & (parents == node[:, None]) & (tokens == target_argmax[rows, node + 1][:, None])
        going = agrees.any(axis=1)
        if not going.any():
            break
        # A row that has stopped finds no child in later rounds either.
        node = np.where(going, agrees.argmax(axis=1), node)
        path[:, depth] = node
        num_accepted += going
    return path, num_accepted, target_argmax[rows, node + 1].astype(np.int64)
