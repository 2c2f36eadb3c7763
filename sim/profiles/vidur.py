"""Operator tables of Vidur (MIT, github.com/microsoft/vidur) as a chip's profile.

One folder holds, all times in milliseconds:

* ``<chip>.<model>.mlp.csv[.gz]``: dense kernels by ``num_tokens`` and ``num_tensor_parallel_workers``, with the model's
  sizes in every row; its matrix products give points of the chip's grid;
* ``*attention.csv[.gz]``: prefill and decode by batch size, chunk and cached tokens, with the numbers of heads;
* ``*cpu_overheads.csv[.gz]`` (optional): the host by batch size, of an engine that prepares one step after the other.

Neither output head, sampler nor all-reduce is in these tables: they stay the roofline's or the grid's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sim.curves import FloatArray
from sim.hardware import Hardware
from sim.profiles.chips import ChipProfile
from sim.profiles.fitting import fit_decode_groups, fit_prefill, floored, hold_out, scaled
from sim.profiles.gemm import fit_gemm

LICENCE = "MIT, Copyright (c) Microsoft Corporation"
_BYTES = 2.0  # float16
_KERNELS = ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add")
_HOST = ("schedule", "prepare_inputs_e2e", "process_model_outputs")


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Seconds of the host per step: ``step_s + row_s · rows``."""

    step_s: float
    row_s: float


def chip_profile(folder: str | Path, hardware: Hardware) -> ChipProfile:
    """Fit the profile of ``hardware`` to the tables in ``folder``.

    Raises:
        ValueError: a table or a column that is missing.
    """
    folder = Path(folder)
    mlp_path, attention_path = _one(folder, "mlp"), _one(folder, "attention")
    mlp, attention = _read(mlp_path), _read(attention_path)
    m, n, k, seconds = _products(mlp)
    grid, gemm_error = fit_gemm(
        m,
        n,
        k,
        seconds,
        flops_per_s=hardware.peak_flops_per_s("bfloat16"),
        bytes_per_s=hardware.memory_bytes_per_s,
        weight_bytes=_BYTES,
    )
    source = (
        "Vidur's profiles of an A100" if hardware.name == "a100" else f"Vidur's profiles of {hardware.name}"
    )
    size, heads, group, entry_bytes = _heads(attention)
    decoding = attention.filter(~pl.col("is_prefill") & (pl.col("kv_cache_size") > 0))
    rows, cached, decode_s = _columns(
        decoding, "batch_size", "kv_cache_size", "time_stats.attn_decode.median"
    )
    points = {group: (rows, rows * cached, np.full(rows.shape, entry_bytes), decode_s)}
    decode, decode_error = fit_decode_groups(points, source)
    chunks = attention.filter(pl.col("is_prefill") & (pl.col("batch_size") == 1))
    tokens, before, prefill_s = _columns(
        chunks, "prefill_chunk_size", "kv_cache_size", "time_stats.attn_prefill.median"
    )
    pairs = tokens * (before + 0.5 * (tokens + 1.0))
    prefill = fit_prefill(tokens, before, prefill_s, source)
    prefill_error = hold_out(
        lambda kept: (
            lambda left: fit_prefill(tokens[kept], before[kept], prefill_s[kept], source)(
                tokens[left], pairs[left]
            )
        ),
        tokens.astype(np.int64),
        prefill_s,
    )
    held_out = {"decode_attention": asdict(decode_error), "prefill_attention": asdict(prefill_error)}
    if gemm_error is not None:
        held_out["gemm"] = asdict(gemm_error)
    kernel_s, bytes_per_s = _elementwise(mlp)
    host = _host_notes(folder)
    return ChipProfile(
        name=hardware.name,
        source=source,
        licence=LICENCE,
        measured_with=f"{mlp_path.name}, {attention_path.name}",
        flops_per_s={"bfloat16": hardware.peak_flops_per_s("bfloat16")},
        memory_bytes_per_s=hardware.memory_bytes_per_s,
        gemm={"bfloat16": grid},
        decode={group: floored(fit.curve) for group, fit in decode.items()},
        decode_row_entries=decode[group].row_entries,
        decode_context_dim_s={group: decode[group].context_s / size},
        prefill=floored(scaled(prefill.curve, heads * size)),
        prefill_token_pairs=prefill.token_pairs,
        prefill_context_dim_s=prefill.context_s / size,
        mixed=None,
        all_reduce={},
        sampling=None,
        elementwise_kernel_s=kernel_s,
        elementwise_bytes_per_s=bytes_per_s,
        held_out=held_out,
        notes=host,
    )


def read_host_overhead(path: str | Path, tensor_parallel: int = 1) -> HostOverhead:
    """Scheduling, input preparation and output handling, over the models and batch sizes of the CPU table.

    Raises:
        ValueError: fewer than two rows of that tensor-parallel degree.
    """
    table = pl.read_csv(path, infer_schema_length=None)
    table = table.filter(pl.col("tensor_parallel_degree") == tensor_parallel)
    if table.height < 2:
        raise ValueError(f"{path} has fewer than two rows with tensor_parallel_degree={tensor_parallel}")
    rows = table["batch_size"].to_numpy().astype(np.float64)
    seconds = sum((table[f"{name}_median"].to_numpy() for name in _HOST), np.zeros(rows.size)) * 1e-3
    slope, base = np.polyfit(rows, seconds, 1)
    return HostOverhead(max(0.0, float(base)), max(0.0, float(slope)))


def _host_notes(folder: Path) -> str:
    paths = sorted(folder.glob("*cpu_overheads.csv*"))
    if not paths:
        return ""
    host = read_host_overhead(paths[0])
    return (
        f"host of an engine that does not overlap it: {1e3 * host.step_s:.2f} ms per step and "
        f"{1e6 * host.row_s:.0f} µs per row ({paths[0].name}); not part of the curves"
    )


def _one(folder: Path, kind: str) -> Path:
    found = sorted(folder.glob(f"*{kind}.csv*"))
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} files *{kind}.csv or *{kind}.csv.gz: exactly one is needed"
        )
    return found[0]


def _read(path: Path) -> pl.DataFrame:
    frame = pl.read_csv(path, infer_schema_length=None)
    if frame.is_empty():
        raise ValueError(f"{path} has no rows")
    return frame


def _columns(frame: pl.DataFrame, *names: str) -> tuple[FloatArray, ...]:
    """As float64; the last one is milliseconds, of which rows without a positive value are dropped."""
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise ValueError(f"a table of Vidur has no column {', '.join(missing)}")
    *sizes, time = names
    frame = frame.filter(pl.col(time).is_not_null() & (pl.col(time) > 0.0))
    return (*(frame[name].to_numpy().astype(np.float64) for name in sizes), frame[time].to_numpy() * 1e-3)


def _products(mlp: pl.DataFrame) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """m, n, k and seconds of the matrix products of the MLP table."""
    tp = pl.col("num_tensor_parallel_workers")
    head = pl.col("n_embd") / pl.col("n_head")
    queries, keys = pl.col("n_head") / tp * head, pl.col("n_kv_head") / tp * head
    wide = pl.col("n_expanded_embd") / tp
    gated = pl.when(pl.col("use_gated_mlp")).then(2.0).otherwise(1.0)
    shapes = {
        "attn_pre_proj": (queries + 2.0 * keys, pl.col("n_embd")),
        "attn_post_proj": (pl.col("n_embd"), queries),
        "mlp_up_proj": (gated * wide, pl.col("n_embd")),
        "mlp_down_proj": (pl.col("n_embd"), wide),
    }
    parts = [
        _columns(mlp.with_columns(n=n, k=k), "num_tokens", "n", "k", f"time_stats.{name}.median")
        for name, (n, k) in shapes.items()
    ]
    m, n, k, seconds = (np.concatenate(column) for column in zip(*parts, strict=True))
    return m, n, k, seconds


def _heads(attention: pl.DataFrame) -> tuple[int, int, int, float]:
    """Head size, query heads per device, query heads per KV head, bytes of a KV entry on a device."""
    devices = int(attention["num_tensor_parallel_workers"][0])
    queries, keys = int(attention["n_q_head"][0]), int(attention["n_kv_head"][0])
    size = int(attention["n_embd"][0]) // queries
    return size, queries // devices, queries // keys, 2.0 * keys // devices * size * _BYTES


def _elementwise(mlp: pl.DataFrame) -> tuple[float, float]:
    """Seconds of a kernel that moves little, and bytes per second of the activation, which moves most."""
    alone = mlp.filter(pl.col("num_tensor_parallel_workers") == 1)
    names = [f"time_stats.{name}.median" for name in _KERNELS if f"time_stats.{name}.median" in alone.columns]
    floor_s = min(float(np.nanmin(alone[name].to_numpy())) for name in names) * 1e-3
    tokens, ffn, seconds = _columns(alone, "num_tokens", "n_expanded_embd", "time_stats.mlp_act.median")
    largest = int(np.argmax(tokens))
    moved = 3.0 * ffn[largest] * _BYTES * tokens[largest]
    return floor_s, float(moved / max(seconds[largest] - floor_s, 1e-9))
