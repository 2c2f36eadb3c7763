"""The two kernels of paged attention: ``attend``, and ``combine`` for contexts that were split.

A program takes a tile of queries of one row and one key-value head. A query comes with all query heads that share
the key-value head: line m of the tile is query ``m // GROUP`` and head ``m % GROUP`` of the group. The program walks
over the row's keys, BLOCK_N at a time, with the running softmax of Milakov & Gimelshein, arXiv 1805.02867, as
FlashAttention does (Dao, arXiv 2307.08691). The keys of a tile may be split among programs, each of which then leaves
its running softmax for ``combine``. Scores are in units of log2, since exp2 is what GPUs have.

A key's *index* is its place in its row: those of the context come first, then those of this step's tokens.

**Batch invariance.** A line's sums must not depend on which other lines share its tile, and tiles of keys that the
line does not see change nothing: they multiply its sums by 1 and add 0. What is left is where a key lies in the
products over BLOCK_N keys, and in which split. Tiles and splits therefore begin at fixed indices, and the keys of a
tree are taken once for every path: a node's ancestors are gathered to the indices that they would have if they were
its whole row, and only that node's lines see them.

Legend: M lines of a tile (BLOCK_M), N keys (BLOCK_N), D head dimension, padded to a power of two (BLOCK_D).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl

ROW_CHUNK = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def find_tile(query_start_ptr, num_rows, num_tokens, tile, BLOCK_Q: tl.constexpr):
    """The row of a tile, where the row's tokens start and end, and which of them is the tile's first query.

    Row r has the tiles from ``query_start[r] // BLOCK_Q + r`` on. Those are at least as many as it needs, and the
    number of all tiles follows from the numbers of tokens and rows. Row ``num_rows`` is the padding behind the rows.
    """
    num_begun = 0
    for chunk in range(0, num_rows + 1, ROW_CHUNK):
        row = chunk + tl.arange(0, ROW_CHUNK)
        start = tl.load(query_start_ptr + row, mask=row <= num_rows, other=0)
        has_begun = (row <= num_rows) & (start // BLOCK_Q + row <= tile)
        num_begun += tl.sum(has_begun.to(tl.int32), axis=0)
    row = num_begun - 1
    start = tl.load(query_start_ptr + row)
    end = tl.load(query_start_ptr + row + 1, mask=row < num_rows, other=num_tokens)
    return row, start, end, (tile - start // BLOCK_Q - row) * BLOCK_Q


@triton.jit
def widen(codes, dtype: tl.constexpr, IS_FP8: tl.constexpr):
    """Numbers of a cache in ``dtype``; float8 comes as its bits, since not all GPUs know it.

    The fields of an e4m3 number are those of a float16 that is 2**-8 times as large, subnormals included. Its NaN,
    which no token should have stored, reads as 480.
    """
    if IS_FP8:
        bits = codes.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        codes = bits.to(tl.float16, bitcast=True) * 256.0
    elif codes.dtype == tl.int8:
        codes = codes.to(tl.float32)  # the interpreter knows no way from integers to bfloat16
    return codes.to(dtype)


@triton.jit
def dot(a, b, acc, IS_INTERPRETED: tl.constexpr):
    """``a @ b + acc``, in full precision for float32. The interpreter would multiply bfloat16's bits as integers."""
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_keys(
    index,
    inside,
    cache,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    IS_QUANTISED: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """Keys and values [N, D] of the ``index`` [N] that are ``inside``, 0 elsewhere, and their scales [N].

    Slots that nobody wrote may hold NaN, and a weight of 0 times NaN is NaN.
    """
    table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr = cache
    block = tl.load(table_ptr + index // PAGE, mask=inside, other=0).to(tl.int64)
    slot = (block * PAGE + index % PAGE) * tl.num_programs(1) + tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    place = slot[:, None] * HEAD_DIM + dim[None, :]
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    k = widen(tl.load(k_ptr + place, mask=mask, other=0), dtype, IS_FP8)
    v = widen(tl.load(v_ptr + place, mask=mask, other=0), dtype, IS_FP8)
    k_scale = inside
    v_scale = inside
    if IS_QUANTISED:
        k_scale = tl.load(k_scale_ptr + slot, mask=inside, other=0.0)
        v_scale = tl.load(v_scale_ptr + slot, mask=inside, other=0.0)
    return k, v, k_scale, v_scale


@triton.jit
def log2_scores(
    q,
    k,
    k_scale,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_QUANTISED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Scores [M, N], to be exponentiated with 2 as the base."""
    scores = dot(q, k.T, tl.zeros([q.shape[0], k.shape[0]], tl.float32), IS_INTERPRETED)
    if IS_QUANTISED:
        scores *= k_scale[None, :]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities.
        power = tl.exp2(scores * (2.0 * LOG2_E * scale / softcap))
        return softcap * LOG2_E * (1.0 - 2.0 / (power + 1.0))
    else:
        return scores * (scale * LOG2_E)


@triton.jit
def absorb(maximum, total, acc, scores, v, v_scale, IS_QUANTISED: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """Take scores [M, N] and values [N, D] into each line's running softmax.

    That is the largest score [M], the sum of the weights [M], and the sum of the weighted values [M, D].
    """
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    # A line that has seen no key yet is at -inf, and the difference of two of these is NaN.
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(maximum - origin)
    total = tl.fma(total, shrink, tl.sum(weights, axis=1))
    if IS_QUANTISED:
        weights *= v_scale[None, :]
    acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], IS_INTERPRETED)
    return highest, total, acc


@triton.jit
def mask_word(mask_line, word, is_masked):
    """Number ``word`` of each line's four words; those before are ones, since all lines see the context."""
    loaded = tl.load(mask_line + tl.minimum(tl.maximum(word, 0), 3), mask=is_masked, other=0)
    return tl.where(word < 0, -1, tl.where(word > 3, 0, loaded)).to(tl.uint32, bitcast=True)


@triton.jit
def mask_bits(mask_line, first, is_masked):
    """32 bits of each line's mask from bit ``first`` on, which may be negative."""
    low = mask_word(mask_line, first >> 5, is_masked)
    high = mask_word(mask_line, (first >> 5) + 1, is_masked)
    # A shift by 32 is undefined, so one by 31 and one by 1.
    return (low >> (first & 31)) | (high << (31 - (first & 31)) << 1)


@triton.jit
def visibility(
    begin,
    context,
    num_keys,
    own,
    own_position,
    mask_line,
    is_masked,
    row_positions_ptr,
    sliding_window,
    BLOCK_N: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Which of the keys from index ``begin`` on each line sees, bool [M, N].

    ``own`` is the index of each line's query, ``own_position`` its position, and ``mask_line`` points to its mask if
    it ``is_masked``. Windows are in positions if there are any, else in indices. Keys beyond the row's are seen only
    by lines without a query.
    """
    key = tl.arange(0, BLOCK_N)
    index = begin + key
    visible = index[None, :] <= own[:, None]
    if HAS_MASKS:
        bits = mask_bits(mask_line, begin - context, is_masked)[:, None]
        if BLOCK_N > 32:
            later = mask_bits(mask_line, begin - context + 32, is_masked)[:, None]
            bits = tl.where((key < 32)[None, :], bits, later)
        seen = (bits >> (key & 31)[None, :]) & 1
        visible = tl.where(is_masked[:, None], seen != 0, visible)
    if HAS_WINDOW:
        position = index
        if HAS_POSITIONS:
            position = key_position(index, context, index < num_keys, row_positions_ptr)
        visible &= position[None, :] > (own_position - sliding_window)[:, None]
    return visible


@triton.jit
def key_position(index, context, inside, row_positions_ptr):
    """Positions [N] of keys: their index in the context, their token's own among this step's."""
    is_new = (index >= context) & inside
    position = tl.load(row_positions_ptr + index - context, mask=is_new, other=0).to(tl.int32)
    return tl.where(is_new, position, index)


@triton.jit(do_not_specialize=["num_tokens"])
def tree_paths(
    mask_ptr, path_ptr, length_ptr, num_tokens, BLOCK_T: tl.constexpr, MAX_TREE_TOKENS: tl.constexpr
):
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
    IS_QUANTISED: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_INVARIANT: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    MAX_TREE_TOKENS: tl.constexpr,
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
    mask_line = mask_ptr + token.to(tl.int64) * 4
    is_masked = valid
    start = 0
    end = tl.minimum(context + first + num_queries, num_keys)
    common = context + first + 1  # keys before it are seen by all lines
    has_masks = False
    if HAS_TREE:
        words = tl.load(mask_line[:, None] + tl.arange(0, 4)[None, :], mask=valid[:, None], other=0)
        is_masked = tl.max((words != 0).to(tl.int32), axis=1) != 0
        has_masks = tl.max(is_masked.to(tl.int32), axis=0) != 0
        end = tl.where(has_masks, num_keys, end)
        common = tl.where(has_masks, context, common)
    if HAS_WINDOW:
        if HAS_TREE:
            own_position = tl.load(position_ptr + token, mask=valid, other=FAR).to(tl.int32)
        nearest = tl.min(own_position, axis=0) - sliding_window + 1
        start = tl.maximum(tl.minimum(nearest, context), 0) // BLOCK_N * BLOCK_N
    if IS_SPLIT:
        if IS_INVARIANT:
            start = tl.maximum(start, tl.program_id(2) * SPLIT_KEYS)
            end = tl.minimum(end, (tl.program_id(2) + 1) * SPLIT_KEYS)
        else:
            per_split = tl.cdiv(tl.cdiv(end - start, tl.num_programs(2)), BLOCK_N) * BLOCK_N
            start += tl.program_id(2) * per_split
            end = tl.minimum(end, start + per_split)
    plain_end = common // BLOCK_N * BLOCK_N
    masked_end = end
    if IS_INVARIANT and HAS_TREE:
        masked_end = tl.where(has_masks, tl.minimum(plain_end, end), end)

    cache = (table_ptr + row.to(tl.int64) * table_stride, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr)
    row_positions_ptr = position_ptr + row_start
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(start, masked_end, BLOCK_N):
        index = begin + tl.arange(0, BLOCK_N)
        k, v, k_scale, v_scale = load_keys(
            index, index < num_keys, cache, q.dtype, HEAD_DIM, BLOCK_D, PAGE, IS_QUANTISED, IS_FP8
        )
        scores = log2_scores(q, k, k_scale, scale, softcap, HAS_SOFTCAP, IS_QUANTISED, IS_INTERPRETED)
        if IS_INVARIANT or HAS_WINDOW or begin >= plain_end:
            visible = visibility(
                begin,
                context,
                num_keys,
                own,
                own_position,
                mask_line,
                is_masked,
                row_positions_ptr,
                sliding_window,
                BLOCK_N,
                HAS_TREE and not IS_INVARIANT,
                HAS_TREE,
                HAS_WINDOW,
            )
            scores = tl.where(visible, scores, float("-inf"))
        maximum, total, acc = absorb(maximum, total, acc, scores, v, v_scale, IS_QUANTISED, IS_INTERPRETED)
    if IS_INVARIANT and HAS_TREE:
        for place in range(first, tl.where(has_masks, first + num_queries, first)):
            length = tl.load(length_ptr + row_start + place)
            # A causal token has no path but sees the tokens up to itself.
            path_start = tl.where(length > 0, context, FAR)
            path_end = tl.minimum(context + tl.where(length > 0, length, place + 1), end)
            row_path_ptr = path_ptr + (row_start + place).to(tl.int64) * MAX_TREE_TOKENS
            # A path has a tile or two more, too few for a pipeline.
            for begin in tl.range(tl.maximum(start, masked_end), path_end, BLOCK_N, num_stages=1):
                step = begin + tl.arange(0, BLOCK_N)
                inside = step < path_end
                on_path = inside & (step >= path_start)
                node = tl.load(row_path_ptr + step - context, mask=on_path, other=0)
                index = tl.where(on_path, context + node, step)
                k, v, k_scale, v_scale = load_keys(
                    index, inside, cache, q.dtype, HEAD_DIM, BLOCK_D, PAGE, IS_QUANTISED, IS_FP8
                )
                scores = log2_scores(q, k, k_scale, scale, softcap, HAS_SOFTCAP, IS_QUANTISED, IS_INTERPRETED)
                visible = inside[None, :] & (line // GROUP == place - first)[:, None]
                if HAS_WINDOW:
                    position = key_position(index, context, inside, row_positions_ptr)
                    visible &= position[None, :] > (own_position - sliding_window)[:, None]
                scores = tl.where(visible, scores, float("-inf"))
                maximum, total, acc = absorb(
                    maximum, total, acc, scores, v, v_scale, IS_QUANTISED, IS_INTERPRETED
                )

    if IS_SPLIT:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        part = (tile * tl.num_programs(2) + tl.program_id(2)) * BLOCK_M + line
        tl.store(maximum_ptr + part, maximum)
        tl.store(total_ptr + part, total)
        # The values of a split without keys are not read.
        tl.store(
            partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=element & (total > 0.0)[:, None]
        )
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
    for split in range(0, num_splits):
        highest = tl.maximum(highest, tl.load(maximum_ptr + part + split * BLOCK_M))
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(0, num_splits):
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
