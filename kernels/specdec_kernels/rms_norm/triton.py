"""RMS normalisation on a GPU: one program a row, the row in registers, one read and one write of each element."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.tuning import CompileCase, architecture, config_for


@dataclass(frozen=True, slots=True)
class Config:
    """``num_warps`` by the number of elements that one warp takes, within 1 and 16."""

    elements_per_warp: int = 1024


CONFIGS = {"default": Config()}


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    num_columns,
    eps,
    offset,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * num_columns
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        # Rounded to the tensors' dtype first, as the sum that is returned is.
        total = x.to(tl.float32) + tl.load(residual_ptr + start + column, mask=inside, other=0.0).to(
            tl.float32
        )
        x = total.to(x.dtype)
        tl.store(sum_ptr + start + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / num_columns + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + column, wide * scale * (weight + offset), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As ``reference.rms_norm``."""
    x = x.contiguous()
    num_columns = x.shape[-1]
    out = torch.empty_like(x)
    total = out if residual is None else torch.empty_like(x)
    block, num_warps = _launch(num_columns, config_for(CONFIGS, architecture(x.device)))
    if x.numel():
        _rms_norm[(x.numel() // num_columns,)](
            x,
            x if residual is None else residual.contiguous(),
            weight,
            out,
            total,
            num_columns,
            eps,
            offset,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=num_warps,
        )
    return out if residual is None else (out, total)


def _launch(num_columns: int, config: Config) -> tuple[int, int]:
    block = triton.next_power_of_2(num_columns)
    return block, min(max(block // config.elements_per_warp, 1), 16)


def compile_cases(arch: str) -> list[CompileCase]:
    """What decoders launch on ``arch``: hidden sizes of 576 and 4096, and heads of 128 for query-key norms."""
    cases: list[CompileCase] = []
    for num_columns in (128, 576, 4096):
        block, num_warps = _launch(num_columns, config_for(CONFIGS, arch))
        for has_residual in (False, True):
            cases.append(
                CompileCase(
                    op="rms_norm",
                    name=f"bf16, {num_columns}{', residual' if has_residual else ''}",
                    kernel=_rms_norm,
                    signature={
                        **dict.fromkeys(
                            ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr"), "*bf16"
                        ),
                        "num_columns": "i32",
                        "eps": "fp32",
                        "offset": "fp32",
                        "BLOCK": "constexpr",
                        "HAS_RESIDUAL": "constexpr",
                    },
                    constants={"BLOCK": block, "HAS_RESIDUAL": has_residual},
                    aligned=("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr", "num_columns"),
                    num_warps=num_warps,
                    needs_wide_loads=num_columns >= 256 * num_warps,
                )
            )
    return cases
