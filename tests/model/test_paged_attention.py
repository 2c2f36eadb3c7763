"""The paged attention reference against attention written out with loops."""

from __future__ import annotations

import math

import pytest
import torch
from specdec_kernels.paged_attention import paged_attention, store_kv
from torch import Tensor

COUNTS, CONTEXTS = (1, 50, 3, 33, 8), (17, 0, 0, 5, 40)
BLOCK_SIZE, NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 3, 2, 12


def naive(
    q: Tensor, k: Tensor, v: Tensor, context: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One row and head: q [Q, D], k and v [S, D]."""
    out = []
    for index, query in enumerate(q):
        last = context + index
        first = 0 if window is None else max(0, last - window + 1)
        scores = k[first : last + 1] @ query * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out.append(scores.softmax(0) @ v[first : last + 1])
    return torch.stack(out)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_matches_loops_with_poisoned_slots(window: int | None, softcap: float | None) -> None:
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
    start = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0).tolist()], dtype=torch.int32)
    scale = 1 / math.sqrt(HEAD_DIM)
    out = paged_attention(
        torch.cat(queries), k_cache, v_cache, start, torch.tensor(CONTEXTS), tables, scale, window, softcap
    )
    for row, actual in enumerate(out.split(COUNTS)):
        for head in range(NUM_KV_HEADS * GROUP):
            k, v = keys[row][:, head // GROUP], values[row][:, head // GROUP]
            expected = naive(queries[row][:, head], k, v, CONTEXTS[row], scale, window, softcap)
            torch.testing.assert_close(actual[:, head], expected, rtol=1e-5, atol=1e-5)
