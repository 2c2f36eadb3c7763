"""The paged attention reference against attention written out with loops."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from specdec_kernels.paged_attention import paged_attention, store_kv
from torch import Tensor

COUNTS, CONTEXTS = (1, 50, 3, 33, 8, 128), (17, 0, 0, 5, 40, 9)
BLOCK_SIZE, NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 3, 2, 12
SCALE = 1 / math.sqrt(HEAD_DIM)


def naive(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """One row and head: q [Q, D], k and v [S, D], visible [Q, S]."""
    out = []
    for query, seen in zip(q, visible, strict=True):
        scores = k[seen] @ query * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out.append(scores.softmax(0) @ v[seen])
    return torch.stack(out)


def check(visible: list[Tensor], softcap: float | None, **options) -> None:
    """Attention over random numbers in a cache of NaN; ``visible`` is bool [Q, S] of each row."""
    noise = torch.Generator().manual_seed(0)
    totals = [count + context for count, context in zip(COUNTS, CONTEXTS, strict=True)]
    per_row = -(-max(totals) // BLOCK_SIZE)
    tables = torch.randperm(len(COUNTS) * per_row, generator=noise).view(len(COUNTS), per_row).int()
    shape = (tables.numel(), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    keys = [torch.randn(total, NUM_KV_HEADS, HEAD_DIM, generator=noise) for total in totals]
    values = [torch.randn(total, NUM_KV_HEADS, HEAD_DIM, generator=noise) for total in totals]
    for row, total in enumerate(totals):
        place = torch.arange(total)
        slots = tables[row, place // BLOCK_SIZE].long() * BLOCK_SIZE + place % BLOCK_SIZE
        store_kv(keys[row], values[row], k_cache, v_cache, slots)
    queries = [torch.randn(count, NUM_KV_HEADS * GROUP, HEAD_DIM, generator=noise) for count in COUNTS]
    start = torch.tensor([0, *accumulate(COUNTS)], dtype=torch.int32)
    rows = (start, torch.tensor(CONTEXTS, dtype=torch.int32), tables)
    out = paged_attention(torch.cat(queries), k_cache, v_cache, *rows, SCALE, softcap=softcap, **options)
    for row, actual in enumerate(out.split(COUNTS)):
        for head in range(NUM_KV_HEADS * GROUP):
            k, v = keys[row][:, head // GROUP], values[row][:, head // GROUP]
            expected = naive(queries[row][:, head], k, v, visible[row], softcap)
            torch.testing.assert_close(actual[:, head], expected, rtol=1e-5, atol=1e-5)


def causal(count: int, context: int) -> Tensor:
    return torch.ones(count, context + count, dtype=torch.bool).tril(context)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_matches_loops_with_poisoned_slots(window: int | None, softcap: float | None) -> None:
    visible = [causal(count, context) for count, context in zip(COUNTS, CONTEXTS, strict=True)]
    if window is not None:
        visible = [seen & ~seen.tril(seen.shape[1] - seen.shape[0] - window) for seen in visible]
    check(visible, softcap, sliding_window=window)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 6, 40])
def test_any_mask_matches_loops(window: int | None, softcap: float | None) -> None:
    """Random bits at random depths beside causal rows and tokens; tokens see their mask, windows go by position."""
    noise = torch.Generator().manual_seed(1)
    visible, masks, positions = [], [], []
    for row, (count, context) in enumerate(zip(COUNTS, CONTEXTS, strict=True)):
        sees = torch.rand(count, count, generator=noise) < 0.4
        sees.fill_diagonal_(True)
        depths = (torch.rand(count, generator=noise) * torch.arange(1, count + 1)).long()
        is_causal = torch.rand(count, generator=noise) < 0.3
        if row == 1:
            depths, is_causal = torch.arange(count), torch.ones(count, dtype=torch.bool)
        seen = torch.cat([torch.ones(count, context, dtype=torch.bool), sees], dim=1)
        seen = torch.where(is_causal[:, None], causal(count, context), seen)
        if window is not None:
            seen &= torch.cat([torch.arange(context), context + depths]) > context + depths[:, None] - window
        bits = [sum(1 << j for j, bit in enumerate(line) if bit) for line in sees.tolist()]
        words = torch.tensor([[_signed(word), _signed(word >> 64)] for word in bits])
        visible.append(seen)
        masks.append(words.masked_fill(is_causal[:, None], 0))
        positions.append(context + depths)
    options = {"tree_mask": torch.cat(masks), "positions": torch.cat(positions)}
    check(visible, softcap, sliding_window=window, **options)


def _signed(word: int) -> int:
    """The lowest 64 bits as int64."""
    return ((word & (1 << 64) - 1) ^ 1 << 63) - (1 << 63)
