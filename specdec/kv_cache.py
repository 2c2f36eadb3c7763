"""The tensors behind the scheduler's blocks.

Nothing here knows who holds a block: a slot is ``block * block_size + offset`` and the scheduler hands them
out. A rejected draft needs no clean-up, since its slots are written again before they are read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specdec_kernels.compact_kv import compact_kv
from torch import Tensor

KV_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Quantised caches by name: one code for each number, one float32 scale for each token and head."""


class KVCache:
    """Paged keys and values of all layers, zero-initialised.

    Args:
        dtype: of the codes; those of ``KV_DTYPES`` come with scales.
        compact: moves slots, see ``specdec_kernels.compact_kv``.

    Attributes:
        data: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], keys before values.
        scales: float32, likewise without the last dimension; ``None`` unless the cache is quantised.
        k, v: views of each layer's, [num_blocks, block_size, num_kv_heads, head_dim].
        k_scale, v_scale: likewise; ``None`` for each layer unless the cache is quantised.
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
        compact: Callable[..., None] = compact_kv,
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self.block_size = block_size
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        is_quantised = dtype in KV_DTYPES.values()
        self.scales = torch.zeros(shape[:-1], device=device) if is_quantised else None
        self._compact = compact
        self.k, self.v = list(self.data[:, 0]), list(self.data[:, 1])
        none = [None] * num_layers
        self.k_scale: list[Tensor] | list[None] = none if self.scales is None else list(self.scales[:, 0])
        self.v_scale: list[Tensor] | list[None] = none if self.scales is None else list(self.scales[:, 1])

    @property
    def planes(self) -> list[Tensor]:
        """All that a block holds: tensors whose first dimension counts blocks."""
        parts = [self.data] if self.scales is None else [self.data, self.scales]
        # As bytes: not every operation knows every dtype.
        return [plane for part in parts for layer in part.view(torch.uint8) for plane in layer]

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole blocks, int64 [C] each; all sources are read before any destination is written."""
        for plane in self.planes:
            plane[destinations] = plane[sources]

    def move_slots(self, sources: Tensor, destinations: Tensor) -> None:
        """Move single tokens' keys and values between slots, int64 [S] each, in all layers.

        See ``specdec_kernels.compact_kv`` for which moves may be made at once.
        """
        self._compact(self.data, sources, destinations, scales=self.scales)

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Memory of one block over all layers."""
        scale_bytes = 4 if dtype in KV_DTYPES.values() else 0
        return 2 * num_layers * block_size * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)
