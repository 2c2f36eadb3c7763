"""Causal attention over a paged KV cache, for a ragged batch of prompt chunks, decodes and draft checks.

Legend: T tokens, R rows, Q queries of a row, S keys of a row, H key-value heads, G query heads per key-value
head, D head dimension.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows with at most this many queries are padded to a batch; longer ones are computed one by one.
MAX_PADDED_QUERIES = 32


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values to their slots, in place.

    Args:
        k, v: [T, H, D].
        k_cache, v_cache: [num_blocks, block_size, H, D].
        slot_mapping: int64 [T], ``block * block_size + offset``.
    """
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, new.to(cache.dtype))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from each token to its row's context and to the tokens before it in this step.

    The keys and values of this step must have been stored. Slots that no token of the row has written may
    hold anything, NaN included. The softmax is computed in float32.

    Args:
        q: [T, H * G, D].
        k_cache, v_cache: [num_blocks, block_size, H, D].
        query_start: int32 [R + 1].
        context_lens: int32 [R].
        block_tables: int32 [R, max_blocks].
        scale: scores are multiplied by it.
        sliding_window: how many keys a token sees, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [T, H * G, D].
    """
    starts, contexts = query_start.tolist(), context_lens.tolist()
    counts = [end - start for start, end in pairwise(starts)]
    out = torch.zeros_like(q)
    short = [row for row, count in enumerate(counts) if 0 < count <= MAX_PADDED_QUERIES]
    groups = [short] if short else []
    groups += [[row] for row, count in enumerate(counts) if count > MAX_PADDED_QUERIES]
    for rows in groups:
        row_index = torch.tensor(rows, device=q.device)
        count_R = torch.tensor([counts[row] for row in rows], device=q.device)
        context_R = torch.tensor([contexts[row] for row in rows], device=q.device)
        num_queries = max(counts[row] for row in rows)
        num_keys = max(counts[row] + contexts[row] for row in rows)
        # A padded query repeats its row's last one, so that no softmax is over nothing.
        offset_RQ = (
            torch.arange(num_queries, device=q.device).expand(len(rows), -1).minimum(count_R[:, None] - 1)
        )
        token_RQ = query_start[row_index].long()[:, None] + offset_RQ
        k, v = (_gather(cache, block_tables[row_index], num_keys) for cache in (k_cache, v_cache))
        mask = _visible(context_R[:, None] + offset_RQ, num_keys, sliding_window)
        unused = torch.arange(num_keys, device=q.device) >= (context_R + count_R)[:, None]
        k, v = (x.masked_fill(unused[:, :, None, None], 0).to(q.dtype) for x in (k, v))
        out[token_RQ] = _attend(q[token_RQ], k, v, mask, scale, softcap)
    return out


def _gather(cache: Tensor, block_tables: Tensor, num_keys: int) -> Tensor:
    """The first ``num_keys`` slots of each row, [R, S, H, D]."""
    num_blocks = -(-num_keys // cache.shape[1])
    return cache[block_tables[:, :num_blocks].long()].flatten(1, 2)[:, :num_keys]


def _visible(position_RQ: Tensor, num_keys: int, sliding_window: int | None) -> Tensor:
    """Which keys each query sees, bool [R, Q, S]."""
    key_S = torch.arange(num_keys, device=position_RQ.device)
    visible = key_S <= position_RQ[:, :, None]
    if sliding_window is not None:
        visible &= key_S > position_RQ[:, :, None] - sliding_window
    return visible


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention of q [R, Q, H * G, D] over k, v [R, S, H, D] under mask [R, Q, S]; [R, Q, H * G, D]."""
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_heads // num_kv_heads
    # The query heads that share a key head become further queries of that head.
    q = q.view(num_rows, num_queries, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = mask[:, None].repeat(1, 1, group, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
        out = (scores.softmax(-1) @ v.float()).to(q.dtype)
    out = out.view(num_rows, num_kv_heads, group, num_queries, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(num_rows, num_queries, num_heads, head_dim)
