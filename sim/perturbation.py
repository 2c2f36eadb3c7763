"""Cost models that might be true instead: each operator off by a factor, as its stated error allows.

Every curve has a ``relative_std``, the spread of measured seconds around it. Here the whole curve is off by one factor,
log-normal with that spread, the operators independently of each other. That is the cautious reading: errors that differ
from size to size would cancel in part.

>>> other = perturbed(cost_model, np.random.default_rng(0))
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from sim.cost_model import CostModel

_FOLLOWS = {
    "verify_pair_s": "prefill_attention",
    "prefill_context_s": "prefill_attention",
    "decode_context_s": "decode_attention",
    "mixed_row_s": "mixed_attention",
    "mixed_row_token_s": "mixed_attention",
    "draft_context_s": "draft_step",
}
"""Coefficient → the curve whose error it has."""
_HOST = ("overhead_s", "overhead_row_s", "draft_row_s")


def perturbed(model: CostModel, rng: np.random.Generator) -> CostModel:
    """``model`` with every operator's seconds times a factor exp(relative_std · z), z standard normal."""
    operators = model.operators
    # One draw for each name in a fixed order, so that models with and without a draft have the same errors elsewhere.
    names: tuple[str, ...] = (
        "dense",
        "decode_attention",
        "prefill_attention",
        "lm_head",
        "sampling",
        "mixed_attention",
        "all_reduce",
        "overhead",
        "draft_step",
        "draft_prefill",
    )
    numbers: list[float] = rng.standard_normal(len(names)).tolist()
    draws: dict[str, float] = {name: number for name, number in zip(names, numbers, strict=True)}  # noqa: C416
    changes: dict[str, Any] = {}
    factors: dict[str, float] = {}
    for name, curve in operators.curves():
        factors[name] = math.exp(curve.relative_std * draws[name])
        seconds = tuple(value * factors[name] for value in curve.seconds)
        changes[name] = replace(curve, seconds=seconds)
    if operators.decode_surface:
        changes["decode_surface"] = operators.decode_surface.times(factors["decode_attention"])
    for name, curve_name in _FOLLOWS.items():
        changes[name] = getattr(operators, name) * factors.get(curve_name, 1.0)
    host = math.exp(operators.overhead_relative_std * draws["overhead"])
    for name in _HOST:
        changes[name] = getattr(operators, name) * host
    return CostModel(
        replace(operators, **changes),
        num_layers=model.num_layers,
        reduced_bytes_per_token=model.reduced_bytes_per_token,
        metadata=model.metadata,
    )
