"""What the matrix products share: the tile of a program, how K is cut among programs, how partial sums are combined.

With few rows there is a program for every block of output features and nothing else to divide, which leaves most of a
GPU idle where N is small. So K is cut too: each program writes a float32 partial sum, and a second kernel adds those of
an output in the order of K. No atomics: the same bits every time. The cut follows from N and K alone, never from the
number of rows.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from specdec_kernels.tuning import CompileCase

IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
MIN_BLOCKS = 4
"""Blocks of K that a program takes at least: fewer and its pipeline of loads never fills."""
MAX_SPLITS = 16
ROWS_AT_ONCE = 512
"""Rows whose partial sums are in memory at the same time: at most 16 x 512 x N floats."""
COMBINE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (M), output features (N) and columns (K) that a program takes at once, and how it is compiled.

    The weights are always the left operand: their features fill the dimension of the matrix instructions that must be
    large (64 on Hopper, 128 on Blackwell), and the rows, of which there may be few, the one that may be small.
    """

    rows: int
    features: int
    columns: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "FEATURES": self.features, "COLUMNS": self.columns}

    def options(self) -> dict[str, int]:
        """Of a launch, the constants among them."""
        return {**self.constants(), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def grid(self, num_rows: int, num_features: int, num_splits: int) -> tuple[int, int, int]:
        # Programs that read the same weights are neighbours.
        return triton.cdiv(num_rows, self.rows), triton.cdiv(num_features, self.features), num_splits

    def cut(self, num_features: int, num_columns: int, num_programs: int) -> tuple[int, int]:
        """(number of splits of K, blocks of K in each), for about ``num_programs`` programs in a tile of rows."""
        num_blocks = triton.cdiv(num_columns, self.columns)
        num_tiles = max(triton.cdiv(num_features, self.features), 1)
        wanted = min(num_programs // num_tiles, num_blocks // MIN_BLOCKS, MAX_SPLITS)
        blocks_per_split = max(triton.cdiv(num_blocks, max(wanted, 1)), 1)
        return max(triton.cdiv(num_blocks, blocks_per_split), 1), blocks_per_split


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Three tiles by the number of rows.

    Attributes:
        programs: that K is split to reach: two for each multiprocessor.
        few: up to as many rows as it has: decoding.
        some: up to ``max_some`` rows, the drafts of a batch; and any number if the result must not depend on it.
        many: more rows, prompts; K is not split.
    """

    programs: int
    few: Tile
    some: Tile
    many: Tile
    max_some: int = 256

    def choose(self, num_rows: int, batch_invariant: bool) -> tuple[Tile, int]:
        """The tile, and how many programs a tile of rows should have."""
        if batch_invariant or self.few.rows < num_rows <= self.max_some:
            return self.some, self.programs
        return (self.few, self.programs) if num_rows <= self.few.rows else (self.many, 1)


@triton.jit
def dot(weight, x, sums, MAX_IMPRECISE: tl.constexpr = None):
    """``weight @ x.T + sums``, exact for float32. The interpreter would multiply bfloat16's bits as integers."""
    x = tl.trans(x)
    if IS_INTERPRETED:
        weight = weight.to(tl.float32)
        x = x.to(tl.float32)
        return tl.dot(weight, x, sums, input_precision="ieee")
    return tl.dot(weight, x, sums, input_precision="ieee", max_num_imprecise_acc=MAX_IMPRECISE)


@triton.jit
def store_tile(
    sums,  # [FEATURES, ROWS]
    out_ptr,
    bias_ptr,
    row,
    feature,
    num_rows,
    num_features,
    HAS_BIAS: tl.constexpr,
):
    """Store the sums of one split, with the bias where they are all there is, into ``out`` [splits, rows, features]."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + feature, mask=feature < num_features, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    line = tl.program_id(2).to(tl.int64) * num_rows + row
    inside = (feature < num_features)[:, None] & (row < num_rows)[None, :]
    tl.store(out_ptr + line[None, :] * num_features + feature[:, None], sums, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _combine(
    partial_ptr,  # [SPLITS, num_rows, num_features]
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < num_features
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        line = split * num_rows + row
        total += tl.load(partial_ptr + line * num_features + feature, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_features + feature, total, mask=inside)


def multiply(out: Tensor, bias: Tensor | None, num_splits: int, launch: Callable[..., None]) -> Tensor:
    """Fill ``out`` [M, N] by ``launch(target, first, last, bias)``, over pieces of rows where K is split.

    ``target`` is [splits, last - first, N]: float32 partial sums, or the rows of ``out`` where there is one split; the
    bias is passed on in the second case only.
    """
    num_rows, num_features = out.shape
    if not out.numel():
        return out
    if num_splits == 1:
        launch(out, 0, num_rows, bias)
        return out
    for first in range(0, num_rows, ROWS_AT_ONCE):
        piece = out[first : first + ROWS_AT_ONCE]
        partial = torch.empty((num_splits, *piece.shape), dtype=torch.float32, device=out.device)
        launch(partial, first, first + len(piece), None)
        _combine[(len(piece), triton.cdiv(num_features, COMBINE_BLOCK))](
            partial,
            out if bias is None else bias,
            piece,
            len(piece),
            num_features,
            SPLITS=num_splits,
            HAS_BIAS=bias is not None,
            BLOCK=COMBINE_BLOCK,
        )
    return out


def compile_cases() -> list[CompileCase]:
    """The sum of partial sums, listed by ``linear`` for all matrix products."""
    return [
        CompileCase(
            op="linear",
            name=f"combine, {splits} splits{', bias' if has_bias else ''}",
            kernel=_combine,
            signature={
                "partial_ptr": "*fp32",
                "bias_ptr": "*bf16",
                "out_ptr": "*bf16",
                "num_rows": "i32",
                "num_features": "i32",
                "SPLITS": "constexpr",
                "HAS_BIAS": "constexpr",
                "BLOCK": "constexpr",
            },
            constants={"SPLITS": splits, "HAS_BIAS": has_bias, "BLOCK": COMBINE_BLOCK},
            aligned=("partial_ptr", "bias_ptr", "out_ptr", "num_features"),
            needs_wide_loads=True,
        )
        for splits, has_bias in ((2, True), (8, False), (MAX_SPLITS, True))
    ]
