"""Attention over a paged KV cache, for a ragged batch of prompt chunks, decodes, draft chains and draft trees.

Legend: T tokens, R rows, Q queries of a row, S keys of a row, H key-value heads, G query heads per key-value
head, D head dimension, M tokens that a tree has at most.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec_kernels.paged_attention.tree_mask import MAX_TREE_TOKENS, unpack_mask

# Rows with at most this many queries are padded to a batch; longer ones are computed one by one. In a step with trees
# those of a tree's size are a second batch.
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
    tree_mask: Tensor | None = None,
    positions: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend from each token to its row's context and to the tokens before it in this step, or those of its mask.

    The keys and values of this step must have been stored. Slots that no token of the row has written may
    hold anything, NaN included. The softmax is computed in float32.

    Args:
        q: [T, H * G, D].
        k_cache, v_cache: [num_blocks, block_size, H, D], in the dtype of ``q``, or int8 or float8_e4m3fn with scales.
        query_start: int32 [R + 1]; tokens of ``q`` beyond the last entry are padding, for which zeros are returned.
        context_lens: int32 [R].
        block_tables: int32 [R, max_blocks].
        scale: scores are multiplied by it.
        sliding_window: how many positions a token sees, its own included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        tree_mask: int64 [T, 2], see ``tree_mask.py``; ``None`` means that all tokens are causal.
        positions: int64 [T], which a sliding window needs beside a tree mask: nodes share positions.
        k_scale, v_scale: float32 [num_blocks, block_size, H], of quantised caches: a value is its code times the
            scale of its token and head.
        batch_invariant: ignored here, where the order of sums is torch's. A kernel computes a token from the same
            keys with the same bits whatever else is in the batch, and whether as a prompt's token, a decode, one
            of a chain or a node of a tree.

    Returns:
        [T, H * G, D].
    """
    starts, contexts = query_start.tolist(), context_lens.tolist()
    counts = [end - start for start, end in pairwise(starts)]
    out = torch.zeros_like(q)
    sees_TM = None if tree_mask is None else unpack_mask(tree_mask)
    for rows in _groups(counts, tree_mask is not None):
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
        blocks = block_tables[row_index, : -(-num_keys // k_cache.shape[1])].long()
        k, v = (
            _gather(cache, scale, blocks, q.dtype)[:, :num_keys]
            for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        index_RQ = context_R[:, None] + offset_RQ
        if sees_TM is None:
            mask = _visible(index_RQ, num_keys, sliding_window)
        else:
            mask = _visible_in_trees(sees_TM[token_RQ], index_RQ, context_R, count_R, num_keys)
            if sliding_window is not None:
                assert positions is not None, "a sliding window needs the positions of a tree's tokens"
                key_RS = _key_positions(positions, token_RQ[:, 0], context_R, count_R, num_keys)
                mask &= key_RS[:, None] > positions[token_RQ][:, :, None] - sliding_window
        unused = torch.arange(num_keys, device=q.device) >= (context_R + count_R)[:, None]
        k, v = (x.masked_fill(unused[:, :, None, None], 0) for x in (k, v))
        out[token_RQ] = _attend(q[token_RQ], k, v, mask, scale, softcap)
    return out


def _groups(counts: list[int], has_trees: bool) -> list[list[int]]:
    """Which rows are computed together, padded to the longest."""
    limits = (0, MAX_PADDED_QUERIES, MAX_TREE_TOKENS) if has_trees else (0, MAX_PADDED_QUERIES)
    groups = [
        [row for row, count in enumerate(counts) if low < count <= high] for low, high in pairwise(limits)
    ]
    return [*filter(None, groups), *([row] for row, count in enumerate(counts) if count > limits[-1])]


def _gather(cache: Tensor, scale: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """All slots of each row's blocks, [R, S, H, D] in ``dtype``."""
    gathered = cache[blocks]
    if scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        gathered = gathered.to(wide) * scale[blocks, :, :, None]
    return gathered.flatten(1, 2).to(dtype)


def _visible(position_RQ: Tensor, num_keys: int, sliding_window: int | None) -> Tensor:
    """Which keys each query sees, bool [R, Q, S]."""
    key_S = torch.arange(num_keys, device=position_RQ.device)
    visible = key_S <= position_RQ[:, :, None]
    if sliding_window is not None:
        visible &= key_S > position_RQ[:, :, None] - sliding_window
    return visible


def _visible_in_trees(
    sees_RQM: Tensor, index_RQ: Tensor, context_R: Tensor, count_R: Tensor, num_keys: int
) -> Tensor:
    """Which keys each query sees by its mask, or, where that is zero, by its index in the row; bool [R, Q, S]."""
    key_S = torch.arange(num_keys, device=index_RQ.device)
    own_RS = key_S - context_R[:, None]  # of the keys of this step
    place_RQS = own_RS.clamp(0, MAX_TREE_TOKENS - 1)[:, None].expand(-1, sees_RQM.shape[1], -1)
    seen = sees_RQM.gather(2, place_RQS) & (own_RS < count_R[:, None])[:, None]
    seen |= (own_RS < 0)[:, None]
    return torch.where(sees_RQM.any(2, keepdim=True), seen, key_S <= index_RQ[:, :, None])


def _key_positions(
    positions: Tensor, first_R: Tensor, context_R: Tensor, count_R: Tensor, num_keys: int
) -> Tensor:
    """The position of each key, int64 [R, S]: its index in the context, its token's own in this step."""
    key_S = torch.arange(num_keys, device=positions.device)
    own_RS = (key_S - context_R[:, None]).minimum(count_R[:, None] - 1)
    return torch.where(own_RS < 0, key_S, positions[first_R[:, None] + own_RS.clamp(min=0)])


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
