"""Weight-only quantised matrix product: codes are read as they are and become weights in registers.

A code of ``bits`` bits is shifted to the top of a float's mantissa, which makes ``1 + code / 2**bits`` without a
conversion; one fused multiply-add with ``2**bits * scale`` and ``minimum - 2**bits * scale`` makes the weight, and it
is rounded to the dtype of the activations. A program's block of weights is the left operand of the matrix instructions,
so that on Hopper it goes from registers into them and no warp makes weights that another one makes too.

The tile depends on the number of rows, unless told not to; how K is cut among programs depends on the tile, N and K.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.linear import tiles
from specdec_kernels.linear.tiles import Tile, Tiles, dot, store_tile
from specdec_kernels.tuning import CompileCase, architecture, config_for
from specdec_kernels.wna16_matmul.weights import GROUP_SIZES, QuantizedWeight

ONE_A_ROW = 2**30
"""A group size beyond any K: the compiled program is the same for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Tiles):
    """As ``Tiles``; ``single`` is for float32 activations, whose products are exact and use no matrix units."""

    single: Tile


_H100 = Config(
    programs=264,
    few=Tile(16, 128, 128, num_warps=4, num_stages=3),
    some=Tile(64, 128, 128, num_warps=8, num_stages=3),
    many=Tile(128, 128, 64, num_warps=8, num_stages=3),
    single=Tile(32, 64, 64, num_warps=8, num_stages=2),
)
# Blocks of 128 columns spill at 8 warps, with some versions of Triton.
_NARROW = Tile(64, 128, 64, num_warps=8, num_stages=4)
CONFIGS = {
    "default": _H100,
    "sm_80": replace(_H100, programs=216, some=_NARROW),
    # With 128 rows, Triton 3.6 asks for 528 of the 512 columns of tensor memory, and makes a trap of the kernel.
    "sm_100": replace(_H100, programs=296, many=_H100.some),
    "sm_120": replace(_H100, programs=376, some=_NARROW),
    # Twice as many threads in a warp, and 64 KiB of shared memory.
    "gfx942": Config(
        programs=608,
        few=Tile(16, 64, 128, num_warps=2, num_stages=2),
        some=Tile(64, 128, 64, num_warps=4, num_stages=2),
        many=Tile(128, 128, 64, num_warps=4, num_stages=2),
        single=Tile(32, 64, 64, num_warps=4, num_stages=2),
    ),
}


@triton.jit
def _expand(values, FEATURES: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """[groups, features] to [features, words]."""
    columns = tl.trans(values)[:, :, None]
    return tl.reshape(tl.broadcast_to(columns, (FEATURES, GROUPS, WORDS // GROUPS)), (FEATURES, WORDS))


@triton.jit
def _one_plus_fraction(words, FIELD: tl.constexpr, BITS: tl.constexpr):
    """``1 + code / 2**BITS`` for the codes in one field of ``words``."""
    SHIFT: tl.constexpr = 23 - BITS - BITS * FIELD
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    words = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
    return ((words & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def _wna16_matmul(
    x_ptr,
    words_ptr,  # int16
    scales_ptr,
    minimums_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    num_columns,
    words_per_row,
    blocks_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS
    APART: tl.constexpr = 32 // FIELDS  # columns between the fields of a word
    WORDS: tl.constexpr = COLUMNS // FIELDS
    GROUPS: tl.constexpr = COLUMNS // GROUP if GROUP < COLUMNS else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    x_line = x_ptr + row[:, None] * num_columns
    words_line = words_ptr + feature.to(tl.int64)[:, None] * words_per_row
    is_row = (row < num_rows)[:, None]
    is_feature = feature < num_features
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, COLUMNS))
    sums = tl.zeros((FEATURES, ROWS), tl.float32)
    for block in range(first, last):
        word = block * WORDS + tl.arange(0, WORDS)
        is_word = is_feature[:, None] & (word < words_per_row)[None, :]
        words = tl.load(words_line + word[None, :], mask=is_word, other=0).to(tl.int32)
        group = block * COLUMNS // GROUP + tl.arange(0, GROUPS)
        at = group[:, None] * num_features + feature[None, :]
        is_group = (group * GROUP < num_columns)[:, None] & is_feature[None, :]
        factor = tl.load(scales_ptr + at, mask=is_group, other=0.0).to(tl.float32) * (1 << BITS)
        if HAS_MINIMUMS:
            offset = tl.load(minimums_ptr + at, mask=is_group, other=0.0).to(tl.float32) - factor
        else:
            offset = -1.5 * factor
        factor = _expand(factor, FEATURES, GROUPS, WORDS)
        offset = _expand(offset, FEATURES, GROUPS, WORDS)
        for field in tl.static_range(FIELDS):
            column = (word // APART * 32 + word % APART + field * APART)[None, :]
            x = tl.load(x_line + column, mask=is_row & (column < num_columns), other=0.0)
            weight = tl.fma(_one_plus_fraction(words, field, BITS), factor, offset)
            sums = dot(weight.to(x.dtype), x, sums)
    store_tile(sums, out_ptr, bias_ptr, row, feature, num_rows, num_features, HAS_BIAS)


def wna16_matmul(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """As ``reference.wna16_matmul``.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_features, num_columns = weight.shape
    if x.shape[-1] != num_columns:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {weight.shape}: their last dimensions must be the same"
        )
    flat = x.reshape(-1, num_columns).contiguous()
    out = torch.empty((len(flat), num_features), dtype=x.dtype, device=x.device)
    config = config_for(CONFIGS, architecture(x.device))
    tile, num_programs = config.choose(len(flat), batch_invariant)
    if x.dtype == torch.float32:
        tile, num_programs = config.single, config.programs
    num_splits, blocks_per_split = tile.cut(num_features, num_columns, num_programs)
    words = weight.codes.view(torch.int16)

    def launch(target: Tensor, first: int, last: int, bias: Tensor | None) -> None:
        _wna16_matmul[tile.grid(last - first, num_features, num_splits)](
            flat[first:last],
            words,
            weight.scales,
            weight.scales if weight.minimums is None else weight.minimums,
            flat if bias is None else bias,
            target,
            last - first,
            num_features,
            num_columns,
            words.shape[1],
            blocks_per_split,
            BITS=weight.bits,
            GROUP=weight.group_size if weight.group_size in GROUP_SIZES else ONE_A_ROW,
            HAS_MINIMUMS=weight.minimums is not None,
            HAS_BIAS=bias is not None,
            **tile.options(),
        )

    return tiles.multiply(out, bias, num_splits, launch).view(*x.shape[:-1], num_features)


def compile_cases(arch: str) -> list[CompileCase]:
    """Widths and group sizes on all tiles; what else changes the code on the tile of few rows."""
    config = config_for(CONFIGS, arch)
    bases = [("few", config.few), ("some", config.some), ("many", config.many)]
    cases = [
        _case(name, tile, bits, group_size)
        for (name, tile), bits, group_size in itertools.product(bases, (4, 8), (32, 128))
    ]
    for bits in (4, 8):
        cases += [
            _case("few", config.few, bits, 32, symmetric=True),
            _case("few", config.few, bits, 64, out="fp32"),
            _case("few", config.few, bits, ONE_A_ROW),
            _case("some", config.some, bits, 32, dtype="fp16", out="fp16", has_bias=True),
            _case("single", config.single, bits, 32, dtype="fp32", out="fp32"),
        ]
    return cases


def _case(
    name: str,
    tile: Tile,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    dtype: str = "bf16",
    out: str = "bf16",
    has_bias: bool = False,
) -> CompileCase:
    groups = "one group a row" if group_size == ONE_A_ROW else f"groups of {group_size}"
    options = (", symmetric" * symmetric, ", split" * (out != dtype), ", bias" * has_bias)
    numbers = ("num_rows", "num_features", "num_columns", "words_per_row", "blocks_per_split")
    constants = {
        "BITS": bits,
        "GROUP": group_size,
        "HAS_MINIMUMS": not symmetric,
        "HAS_BIAS": has_bias,
        **tile.constants(),
    }
    pointers = {
        "x_ptr": f"*{dtype}",
        "words_ptr": "*i16",
        "scales_ptr": "*fp16",
        "minimums_ptr": "*fp16",
        "bias_ptr": f"*{dtype}",
        "out_ptr": f"*{out}",
    }
    return CompileCase(
        op="wna16_matmul",
        name=f"int{bits}, {dtype}, {name} rows, {groups}{''.join(options)}",
        kernel=_wna16_matmul,
        signature={**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=(*pointers, *numbers[1:4]),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        uses_matrix_units=dtype != "fp32",
        needs_wide_loads=dtype != "fp32",
    )
