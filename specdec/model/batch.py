"""What one forward pass computes: a ragged batch of tokens and where their keys and values go."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    logit_rows: Tensor
