"""Compiles the C++ decoder at first use and loads it.

The result is cached by a hash of sources, flags, compiler and CPU, so later processes only load it. The library is
linked without an OpenMP runtime of its own: its symbols resolve to the one torch has loaded, since two thread pools
on the same cores would starve each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  (loads the OpenMP runtime that the library uses)

log = logging.getLogger(__name__)
COMPILE_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-w"]

# What a flavour needs: CPU flags as in /proc/cpuinfo, each with the compiler option that uses it.
AVX2 = {"avx2": "-mavx2", "fma": "-mfma"}
AVX512 = AVX2 | {f"avx512{part}": f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")}
AVX512 |= {"avx512_bf16": "-mavx512bf16"}
AMX = AVX512 | {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"}
FLAVOURS = {"amx": AMX, "avx512": AVX512, "avx2": AVX2}  # the best first
EMULATED = "emulated"  # the AMX code on tiles in plain C++, to test it where there is no AMX


def cache_dir() -> Path:
    """``SPECDEC_NATIVE_CACHE``, else ``native`` in the folder where models are cached."""
    own = os.environ.get("SPECDEC_NATIVE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("SPECDEC_CACHE")
    if base:
        return Path(base) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec" / "native"


@functools.cache
def cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def compiler() -> str | None:
    """``CXX``, else the first of g++ and clang++ on the path."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def native_flavours() -> list[str]:
    """Those this CPU can run, the best first."""
    return [name for name, needs in FLAVOURS.items() if needs.keys() <= cpu_flags()]


@functools.cache
def is_available() -> tuple[bool, str]:
    """Whether the native decoder can run here (Linux on x86-64 with AVX2, and a C++ compiler), and if not, why."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False, f"it needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if not native_flavours():
        return False, f"the CPU lacks {', '.join(flag for flag in AVX2 if flag not in cpu_flags())}"
    if compiler() is None:
        return False, "no C++ compiler was found (set CXX or install g++)"
    try:
        library()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        return False, f"the C++ decoder could not be built: {detail.strip()[-500:]}"
    return True, ""


@functools.cache
def library(flavour: str | None = None) -> ctypes.CDLL:
    """The loaded library, compiled first if the cache has none.

    Raises:
        subprocess.CalledProcessError: the compiler failed; ``stderr`` says why.
        OSError: it cannot be loaded, or the kernel refuses AMX.
    """
    flavour = flavour or native_flavours()[0]
    lib = ctypes.CDLL(str(_build(flavour)))
    lib.specdec_new_workspace.restype = ctypes.c_void_p
    lib.specdec_free_workspace.argtypes = [ctypes.c_void_p]
    lib.specdec_advise_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.specdec_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    lib.specdec_forward.restype = None
    lib.specdec_move_slots.argtypes = [ctypes.c_void_p]
    lib.specdec_move_slots.restype = None
    lib.specdec_head_inputs.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    lib.specdec_head_inputs.restype = None
    lib.specdec_top.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int32] * 4]
    lib.specdec_top.restype = None
    if flavour == "amx" and lib.specdec_enable_amx() != 0:
        raise OSError("the operating system refuses AMX tile state to this process")
    return lib


def _options(flavour: str) -> list[str]:
    if flavour != EMULATED:
        return [*COMPILE_FLAGS, *FLAVOURS[flavour].values()]
    vectors = next(name for name in native_flavours() if name != "amx")
    return [*_options(vectors), "-DSPECDEC_EMULATE_TILES"]


def _build(flavour: str) -> Path:
    command = compiler()
    assert command is not None
    folder = Path(__file__).parent
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    flags = _options(flavour)
    digest = hashlib.sha256(repr((version, flags)).encode())
    for source in sorted(folder.glob("*.?pp")):
        digest.update(source.read_bytes())
    target = cache_dir() / f"decoder-{flavour}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built, unlinked = Path(scratch) / "decoder.so", Path(scratch) / "decoder.o"
        for step in (
            [command, *flags, "-c", str(folder / "decoder.cpp"), "-o", str(unlinked)],
            [command, "-shared", "-o", str(built), str(unlinked)],
        ):
            subprocess.run(step, capture_output=True, text=True, check=True)
        built.replace(target)
    log.info("compiled the native decoder (%s) in %.1f s", flavour, time.perf_counter() - start_s)
    return target
