"""Experiments on a tiny model: real runs of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.run import execute
from tests.test_configs import build

LIMITS = (
    "tracking=disabled",
    "model.dtype=float32",
    "engine.max_model_len=128",
    "engine.kv_memory_mb=64",
)


def run_tiny(experiment: str, model: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    """The summary of ``experiment`` with two short prompts, run in ``directory``, which is made if missing."""
    prompts = directory.with_suffix(".jsonl")
    prompts.write_text('{"prompt": "one two one two one"}\n{"prompt": "red green red"}\n')
    given = (f"model.name={model}", f"workload.prompts={prompts}", *LIMITS, *overrides)
    directory.mkdir(exist_ok=True)
    return execute(build(*given, experiment=experiment), directory, None)
