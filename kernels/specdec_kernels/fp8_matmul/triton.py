"""float8 matrix product, and the rounding of activations to float8.

``fp8_matmul`` multiplies codes and applies both scales to the sums. On Hopper the matrix units add float8 products to a
sum of about 14 bits, so every block of K is added to float32 sums outside them (DeepSeek-V3, arXiv 2412.19437, section
3.3.2). Ampere and MI300X have no units for e4m3fn (MI300X's format has another bias): there, ``WIDEN`` makes float16 of
the bits, exactly. All tiles by the number of rows as in ``wna16_matmul``.

``quantize_fp8`` rounds to nearest, ties to even, in integer arithmetic, as not all GPUs have that conversion; the bits
are torch's everywhere.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.fp8_matmul.reference import LARGEST
from specdec_kernels.linear import tiles
from specdec_kernels.linear.tiles import Tile, Tiles, dot, store_tile
from specdec_kernels.tuning import CompileCase, architecture, config_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Tiles):
    """As ``Tiles``.

    Attributes:
        widen: the GPU cannot multiply e4m3fn.
        elements_per_warp: of ``quantize_fp8``: ``num_warps`` by the number of elements, within 1 and 16.
    """

    widen: bool = False
    elements_per_warp: int = 1024


_H100 = Config(
    programs=264,
    few=Tile(16, 128, 128, num_warps=4, num_stages=4),
    some=Tile(64, 128, 128, num_warps=4, num_stages=3),
    many=Tile(128, 128, 128, num_warps=8, num_stages=3),
)
# Widened codes take twice the registers.
_WIDEN = replace(
    _H100,
    few=Tile(16, 128, 64, num_warps=4, num_stages=4),
    some=Tile(64, 128, 64, num_warps=4, num_stages=3),
    many=Tile(128, 128, 64, num_warps=8, num_stages=3),
    widen=True,
)
CONFIGS = {
    "default": _H100,
    "sm_80": replace(_WIDEN, programs=216),
    "sm_86": replace(_WIDEN, programs=168),
    "sm_100": replace(_H100, programs=296),
    "sm_120": replace(_H100, programs=376),
    "gfx942": replace(_WIDEN, programs=608),
}

LARGEST_CODE = tl.constexpr(LARGEST)


@triton.jit
def _as_half(codes):
    """float16 of 2**-8 times the e4m3fn number with these bits: a float16 has the same fields, with another bias."""
    magnitude = (codes & 0x7F).to(tl.uint16)
    bits = ((codes & 0x80).to(tl.uint16) << 8) | (magnitude << 7)
    return tl.where(magnitude == 0x7F, bits | 0x7C00, bits).to(tl.float16, bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def _fp8_matmul(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    num_columns,
    blocks_per_split,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    x_line = x_ptr + row[:, None] * num_columns
    weight_line = weight_ptr + feature.to(tl.int64)[:, None] * num_columns
    is_row = row < num_rows
    is_feature = feature < num_features
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, COLUMNS))
    sums = tl.zeros((FEATURES, ROWS), tl.float32)
    for block in range(first, last):
        column = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        is_column = column < num_columns
        weight = tl.load(weight_line + column, mask=is_feature[:, None] & is_column, other=0.0)
        x = tl.load(x_line + column, mask=is_row[:, None] & is_column, other=0.0)
        if WIDEN:
            weight, x = _as_half(weight), _as_half(x)
        sums = dot(weight, x, sums, MAX_IMPRECISE=None if WIDEN else COLUMNS)
    if WIDEN:
        sums *= 65536.0  # of the 2**-8 in both operands
    sums *= tl.load(weight_scale_ptr + feature, mask=is_feature, other=0.0)[:, None]
    sums *= tl.load(x_scale_ptr + row, mask=is_row, other=0.0)[None, :]
    store_tile(sums, out_ptr, bias_ptr, row, feature, num_rows, num_features, HAS_BIAS)


@triton.jit
def _quantize_rows(x_ptr, codes_ptr, scale_ptr, num_columns, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * num_columns
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    # Bits of magnitudes are in the order of the magnitudes, with NaN above all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, LARGEST_CODE)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + tl.program_id(0), scale)
    bits = tl.div_rn(x, tl.zeros_like(x) + scale).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Numbers from 2**-6 up keep three bits of their mantissa and change the bias of their exponent from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below, a unit of the code is 2**-9, as is a unit in the last place of float32 numbers from 2**14 on.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
    tl.store(codes_ptr + start + column, code.to(tl.uint8), mask=inside)


def fp8_matmul(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> Tensor:
    """As ``reference.fp8_matmul``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    num_features, num_columns = weight.shape
    if x.shape[-1] != num_columns or {x.dtype, weight.dtype} != {torch.float8_e4m3fn}:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype}: their last dimensions "
            "must be the same and both float8_e4m3fn, as quantize_fp8 makes them"
        )
    config = config_for(CONFIGS, architecture(x.device))
    tile, num_programs = config.choose(len(x), batch_invariant)
    num_splits, blocks_per_split = tile.cut(num_features, num_columns, num_programs)
    codes = torch.uint8 if config.widen else torch.float8_e4m3fn
    x, weight = x.contiguous().view(codes), weight.contiguous().view(codes)
    out = torch.empty((len(x), num_features), dtype=dtype, device=x.device)

    def launch(target: Tensor, first: int, last: int, bias: Tensor | None) -> None:
        _fp8_matmul[tile.grid(last - first, num_features, num_splits)](
            x[first:last],
            x_scale[first:last],
            weight,
            weight_scale,
            out if bias is None else bias,
            target,
            last - first,
            num_features,
            num_columns,
            blocks_per_split,
            WIDEN=config.widen,
            HAS_BIAS=bias is not None,
            **tile.options(),
        )

    return tiles.multiply(out, bias, num_splits, launch)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize_fp8``."""
    num_rows, num_columns = x.shape
    codes = torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block, num_warps = _launch(num_columns, config_for(CONFIGS, architecture(x.device)))
    if x.numel():
        _quantize_rows[(num_rows,)](
            x.contiguous(), codes.view(torch.uint8), scale, num_columns, BLOCK=block, num_warps=num_warps
        )
    return codes, scale


def _launch(num_columns: int, config: Config) -> tuple[int, int]:
    block = triton.next_power_of_2(num_columns)
    return block, min(max(block // config.elements_per_warp, 1), 16)


def compile_cases(arch: str) -> list[CompileCase]:
    """All tiles, and rows of a small and a large decoder."""
    config = config_for(CONFIGS, arch)
    named = (("few", config.few), ("some", config.some), ("many", config.many))
    cases = [
        _matmul_case(name, tile, config.widen, out, has_bias)
        for (name, tile), (out, has_bias) in itertools.product(
            named, (("bf16", False), ("fp16", True), ("fp32", False))
        )
        if name != "many" or out != "fp32"
    ]
    return cases + [
        _quantize_case(num_columns, dtype, config)
        for num_columns, dtype in ((576, "bf16"), (4096, "bf16"), (14336, "bf16"), (4096, "fp16"))
    ]


def _matmul_case(name: str, tile: Tile, widen: bool, out: str, has_bias: bool) -> CompileCase:
    codes = "*u8" if widen else "*fp8e4nv"
    pointers = {
        "x_ptr": codes,
        "x_scale_ptr": "*fp32",
        "weight_ptr": codes,
        "weight_scale_ptr": "*fp32",
        "bias_ptr": "*bf16" if out == "fp32" else f"*{out}",
        "out_ptr": f"*{out}",
    }
    numbers = ("num_rows", "num_features", "num_columns", "blocks_per_split")
    constants = {"WIDEN": widen, "HAS_BIAS": has_bias, **tile.constants()}
    return CompileCase(
        op="fp8_matmul",
        name=f"{name} rows, {'split' if out == 'fp32' else out}{', bias' if has_bias else ''}",
        kernel=_fp8_matmul,
        signature={**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=(*pointers, "num_features", "num_columns"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        uses_matrix_units=True,
        needs_wide_loads=True,
    )


def _quantize_case(num_columns: int, dtype: str, config: Config) -> CompileCase:
    block, num_warps = _launch(num_columns, config)
    return CompileCase(
        op="fp8_matmul",
        name=f"quantise {num_columns} {dtype}",
        kernel=_quantize_rows,
        signature={
            "x_ptr": f"*{dtype}",
            "codes_ptr": "*u8",
            "scale_ptr": "*fp32",
            "num_columns": "i32",
            "BLOCK": "constexpr",
        },
        constants={"BLOCK": block},
        aligned=("x_ptr", "codes_ptr", "scale_ptr", "num_columns"),
        num_warps=num_warps,
        needs_wide_loads=True,
    )
