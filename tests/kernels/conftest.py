"""Models of every case and flavour that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.native import CASES, FLAVOURS, Model


@pytest.fixture(scope="module", params=[(c, f) for f in FLAVOURS for c in CASES], ids="-".join)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(*request.param)


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model("llama", FLAVOURS[0])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two would spin at every barrier while other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
