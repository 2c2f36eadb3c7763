"""specdec: a speculative-decoding executor and a scheduling simulator that share one scheduler.

>>> from specdec import LLM, SamplingParams
>>> llm = LLM(model="smollm2-135m", drafter="ngram")
>>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=16))[0].text

The names below load torch on first use, so ``import specdec.scheduler`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.llm import LLM
    from specdec.output import RequestOutput
    from specdec.scheduler.request import SamplingParams

__all__ = ["LLM", "RequestOutput", "SamplingParams"]
_HOME = {
    "LLM": "specdec.llm",
    "RequestOutput": "specdec.output",
    "SamplingParams": "specdec.scheduler.request",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
