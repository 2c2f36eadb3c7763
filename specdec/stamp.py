"""Where a result came from: git revision, software versions, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "triton", "numpy", "simpy", "hydra-core", "wandb")
CPU_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")


def stamp() -> dict[str, Any]:
    """Git, software and hardware of this process, as plain JSON values. Missing facts are ``None``."""
    return {"git": git_stamp(), "software": software_stamp(), "hardware": hardware_stamp()}


def git_stamp(folder: Path | None = None) -> dict[str, Any]:
    """Revision of the source tree, and whether it had local changes; ``None`` outside git."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folder or Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"revision": revision, "dirty": None if status is None else bool(status)}


def software_stamp() -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def hardware_stamp() -> dict[str, Any]:
    import torch

    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gb": round(pages / 2**30, 1),
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
