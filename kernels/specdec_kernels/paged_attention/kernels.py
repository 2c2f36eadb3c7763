"""The kernels of paged attention: ``attend``, ``combine`` for contexts that were split, and ``tree_paths``.

A program takes a tile of queries of one row and one key-value head. A query comes with all query heads that share
the key-value head: line m of the tile is query ``m // GROUP`` and head ``m % GROUP`` of the group. The program walks
over the row's keys, BLOCK_N at a time, with the running softmax of Milakov & Gimelshein, arXiv 1805.02867, as
FlashAttention does (Dao, arXiv 2307.08691). The keys of a tile may be split among programs, each of which then leaves
its running softmax for ``combine``.

**Batch invariance.** A line's sums must not depend on which other lines share its tile. Tiles of keys that a line does
not see change nothing: they multiply its sums by 1 and add 0. What is left is where a key lies in the products over
BLOCK_N keys, and in which split. Tiles and splits therefore begin at fixed indices, and the keys of a tree are taken
once for every path: a node's ancestors are gathered to the indices that they would have if they were its whole row,
and only that node's lines see them.

Legend: M lines of a tile (BLOCK_M), N keys (BLOCK_N), D head dimension, padded to a power of two (BLOCK_D).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Within a kernel most values are tensors, whatever they look like.

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.paged_attention import tree_mask
from specdec_kernels.paged_attention.tiles import (
    absorb,
    find_tile,
    hide_far,
    hide_unseen,
    key_position,
    load_keys,
    log2_scores,
    split_range,
)

MAX_TREE_TOKENS = tl.constexpr(tree_mask.MAX_TREE_TOKENS)
FAR = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["num_tokens"])
def tree_paths(mask_ptr, path_ptr, length_ptr, num_tokens, BLOCK_T: tl.constexpr):
    """For each token the places in its row of the tokens that its mask shows, in order, and their number.

    Writes int32 [T, MAX_TREE_TOKENS], of which entries beyond the number are left as they are, and int32 [T].
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    bit = tl.arange(0, MAX_TREE_TOKENS)
    inside = (token < num_tokens)[:, None] & (bit >= 0)[None, :]
    word_ptr = mask_ptr + token.to(tl.int64)[:, None] * (MAX_TREE_TOKENS // 32) + (bit // 32)[None, :]
    bits = (tl.load(word_ptr, mask=inside, other=0) >> (bit & 31)[None, :]) & 1
    rank = tl.cumsum(bits, axis=1) - bits
    places = tl.broadcast_to(bit[None, :], [BLOCK_T, MAX_TREE_TOKENS])
    path_line_ptr = path_ptr + token.to(tl.int64)[:, None] * MAX_TREE_TOKENS
    tl.store(path_line_ptr + rank, places, mask=inside & (bits != 0))
    tl.store(length_ptr + token, tl.sum(bits, axis=1), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "first_tile", "sliding_window"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    maximum_ptr,
    total_ptr,
    partial_ptr,
    query_start_ptr,
    context_ptr,
    table_ptr,
    mask_ptr,
    position_ptr,
    path_ptr,
    length_ptr,
    num_tokens,
    num_rows,
    first_tile,
    q_stride_token,
    q_stride_head,
    table_stride,
    scale,
    softcap,
    sliding_window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_INVARIANT: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    row, row_start, row_end, first = find_tile(
        query_start_ptr, num_rows, num_tokens, first_tile + tl.program_id(0), BLOCK_Q
    )
    if row_start + first >= row_end:
        return
    num_queries = tl.minimum(BLOCK_Q, row_end - row_start - first)
    context = tl.load(context_ptr + row, mask=row < num_rows, other=0)
    num_keys = tl.where(row < num_rows, context + row_end - row_start, 0)

    line = tl.arange(0, BLOCK_M)
    valid = line < num_queries * GROUP
    token = row_start + first + line // GROUP
    head = tl.program_id(1) * GROUP + line % GROUP
    dim = tl.arange(0, BLOCK_D)
    element = valid[:, None] & (dim < HEAD_DIM)[None, :]
    q_line = token.to(tl.int64) * q_stride_token + head * q_stride_head
    q = tl.load(q_ptr + q_line[:, None] + dim[None, :], mask=element, other=0.0)

    # Which keys the tile needs: those up to its last query, or all of its row if there are masks.
    own = context + first + line // GROUP
    own_position = own
    mask_line = mask_ptr + token.to(tl.int64) * (MAX_TREE_TOKENS // 32)
    is_masked = valid
    start = 0
    end = tl.minimum(context + first + num_queries, num_keys)
    common = context + first + 1  # keys before it are seen by all lines
    num_paths = 0
    if HAS_TREE:
        word = tl.arange(0, MAX_TREE_TOKENS // 32)
        words = tl.load(mask_line[:, None] + word[None, :], mask=valid[:, None], other=0)
        is_masked = tl.max((words != 0).to(tl.int32), axis=1) != 0
        has_masks = tl.max(is_masked.to(tl.int32), axis=0) != 0
        end = tl.where(has_masks, num_keys, end)
        common = tl.where(has_masks, context, common)
        num_paths = tl.where(has_masks, num_queries, 0)
    if HAS_WINDOW:
        if HAS_TREE:
            own_position = tl.load(position_ptr + token, mask=valid, other=FAR).to(tl.int32)
        nearest = tl.min(own_position, axis=0) - sliding_window + 1
        start = tl.maximum(tl.minimum(nearest, context), 0) // BLOCK_N * BLOCK_N
    if IS_SPLIT:
        start, end = split_range(start, end, SPLIT_KEYS, BLOCK_N, IS_INVARIANT)
    plain_end = common // BLOCK_N * BLOCK_N
    shared_end = end
    if IS_INVARIANT and HAS_TREE:
        shared_end = tl.where(num_paths > 0, tl.minimum(plain_end, end), end)

    cache = (table_ptr + row.to(tl.int64) * table_stride, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr)
    keys_of_row = (context, num_keys, position_ptr + row_start)
    lines = (own, own_position, mask_line, is_masked)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(start, shared_end, BLOCK_N):
        index = tl.minimum(begin + tl.arange(0, BLOCK_N), num_keys - 1)
        k, v, k_scale, v_scale = load_keys(index, cache, q.dtype, HEAD_DIM, BLOCK_D, PAGE)
        scores = log2_scores(q, k, k_scale, scale, softcap, HAS_SOFTCAP)
        if IS_INVARIANT or HAS_WINDOW or begin >= plain_end:
            HAS_MASKS: tl.constexpr = HAS_TREE and not IS_INVARIANT
            scores = hide_unseen(
                scores, begin, keys_of_row, lines, sliding_window, BLOCK_N, HAS_MASKS, HAS_TREE, HAS_WINDOW
            )
        maximum, total, acc = absorb(maximum, total, acc, scores, v, v_scale)
    if IS_INVARIANT and HAS_TREE:
        for place in range(first, first + num_paths):
            length = tl.load(length_ptr + row_start + place)
            # A causal token has no path but sees the tokens up to itself.
            path_start = tl.where(length > 0, context, FAR)
            path_end = tl.minimum(context + tl.where(length > 0, length, place + 1), end)
            row_path_ptr = path_ptr + (row_start + place).to(tl.int64) * MAX_TREE_TOKENS
            # A path has a tile or two more, too few for a pipeline.
            for begin in tl.range(tl.maximum(start, shared_end), path_end, BLOCK_N, num_stages=1):
                step = begin + tl.arange(0, BLOCK_N)
                last = tl.minimum(step, path_end - 1)
                node = tl.load(row_path_ptr + tl.maximum(last - context, 0))
                index = tl.where(last < path_start, last, context + node)
                k, v, k_scale, v_scale = load_keys(index, cache, q.dtype, HEAD_DIM, BLOCK_D, PAGE)
                scores = log2_scores(q, k, k_scale, scale, softcap, HAS_SOFTCAP)
                is_own = line // GROUP == place - first
                scores = tl.where((step < path_end)[None, :] & is_own[:, None], scores, float("-inf"))
                if HAS_WINDOW:
                    scores = hide_far(scores, key_position(index, keys_of_row), own_position, sliding_window)
                maximum, total, acc = absorb(maximum, total, acc, scores, v, v_scale)

    if IS_SPLIT:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        part = (tile * tl.num_programs(2) + tl.program_id(2)) * BLOCK_M + line
        tl.store(maximum_ptr + part, maximum)
        tl.store(total_ptr + part, total)
        # The values of a split without keys are not read.
        element = element & (total > 0.0)[:, None]
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=element)
    else:
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        out_line = (token.to(tl.int64) * tl.num_programs(1) * GROUP + head) * HEAD_DIM
        tl.store(out_ptr + out_line[:, None] + dim[None, :], acc, mask=element)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "first_tile", "num_splits"])
def combine(
    out_ptr,
    maximum_ptr,
    total_ptr,
    partial_ptr,
    query_start_ptr,
    num_tokens,
    num_rows,
    first_tile,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The output of a tile from the running softmaxes of its splits, added in order."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    _, row_start, row_end, first = find_tile(
        query_start_ptr, num_rows, num_tokens, first_tile + tl.program_id(0), BLOCK_Q
    )
    if row_start + first >= row_end:
        return
    line = tl.arange(0, BLOCK_M)
    valid = line < tl.minimum(BLOCK_Q, row_end - row_start - first) * GROUP
    dim = tl.arange(0, BLOCK_D)
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part = tile * num_splits * BLOCK_M + line
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(num_splits):
        highest = tl.maximum(highest, tl.load(maximum_ptr + part + split * BLOCK_M))
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(num_splits):
        split_part = part + split * BLOCK_M
        weight = tl.exp2(tl.load(maximum_ptr + split_part) - origin)
        split_total = tl.load(total_ptr + split_part)
        total = tl.fma(weight, split_total, total)
        has_keys = valid & (split_total > 0.0)
        values = tl.load(
            partial_ptr + split_part[:, None] * HEAD_DIM + dim[None, :],
            mask=has_keys[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        acc = tl.fma(tl.broadcast_to(weight[:, None], [BLOCK_M, BLOCK_D]), values, acc)
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    token = row_start + first + line // GROUP
    head = tl.program_id(1) * GROUP + line % GROUP
    out_line = (token.to(tl.int64) * tl.num_programs(1) * GROUP + head) * HEAD_DIM
    tl.store(out_ptr + out_line[:, None] + dim[None, :], acc, mask=valid[:, None] & (dim < HEAD_DIM)[None, :])
