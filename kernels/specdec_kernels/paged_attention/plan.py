"""What a launch of paged attention is made of: which tiles, in how many splits, in how many passes.

Everything follows from shapes, so that a launch needs no number from the device and can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from specdec_kernels.tuning import architecture, config_for

INVARIANT_SPLIT_KEYS = 2048
"""Keys of a split in batch-invariant mode: a multiple of every tile's."""

MIN_SPLIT_KEYS = 256
"""Fewer keys are not worth a program and what ``combine`` does for it."""

PROGRAMS_PER_PROCESSOR = 2
"""Contexts are split until there are so many programs for each of the GPU's multiprocessors."""

WORKSPACE_BYTES = 1 << 28
"""Most memory for what splits leave for ``combine``; batches that need more are computed in several passes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program takes at once.

    Attributes:
        num_lines: queries times the query heads of a key-value head.
        num_keys: of each step of the loop.
        num_stages: from 5 on, the next keys are on their way while these are computed; from 3 on, their block numbers.
    """

    num_lines: int
    num_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """By the lines that a row has on average: ``few`` for decodes, ``some`` for drafts and trees, ``many`` for prompts.

    Batch-invariant mode has ``some`` for all.
    """

    few: Tile
    some: Tile
    many: Tile


# Where matrix instructions take their operands from registers (all but sm_90 and sm_100), quantised keys and values are
# converted there, a whole tile at a time: tiles are small, and 64 lines of 128 numbers have 8 warps, or registers
# spill. Hopper and Blackwell multiply out of shared memory. Prompts have as many lines as fit, since their keys are
# read once for each tile; decodes have two tiles of keys in flight where registers allow it, and are small enough for
# several programs on a multiprocessor.
CONFIGS: dict[str, Mapping[int, Tiles]] = {
    "default": {
        64: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 32, 4, 2), many=Tile(64, 64, 8, 3)),
        128: Tiles(few=Tile(16, 32, 4, 5), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
        256: Tiles(few=Tile(16, 32, 4, 3), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
    },
    "sm_90": {
        64: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 64, 4, 3), many=Tile(128, 64, 8, 3)),
        128: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 64, 4, 3), many=Tile(128, 64, 8, 3)),
        256: Tiles(few=Tile(16, 32, 4, 5), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
    },
    "sm_100": {
        64: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 64, 4, 3), many=Tile(64, 64, 4, 3)),
        128: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 32, 4, 3), many=Tile(128, 64, 8, 3)),
        256: Tiles(few=Tile(16, 32, 4, 5), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
    },
    # As the default, but that a second tile of float8 keys in flight spills with heads of 128.
    "sm_120": {
        64: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 32, 4, 2), many=Tile(64, 64, 8, 3)),
        128: Tiles(few=Tile(16, 32, 4, 3), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
        256: Tiles(few=Tile(16, 32, 4, 3), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
    },
    # A pipeline of two stages is what AMD's compiler makes, and there are 64 KiB of shared memory.
    "gfx942": {
        64: Tiles(few=Tile(16, 64, 4, 2), some=Tile(64, 32, 4, 2), many=Tile(64, 32, 4, 2)),
        128: Tiles(few=Tile(16, 32, 4, 2), some=Tile(64, 32, 4, 2), many=Tile(64, 32, 4, 2)),
        256: Tiles(few=Tile(16, 32, 4, 2), some=Tile(32, 32, 4, 2), many=Tile(32, 32, 4, 2)),
    },
}
"""By architecture and by the head size, rounded up to a power of two, from 64 on. Nothing here was timed: all compile
without spills on their architecture (``compile_cases``)."""

FLOAT32_TILE = Tile(16, 32, 4, 1)
"""For tests: float32 is multiplied exactly, without matrix instructions."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of a launch, all of them known without looking at the device.

    Attributes:
        group: query heads of a key-value head.
        num_tiles: at least as many as there are tiles with queries, see ``kernels.find_tile``.
        tiles_per_pass: as many as the workspace has room for.
    """

    tile: Tile
    group: int
    num_tiles: int
    num_splits: int
    tiles_per_pass: int


def make_plan(q: Tensor, k_cache: Tensor, block_tables: Tensor, batch_invariant: bool) -> Plan:
    (num_tokens, num_heads, head_dim), num_rows = q.shape, block_tables.shape[0]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group, longest_row = num_heads // num_kv_heads, block_tables.shape[1] * block_size
    lines_per_row = triton.cdiv(num_tokens * group, max(num_rows, 1))
    tile = _tile(architecture(q.device), q.dtype, head_dim, group, lines_per_row, batch_invariant)
    queries = tile.num_lines // group
    if batch_invariant:
        num_splits = triton.cdiv(longest_row, INVARIANT_SPLIT_KEYS)
    else:
        programs = max(num_rows, triton.cdiv(num_tokens, queries)) * num_kv_heads
        wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _num_processors(q.device), programs)
        num_splits = min(wanted, triton.cdiv(longest_row, MIN_SPLIT_KEYS))
    num_splits, num_tiles = max(num_splits, 1), num_tokens // queries + num_rows + 1
    bytes_per_tile = num_kv_heads * num_splits * tile.num_lines * (head_dim + 2) * 4
    tiles_per_pass = num_tiles if num_splits == 1 else max(WORKSPACE_BYTES // bytes_per_tile, 1)
    return Plan(tile, group, num_tiles, num_splits, min(tiles_per_pass, num_tiles))


def _tile(
    arch: str, dtype: torch.dtype, head_dim: int, group: int, lines_per_row: int, batch_invariant: bool
) -> Tile:
    """The tile for rows of so many lines, with room for the query heads of a key-value head."""
    if dtype == torch.float32:
        tile = FLOAT32_TILE
    else:
        tiles = config_for(CONFIGS, arch)[max(triton.next_power_of_2(head_dim), 64)]
        fitting = [tile for tile in (tiles.few, tiles.some) if lines_per_row <= tile.num_lines]
        tile = tiles.some if batch_invariant else (*fitting, tiles.many)[0]
    return replace(tile, num_lines=max(tile.num_lines, triton.next_power_of_2(group)))


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def constants_of(
    plan: Plan,
    head_dim: int,
    page: int,
    has_tree: bool,
    has_window: bool,
    has_softcap: bool,
    is_invariant: bool,
) -> dict[str, Any]:
    """Compile-time arguments of ``kernels.attend``."""
    return {
        "GROUP": plan.group,
        "HEAD_DIM": head_dim,
        "PAGE": page,
        "BLOCK_M": plan.tile.num_lines,
        "BLOCK_N": plan.tile.num_keys,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "SPLIT_KEYS": INVARIANT_SPLIT_KEYS,
        "HAS_TREE": has_tree,
        "HAS_WINDOW": has_window,
        "HAS_SOFTCAP": has_softcap,
        "IS_SPLIT": plan.num_splits > 1,
        "IS_INVARIANT": is_invariant,
    }
