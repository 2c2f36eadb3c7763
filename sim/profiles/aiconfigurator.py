"""Kernel tables of NVIDIA's aiconfigurator (Apache-2.0, github.com/ai-dynamo/aiconfigurator) as a chip's profile.

Two layouts are read: flat CSV files ``<system>.gemm_perf.bf16.csv.gz``, ``…context_attention_perf…``,
``…generation_attention_perf…``, ``<system>.allreduce.csv``; and the Parquet folders of the wheel
``aiconfigurator-core``, ``systems/data/<system>/<operator>/<engine>/<version>/``, of which the engine "vllm" and its
newest version are taken. The wheel also has matrix products in fp8.

Latencies are milliseconds. ``message_size`` of an all-reduce counts elements of two bytes: as bytes, eight A100 would
reach half of what NCCL is known to.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sim.curves import Curve, FloatArray, fit_curve
from sim.hardware import Hardware, load_hardware
from sim.profiles.chips import ChipProfile
from sim.profiles.fitting import MAX_POINTS, DecodeFit, HeldOut, fit_decode_groups, fit_prefill_sizes, floored
from sim.profiles.gemm import GemmGrid, fit_gemm

SYSTEMS = {
    "a100_sxm": "a100",
    "b200_sxm": "b200",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx_pro_6000",
}
"""aiconfigurator's name of a system → the name in ``conf/hardware``."""
LICENCE = "Apache-2.0, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES"
_GROUPS = (1, 2, 4, 8, 16)
_SMALLEST = 128  # of n and k: narrower products are routers and the like
_ELEMENT_BYTES = 2.0
_HEAD_SIZES = (128,)  # what the models here have; with other sizes, other kernels run
_MOST_HEAD_SIZE = 128
_ELEMENTWISE_KERNEL_S = 3e-6  # mem_empirical_constant_latency of its sheets
_MEMORY_SHARE = 0.8  # mem_bw_empirical_scaling_factor
_WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0}


@dataclass(frozen=True)
class Tables:
    """The tables of one system; columns in seconds where they end in ``_s``."""

    system: str
    gemm: dict[str, pl.DataFrame]
    context: pl.DataFrame
    generation: pl.DataFrame
    all_reduce: pl.DataFrame
    version: str


def find_systems(folder: str | Path) -> dict[str, Path]:
    """System → where its tables are, of those in ``folder`` that :data:`SYSTEMS` knows.

    Raises:
        ValueError: none.
    """
    folder = Path(folder)
    found = {name: folder for name in SYSTEMS if (folder / f"{name}.gemm_perf.bf16.csv.gz").is_file()}
    if not found:
        roots = [folder, folder / "data", folder / "systems" / "data"]
        roots += [path / "data" for path in folder.rglob("systems")]
        for root in roots:
            for name in SYSTEMS:
                if (root / name / "gemm").is_dir():
                    found[name] = root / name
    if not found:
        raise ValueError(
            f"{folder} holds no tables of aiconfigurator: neither <system>.gemm_perf.bf16.csv.gz nor "
            f"data/<system>/gemm, for any of {', '.join(SYSTEMS)}"
        )
    return found


def read_tables(system: str, folder: Path) -> Tables:
    """The tables of ``system`` in one of the two layouts.

    Raises:
        ValueError: a table or a column is missing.
    """
    if (folder / f"{system}.gemm_perf.bf16.csv.gz").is_file():
        return _read_flat(system, folder)
    gemm, version = _newest(folder / "gemm" / "vllm", "gemm_perf")
    context, _ = _newest(folder / "attention" / "vllm", "context_attention_perf")
    generation, _ = _newest(folder / "attention" / "vllm", "generation_attention_perf")
    reduce, _ = _newest(folder / "comm" / "vllm", "custom_allreduce_perf")
    by_dtype = {
        dtype: _in_seconds(gemm.filter(pl.col("gemm_dtype") == dtype))
        for dtype in _WEIGHT_BYTES
        if (gemm["gemm_dtype"] == dtype).any()
    }
    kept = (pl.col("kv_cache_dtype") == "bfloat16") & (pl.col("attn_dtype") == "bfloat16")
    windowless = kept & (pl.col("window_size") <= 0)
    return Tables(
        system,
        by_dtype,
        _in_seconds(context.filter(windowless if "window_size" in context.columns else kept)),
        _in_seconds(generation.filter(windowless if "window_size" in generation.columns else kept)),
        _in_seconds(reduce),
        f"vLLM {version}",
    )


def _read_flat(system: str, folder: Path) -> Tables:
    def table(name: str) -> pl.DataFrame:
        path = folder / f"{system}.{name}"
        if not path.is_file():
            raise ValueError(f"{path} is missing: {system} needs all four tables")
        return _in_seconds(pl.read_csv(path, infer_schema_length=None))

    reduce = table("allreduce.csv")
    return Tables(
        system,
        {"bfloat16": table("gemm_perf.bf16.csv.gz")},
        table("context_attention_perf.bf16.csv.gz"),
        table("generation_attention_perf.bf16.csv.gz"),
        reduce,
        f"vLLM {reduce['version'][0]}",
    )


def _newest(folder: Path, name: str) -> tuple[pl.DataFrame, str]:
    versions = [path for path in folder.glob("*") if (path / f"{name}.parquet").is_file()]
    if not versions:
        raise ValueError(f"{folder} has no <version>/{name}.parquet")
    newest = max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    return pl.read_parquet(newest / f"{name}.parquet"), newest.name


def _in_seconds(frame: pl.DataFrame) -> pl.DataFrame:
    column = "latency_ms" if "latency_ms" in frame.columns else "latency"
    if column not in frame.columns:
        raise ValueError(f"a table has no latency: it has {', '.join(frame.columns)}")
    return frame.filter(pl.col(column) > 0.0).with_columns((pl.col(column) * 1e-3).alias("seconds"))


def fit_profile(tables: Tables, hardware: Hardware | None = None) -> ChipProfile:
    """Fit the profile of one chip.

    Args:
        hardware: its sheet, by default the one that ships.

    Raises:
        ValueError: tables without usable rows.
    """
    name = SYSTEMS[tables.system]
    sheet = hardware or load_hardware(name)
    source = f"aiconfigurator {tables.system}"
    held_out: dict[str, dict[str, float]] = {}
    grids: dict[str, GemmGrid] = {}
    for dtype, table in tables.gemm.items():
        if dtype not in sheet.flops_per_s:
            continue
        grids[dtype], error = _fit_gemm(table, sheet, dtype)
        _note(held_out, "gemm" if dtype == "bfloat16" else f"gemm_{dtype}", error)
    decode, error = _fit_decode(tables.generation, source)
    _note(held_out, "decode_attention", error)
    prefill, token_pairs, error = _fit_prefill(tables.context, source)
    _note(held_out, "prefill_attention", error)
    return ChipProfile(
        name=name,
        source=source,
        licence=LICENCE,
        measured_with=tables.version,
        flops_per_s={dtype: sheet.flops_per_s[dtype] for dtype in grids},
        memory_bytes_per_s=sheet.memory_bytes_per_s,
        gemm=grids,
        decode={group: floored(fit.curve) for group, fit in decode.items()},
        decode_row_entries=next(iter(decode.values())).row_entries,
        decode_context_dim_s={group: fit.context_s / _MOST_HEAD_SIZE for group, fit in decode.items()},
        prefill=prefill,
        prefill_token_pairs=token_pairs,
        prefill_context_dim_s=None,
        mixed=None,
        all_reduce=_fit_all_reduce(tables.all_reduce, source),
        sampling=None,
        elementwise_kernel_s=_ELEMENTWISE_KERNEL_S,
        elementwise_bytes_per_s=sheet.memory_bytes_per_s * _MEMORY_SHARE,
        held_out=held_out,
        notes="chunks over a cached context, rows beside chunks and sampling were not measured: roofline",
    )


def _note(held_out: dict[str, dict[str, float]], name: str, error: HeldOut | None) -> None:
    if error is not None:
        held_out[name] = asdict(error)


def _columns(frame: pl.DataFrame, *names: str) -> tuple[FloatArray, ...]:
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise ValueError(f"a table has no column {', '.join(missing)}: it has {', '.join(frame.columns)}")
    return tuple(frame[name].to_numpy().astype(np.float64) for name in names)


def _fit_gemm(table: pl.DataFrame, sheet: Hardware, dtype: str) -> tuple[GemmGrid, HeldOut | None]:
    m, n, k, seconds = _columns(table, "m", "n", "k", "seconds")
    wide = (n >= _SMALLEST) & (k >= _SMALLEST)
    return fit_gemm(
        m[wide],
        n[wide],
        k[wide],
        seconds[wide],
        flops_per_s=sheet.flops_per_s[dtype],
        bytes_per_s=sheet.memory_bytes_per_s,
        weight_bytes=_WEIGHT_BYTES[dtype],
    )


def _fit_decode(table: pl.DataFrame, source: str) -> tuple[dict[int, DecodeFit], HeldOut]:
    """Curves by bytes of keys and values, for each number of query heads per KV head."""
    table = table.filter(pl.col("head_dim").is_in(_HEAD_SIZES))
    rows, new, cached, heads, kv_heads, size, seconds = _columns(
        table, "batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "seconds"
    )
    points: dict[int, tuple[FloatArray, FloatArray, FloatArray, FloatArray]] = {}
    for group in _GROUPS:
        mine = heads == group * kv_heads
        if np.count_nonzero(mine) >= 3:
            entries = rows * (new + cached)
            entry_bytes = 2.0 * kv_heads * size * _ELEMENT_BYTES
            points[group] = (rows[mine], entries[mine], entry_bytes[mine], seconds[mine])
    if not points:
        raise ValueError(f"{source}: no decode attention with {_GROUPS} query heads per KV head")
    return fit_decode_groups(points, source)


def _fit_prefill(table: pl.DataFrame, source: str) -> tuple[Curve, float, HeldOut]:
    """By query-key pairs · query heads · head size; prompts of several requests in one launch count together."""
    table = table.filter(pl.col("head_dim").is_in(_HEAD_SIZES) & (pl.col("step") == 0))
    batch, new, heads, size, seconds = _columns(
        table, "batch_size", "isl", "num_heads", "head_dim", "seconds"
    )
    many = new >= 16.0
    tokens, pairs = batch * new, batch * new * (new + 1.0) / 2.0
    fit, error = fit_prefill_sizes(
        tokens[many], pairs[many], (heads * size)[many], seconds[many], new[many], source
    )
    return floored(fit.curve), fit.token_pairs, error


def _fit_all_reduce(table: pl.DataFrame, source: str) -> dict[int, Curve]:
    """By bytes, for each number of devices, in CUDA graphs where that was measured."""
    if "backend" in table.columns and table["backend"].str.contains("graph").any():
        table = table.filter(pl.col("backend").str.contains("graph"))
    curves: dict[int, Curve] = {}
    for (count,), part in table.group_by("num_gpus", maintain_order=True):
        sizes, seconds = _columns(part, "message_size", "seconds")
        number: Any = count
        curves[int(number)] = floored(
            fit_curve(sizes * _ELEMENT_BYTES, seconds, source=source, max_points=MAX_POINTS)
        )
    return dict(sorted(curves.items()))
