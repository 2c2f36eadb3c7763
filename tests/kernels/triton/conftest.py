"""Triton's kernels, interpreted on the CPU or, where ``make gpu-test`` says so, on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton import runtime, sanitizer


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Where the kernels of this run take their tensors from."""
    return runtime.device()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The interpreter works in numpy; torch's threads would only get in its way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """Uninitialised memory holds NaN (and large integers), so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def checked_addresses(request: pytest.FixtureRequest):
    """Whatever a kernel reads or writes must be its own; broken copies are to be noticed by their values."""
    if runtime.IS_INTERPRETED and "broken" not in request.node.name:
        with sanitizer.checked():
            yield
    else:
        yield
