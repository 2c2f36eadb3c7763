"""``kernels/`` must not pass for the Hugging Face package of that name, which transformers looks for."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_folder_is_no_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_is_not_fooled_at_the_repository_root():
    code = (
        "import transformers.models.llama.modeling_llama\n"
        "from transformers.utils import is_kernels_available\n"
        "print(is_kernels_available())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not _real_package_is_installed():
        assert done.stdout.split()[-1] == "False"


def test_the_kernels_are_importable_from_elsewhere(tmp_path: Path):
    code = "import importlib.util, specdec_kernels; print(importlib.util.find_spec('kernels') is None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _real_package_is_installed() or done.stdout.strip() == "True"


def _real_package_is_installed() -> bool:
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return False
    return True
