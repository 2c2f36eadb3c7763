"""Broken copies of an op's module: proof that a test would notice.

>>> broken(rms_norm, "/ num_columns", "").rms_norm(x, weight, 1e-5)
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def broken(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of ``module`` in whose source ``old``, which must occur, is replaced by ``new`` everywhere."""
    source = Path(str(module.__file__)).read_text("utf-8")
    assert old in source, f"{module.__name__} does not contain {old!r}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "broken.py"  # the interpreter reads kernels' source from a file
        path.write_text(source.replace(old, new), "utf-8")
        name = f"broken_{abs(hash((module.__name__, old, new)))}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        sys.modules[name] = copy  # dataclasses look their module up
        spec.loader.exec_module(copy)
    return copy
