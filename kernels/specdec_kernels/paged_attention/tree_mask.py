"""Token trees: which tokens of its own step a token sees, as bits in two 64-bit words.

A row that is a tree holds its last known token, the root, and the nodes, parents before children. Bit j of a token's
mask says that it sees token j of its row in this step; a node has the bits of the root, its ancestors and itself. A
token whose mask is zero is causal: it sees the tokens of its row up to itself. Legend: T tokens, R rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_TREE_TOKENS = 128


def unpack_mask(tree_mask: Tensor) -> Tensor:
    """The bits of int64 [T, 2], bool [T, MAX_TREE_TOKENS]."""
    places = torch.arange(64, device=tree_mask.device)
    return (tree_mask[:, :, None] >> places & 1).bool().flatten(1)


def check_tree_mask(tree_mask: NDArray[np.int64], query_start: NDArray[np.int32]) -> None:
    """Assert that masks int64 [T, 2] fit rows that start at int32 [R + 1] ``query_start``."""
    num_tokens, counts = int(query_start[-1]), np.diff(query_start)
    assert tree_mask.dtype == np.int64 and tree_mask.shape == (num_tokens, 2), (
        f"a tree mask is int64 [{num_tokens}, 2], not {tree_mask.dtype} {list(tree_mask.shape)}"
    )
    masked = np.flatnonzero(tree_mask.any(axis=1))
    count = np.repeat(counts, counts)[masked]
    assert (count <= MAX_TREE_TOKENS).all(), f"a row with tree masks has more than {MAX_TREE_TOKENS} tokens"
    own = masked - np.repeat(query_start[:-1], counts)[masked]
    words = np.ascontiguousarray(tree_mask[masked]).view(np.uint8)
    bits = np.unpackbits(words, axis=1, bitorder="little")
    assert bits[np.arange(masked.size), own].all(), "a token with a tree mask does not see itself"
    assert not (bits & (np.arange(MAX_TREE_TOKENS) >= count[:, None])).any(), (
        "a tree mask has bits beyond its row's tokens"
    )
