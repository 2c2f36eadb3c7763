"""What the programs of paged attention do with a tile of keys: find it, load it, score it, mask it, sum it up.

Functions of ``kernels.py``, in the order of their use. Legend: M lines of a tile, N keys, D head dimension, padded to a
power of two (BLOCK_D). A key's *index* is its place in its row: those of the context come first, then those of this
step's tokens. Scores are in units of log2, since exp2 is what GPUs have.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Within a kernel most values are tensors, whatever they look like.

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

ROW_CHUNK = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


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
def split_range(start, end, SPLIT_KEYS: tl.constexpr, BLOCK_N: tl.constexpr, IS_INVARIANT: tl.constexpr):
    """This program's part of the keys from ``start`` to ``end``: an even one, or from one multiple to the next."""
    if IS_INVARIANT:
        start = tl.maximum(start, tl.program_id(2) * SPLIT_KEYS)
        end = tl.minimum(end, (tl.program_id(2) + 1) * SPLIT_KEYS)
    else:
        num_keys = tl.cdiv(tl.cdiv(end - start, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        start += tl.program_id(2) * num_keys
        end = tl.minimum(end, start + num_keys)
    return start, end


@triton.jit
def load_keys(
    index, cache, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr
):
    """Keys and values [N, D] of ``index`` [N], and their scales [N].

    All must be keys of the row, for what nobody wrote may be NaN, and a weight of 0 times NaN is NaN. A repeated key
    takes fewer registers than a condition, so what lies beyond the row is to be its last key.
    """
    table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr = cache
    block = tl.load(table_ptr + index // PAGE).to(tl.int64)
    slot = (block * PAGE + index % PAGE) * tl.num_programs(1) + tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    place = slot[:, None] * HEAD_DIM + dim[None, :]
    mask = (dim < HEAD_DIM)[None, :]
    k = widen(tl.load(k_ptr + place, mask=mask, other=0), dtype)
    v = widen(tl.load(v_ptr + place, mask=mask, other=0), dtype)
    k_scale = tl.full(index.shape, 1.0, tl.float32)
    v_scale = k_scale
    if k_ptr.dtype.element_ty.is_int():
        k_scale = tl.load(k_scale_ptr + slot)
        v_scale = tl.load(v_scale_ptr + slot)
    return k, v, k_scale, v_scale


@triton.jit
def widen(codes, dtype: tl.constexpr):
    """Numbers of a cache in ``dtype``. Float8 comes as its bits, in uint8, since not all GPUs know it.

    The fields of an e4m3 number are those of a float16 that is 2**-8 times as large, subnormals included. Its NaN,
    which no token should have stored, reads as 480.
    """
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        codes = bits.to(tl.float16, bitcast=True) * 256.0
    elif codes.dtype == tl.int8:
        codes = codes.to(tl.float32)  # the interpreter knows no way from integers to bfloat16
    return codes.to(dtype)


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc``, in full precision for float32. The interpreter would multiply bfloat16's bits as integers."""
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def log2_scores(q, k, k_scale, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores [M, N], to be exponentiated with 2 as the base."""
    scores = dot(q, k.T, tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * k_scale[None, :]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities.
        power = tl.exp2(scores * (2.0 * LOG2_E * scale / softcap))
        scores = softcap * LOG2_E * (1.0 - 2.0 / (power + 1.0))
    else:
        scores = scores * (scale * LOG2_E)
    return scores


@triton.jit
def mask_word(mask_line, word, is_masked):
    """Number ``word`` of each line's four words; those before are ones, since all lines see the context."""
    loaded = tl.load(mask_line + tl.minimum(tl.maximum(word, 0), 3), mask=is_masked, other=0)
    return tl.where(word < 0, -1, tl.where(word > 3, 0, loaded)).to(tl.uint32, bitcast=True)


@triton.jit
def seen_bits(begin, context, own, mask_line, is_masked):
    """Which of the 32 keys from index ``begin`` on each line sees, uint32 [M]: by its mask, or those up to its own."""
    shift = (begin - context) & 31
    low = mask_word(mask_line, (begin - context) >> 5, is_masked)
    high = mask_word(mask_line, ((begin - context) >> 5) + 1, is_masked)
    # A shift by 32 is undefined: one by 31 and one by 1, and none for lines that see nothing.
    masked = (low >> shift) | (high << (31 - shift) << 1)
    num_seen = tl.minimum(own - begin + 1, 32)
    all_ones = tl.full(own.shape, 0xFFFFFFFF, tl.uint32)
    causal = tl.where(num_seen > 0, all_ones >> (32 - tl.maximum(num_seen, 1)).to(tl.uint32), 0)
    return tl.where(is_masked, masked, causal)


@triton.jit
def key_position(index, row):
    """Positions [N] of a row's keys: their index in the context, their token's own among this step's."""
    context, _, positions_ptr = row
    position = tl.load(positions_ptr + tl.maximum(index - context, 0)).to(tl.int32)
    return tl.where(index < context, index, position)


@triton.jit
def hide_far(scores, position, own_position, sliding_window):
    """``scores`` with -inf where a key's position [N] is not within the window of a line's [M]."""
    return tl.where(position[None, :] > (own_position - sliding_window)[:, None], scores, float("-inf"))


@triton.jit
def hide_unseen(
    scores,
    begin,
    row,
    lines,
    sliding_window,
    BLOCK_N: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """``scores`` [M, N] of the keys from index ``begin`` on, with -inf where a line does not see a key.

    ``row`` is the row's context, its number of keys, and where the positions of its tokens are. ``lines`` are the index
    of each line's query, its position, where its mask is, and whether it has one. Windows are in positions if there
    are any, else in indices. Keys beyond the row are seen only by lines without a query.

    One thing hides after the other, since conditions for a whole tile take many registers.
    """
    context, num_keys, _ = row
    own, own_position, mask_line, is_masked = lines
    key = tl.arange(0, BLOCK_N)
    index = begin + key
    if HAS_MASKS:
        bits = seen_bits(begin, context, own, mask_line, is_masked)[:, None]
        if BLOCK_N > 32:
            later = seen_bits(begin + 32, context, own, mask_line, is_masked)[:, None]
            bits = tl.where((key < 32)[None, :], bits, later)
        scores = tl.where(((bits >> (key & 31)[None, :]) & 1) != 0, scores, float("-inf"))
    else:
        scores = tl.where(index[None, :] <= own[:, None], scores, float("-inf"))
    if HAS_WINDOW:
        position = index
        if HAS_POSITIONS:
            position = key_position(tl.minimum(index, num_keys - 1), row)
        scores = hide_far(scores, position, own_position, sliding_window)
    return scores


@triton.jit
def absorb(maximum, total, acc, scores, v, v_scale):
    """Take scores [M, N] and values [N, D] into each line's running softmax.

    That is the largest score [M], the sum of the weights [M], and the sum of the weighted values [M, D].
    """
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    # A line that has seen no key yet is at -inf, and the difference of two of these is NaN.
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(maximum - origin)
    total = tl.fma(total, shrink, tl.sum(weights, axis=1))
    acc = dot((weights * v_scale[None, :]).to(v.dtype), v, acc * shrink[:, None])
    return highest, total, acc
