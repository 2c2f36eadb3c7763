"""What one forward pass computes: a ragged batch of tokens, where their keys and values go, what else is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Legend: T tokens of this step, R rows, N tokens whose logits are wanted.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], place of each token in its sequence.
        query_start: int32 [R + 1], where each row's tokens begin within T.
        context_lens: int32 [R], tokens whose keys and values are in the cache already.
        block_tables: int32 [R, max_blocks], KV blocks in order; entries beyond a row's use are ignored.
        slot_mapping: int64 [T], ``block * block_size + offset`` where each token's keys and values go.
        logit_rows: int64 [N], indices into T.
        tree_mask: int64 [T, 2], which tokens of its row in this step a token sees, see
            ``specdec_kernels.paged_attention.tree_mask``; ``None`` if all are causal.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    logit_rows: Tensor
    tree_mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """Where a forward pass leaves the residual stream behind some decoder layers.

    The final norm's input is that of the last layer.

    Attributes:
        layers: C indices; each must be among the layers that are run.
        hidden: float32 [C, T, hidden_size], contiguous, on the model's device; filled by the pass.
    """

    layers: Sequence[int]
    hidden: Tensor

    @classmethod
    def empty(
        cls,
        layers: Sequence[int],
        num_tokens: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
    ) -> Captured:
        return cls(layers, torch.empty(len(layers), num_tokens, hidden_size, device=device))
