"""Dense matrix product with one tile and one order of K, whatever the number of rows.

A GPU's library picks another kernel for 1 row than for 64, and another order of summing with it, so that a token's
logits change with what else is in the batch. Here the tile and the cut of K follow from the dtype, N and K alone, and
the compiled program does not know the number of rows: a row's bits are always the same. The price is a tile that suits
neither one row nor thousands.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.linear import tiles
from specdec_kernels.linear.tiles import Tile, dot, store_tile
from specdec_kernels.tuning import CompileCase, architecture, config_for


@dataclass(frozen=True, slots=True)
class Config:
    """One tile for 16-bit inputs and one for float32, whose products are exact and use no matrix units.

    Attributes:
        programs: that K is split to reach: two for each multiprocessor.
    """

    programs: int
    half: Tile
    single: Tile


_H100 = Config(
    programs=264,
    half=Tile(64, 128, 64, num_warps=4, num_stages=3),
    single=Tile(32, 64, 32, num_warps=4, num_stages=2),
)
# Where each warp keeps its sums in its own registers, 4 warps spill.
_WIDE = replace(_H100, half=Tile(64, 128, 64, num_warps=8, num_stages=3))
CONFIGS = {
    "default": _H100,
    "sm_80": replace(_WIDE, programs=216),
    "sm_100": replace(_H100, programs=296),
    "sm_120": replace(_WIDE, programs=376),
    "gfx942": replace(_H100, programs=608),
}


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def _linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    num_columns,
    blocks_per_split,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    x_line = x_ptr + row[:, None] * num_columns
    weight_line = weight_ptr + feature.to(tl.int64)[:, None] * num_columns
    is_row = (row < num_rows)[:, None]
    is_feature = (feature < num_features)[:, None]
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, COLUMNS))
    sums = tl.zeros((FEATURES, ROWS), tl.float32)
    for block in range(first, last):
        column = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        is_column = column < num_columns
        weight = tl.load(weight_line + column, mask=is_feature & is_column, other=0.0)
        x = tl.load(x_line + column, mask=is_row & is_column, other=0.0)
        sums = dot(weight, x, sums)
    store_tile(sums, out_ptr, bias_ptr, row, feature, num_rows, num_features, HAS_BIAS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.linear``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    num_features, num_columns = weight.shape
    if x.shape[-1] != num_columns or x.dtype != weight.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype}: "
            "their last dimensions and dtypes must be the same"
        )
    flat, weight = x.reshape(-1, num_columns).contiguous(), weight.contiguous()
    out = torch.empty((len(flat), num_features), dtype=x.dtype, device=x.device)
    config = config_for(CONFIGS, architecture(x.device))
    tile = config.single if x.dtype == torch.float32 else config.half
    num_splits, blocks_per_split = tile.cut(num_features, num_columns, config.programs)

    def launch(target: Tensor, first: int, last: int, bias: Tensor | None) -> None:
        _linear[tile.grid(last - first, num_features, num_splits)](
            flat[first:last],
            weight,
            weight if bias is None else bias,
            target,
            last - first,
            num_features,
            num_columns,
            blocks_per_split,
            HAS_BIAS=bias is not None,
            **tile.options(),
        )

    return tiles.multiply(out, bias, num_splits, launch).view(*x.shape[:-1], num_features)


def compile_cases(arch: str) -> list[CompileCase]:
    """What decoders launch: the sizes enter only by their divisibility and by whether K is split."""
    config = config_for(CONFIGS, arch)
    cases = tiles.compile_cases()
    for dtype, out, has_bias in (
        ("bf16", "bf16", False),
        ("bf16", "bf16", True),
        ("bf16", "fp32", False),
        ("fp16", "fp16", False),
        ("fp32", "fp32", True),
    ):
        tile = config.single if dtype == "fp32" else config.half
        cases.append(
            CompileCase(
                op="linear",
                name=f"{dtype}{', split' if out != dtype else ''}{', bias' if has_bias else ''}",
                kernel=_linear,
                signature={
                    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}"),
                    "out_ptr": f"*{out}",
                    **dict.fromkeys(("num_rows", "num_features", "num_columns", "blocks_per_split"), "i32"),
                    **dict.fromkeys(("HAS_BIAS", "ROWS", "FEATURES", "COLUMNS"), "constexpr"),
                },
                constants={"HAS_BIAS": has_bias, **tile.constants()},
                aligned=("x_ptr", "weight_ptr", "bias_ptr", "out_ptr", "num_features", "num_columns"),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                uses_matrix_units=dtype != "fp32",
                needs_wide_loads=True,
            )
        )
    return cases
