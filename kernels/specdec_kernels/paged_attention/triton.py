"""Paged attention on a GPU: the launches of ``kernels.py``, and what it is compiled for."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from specdec_kernels.paged_attention import kernels
from specdec_kernels.paged_attention.plan import CONFIGS, FLOAT32_TILE, Plan, Tile, constants_of, make_plan
from specdec_kernels.paged_attention.tree_mask import MAX_TREE_TOKENS
from specdec_kernels.tuning import CompileCase, config_for

_TOKENS_PER_PROGRAM = 16  # of ``tree_paths``
_COMBINE_CONSTANTS = ("GROUP", "HEAD_DIM", "BLOCK_M", "BLOCK_D")


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
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and q.stride(2) == 1, "strides"
    has_tree, has_window = tree_mask is not None, sliding_window is not None
    assert not (has_tree and has_window and positions is None), "trees' windows need positions"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    unused = query_start  # stands for tensors that are not there
    words = unused if tree_mask is None else tree_mask.contiguous().view(torch.int32)
    paths = _tree_paths(words) if batch_invariant and has_tree else (unused, unused)
    plan = make_plan(q, k_cache, block_tables, batch_invariant)
    constants = constants_of(
        plan, q.shape[2], k_cache.shape[1], has_tree, has_window, softcap is not None, batch_invariant
    )
    scales = (unused if k_scale is None else k_scale, unused if v_scale is None else v_scale)
    rows = (query_start, context_lens, block_tables, words, unused if positions is None else positions)
    workspace = _workspace(plan, k_cache.shape[2], q.shape[2], out)
    numbers = {
        "q_stride_token": q.stride(0),
        "q_stride_head": q.stride(1),
        "table_stride": block_tables.stride(0),
        "scale": scale,
        "softcap": softcap or 0.0,
        "sliding_window": sliding_window or 0,
    }
    for first_tile in range(0, plan.num_tiles, plan.tiles_per_pass):
        grid = (min(plan.tiles_per_pass, plan.num_tiles - first_tile), k_cache.shape[2])
        sizes = (q.shape[0], context_lens.shape[0], first_tile)
        kernels.attend[(*grid, plan.num_splits)](
            *(q, k_cache, v_cache, *scales, out, *workspace, *rows, *paths, *sizes),
            **(numbers | constants),
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages,
        )
        if plan.num_splits > 1:
            kernels.combine[grid](
                *(out, *workspace, query_start, *sizes, plan.num_splits),
                **{name: constants[name] for name in _COMBINE_CONSTANTS},
                num_warps=plan.tile.num_warps,
            )
    return out


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
    constants = constants_of(plan, head_dim, page=16, **flags)
    wide, positions = _TRITON_TYPES[dtype], "*i64" if flags["has_tree"] else "*i32"
    types = dict.fromkeys(("q_ptr", "out_ptr"), wide)
    types |= dict.fromkeys(("k_ptr", "v_ptr"), _TRITON_TYPES[cache_dtype or dtype])
    types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32" if cache_dtype else "*i32")
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
