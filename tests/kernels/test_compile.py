"""Every specialisation of every kernel compiles for every architecture, without spills, within the chip's limits.

Compiling needs a process that does not interpret, so each test starts one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from specdec_kernels import aot
from specdec_kernels.tuning import ARCHITECTURES

FOLDER = Path(aot.__file__).parent
OPS = sorted(path.parent.name for path in FOLDER.glob("*/triton.py"))
BUDGET = FOLDER.parent / "BUDGET.md"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows_of(page: str) -> dict[str, set[tuple[str, str]]]:
    """Specialisations and architectures by op, as a page of the budget lists them."""
    rows: dict[str, set[tuple[str, str]]] = {}
    op = ""
    for line in page.splitlines():
        if line.startswith("## "):
            op = line[3:]
        elif found := re.match(r"\| (.+?) \| (sm_\d+|gfx\w+) \|", line):
            rows.setdefault(op, set()).add((found[1], found[2]))
    return rows


@pytest.mark.parametrize("op", OPS)
def test_an_op_keeps_to_its_budget(op: str):
    """Each specialisation for sm_90 and one other architecture; `make kernel-budget` compiles for all."""
    done = run("-m", "specdec_kernels.aot", "--ops", op, "--processes", "1", "--quick")
    found = rows_of(done.stdout)[op]
    assert done.returncode == 0, done.stderr[-2000:]
    assert found == {(case.name, arch) for case, arch in aot.cases_of(op, ARCHITECTURES, quick=True)}
    assert {case.name for case, _ in aot.cases_of(op, ["sm_90"])} == {
        name for name, arch in found if arch == "sm_90"
    }


@pytest.mark.parametrize("op", OPS)
def test_the_budget_lists_every_specialisation_and_no_problem(op: str):
    page = BUDGET.read_text("utf-8")
    expected = {(case.name, arch) for case, arch in aot.cases_of(op, ARCHITECTURES)}
    assert rows_of(page)[op] == expected, "run `make kernel-budget`"
    assert {"sm_90", "sm_100", "sm_120"} <= {arch for _, arch in expected}
    assert "**" not in page


BROKEN = """
import dataclasses
from specdec_kernels import aot
from specdec_kernels.rms_norm.triton import compile_cases
for change in (
    dict(uses_matrix_units=True),
    dict(needs_wide_loads=True, aligned=()),
    dict(constants={"BLOCK": 1 << 8 + WIDTH, "HAS_RESIDUAL": True}, num_warps=1),  # 256 elements a thread
):
    case = dataclasses.replace(compile_cases("ARCH")[-1], **change)
    print(*aot.compile_case(case, "ARCH").problems)
"""


@pytest.mark.parametrize(("arch", "log_warp"), [("sm_90", 5), ("gfx942", 6)])
def test_a_kernel_that_breaks_its_promise_is_noticed(arch: str, log_warp: int):
    done = run("-c", BROKEN.replace("ARCH", arch).replace("WIDTH", str(log_warp)))
    assert done.returncode == 0, done.stderr[-2000:]
    matrix, loads, spills = done.stdout.splitlines()
    assert matrix == "no matrix instructions" and "no 128-bit loads" in loads
    assert re.match(r"\d+ spills", spills)


def test_more_memory_than_the_chip_has_is_a_problem():
    (case, _), *_ = aot.cases_of("linear", ["sm_100"])
    found = aot.Resources("linear", case.name, "sm_100", 128, 0, 227 << 10, 512, 8, 8, 400)
    assert not list(aot.problems_of(case, found))
    beyond = dataclasses.replace(found, shared_bytes=(227 << 10) + 1, tensor_columns=528)
    assert len(list(aot.problems_of(case, beyond))) == 2


def test_what_is_asked_for_must_exist():
    with pytest.raises(ValueError, match=r"ops \['nothing'\] do not exist"):
        aot.op_modules(["nothing"])
    assert set(aot.SHARED_BYTES) == set(ARCHITECTURES)
