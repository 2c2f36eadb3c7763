"""Who may import whom: the contracts of pyproject.toml, and what an import really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ["scheduler", "trace", "metrics", "workload"]
ARRAYS = {"numpy", "polars", "scipy", "simpy", "yaml", "ddsketch"}


def sources(path: Path) -> list[Path]:
    """Python files of a package, or of the module that it would be."""
    return sorted(path.rglob("*.py")) or [file for file in [path.with_suffix(".py")] if file.exists()]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, type checking and function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: absolute imports only"
            yield node.module


def foreign(folder: Path) -> set[str]:
    """Top-level packages outside the standard library."""
    names = {name.partition(".")[0] for file in sources(folder) for name in imported(file)}
    return names - set(sys.stdlib_module_names)


def test_contracts_hold():
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(program), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scheduler_needs_numpy_only():
    assert foreign(ROOT / "specdec" / "scheduler") == {"numpy", "specdec"}


@pytest.mark.parametrize("name", SHARED[1:])
def test_shared_modules_need_no_framework(name: str):
    assert foreign(ROOT / "specdec" / name) <= {*ARRAYS, "specdec"}


def test_the_simulator_needs_arrays_and_the_shared_modules():
    assert foreign(ROOT / "sim") <= {*ARRAYS, "specdec", "sim"}


@pytest.mark.parametrize(
    "module",
    [
        "specdec",
        "specdec.scheduler",
        "specdec.trace",
        "specdec.config",
        "specdec.run",
        "specdec.tracking",
        "specdec.stamp",
    ],
)
def test_light_modules_leave_torch_alone(module: str, tmp_path: Path):
    heavy = ("torch", "transformers", "wandb", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_api_is_exported_lazily():
    import specdec

    assert set(specdec.__all__) == {"LLM", "RequestOutput", "SamplingParams"}
    from specdec import SamplingParams

    assert SamplingParams.__module__ == "specdec.scheduler.request"
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        _ = specdec.LMM
