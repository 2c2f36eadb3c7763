"""Schema of the experiment that times kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelBenchConfig:
    """ops: which to time, null is all. chip: sheet of this machine's GPU, for ratios to its roofline."""

    name: str = "kernel_bench"
    ops: list[str] | None = None
    chip: str | None = None
