"""The tensors behind the scheduler's blocks.

Nothing here knows who holds a block: a slot is ``block * block_size + offset`` and the scheduler hands them
out. A rejected draft needs no clean-up, since its slots are written again before they are read.
"""

from __future__ import annotations

import torch
from specdec_kernels.compact_kv import compact_kv
from torch import Tensor


class KVCache:
    """Paged keys and values, one tensor pair per layer, zero-initialised.

    Attributes:
        k, v: per layer [num_blocks, block_size, num_kv_heads, head_dim].
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.block_size = block_size
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole blocks, int64 [C] each; all sources are read before any destination is written."""
        for cache in (*self.k, *self.v):
            cache[destinations] = cache[sources]

    def move_slots(self, sources: Tensor, destinations: Tensor) -> None:
        """Move single tokens' keys and values between slots, int64 [S] each, in all layers.

        All sources are read before any destination is written.
        """
        for cache in (*self.k, *self.v):
            compact_kv(cache, sources, destinations)

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
