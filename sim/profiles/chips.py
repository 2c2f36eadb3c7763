"""A chip's fitted curves, and the cost model of any model shape that they give.

Where a chip's profile ships with the package (``sim/profiles/data``), ``hardware=<chip>`` uses it; the sheet's
``timings: roofline`` forces the formulas of :mod:`sim.roofline` instead. What a profile lacks (drafting on the host,
reading a long context for a short chunk, …) still comes from that roofline. ``metadata["origin"]`` and the sources of
the curves say what was used. ``timings`` may also be the folder of a cost model (``CostModel.save``), as
``+experiment=calibrate`` writes one for the device that it ran on: that is of one model on one device, and taken as
it is.

How the curves carry over from the measured shapes to a model's:

* matrix products go by (m, n, k), see :mod:`sim.profiles.gemm`;
* attention of decoding rows goes by the bytes of keys and values that are read, with one curve for each number of
  query heads per KV head (the nearest measured one);
* attention of prompts goes by query-key pairs · query heads · head size;
* attention of rows beside chunks likewise, as there each query head reads for itself;
* an all-reduce goes by bytes, with one curve for each number of devices (the nearest one above, if any);
* sampling goes by logits;
* norms, rotary embedding and activation go by the bytes that they move.

Attention of 2 to 15 query tokens over a long context, which verification is, stands in no published table: it is
modelled as the longer of one read of the KV cache and all query-key pairs.

>>> chip_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"]).metadata["origin"]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sim.cost_model import CostModel, roofline_cost_model
from sim.curves import Curve, FloatArray, Operators
from sim.hardware import Hardware, free_bytes, holds_cost_model
from sim.model_shape import DTYPE_BYTES, ModelShape
from sim.profiles.chip_profile import (
    DATA,
    ChipProfile,
    MixedAttention,
    load_profile,
    profile_of,
    shipped_profile,
)
from sim.profiles.gemm import GemmGrid
from sim.roofline import RELATIVE_STD, Efficiencies, roofline_operators

__all__ = [
    "DATA",
    "ChipProfile",
    "MixedAttention",
    "chip_cost_model",
    "draft_cost_model",
    "fitted_operators",
    "load_profile",
    "measured_cost_model",
    "profile_of",
    "shipped_profile",
]

_ELEMENTWISE_KERNELS = 4  # two norms, rotary embedding, activation
_TOKENS = tuple(
    sorted(
        {
            *range(1, 34),
            *range(36, 65, 4),
            *(65, 72, 80, 88, 96, 97, 104, 112, 120, 128, 129, 144, 160, 176, 192, 193, 208, 224, 240, 256),
            *(257, 288, 320, 384, 448, 512, 513, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048, 2560),
            *(3072, 4096, 6144, 8192, 16384, 32768),
        }
    )
)
"""Sizes at which the curve over tokens has its points: dense where batches of decoding rows lie."""


def chip_cost_model(
    hardware: Hardware,
    model: ModelShape,
    *,
    tensor_parallel: int = 1,
    draft: ModelShape | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    efficiencies: Efficiencies | None = None,
) -> CostModel:
    """The cost model of ``model`` from the chip's fitted profile, or from its roofline where there is none.

    Args:
        tensor_parallel, draft, dtype, kv_dtype, efficiencies: see ``roofline_cost_model``.

    Raises:
        ValueError: see ``roofline_cost_model``, :func:`profile_of` and :func:`measured_cost_model`.
    """
    if holds_cost_model(hardware.timings):
        free_bytes(hardware, model.stored_as(dtype, kv_dtype), tensor_parallel)
        return measured_cost_model(
            hardware.timings, model, tensor_parallel=tensor_parallel, draft=draft, dtype=dtype
        )
    base = roofline_cost_model(
        hardware,
        model,
        tensor_parallel=tensor_parallel,
        draft=draft,
        dtype=dtype,
        kv_dtype=kv_dtype,
        efficiencies=efficiencies,
    )
    profile = profile_of(hardware)
    if profile is None or _grid(profile, dtype) is None:
        return base
    model = model.stored_as(dtype, kv_dtype)
    draft = draft.stored_as(dtype, kv_dtype) if draft else None
    operators = fitted_operators(profile, base.operators, model, tensor_parallel, draft, dtype)
    metadata = base.metadata | {"origin": f"fitted: {profile.source} ({profile.measured_with})"}
    return CostModel(
        operators,
        num_layers=base.num_layers,
        reduced_bytes_per_token=base.reduced_bytes_per_token,
        metadata=metadata,
    )


def measured_cost_model(
    folder: str,
    model: ModelShape,
    *,
    tensor_parallel: int = 1,
    draft: ModelShape | None = None,
    dtype: str = "bfloat16",
) -> CostModel:
    """The cost model in ``folder``, if it is of this model; its draft model's curves only if ``draft`` is that one.

    Raises:
        ValueError: a folder of another model, draft model or data type, or several devices.
    """
    found = CostModel.load(folder)
    name, measured_dtype = found.metadata.get("model"), found.metadata.get("dtype")
    if name != model.name:
        raise ValueError(
            f"hardware.timings={folder} is of model {name!r}, not of {model.name!r}: simulate that model, or calibrate "
            "this one"
        )
    if found.num_layers != model.num_layers:
        raise ValueError(
            f"hardware.timings={folder} is of {found.num_layers} decoder layers, {model.name} has {model.num_layers}"
        )
    if tensor_parallel != 1:
        raise ValueError(
            f"hardware.timings={folder} was measured on one device, not on {tensor_parallel}: use tensor_parallel=1 or "
            "another hardware.timings"
        )
    if measured_dtype in DTYPE_BYTES and measured_dtype != dtype:
        raise ValueError(f"hardware.timings={folder} was measured in {measured_dtype}, not in {dtype}")
    if draft is None:
        operators = replace(found.operators, draft_step=None, draft_prefill=None)
        return CostModel(operators, num_layers=found.num_layers, metadata=found.metadata)
    if found.metadata.get("draft") != draft.name or found.operators.draft_step is None:
        raise ValueError(
            f"hardware.timings={folder} holds no times of the draft model {draft.name!r}: calibrate with "
            "drafter=draft_model, or draft without a model"
        )
    return found


def draft_cost_model(hardware: Hardware, draft: ModelShape, dtype: str = "bfloat16") -> CostModel:
    """Of a draft model that has ``hardware`` for itself.

    Raises:
        ValueError: weights that do not fit, a chip without the data type, or timings of another model.
    """
    free_bytes(hardware, draft)
    if holds_cost_model(hardware.timings):
        raise ValueError(
            f"hardware.timings={hardware.timings} is of one model, not of a draft model by itself: give another "
            "experiment.draft_hardware"
        )
    base = roofline_operators(
        hardware, draft, tensor_parallel=1, draft=draft, dtype=dtype, efficiencies=Efficiencies()
    )
    profile = profile_of(hardware)
    if profile is not None and _grid(profile, dtype) is not None:
        base = fitted_operators(profile, base, draft, 1, draft, dtype)
    return CostModel(base, num_layers=draft.num_layers)


def fitted_operators(
    profile: ChipProfile,
    base: Operators,
    model: ModelShape,
    tensor_parallel: int,
    draft: ModelShape | None,
    dtype: str,
) -> Operators:
    """``base`` with all that the profile has put in its place.

    Args:
        base: the roofline's operators of the same model.
        model, draft: as stored in ``dtype``.
    """
    grid = _grid(profile, dtype)
    assert grid is not None
    heads, kv_heads = model.num_heads // tensor_parallel, model.kv_heads_per_device(tensor_parallel)
    entry_bytes = 2.0 * kv_heads * model.head_dim * model.kv_bytes_per_element
    pair_dims = float(heads * model.head_dim)
    group = _nearest_group(profile.decode, heads / kv_heads)
    prefill = _rescaled(profile.prefill, pair_dims)
    context_s = profile.prefill_context_dim_s
    found = replace(
        base,
        dense=_dense(profile, grid, model, tensor_parallel, base.dense.relative_std),
        lm_head=_head(profile, grid, model, tensor_parallel),
        decode_attention=_rescaled(profile.decode[group], entry_bytes),
        decode_row_entries=profile.decode_row_entries,
        decode_context_s=profile.decode_context_dim_s.get(group, 0.0) * model.head_dim,
        prefill_attention=prefill,
        prefill_token_pairs=profile.prefill_token_pairs,
        prefill_context_s=base.prefill_context_s if context_s is None else context_s * model.head_dim,
        verify_pair_s=prefill.slopes[-1],
    )
    if profile.mixed is not None:
        found = replace(
            found,
            mixed_attention=_rescaled(profile.mixed.curve, pair_dims),
            mixed_row_s=profile.mixed.row_head_s * heads,
            mixed_row_token_s=profile.mixed.row_token_head_s * heads,
        )
    if profile.sampling is not None:
        found = replace(found, sampling=_rescaled(profile.sampling, float(model.vocab_size)))
    if tensor_parallel > 1 and profile.all_reduce:
        found = replace(found, all_reduce=_nearest_count(profile.all_reduce, tensor_parallel))
    if draft is not None:
        found = replace(
            found,
            draft_step=_draft_step(profile, grid, draft, found.sampling, model),
            draft_prefill=_times(
                _dense(profile, grid, draft, 1, RELATIVE_STD["draft_prefill"]), draft.num_layers
            ),
        )
    return found


def _grid(profile: ChipProfile, dtype: str) -> GemmGrid | None:
    """Products of ``dtype``; float16 runs as bfloat16 does, int8 as fp8."""
    return profile.gemm.get({"float16": "bfloat16", "int8": "fp8"}.get(dtype, dtype))


def _rescaled(curve: Curve, factor: float) -> Curve:
    """The curve of sizes that are ``factor`` times those of the new one."""
    return replace(curve, x=tuple(value / factor for value in curve.x))


def _times(curve: Curve, factor: float) -> Curve:
    return replace(curve, seconds=tuple(value * factor for value in curve.seconds))


def _nearest_group(curves: Mapping[int, Curve], group: float) -> int:
    return min(curves, key=lambda known: abs(math.log(known / group)))


def _nearest_count(curves: Mapping[int, Curve], count: int) -> Curve:
    """Of the smallest measured group that is not smaller; above all of them, a ring takes little longer than the
    largest."""
    return curves[min((known for known in curves if known >= count), default=max(curves))]


def _dense(
    profile: ChipProfile, grid: GemmGrid, model: ModelShape, tensor_parallel: int, relative_std: float
) -> Curve:
    """Matrix products and elementwise kernels of one decoder layer."""
    model.check_dense()
    hidden, ffn = model.hidden_size, model.intermediate_size / tensor_parallel
    queries = model.num_heads // tensor_parallel * model.head_dim
    keys = model.kv_heads_per_device(tensor_parallel) * model.head_dim
    tokens = np.array(_TOKENS, np.float64)
    shapes = ((queries + 2 * keys, hidden), (hidden, queries), (2 * ffn, hidden), (hidden, ffn))
    seconds = sum(
        (grid(tokens, n, k, model.weight_bytes_per_param) for n, k in shapes), np.zeros(tokens.size)
    )
    moved = 2.0 * (8 * hidden + 2 * (queries + keys) + 3 * ffn)
    seconds = seconds + _ELEMENTWISE_KERNELS * profile.elementwise_kernel_s
    seconds = seconds + moved * tokens / profile.elementwise_bytes_per_s
    std = profile.held_out.get("gemm", {}).get("p90", 2.0 * relative_std) / 2.0
    return _monotone(tokens, seconds, std, profile)


def _head(profile: ChipProfile, grid: GemmGrid, model: ModelShape, tensor_parallel: int) -> Curve:
    tokens = np.array([size for size in _TOKENS if size <= 4096], np.float64)
    vocab = model.vocab_size / tensor_parallel
    seconds = grid(tokens, vocab, model.hidden_size, model.weight_bytes_per_param)
    std = profile.held_out.get("gemm", {}).get("p90", 0.2) / 2.0
    return _monotone(tokens, seconds + profile.elementwise_kernel_s, std, profile)


def _draft_step(
    profile: ChipProfile, grid: GemmGrid, draft: ModelShape, sampling: Curve, target: ModelShape
) -> Curve:
    """All layers, head and choice of the token; the attention's floor, but not its bytes."""
    rows = np.array([size for size in _TOKENS if size <= 4096], np.float64)
    layer = _dense(profile, grid, draft, 1, RELATIVE_STD["draft_step"])
    head = _head(profile, grid, draft, 1)
    floor_s = profile.decode[_nearest_group(profile.decode, draft.num_heads / draft.num_kv_heads)].seconds[0]
    choice_s = sampling(rows * draft.vocab_size / target.vocab_size)
    seconds = draft.num_layers * (layer(rows) + floor_s) + head(rows) + choice_s
    return _monotone(rows, seconds, RELATIVE_STD["draft_step"], profile)


def _monotone(sizes: FloatArray, seconds: FloatArray, relative_std: float, profile: ChipProfile) -> Curve:
    return Curve(
        x=tuple(sizes.tolist()),
        seconds=tuple(np.maximum.accumulate(seconds).tolist()),
        relative_std=relative_std,
        source=f"{profile.source} ({profile.measured_with})",
    )
