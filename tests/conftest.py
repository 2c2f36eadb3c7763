"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before any kernel is decorated; `make gpu-test` compiles them


@pytest.fixture(scope="session")
def smollm2_float32():
    """SmolLM2-135M-Instruct with its exact dequantised weights."""
    import torch

    from specdec.model.weights import load_model

    return load_model("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_bfloat16():
    import torch

    from specdec.model.weights import load_model

    return load_model("smollm2-135m", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer."""
    from tests.helpers.models import tiny_model_dir

    return tiny_model_dir("llama", tmp_path_factory.mktemp("tiny_llama"), seed=0)


@pytest.fixture(scope="session")
def tiny_draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random Llama of the same vocabulary."""
    from tests.helpers.models import tiny_model_dir

    return tiny_model_dir("llama", tmp_path_factory.mktemp("tiny_draft"), seed=1)
