"""Ragged batches over a paged KV cache for tests of attention, NaN wherever no token of a row has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.trees import Tree
from tests.kernels.triton.broken import broken

FP8_NAN = 0x7F


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int = 1
    group: int = 2
    head_dim: int = 16
    block_size: int = 8
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # as ``dtype``


@dataclass(frozen=True)
class Batch:
    """Arguments of ``paged_attention``: tensors by name, and the other options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, function, **more) -> Tensor:
        return function(**self.tensors, **self.options, **more)

    def in_float64(self, function) -> Tensor:
        """What a reference makes of the same numbers; caches of integers and eight-bit floats stay as they are."""
        wide = {name: x.double() if _is_wide(x) else x for name, x in self.tensors.items()}
        return function(**wide, **self.options)

    def with_tensors(self, **tensors: Tensor) -> Batch:
        return Batch(self.tensors | tensors, self.options)


def _is_wide(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float8_e4m3fn


def make_batch(
    rows: Sequence[tuple[int, int]],
    shape: Shape,
    device: torch.device,
    trees: Mapping[int, Tree] | None = None,
    seed: int = 0,
    spare_blocks: int = 1,
    **options: Any,
) -> Batch:
    """Random numbers for rows of (tokens in the context, tokens of this step); those in ``trees`` are trees.

    Blocks are shuffled. Entries of a table beyond a row's use point to a block that is NaN, ``spare_blocks`` of them
    beyond the longest row.
    """
    noise = torch.Generator().manual_seed(seed)
    contexts, counts = [row[0] for row in rows], [row[1] for row in rows]
    needed = [-(-(context + count) // shape.block_size) for context, count in rows]
    order = (torch.randperm(sum(needed), generator=noise) + 1).tolist()
    tables = torch.zeros(len(rows), max(needed, default=0) + spare_blocks, dtype=torch.int32)
    for row, number in enumerate(needed):
        tables[row, :number] = torch.tensor([order.pop() for _ in range(number)])
    place = [torch.arange(context + count) for context, count in rows]
    slots = torch.cat(
        [
            tables[row, at // shape.block_size].long() * shape.block_size + at % shape.block_size
            for row, at in enumerate(place)
        ]
        or [torch.zeros(0, dtype=torch.int64)]
    )
    num_heads = shape.num_kv_heads * shape.group
    tensors = {
        "q": torch.randn(sum(counts), num_heads, shape.head_dim, generator=noise).to(shape.dtype),
        "query_start": torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "block_tables": tables,
    }
    for name in ("k", "v"):
        tensors |= _cache(name, shape, sum(needed) + 1, slots, noise)
    if trees is not None:
        tensors |= _masks(rows, trees)
    options = {"scale": 1.3 * shape.head_dim**-0.5} | options
    return Batch({name: x.to(device) for name, x in tensors.items()}, options)


def _cache(
    name: str, shape: Shape, num_blocks: int, slots: Tensor, noise: torch.Generator
) -> dict[str, Tensor]:
    size = (num_blocks * shape.block_size, shape.num_kv_heads, shape.head_dim)
    blocks = (num_blocks, shape.block_size, shape.num_kv_heads)
    dtype = shape.cache_dtype or shape.dtype
    values = torch.randn(len(slots), *size[1:], generator=noise)
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        cache = torch.full(size, torch.nan, dtype=dtype)
        cache[slots] = values.to(dtype)
        return {f"{name}_cache": cache.view(*blocks, shape.head_dim)}
    scales = torch.full(size[:2], torch.nan)
    scales[slots] = 2.0 ** torch.randn(len(slots), size[1], generator=noise)
    if dtype == torch.int8:
        cache = torch.full(size, 111, dtype=torch.int8)
        cache[slots] = (values * 40).round().clamp(-127, 127).to(torch.int8)
        scales[slots] /= 40
    else:
        # Subnormal codes, and the largest, are among them.
        codes = (values * torch.rand(values.shape, generator=noise).pow(8) * 100).clamp(-448, 448)
        codes[:1] = 448.0
        cache = torch.full(size, FP8_NAN, dtype=torch.uint8)
        cache[slots] = codes.to(dtype).view(torch.uint8)
        scales[slots] /= 100
        cache = cache.view(dtype)
    return {f"{name}_cache": cache.view(*blocks, shape.head_dim), f"{name}_scale": scales.view(blocks)}


def _masks(rows: Sequence[tuple[int, int]], trees: Mapping[int, Tree]) -> dict[str, Tensor]:
    masks, positions = [np.zeros((0, 2), np.int64)], [torch.zeros(0, dtype=torch.int64)]
    for row, (context, count) in enumerate(rows):
        depths = torch.arange(count)
        if row in trees:
            assert len(trees[row]) == count
            depths = torch.tensor(trees[row].depths)
        masks.append(trees[row].mask() if row in trees else np.zeros((count, 2), np.int64))
        positions.append(context + depths)
    return {"tree_mask": torch.from_numpy(np.concatenate(masks)), "positions": torch.cat(positions)}


def tree_batch(
    trees: Sequence[Tree],
    shape: Shape,
    device: torch.device,
    contexts: Sequence[int] = (0, 1, 7, 29),
    **options: Any,
) -> Batch:
    """A row for each tree, behind contexts that take turns."""
    rows = [(contexts[row % len(contexts)], len(tree)) for row, tree in enumerate(trees)]
    return make_batch(rows, shape, device, dict(enumerate(trees)), **options)


def split_contexts(monkeypatch: pytest.MonkeyPatch, plan: ModuleType, keys: int) -> None:
    """Have ``plan`` split even short contexts, into parts of about ``keys``."""
    monkeypatch.setattr(plan, "MIN_SPLIT_KEYS", keys)
    monkeypatch.setattr(plan, "PROGRAMS_PER_PROCESSOR", 1000)
    monkeypatch.setattr(plan, "INVARIANT_SPLIT_KEYS", keys)


def broken_kernels(kernels: ModuleType, tiles: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of ``kernels`` with ``old`` replaced, in it or in ``tiles``, from which it takes its functions."""
    if old in Path(str(kernels.__file__)).read_text("utf-8"):
        return broken(kernels, old, new)
    copy, parts = broken(kernels, "GROUP", "GROUP"), broken(tiles, old, new)
    for name in vars(tiles).keys() & vars(copy).keys():
        if callable(getattr(tiles, name)):
            setattr(copy, name, getattr(parts, name))
    return copy
