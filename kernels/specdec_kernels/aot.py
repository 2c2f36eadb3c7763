"""Kernels compiled ahead of time for GPUs that are not here: registers, spills, shared memory, instructions.

Every op lists its specialisations (``compile_cases`` in its ``triton.py``); Triton compiles each for an architecture
without such a device, and the assemblers that come with Triton make the machine code that is read here.

    python -m specdec_kernels.aot                              # a table of all ops, for all architectures
    python -m specdec_kernels.aot --ops sample --archs sm_90
    python -m specdec_kernels.aot --quick                      # each specialisation for two architectures
    python -m specdec_kernels.aot --write kernels/BUDGET.md    # what `make kernel-budget` runs

The exit status is 1 if any kernel spills, asks for more shared or tensor memory than the chip has, or lacks the
instructions that its op promises.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from specdec_kernels.tuning import ARCHITECTURES, CompileCase

SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Most shared memory of one block: CUDA C++ Programming Guide, table of technical specifications; CDNA 3's LDS."""
TENSOR_COLUMNS = 512
"""Columns of a multiprocessor's tensor memory, where sm_100 has it (PTX ISA, tcgen05)."""

_NVIDIA_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|UTC\w*MMA)\b")
_NVIDIA_WIDE = re.compile(r"\bLDG(?:STS)?\.E\S*\.(?:128|256)\b|\bUTMALDG|\bUBLKCP")
_NVIDIA_SPILL = re.compile(r"\b(?:STL|LDL)(?:\.|\b)")
_NVIDIA_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_AMD_MATRIX = re.compile(r"\bv_(?:s?mfmac?|wmma)_\w+")
_AMD_WIDE = re.compile(r"\b(?:global|buffer)_load_(?:lds_)?dwordx4\b")
_AMD_LINE = re.compile(r"^\s+(?:[vs]_|global_|buffer_|ds_|flat_)\w+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one specialisation takes on one architecture.

    Attributes:
        registers: of a thread (vector registers on AMD GPUs).
        spills: loads and stores of spilled registers in the machine code.
        shared_bytes: of a block.
        tensor_columns: of tensor memory, for a block.
        matrix_instructions, wide_loads: how many the machine code has; wide are global loads of 128 bits and more,
            bulk copies included.
        instructions: all of them.
    """

    op: str
    name: str
    arch: str
    registers: int
    spills: int
    shared_bytes: int
    tensor_columns: int
    matrix_instructions: int
    wide_loads: int
    instructions: int
    problems: tuple[str, ...] = ()


def op_modules(names: Sequence[str] = ()) -> dict[str, ModuleType]:
    """The ``triton.py`` of each op by name, of all that have one if none is named.

    Raises:
        ValueError: an op that does not exist.
    """
    folder = Path(__file__).parent
    known = sorted(path.parent.name for path in folder.glob("*/triton.py"))
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"ops {sorted(unknown)} do not exist: choose from {known}")
    return {name: importlib.import_module(f"specdec_kernels.{name}.triton") for name in names or known}


def compile_case(case: CompileCase, arch: str) -> Resources:
    """Compile ``case`` for ``arch`` and read its machine code.

    Raises:
        ValueError: this process interprets Triton's kernels, or the architecture is none of those known.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if knobs.runtime.interpret:
        raise ValueError(
            "TRITON_INTERPRET=1: kernels are interpreted in this process, unset it to compile them"
        )
    if arch not in SHARED_BYTES:
        raise ValueError(f"arch={arch!r} is unknown: choose from {list(SHARED_BYTES)}")
    arguments = list(case.signature)
    source = ASTSource(
        case.kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constants),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    is_amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch[3:]), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    memory = {
        "shared_bytes": int(compiled.metadata.shared),
        "tensor_columns": int(getattr(compiled.metadata, "tmem_size", None) or 0),
    }
    counts = _read_amd(compiled.asm["amdgcn"]) if is_amd else _read_nvidia(compiled.asm["cubin"])
    found = Resources(case.op, case.name, arch, **counts | memory)  # pyright: ignore[reportArgumentType]
    return replace(found, problems=tuple(problems_of(case, found)))


def problems_of(case: CompileCase, found: Resources) -> Iterable[str]:
    """In what ``found`` is beyond the chip, or short of what the op promises."""
    if found.spills:
        yield f"{found.spills} spills"
    if found.shared_bytes > SHARED_BYTES[found.arch]:
        yield f"{found.shared_bytes} bytes of shared memory of {SHARED_BYTES[found.arch]}"
    if found.tensor_columns > TENSOR_COLUMNS:
        # Triton lets it pass; the assembler makes a trap of the kernel.
        yield f"{found.tensor_columns} columns of tensor memory of {TENSOR_COLUMNS}"
    if case.uses_matrix_units and not found.matrix_instructions:
        yield "no matrix instructions"
    if case.needs_wide_loads and not found.wide_loads:
        yield "no 128-bit loads"


def _read_nvidia(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+)", text)
    assert usage is not None, "cuobjdump shows no resource usage"
    lines = _NVIDIA_LINE.findall(text)
    return {
        "registers": int(usage[1]),
        "spills": sum(bool(_NVIDIA_SPILL.search(line)) for line in lines),
        "matrix_instructions": sum(bool(_NVIDIA_MATRIX.search(line)) for line in lines),
        "wide_loads": sum(bool(_NVIDIA_WIDE.search(line)) for line in lines),
        "instructions": len(lines),
    }


def _read_amd(text: str) -> dict[str, int]:
    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        assert match is not None, f"the assembly has no {key}"
        return int(match[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "matrix_instructions": len(_AMD_MATRIX.findall(text)),
        "wide_loads": len(_AMD_WIDE.findall(text)),
        "instructions": len(_AMD_LINE.findall(text)),
    }


def cases_of(name: str, archs: Sequence[str], quick: bool = False) -> list[tuple[CompileCase, str]]:
    """The specialisations of one op and what to compile them for.

    Args:
        quick: for the second of ``archs`` and one of the others in turn, instead of all.
    """
    module = op_modules([name])[name]
    found = [(number, case, arch) for arch in archs for number, case in enumerate(module.compile_cases(arch))]
    if not quick:
        return [(case, arch) for _, case, arch in found]
    others = [arch for place, arch in enumerate(archs) if place != 1]
    return [
        (case, arch)
        for number, case, arch in found
        if arch == archs[1] or arch == others[number % len(others)]
    ]


def compile_op(name: str, archs: Sequence[str], quick: bool = False) -> list[Resources]:
    """What :func:`cases_of` lists, compiled."""
    return [compile_case(case, arch) for case, arch in cases_of(name, archs, quick)]


def compile_ops(
    names: Sequence[str] = (),
    archs: Sequence[str] = ARCHITECTURES,
    *,
    quick: bool = False,
    num_processes: int | None = None,
) -> list[Resources]:
    """All specialisations of ``names`` for ``archs``, compiled side by side."""
    ops = list(op_modules(names))
    if quick:
        work = [(name, tuple(archs), True) for name in ops]
    else:
        work = [(name, (arch,), False) for name in ops for arch in archs]
    with ProcessPoolExecutor(num_processes or os.cpu_count()) as pool:
        parts = pool.map(compile_op, *zip(*work, strict=True))
        return [resources for part in parts for resources in part]


def budget_page(found: Sequence[Resources]) -> str:
    """The table as a Markdown page."""
    import triton

    lines = [
        "# What the Triton kernels take",
        "",
        f"Compiled ahead of time with Triton {triton.__version__}; generated by `make kernel-budget`, do not edit.",
        "No GPU was involved: these are facts about machine code, not about time. Spills are loads and stores of",
        "registers in local memory; wide loads are global loads of 128 bits or more, bulk copies included.",
        "",
    ]
    for op in dict.fromkeys(resources.op for resources in found):
        lines += [
            f"## {op}",
            "",
            "| specialisation | arch | registers | spills | shared, bytes | tensor columns | matrix instr. | "
            "wide loads | instr. |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one.name} | {one.arch} | {one.registers} | {one.spills} | {one.shared_bytes} | "
            f"{one.tensor_columns} | {one.matrix_instructions} | {one.wide_loads} | {one.instructions} |"
            + (f" **{'; '.join(one.problems)}**" if one.problems else "")
            for one in found
            if one.op == op
        ]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--ops", nargs="*", default=[], help="all by default")
    parser.add_argument("--archs", nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="each specialisation for two architectures")
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--write", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    found = compile_ops(options.ops, options.archs, quick=options.quick, num_processes=options.processes)
    page = budget_page(found)
    if options.write:
        options.write.write_text(page, "utf-8")
    else:
        print(page)
    bad = [one for one in found if one.problems]
    for one in bad:
        print(f"{one.op}, {one.name}, {one.arch}: {'; '.join(one.problems)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
