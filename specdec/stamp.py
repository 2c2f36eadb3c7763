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


def git_stamp(package: Path | None = None) -> dict[str, Any]:
    """Revision of the source tree that holds ``package`` (default: this one), and whether it had changes.

    ``None`` outside git, and where the package is merely installed inside somebody else's repository.
    """
    folder = package or Path(__file__).resolve().parent
    revision, status = _git(folder, "rev-parse", "HEAD"), None
    if revision and _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        status = _git(folder, "status", "--porcelain")
    return {
        "revision": None if status is None else revision,
        "dirty": None if status is None else bool(status),
    }


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gb": round(memory_bytes / 2**30, 1),
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
