"""Paged attention on a GPU: which tiles, how many splits, and the launches of ``kernels.py``.

Everything about a launch follows from shapes, so that it needs no number from the device and can be captured.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from specdec_kernels.paged_attention import kernels
from specdec_kernels.paged_attention.tree_mask import MAX_TREE_TOKENS
from specdec_kernels.tuning import CompileCase, architecture, config_for

INVARIANT_SPLIT_KEYS = 2048
"""Keys of a split in batch-invariant mode: a multiple of every tile's."""

MIN_SPLIT_KEYS = 256
"""Fewer keys are not worth a program and what ``combine`` does for it."""

PROGRAMS_PER_PROCESSOR = 2
"""Contexts are split until there are so many programs for each of the GPU's multiprocessors."""

WORKSPACE_BYTES = 1 << 28
"""Most memory for what splits leave for ``combine``; batches that need more are computed in several passes."""

_TOKENS_PER_PROGRAM = 16  # of ``tree_paths``


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


CONFIGS: dict[str, Mapping[int, Tiles]] = {
    "default": {
        64: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 32, 4, 3), many=Tile(128, 64, 8, 3)),
        128: Tiles(few=Tile(16, 32, 4, 5), some=Tile(64, 64, 8, 3), many=Tile(64, 64, 8, 3)),
        256: Tiles(few=Tile(16, 32, 4, 3), some=Tile(32, 32, 8, 3), many=Tile(32, 32, 8, 3)),
    },
    "sm_90": {
        64: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 64, 4, 3), many=Tile(128, 64, 8, 3)),
        128: Tiles(few=Tile(16, 64, 4, 5), some=Tile(64, 64, 4, 3), many=Tile(128, 64, 8, 3)),
        256: Tiles(few=Tile(16, 32, 4, 5), some=Tile(64, 32, 8, 3), many=Tile(64, 32, 8, 3)),
    },
    "gfx942": {
        64: Tiles(few=Tile(16, 64, 4, 2), some=Tile(64, 32, 4, 2), many=Tile(64, 32, 4, 2)),
        128: Tiles(few=Tile(16, 32, 4, 2), some=Tile(64, 32, 4, 2), many=Tile(64, 32, 4, 2)),
        256: Tiles(few=Tile(16, 32, 4, 2), some=Tile(32, 32, 4, 2), many=Tile(32, 32, 4, 2)),
    },
}
CONFIGS["sm_100"] = CONFIGS["sm_90"]
"""By architecture and by the head size, rounded up to a power of two, from 64 on."""

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
    """As ``reference.paged_attention``, for contiguous caches."""
    is_quantised = k_cache.dtype in (torch.int8, torch.float8_e4m3fn)
    assert is_quantised == (k_scale is not None), "quantised caches have scales, others have none"
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and q.stride(2) == 1
    assert sliding_window is None or tree_mask is None or positions is not None, (
        "trees' windows need positions"
    )
    num_tokens, head_dim, num_rows = q.shape[0], q.shape[2], context_lens.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    plan = _plan(q, k_cache, block_tables, batch_invariant)
    constants = _constants(
        plan,
        head_dim,
        page=k_cache.shape[1],
        has_tree=tree_mask is not None,
        has_window=sliding_window is not None,
        has_softcap=softcap is not None,
        is_invariant=batch_invariant,
    )
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if tree_mask is not None:
        tree_mask = tree_mask.contiguous().view(torch.int32)
    paths = (
        _tree_paths(tree_mask) if batch_invariant and tree_mask is not None else (query_start, query_start)
    )
    maximum, total, partial = _workspace(plan, k_cache.shape[2], head_dim, out)
    for first_tile in range(0, plan.num_tiles, plan.tiles_per_pass):
        tiles = min(plan.tiles_per_pass, plan.num_tiles - first_tile)
        kernels.attend[(tiles, k_cache.shape[2], plan.num_splits)](
            q,
            k_cache,
            v_cache,
            out if k_scale is None else k_scale,
            out if v_scale is None else v_scale,
            out,
            maximum,
            total,
            partial,
            query_start,
            context_lens,
            block_tables,
            query_start if tree_mask is None else tree_mask,
            query_start if positions is None else positions,
            *paths,
            num_tokens,
            num_rows,
            first_tile,
            q.stride(0),
            q.stride(1),
            block_tables.stride(0),
            scale,
            0.0 if softcap is None else softcap,
            0 if sliding_window is None else sliding_window,
            **constants,
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages,
        )
        if plan.num_splits > 1:
            kernels.combine[(tiles, k_cache.shape[2])](
                out,
                maximum,
                total,
                partial,
                query_start,
                num_tokens,
                num_rows,
                first_tile,
                plan.num_splits,
                **{name: constants[name] for name in ("GROUP", "HEAD_DIM", "BLOCK_M", "BLOCK_D")},
                num_warps=plan.tile.num_warps,
            )
    return out


def _plan(q: Tensor, k_cache: Tensor, block_tables: Tensor, batch_invariant: bool) -> Plan:
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


def _constants(
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


def _workspace(plan: Plan, num_kv_heads: int, head_dim: int, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums, float32 [tiles, H, splits, lines], and values [..., D]; ``out`` thrice without splits."""
    if plan.num_splits == 1:
        return out, out, out
    shape = (plan.tiles_per_pass, num_kv_heads, plan.num_splits, plan.tile.num_lines)
    maximum, total = (torch.empty(shape, dtype=torch.float32, device=out.device) for _ in range(2))
    return maximum, total, torch.empty((*shape, head_dim), dtype=torch.float32, device=out.device)


def _tree_paths(words: Tensor) -> tuple[Tensor, Tensor]:
    """``kernels.tree_paths`` of masks as int32 [T, 4]."""
    num_tokens = words.shape[0]
    path = torch.empty((num_tokens, MAX_TREE_TOKENS), dtype=torch.int32, device=words.device)
    length = torch.empty(num_tokens, dtype=torch.int32, device=words.device)
    kernels.tree_paths[(triton.cdiv(num_tokens, _TOKENS_PER_PROGRAM),)](
        words, path, length, num_tokens, BLOCK_T=_TOKENS_PER_PROGRAM
    )
    return path, length


_FEW, _SOME, _MANY = "few", "some", "many"
_BF16, _FP16, _INT8, _FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
_TRITON_TYPES = {_BF16: "*bf16", _FP16: "*fp16", torch.float32: "*fp32", _INT8: "*i8", _FP8: "*u8"}
# Every tile of the table, and every feature with the tile that it asks most of.
_CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "decode, heads of 64": (_FEW, 64, {}),
    "decode, heads of 128, window, soft-cap": (_FEW, 128, {"has_window": True, "has_softcap": True}),
    "decode, heads of 128, int8, split": (_FEW, 128, {"cache_dtype": _INT8, "is_split": True}),
    "decode, heads of 128, float8, fp16": (_FEW, 128, {"cache_dtype": _FP8, "dtype": _FP16}),
    "decode, heads of 256, split": (_FEW, 256, {"is_split": True}),
    "tree, heads of 64, float8": (_SOME, 64, {"has_tree": True, "cache_dtype": _FP8}),
    "verify, heads of 80": (_SOME, 80, {}),
    "verify, heads of 96, int8": (_SOME, 96, {"cache_dtype": _INT8}),
    "tree, heads of 128, window, split": (
        _SOME,
        128,
        {"has_tree": True, "has_window": True, "is_split": True},
    ),
    "tree, heads of 256, float8": (_SOME, 256, {"has_tree": True, "cache_dtype": _FP8}),
    "prefill, heads of 64": (_MANY, 64, {}),
    "prefill, heads of 128": (_MANY, 128, {}),
    "prefill, heads of 128, float8, tree": (_MANY, 128, {"has_tree": True, "cache_dtype": _FP8}),
    "prefill, heads of 256, window, soft-cap": (_MANY, 256, {"has_window": True, "has_softcap": True}),
    "invariant, heads of 64, split": (_SOME, 64, {"is_invariant": True, "is_split": True}),
    "invariant, heads of 128, float8, tree, window": (
        _SOME,
        128,
        {"is_invariant": True, "has_tree": True, "has_window": True, "cache_dtype": _FP8},
    ),
    "invariant, heads of 256, tree": (_SOME, 256, {"is_invariant": True, "has_tree": True}),
    "float32, heads of 64": ("float32", 64, {"dtype": torch.float32}),
}


def compile_cases(arch: str) -> list[CompileCase]:
    """Attention for groups of four query heads and blocks of 16, both other kernels, on ``arch``."""
    cases = [
        _attend_case(name, _case_tile(arch, rows, head_dim), head_dim, **features)
        for name, (rows, head_dim, features) in _CASES.items()
    ]
    for rows, head_dim in ((_FEW, 128), (_SOME, 256)):
        cases.append(_combine_case(rows, _case_tile(arch, rows, head_dim), head_dim))
    cases.append(
        CompileCase(
            op="paged_attention",
            name="paths of trees",
            kernel=kernels.tree_paths,
            signature={
                **dict.fromkeys(("mask_ptr", "path_ptr", "length_ptr"), "*i32"),
                "num_tokens": "i32",
                "BLOCK_T": "constexpr",
            },
            constants={"BLOCK_T": _TOKENS_PER_PROGRAM},
            aligned=("mask_ptr", "path_ptr", "length_ptr"),
        )
    )
    return cases


def _case_tile(arch: str, rows: str, head_dim: int) -> Tile:
    tiles = config_for(CONFIGS, arch)[max(triton.next_power_of_2(head_dim), 64)]
    return {_FEW: tiles.few, _SOME: tiles.some, _MANY: tiles.many}.get(rows, FLOAT32_TILE)


def _attend_case(
    name: str,
    tile: Tile,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    is_split: bool = False,
    **features: bool,
) -> CompileCase:
    flags = {"has_tree": False, "has_window": False, "has_softcap": False, "is_invariant": False} | features
    plan = Plan(tile, group=4, num_tiles=1, num_splits=2 if is_split else 1, tiles_per_pass=1)
    constants = _constants(plan, head_dim, page=16, **flags)
    wide, positions = _TRITON_TYPES[dtype], "*i64" if flags["has_tree"] else "*i32"
    types = dict.fromkeys(("q_ptr", "out_ptr"), wide)
    types |= dict.fromkeys(("k_ptr", "v_ptr"), _TRITON_TYPES[cache_dtype or dtype])
    types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32" if cache_dtype else wide)
    types |= dict.fromkeys(("maximum_ptr", "total_ptr", "partial_ptr"), "*fp32" if is_split else wide)
    types |= {"position_ptr": positions, "scale": "fp32", "softcap": "fp32"}
    names = kernels.attend.arg_names
    pointers = tuple(name for name in names if name.endswith("_ptr"))
    types = dict.fromkeys(pointers, "*i32") | types | dict.fromkeys(constants, "constexpr")
    return CompileCase(
        op="paged_attention",
        name=name,
        kernel=kernels.attend,
        signature={name: types.get(name, "i32") for name in names},
        constants=constants,
        aligned=(*pointers, "q_stride_token", "q_stride_head"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        uses_matrix_units=dtype != torch.float32,
        needs_wide_loads=True,
    )


def _combine_case(rows: str, tile: Tile, head_dim: int) -> CompileCase:
    pointers = ("out_ptr", "maximum_ptr", "total_ptr", "partial_ptr", "query_start_ptr")
    constants = {"GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_M": tile.num_lines, "BLOCK_D": head_dim}
    types = dict.fromkeys(pointers, "*fp32") | {"out_ptr": "*bf16", "query_start_ptr": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    return CompileCase(
        op="paged_attention",
        name=f"combine, {rows} lines, heads of {head_dim}",
        kernel=kernels.combine,
        signature={name: types.get(name, "i32") for name in kernels.combine.arg_names},
        constants=constants,
        aligned=pointers,
        num_warps=tile.num_warps,
        needs_wide_loads=True,
    )
