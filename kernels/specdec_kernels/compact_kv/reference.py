"""Moving single tokens' keys or values, so that the accepted path of a token tree becomes consecutive."""

from __future__ import annotations

from torch import Tensor


def compact_kv(cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copy slots within a cache, in place; all sources are read before any destination is written.

    Args:
        cache: [num_blocks, block_size, H, D].
        sources, destinations: int64 [S], ``block * block_size + offset``; destinations are distinct.
    """
    slots = cache.view(-1, *cache.shape[2:])
    slots.index_copy_(0, destinations, slots[sources])
