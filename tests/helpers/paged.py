"""Drive a Decoder over a paged cache with shuffled blocks and poisoned slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.model.batch import ForwardBatch
from specdec.model.decoder import Decoder


class PagedRun:
    """Sequences side by side in one cache; whatever has not been written is NaN.

    Args:
        max_len: tokens that each sequence may reach.
    """

    def __init__(
        self, decoder: Decoder, num_rows: int, max_len: int, block_size: int = 4, seed: int = 0
    ) -> None:
        config = decoder.config
        per_row = -(-max_len // block_size)
        shape = (config.num_layers, num_rows * per_row + 3, block_size, config.num_kv_heads, config.head_dim)
        self.decoder, self.block_size = decoder, block_size
        self.cache = KVCache(*shape, decoder.dtype)
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(torch.nan)
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
        self.block_tables = order[: num_rows * per_row].view(num_rows, per_row)
        self.lengths = [0] * num_rows

    @torch.inference_mode()
    def step(self, new: Mapping[int, Sequence[int]], layers: Sequence[int] | None = None) -> list[Tensor]:
        """Feed tokens to some rows; logits float32 [number of tokens, V] of each, in the order given."""
        rows, counts = list(new), [len(tokens) for tokens in new.values()]
        contexts = [self.lengths[row] for row in rows]
        positions = [
            torch.arange(start, start + count) for start, count in zip(contexts, counts, strict=True)
        ]
        slots = [self._slots(row, position) for row, position in zip(rows, positions, strict=True)]
        batch = ForwardBatch(
            token_ids=torch.tensor([token for tokens in new.values() for token in tokens]),
            positions=torch.cat(positions),
            query_start=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=self.block_tables[rows].int(),
            slot_mapping=torch.cat(slots),
            logit_rows=torch.arange(sum(counts)),
        )
        logits = self.decoder.logits(self.decoder.forward(batch, self.cache, layers))
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        return list(logits.split(counts))

    def _slots(self, row: int, positions: Tensor) -> Tensor:
        return (
            self.block_tables[row, positions // self.block_size] * self.block_size
            + positions % self.block_size
        )
