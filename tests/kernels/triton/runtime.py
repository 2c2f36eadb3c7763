"""How the tests of this folder run Triton's kernels.

``TRITON_INTERPRET`` is read when a kernel is decorated, so it is set here, before any is imported: 1 unless the
environment says otherwise, which ``make gpu-test`` does.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

IS_INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"


def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")
