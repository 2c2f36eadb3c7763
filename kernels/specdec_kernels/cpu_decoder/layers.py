"""A C++ decoder that is given hidden states instead of token ids: for draft heads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec_kernels.cpu_decoder.decoder import CpuDecoder, CpuKVCache, DecoderSpec


class CpuLayers(CpuDecoder):
    """Layers, final norm and head; the rows of its embedding are whatever each step feeds.

    Args:
        spec, weights, flavour: as of :class:`CpuDecoder`, with an ``lm_head`` and without an ``embed``.
    """

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Tensor], flavour: str | None = None) -> None:
        embed = torch.zeros(1, spec.hidden_size)
        super().__init__(spec, {**weights, "embed": embed}, flavour)

    def forward_hidden(
        self,
        inputs: Tensor,
        positions: NDArray[np.int64],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slot_mapping: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
        kv_cache: CpuKVCache,
        tree_mask: NDArray[np.int64] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`CpuDecoder.forward`, of the first layer's ``inputs`` [T, hidden_size], rounded to bfloat16.

        Returns:
            logits float32 [N, vocab_size], and the last layer's outputs float32 [T, hidden_size].
        """
        rounded = inputs.to(torch.bfloat16).contiguous()
        self._model.embed = rounded.data_ptr()
        outputs = torch.empty(inputs.shape, dtype=torch.float32)
        logits = self.forward(
            np.arange(inputs.shape[0]),
            positions,
            query_start,
            context_lens,
            block_tables,
            slot_mapping,
            logit_rows,
            kv_cache,
            capture=[self.spec.num_layers - 1],
            captured=outputs[None],
            tree_mask=tree_mask,
        )
        return logits, outputs

    def _check(
        self, longs: list[NDArray[np.int64]], ints: list[NDArray[np.int32]], kv_cache: CpuKVCache
    ) -> None:
        # What stands for token ids are rows of the inputs, which the head's vocabulary does not bound.
        token_ids, *others = longs
        super()._check([np.zeros_like(token_ids), *others], ints, kv_cache)
