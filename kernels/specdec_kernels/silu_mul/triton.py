"""Gated activations on a GPU: one program a piece of a row, one read of each input and one write of each output."""

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
    """``block`` outputs a program at most. Eight outputs of 16 bits a thread make loads of 128 bits."""

    block: int = 1024
    elements_per_warp: int = 256


CONFIGS = {
    "default": Config(),
    "gfx942": Config(elements_per_warp=512),  # warps of 64 threads
}


@triton.jit
def _gated(gate_up_ptr, out_ptr, num_columns, BLOCK: tl.constexpr, IS_GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    gate_ptr = gate_up_ptr + row * 2 * num_columns
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_columns + column, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh(x)) / 2 = sigmoid(2 x), and the factor is 2 sqrt(2 / pi).
    slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if IS_GELU else gate
    tl.store(out_ptr + row * num_columns + column, gate * tl.sigmoid(slope) * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As ``reference.silu_mul``."""
    return _launch_gated(gate_up, is_gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As ``reference.gelu_mul``."""
    return _launch_gated(gate_up, is_gelu=True)


def _launch_gated(gate_up: Tensor, *, is_gelu: bool) -> Tensor:
    gate_up = gate_up.contiguous()
    num_columns = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], num_columns), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block, num_warps = _launch(num_columns, config_for(CONFIGS, architecture(gate_up.device)))
        grid = (out.numel() // num_columns, triton.cdiv(num_columns, block))
        _gated[grid](gate_up, out, num_columns, BLOCK=block, IS_GELU=is_gelu, num_warps=num_warps)
    return out


def _launch(num_columns: int, config: Config) -> tuple[int, int]:
    block = min(triton.next_power_of_2(num_columns), config.block)
    return block, max(block // config.elements_per_warp, 1)


def compile_cases(arch: str) -> list[CompileCase]:
    """What decoders launch on ``arch``: intermediate sizes of 1536 and 14336 in 16 bits and in 32."""
    cases: list[CompileCase] = []
    for dtype in ("bf16", "fp32"):
        for num_columns in (1536, 14336):
            block, num_warps = _launch(num_columns, config_for(CONFIGS, arch))
            for is_gelu in (False, True):
                cases.append(
                    CompileCase(
                        op="silu_mul",
                        name=f"{dtype}, {num_columns}, {'gelu' if is_gelu else 'silu'}",
                        kernel=_gated,
                        signature={
                            "gate_up_ptr": f"*{dtype}",
                            "out_ptr": f"*{dtype}",
                            "num_columns": "i32",
                            "BLOCK": "constexpr",
                            "IS_GELU": "constexpr",
                        },
                        constants={"BLOCK": block, "IS_GELU": is_gelu},
                        aligned=("gate_up_ptr", "out_ptr", "num_columns"),
                        num_warps=num_warps,
                        needs_wide_loads=True,
                    )
                )
    return cases
