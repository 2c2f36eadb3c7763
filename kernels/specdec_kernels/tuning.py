"""Launch configurations by GPU architecture, and what each kernel is compiled for without a GPU.

Every op's ``triton.py`` holds its own table, ``CONFIGS``: a mapping from an architecture (``"sm_90"``, ``"gfx942"``) to
its launch configuration, with an entry ``"default"`` for all others, the interpreter among them. Nothing is tuned at
import or at the first call; a table changes when somebody has measured a better entry and says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
"""What kernels are compiled for ahead of time: A100, H100 and H200, B200, RTX PRO 6000 (and 5090), MI300X."""

Config = TypeVar("Config")


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"`` and so on; ``"default"`` for a CPU, where Triton interprets."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config_for(table: Mapping[str, Config], arch: str) -> Config:
    """The entry of ``arch``, or the default."""
    return table.get(arch, table["default"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One specialisation of a kernel, exactly as a launch would make it, to be compiled ahead of time.

    Attributes:
        op: its folder. name: says which specialisation, unique within the op.
        kernel: the ``triton.jit`` function.
        signature: Triton type of every argument in order, e.g. ``{"x": "*bf16", "n": "i32", "BLOCK": "constexpr"}``.
        constants: values of the constants.
        aligned: arguments whose value (or address) is divisible by 16, as most are at run time.
        num_warps, num_stages: of the launch.
        uses_matrix_units: the machine code must contain matrix instructions.
        needs_wide_loads: it must contain global loads of 128 bits, as memory-bound kernels should.
    """

    op: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    uses_matrix_units: bool = False
    needs_wide_loads: bool = False
