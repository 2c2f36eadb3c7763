"""Kernels of greedy verification: the argmax of every entry's logits, then a walk through the drafts."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Inside kernels everything is a tensor or a constant of Triton's, which its own annotations do not show.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def argmax_parts(logits_ptr, values_ptr, tokens_ptr, num_columns, BLOCK: tl.constexpr):
    """Largest of one part of a row's logits and its first place, −1 where there is NaN, which counts as the largest."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    logits = tl.load(logits_ptr + row * num_columns + column, mask=inside, other=float("-inf")).to(tl.float32)
    is_nan = logits != logits
    logits = tl.where(is_nan, float("inf"), logits)
    largest = tl.max(logits, axis=0)
    token = tl.min(tl.where((logits == largest) & inside, tl.where(is_nan, -1, column), num_columns), axis=0)
    place = row * tl.num_programs(1) + part
    tl.store(values_ptr + place, largest)
    tl.store(tokens_ptr + place, token)


@triton.jit(do_not_specialize=["num_rows", "num_entries"])
def greedy_walk(
    values_ptr,
    argmax_ptr,
    tokens_ptr,
    parents_ptr,
    num_drafted_ptr,
    logit_start_ptr,
    accepted_ptr,
    path_ptr,
    next_ptr,
    num_rows,
    num_entries,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTS: tl.constexpr,
    IS_CHAIN: tl.constexpr,
):
    """Several rows at once: step to the child whose token is the argmax until there is none."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    entry = tl.arange(0, ENTRIES)[None, :]
    start = tl.load(logit_start_ptr + row, mask=inside, other=-1)
    count = tl.load(num_drafted_ptr + row, mask=start >= 0, other=0)
    seen = (entry <= count[:, None]) & (start >= 0)[:, None]
    drafted = seen & (entry > 0)
    place = (start[:, None] + entry) * PARTS
    largest = tl.load(values_ptr + place, mask=seen, other=0.0)
    argmax = tl.load(argmax_ptr + place, mask=seen, other=-1)
    for part in tl.static_range(1, PARTS):
        value = tl.load(values_ptr + place + part, mask=seen, other=0.0)
        token = tl.load(argmax_ptr + place + part, mask=seen, other=-1)
        # Of equal ones the first stays, unless the later is NaN's −1.
        better = (value > largest) | ((value == largest) & (token < 0))
        largest = tl.where(better, value, largest)
        argmax = tl.where(better, token, argmax)
    node = row[:, None] * (num_entries - 1) + entry - 1
    tokens = tl.load(tokens_ptr + node, mask=drafted, other=-1)
    parents = entry - 1
    if not IS_CHAIN:
        parents = tl.load(parents_ptr + node, mask=drafted, other=-1).to(tl.int32) + 1

    last = tl.zeros([ROWS], tl.int32)
    wanted = tl.sum(tl.where(entry == 0, argmax, 0), axis=1)
    num_accepted = tl.zeros([ROWS], tl.int32)
    path = tl.zeros([ROWS, ENTRIES], tl.int32)
    searching = tl.max(tl.where(start >= 0, 1, 0), axis=0)
    while searching > 0:
        wanted_here = drafted & (wanted >= 0)[:, None] & (tokens == wanted[:, None])
        agrees = wanted_here & (parents == last[:, None])
        child = tl.min(tl.where(agrees, entry, ENTRIES), axis=1)
        found = child < ENTRIES
        path = tl.where(found[:, None] & (entry == num_accepted[:, None]), child[:, None] - 1, path)
        num_accepted += found.to(tl.int32)
        last = tl.where(found, child, last)
        wanted = tl.where(found, tl.sum(tl.where(entry == child[:, None], argmax, 0), axis=1), wanted)
        searching = tl.max(found.to(tl.int32), axis=0)
    tl.store(accepted_ptr + row, num_accepted, mask=inside)
    tl.store(next_ptr + row, tl.where(start >= 0, wanted, -1).to(tl.int64), mask=inside)
    tl.store(path_ptr + node + 1, path.to(tl.int64), mask=inside[:, None] & (entry < num_entries - 1))
