"""Acceptance where nobody measured it: rates that published or own measurements suggest, for tasks and drafts.

Given are mean tokens per verification τ and the length of the chain they were measured with; the rate α is the one at
which ``sim.closed_form.expected_tokens`` gives that τ. Sources:

* lookup: n-gram lookup (n ≤ 3, latest match, 10 drafts) simulated on 15,000 tokens of SmolLM2-135M's own answers; a
  larger model on other prompts will differ;
* eagle: EAGLE-3 with a chain of 7 on Qwen3-8B at temperature 1, as published with DSpark: GSM8K 5.30, HumanEval 4.33,
  MT-Bench 2.66. Other tasks take MT-Bench's;
* draft model: 2.28 of Spec-Bench (Vicuna-7B, greedy); its draft length is taken to be 5, for all tasks.

Whoever can measure should: ``+experiment=draft_sweep`` takes minutes.

>>> round(assumed_alpha("eagle", "maths"), 2)
0.88
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

from sim.closed_form import FloatArray, expected_tokens
from sim.speculative_step import EAGLE, LOOKUP

ASSUMED_STD = 0.1
"""Standard deviation of an assumed α: about what lies between tasks of one kind."""
_CHAT = "chat"
_TAU: dict[str, tuple[int, dict[str, float]]] = {
    LOOKUP: (
        10,
        {
            "chat": 1.63,
            "code": 1.5,
            "maths": 1.85,
            "writing": 1.3,
            "summarisation": 1.84,
            "translation": 2.65,
            "extraction": 3.0,
            "rag": 2.0,
        },
    ),
    EAGLE: (7, {"chat": 2.66, "code": 4.33, "maths": 5.30}),
    "draft model": (5, {"chat": 2.28}),
}
TASKS = tuple(_TAU[LOOKUP][1])
SOURCES = {
    LOOKUP: "n-gram lookup on SmolLM2-135M's answers",
    EAGLE: "EAGLE-3's published τ on Qwen3-8B (chain of 7, temperature 1)",
    "draft model": "Spec-Bench's τ of a draft model on Vicuna-7B",
}


def kind_of(draft: str) -> str:
    """Row of the table that a draft belongs to."""
    return draft if draft in (LOOKUP, EAGLE) else "draft model"


def assumed_alpha(draft: str, task: str) -> float:
    """The rate of one task."""
    length, by_task = _TAU[kind_of(draft)]
    return rate_of(by_task.get(task, by_task[_CHAT]), length)


def rate_of(tau: float, num_drafts: int) -> float:
    """α at which a chain of ``num_drafts`` gives ``tau`` tokens per verification.

    Raises:
        ValueError: no rate does.
    """
    if not 1.0 <= tau <= num_drafts + 1.0:
        raise ValueError(f"tau={tau} of {num_drafts} drafts must be in [1, {num_drafts + 1}]")
    root = brentq(lambda rate: float(expected_tokens(rate, num_drafts)) - tau, 0.0, 1.0)
    return cast(float, root)


def assumed_survival(draft: str, tasks: Mapping[str, float], num_positions: int) -> FloatArray:
    """P(the first j drafts are accepted), j = 1 … ``num_positions``, over a mix of tasks: float64.

    Args:
        tasks: shares, of any sum > 0; empty is chat alone.
    """
    shares = dict(tasks) or {_CHAT: 1.0}
    total = sum(shares.values())
    powers = np.arange(1, num_positions + 1)
    parts = [share / total * assumed_alpha(draft, task) ** powers for task, share in shares.items()]
    return np.asarray(np.sum(parts, axis=0), np.float64)


def is_of_another_task(draft: str, tasks: Mapping[str, float]) -> list[str]:
    """Tasks of the mix for which no figure of this draft is known, so that chat's stands in."""
    return [task for task in tasks if task not in _TAU[kind_of(draft)][1]]
