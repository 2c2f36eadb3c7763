"""From operator profiles of some models on a chip (:mod:`sim.profiles.llmservingsim`) to the chip's own curves.

The dense kernels of a model are matrix products of known shapes, so they give points of the chip's grid; its attention
is carried over by bytes and by query heads · head size, as :mod:`sim.profiles.chips` says. The smallest model on the
fewest devices, whose heads are all on one chip, decides about prompts and about rows beside chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from sim.curves import Curve, FloatArray, fit_curve
from sim.hardware import Hardware
from sim.model_shape import ModelShape
from sim.profiles.chips import ChipProfile, MixedAttention
from sim.profiles.fitting import MAX_POINTS, fit_decode_groups, floored, scaled, simplified
from sim.profiles.gemm import fit_gemm
from sim.profiles.llmservingsim import OperatorProfile

LICENCE = "MIT, Copyright (c) the LLMServingSim authors"
_BYTES = 2.0  # the profiles are in bfloat16
_KERNELS = 4


def chip_profile(
    profiles: Sequence[tuple[OperatorProfile, ModelShape]], hardware: Hardware, *, licence: str = LICENCE
) -> ChipProfile:
    """The profile of ``hardware`` from those of models that ran on it.

    Args:
        profiles: each with the shape of its model.

    Raises:
        ValueError: none, or tables without usable rows.
    """
    if not profiles:
        raise ValueError(f"no operator profile of {hardware.name}")
    ordered = sorted(profiles, key=lambda pair: (pair[0].tensor_parallel, pair[1].num_params))
    main, shape = ordered[0]
    source = f"LLMServingSim profiles of {', '.join(dict.fromkeys(shape.name for _, shape in ordered))}"
    m, n, k, seconds = (
        np.concatenate(parts) for parts in zip(*(_products(*pair) for pair in ordered), strict=True)
    )
    grid, gemm_error = fit_gemm(
        m,
        n,
        k,
        seconds,
        flops_per_s=hardware.peak_flops_per_s("bfloat16"),
        bytes_per_s=hardware.memory_bytes_per_s,
        weight_bytes=_BYTES,
    )
    decode, decode_error = fit_decode_groups(_decode_points(ordered), source)
    heads = shape.num_heads // main.tensor_parallel
    kernel_s, bytes_per_s = _elementwise(main, shape)
    held_out = {name: error for name, error in main.held_out().items() if name.endswith("prefill_attention")}
    held_out |= {
        name: error for name, error in main.held_out().items() if name in ("mixed_attention", "sampling")
    }
    held_out["decode_attention"] = asdict(decode_error)
    if gemm_error is not None:
        held_out["gemm"] = asdict(gemm_error)
    return ChipProfile(
        name=hardware.name,
        source=source,
        licence=licence,
        measured_with=main.measured_with,
        flops_per_s={"bfloat16": hardware.peak_flops_per_s("bfloat16")},
        memory_bytes_per_s=hardware.memory_bytes_per_s,
        gemm={"bfloat16": grid},
        decode={group: floored(fit.curve) for group, fit in decode.items()},
        decode_row_entries=next(iter(decode.values())).row_entries,
        decode_context_dim_s={group: fit.context_s / shape.head_dim for group, fit in decode.items()},
        prefill=floored(scaled(main.prefill.curve, heads * shape.head_dim)),
        prefill_token_pairs=main.prefill.token_pairs,
        prefill_context_dim_s=main.prefill.context_s / shape.head_dim,
        mixed=_mixed(main, shape),
        all_reduce={},
        sampling=_sampling(main, shape),
        elementwise_kernel_s=kernel_s,
        elementwise_bytes_per_s=bytes_per_s,
        held_out=held_out,
        notes="no all-reduce was measured: roofline",
    )


def completed(profile: ChipProfile, other: ChipProfile) -> ChipProfile:
    """``profile`` with what only ``other``, of the same chip, has measured: all-reduces, data types, numbers of query
    heads per KV head, and matrix products where ``other`` has more of them.

    Raises:
        ValueError: profiles of different chips.
    """
    if profile.name != other.name:
        raise ValueError(f"a profile of {other.name} cannot complete one of {profile.name}")
    held_out = other.held_out | profile.held_out
    gemm = dict(profile.gemm)
    for dtype, grid in other.gemm.items():
        name = "gemm" if dtype == "bfloat16" else f"gemm_{dtype}"
        points = [part.held_out.get(name, {}).get("num_points", 0) for part in (profile, other)]
        if dtype not in gemm or points[1] > points[0]:
            gemm[dtype] = grid
            held_out |= {name: other.held_out[name]} if name in other.held_out else {}
    return replace(
        profile,
        gemm=gemm,
        flops_per_s=profile.flops_per_s | other.flops_per_s,
        decode=dict(sorted((other.decode | profile.decode).items())),
        decode_context_dim_s=other.decode_context_dim_s | profile.decode_context_dim_s,
        all_reduce=other.all_reduce | profile.all_reduce,
        held_out=held_out,
        source=f"{profile.source}; products, all-reduce and other heads: {other.source}",
        licence=f"{profile.licence}; {other.licence}",
        measured_with=f"{profile.measured_with}; {other.measured_with}",
        notes="",
    )


def _products(
    profile: OperatorProfile, shape: ModelShape
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """m, n, k and seconds of the matrix products in a profile."""
    tp, hidden = profile.tensor_parallel, shape.hidden_size
    queries = shape.num_heads // tp * shape.head_dim
    keys = shape.kv_heads_per_device(tp) * shape.head_dim
    ffn = shape.intermediate_size // tp
    shapes = {
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "gate_up_proj": (2 * ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    parts = [(*profile.dense[name], *sizes) for name, sizes in shapes.items() if name in profile.dense]
    parts.append((*profile.lm_head, shape.vocab_size // tp, hidden))
    m, n, k, seconds = (
        [np.asarray(rows, np.float64) for rows, *_ in parts],
        [np.full(rows.size, float(n)) for rows, _, n, _ in parts],
        [np.full(rows.size, float(k)) for rows, _, _, k in parts],
        [np.asarray(taken, np.float64) for _, taken, *_ in parts],
    )
    return np.concatenate(m), np.concatenate(n), np.concatenate(k), np.concatenate(seconds)


def _decode_points(
    profiles: Sequence[tuple[OperatorProfile, ModelShape]],
) -> dict[int, tuple[FloatArray, FloatArray, FloatArray, FloatArray]]:
    """What ``fit_decode_groups`` takes."""
    points: dict[int, list[tuple[FloatArray, FloatArray, FloatArray, FloatArray]]] = {}
    for profile, shape in profiles:
        kv_heads = shape.kv_heads_per_device(profile.tensor_parallel)
        group = shape.num_heads // profile.tensor_parallel // kv_heads
        table = profile.attention
        alone = table.where((table.chunk == 0.0) & (table.rows > 0.0))
        entry_bytes = np.full(alone.rows.size, 2.0 * kv_heads * shape.head_dim * _BYTES)
        points.setdefault(group, []).append((alone.rows, alone.entries, entry_bytes, alone.seconds))
    return {
        group: (
            np.concatenate([part[0] for part in parts]),
            np.concatenate([part[1] for part in parts]),
            np.concatenate([part[2] for part in parts]),
            np.concatenate([part[3] for part in parts]),
        )
        for group, parts in points.items()
    }


def _mixed(profile: OperatorProfile, shape: ModelShape) -> MixedAttention | None:
    fit = profile.mixed
    if fit is None:
        return None
    heads = shape.num_heads // profile.tensor_parallel
    return MixedAttention(
        curve=floored(scaled(fit.curve, heads * shape.head_dim)),
        row_head_s=fit.row_s / heads,
        row_token_head_s=fit.row_token_s / heads,
    )


def _sampling(profile: OperatorProfile, shape: ModelShape) -> Curve:
    rows, seconds = profile.sampling
    curve = fit_curve(rows * shape.vocab_size, seconds, source=profile.source, max_points=MAX_POINTS)
    return floored(simplified(curve))


def _elementwise(profile: OperatorProfile, shape: ModelShape) -> tuple[float, float]:
    """Seconds of a kernel that moves next to nothing, and bytes per second of kernels that move many."""
    tp, hidden = profile.tensor_parallel, shape.hidden_size
    names = [name for name in ("layernorm", "rotary_emb", "act_fn") if name in profile.dense]
    tokens = profile.dense[names[0]][0]
    factor = {"layernorm": 2.0}
    seconds = sum(
        (factor.get(name, 1.0) * np.interp(tokens, *profile.dense[name]) for name in names),
        np.zeros(tokens.size),
    )
    queries = shape.num_heads // tp * shape.head_dim
    keys = shape.kv_heads_per_device(tp) * shape.head_dim
    moved = _BYTES * (8 * hidden + 2 * (queries + keys) + 3 * shape.intermediate_size / tp)
    floor_s = float(seconds.min())
    slope = (float(seconds[-1]) - floor_s) / (moved * float(tokens[-1]))
    return floor_s / _KERNELS, 1.0 / slope
