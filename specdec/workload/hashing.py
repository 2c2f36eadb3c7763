"""Prefix blocks without tokens: 64-bit names such that equal names mean equal prefixes.

The engine hashes token values (``specdec.scheduler.blocks.hash_blocks``); a trace or a synthetic session only
knows which blocks are the same. Two different prefixes of m in all share a name with probability m² / 2^65.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HashArray = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def mix64(values: HashArray) -> HashArray:
    """SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014): a bijection that scatters the bits."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    return mixed ^ (mixed >> _SHIFTS[2])


def pair_hash(first: HashArray, second: HashArray) -> HashArray:
    """Name of an ordered pair, never 0; uint64 arrays that broadcast."""
    mixed = mix64(mix64(first) + second)
    return np.where(mixed == 0, np.uint64(1), mixed)


def chain_hashes(block_ids: HashArray, start: NDArray[np.int64]) -> HashArray:
    """Chained hashes of blocks that have ids: equal if and only if all ids up to there are equal.

    Args:
        block_ids: uint64 [sum], the ids of all sequences, one sequence after the other.
        start: int64 [N + 1], where each sequence begins.

    Returns:
        uint64 [sum], none of them 0.
    """
    counts = np.diff(start)
    # The longest first, so that the sequences that reach a depth are a prefix of the rows.
    rows = np.argsort(-counts, kind="stable")
    depths = np.arange(counts.max(initial=0))
    num_reaching = np.searchsorted(-counts[rows], -depths, side="left")
    hashes = np.empty_like(block_ids)
    parents = np.zeros(len(counts), np.uint64)
    for depth, num in zip(depths.tolist(), num_reaching.tolist(), strict=True):
        at = start[rows[:num]] + depth
        parents = pair_hash(parents[:num], block_ids[at])
        hashes[at] = parents
    return hashes


def split_hashes(hashes: HashArray, factor: int) -> HashArray:
    """Each block's hash replaced by those of the ``factor`` equal parts of the block, uint64 [n · factor]."""
    return pair_hash(hashes[:, None], np.arange(factor, dtype=np.uint64)).reshape(-1)


def random_tokens(seeds: HashArray, num_tokens: int, vocab_size: int) -> NDArray[np.int32]:
    """Token ids that depend on nothing but the seed and the place, so blocks of one name hold equal tokens.

    Returns:
        int32 [len(seeds), num_tokens] in [0, vocab_size).
    """
    bits = pair_hash(seeds[:, None], np.arange(num_tokens, dtype=np.uint64))
    return (bits % np.uint64(vocab_size)).astype(np.int32)
