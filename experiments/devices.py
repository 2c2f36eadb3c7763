"""A model on a chip, for experiments that go by formulas: its cost model with a drafter, its memory, its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sim.cost_model import CostModel
from sim.hardware import Hardware, kv_blocks, load_hardware
from sim.mean_field import Mix
from sim.model_shape import MODEL_SHAPES, ModelShape
from sim.perturbation import perturbed
from sim.profiles.chips import chip_cost_model
from sim.speculative_step import EAGLE, LOOKUP, draft_shape
from specdec.workload import azure_like

DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees that are tried for the fewest chips that hold a model."""
_SAMPLE, _BLOCK = 20_000, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """``tensor_parallel`` chips that hold one copy of ``target``.

    Attributes:
        kv_tokens: that fit beside the weights.
        draft_cost_ratio: of the drafter, where it goes by a share of a plain step.
    """

    chip: Hardware
    target: ModelShape
    tensor_parallel: int
    draft: str
    model: CostModel
    kv_tokens: int
    draft_cost_ratio: float | None

    def drawn(self, rng: np.random.Generator) -> Device:
        """With another cost model within the errors of this one."""
        return replace(self, model=perturbed(self.model, rng))

    @property
    def origin(self) -> str:
        return str(self.model.metadata.get("origin", "unknown"))

    def describe_draft(self) -> str:
        return describe_draft(self.draft, self.draft_cost_ratio)


def describe_draft(draft: str, draft_cost_ratio: float | None = None) -> str:
    """A way to draft in words."""
    if draft == LOOKUP:
        return "lookup (n-gram, suffix: no device time)"
    if draft == EAGLE:
        cost = (
            "one decoder layer and the head"
            if draft_cost_ratio is None
            else f"{draft_cost_ratio:g} plain steps"
        )
        return f"EAGLE-like head ({cost} per token)"
    return f"draft model {draft}"


def make_device(
    chip: Hardware,
    target: ModelShape,
    draft: str = LOOKUP,
    *,
    tensor_parallel: int | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    memory_utilisation: float = 0.9,
    draft_cost_ratio: float | None = None,
    min_tokens: int = 1,
    cost_model: CostModel | None = None,
    keep_stored: bool = False,
) -> Device:
    """A device.

    Args:
        draft: see ``draft_shape``.
        tensor_parallel: ``None`` is the fewest chips that hold the weights and ``min_tokens`` of KV cache, or where
            none do, the most chips that hold anything.
        dtype, kv_dtype, memory_utilisation: see ``chip_cost_model`` and ``kv_blocks``.
        draft_cost_ratio: of an eagle draft.
        cost_model: in place of the chip's own.
        keep_stored: ``target`` has its bytes already.

    Raises:
        ValueError: the model fits on none of ``DEGREES``, or not on ``tensor_parallel`` chips.
    """
    target = target if keep_stored else target.stored_as(dtype, kv_dtype)
    shape = draft_shape(draft, target)
    ratio = draft_cost_ratio if draft == EAGLE else None
    degrees: Sequence[int] = DEGREES if tensor_parallel is None else (tensor_parallel,)
    error: ValueError | None = None
    found: Device | None = None
    for degree in degrees:
        try:
            blocks = kv_blocks(chip, target, degree, _BLOCK, memory_utilisation, draft=shape)
            model = cost_model or chip_cost_model(
                chip,
                target,
                tensor_parallel=degree,
                draft=shape if ratio is None else None,
                dtype=dtype,
                kv_dtype=kv_dtype,
            )
        except ValueError as problem:
            error = problem
            continue
        found = Device(
            chip=chip,
            target=target,
            tensor_parallel=degree,
            draft=draft,
            model=model,
            kv_tokens=blocks * _BLOCK,
            draft_cost_ratio=ratio,
        )
        if found.kv_tokens >= min_tokens:
            break
    if found is not None:
        return found
    tried = " or ".join(str(degree) for degree in degrees)
    raise ValueError(
        f"{target.name} with draft {draft} does not run on {tried} × {chip.name}: {error}"
    ) from error


def device_of(options: Any, chip: str | Hardware, model: str, draft: str, **others: Any) -> Device:
    """With what the schemas of ``config_extrapolation`` have in common."""
    return make_device(
        chip if isinstance(chip, Hardware) else load_hardware(chip),
        MODEL_SHAPES[model],
        draft,
        **{
            "tensor_parallel": options.tensor_parallel,
            "dtype": options.dtype,
            "memory_utilisation": options.memory_utilisation,
            "draft_cost_ratio": options.draft_cost_ratio,
            **others,
        },
    )


def mix_of(lengths: str, prompt_len: int | None = None, output_len: int | None = None) -> Mix:
    """Of Azure's conversations or code completions, or of requests that are all alike."""
    if lengths == "fixed":
        assert prompt_len is not None and output_len is not None
        return Mix.of([prompt_len], [output_len])
    prompts, outputs = azure_like(lengths).sample(np.random.default_rng(0), _SAMPLE)
    return Mix.of(prompts, outputs)
