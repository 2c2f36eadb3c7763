"""Seconds of a step of decoding rows, with and without drafts: what formulas of speed-ups need.

All rows are alike: a batch of requests with the same context, each with the same number of drafts.

>>> plain_s = step_seconds(cost_model, batch=8, context=1024)
>>> step_s = step_seconds(cost_model, batch=8, context=1024, drafts=Drafts.chain(4))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from sim.cost_model import CostModel, StepFeatures
from sim.curves import FloatArray
from sim.model_shape import MODEL_SHAPES, ModelShape

LOOKUP, EAGLE = "lookup", "eagle"
DRAFT_KINDS = (LOOKUP, EAGLE)
"""Ways to draft beside a draft model, which goes by its own name."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """What each row drafts in a step.

    Attributes:
        depth: passes of the drafter; 0 is plain decoding.
        nodes: tokens to verify: ``depth`` of a chain, more of a tree.
    """

    depth: int = 0
    nodes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= self.nodes or (self.depth == 0) != (self.nodes == 0):
            raise ValueError(
                f"depth={self.depth} and nodes={self.nodes}: a draft has at least a node per level"
            )

    @classmethod
    def chain(cls, k: int) -> Drafts:
        """``k`` tokens after one another."""
        return cls(k, k)


PLAIN = Drafts()


def draft_shape(kind: str, target: ModelShape) -> ModelShape | None:
    """What drafts, as a model: nothing for lookup, one decoder layer and the head for an EAGLE-like draft.

    Args:
        kind: "lookup", "eagle" or the name of a shape.

    Raises:
        ValueError: a draft model that is not smaller than the target.
    """
    if kind == LOOKUP:
        return None
    if kind == EAGLE:
        # It shares the target's embeddings; counted once, they stand for the head that it computes.
        return replace(target, name=f"{target.name}-eagle", num_layers=1, tied_embeddings=True)
    draft = MODEL_SHAPES[kind]
    if draft.num_params >= target.num_params:
        raise ValueError(
            f"draft model {kind} has as many parameters as {target.name}: choose a smaller one, or eagle or lookup"
        )
    return draft


def step_seconds(
    model: CostModel,
    batch: ArrayLike,
    context: ArrayLike,
    drafts: Drafts = PLAIN,
    *,
    draft_cost_ratio: float | None = None,
) -> FloatArray:
    """Seconds of a step, of the broadcast shape.

    Args:
        batch: rows, whole numbers >= 1.
        context: cached tokens of each.
        drafts: of each.
        draft_cost_ratio: a pass of the drafter takes this share of a plain step, whatever ``model`` says of drafts.
    """
    rows, each = np.broadcast_arrays(np.asarray(batch, np.float64), np.asarray(context, np.float64))
    nothing, tokens, cached = np.zeros_like(rows), rows * (1 + drafts.nodes), rows * each
    verified = model.predict(StepFeatures(tokens, tokens, rows, tokens, cached, *[nothing] * 5))
    seconds = verified.verify_s + verified.sample_s + verified.overhead_s
    if drafts.depth == 0:
        return seconds
    if draft_cost_ratio is not None:
        return seconds + drafts.depth * draft_cost_ratio * step_seconds(model, rows, each)
    # A level of a tree is one pass over all its nodes: as a chain of so many more rows over the same context.
    wide = np.ceil(rows * drafts.nodes / drafts.depth)
    steps = np.full_like(rows, drafts.depth)
    chain = wide * (1 + drafts.depth)
    drafting = StepFeatures(
        chain, chain, wide, chain, cached, nothing, nothing, steps, wide, wide * drafts.depth
    )
    return seconds + model.predict(drafting).draft_s
