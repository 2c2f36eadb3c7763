"""aiconfigurator's table of measured end-to-end rows (``silicon_sample.csv``) against the closed form.

Rows of dense models that this simulator knows, on chips with a fitted profile, aggregated serving. The host's
overheads of each engine are fitted on rows whose ``id`` has an even CRC-32; errors count on the odd ones alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sim.cost_model import CostModel
from sim.curves import FloatArray
from sim.hardware import kv_blocks, load_hardware
from sim.model_shape import MODEL_SHAPES
from sim.profiles.aiconfigurator import SYSTEMS
from sim.profiles.chips import chip_cost_model, shipped_profile
from sim.profiles.fitting import minimum
from sim.steady_state import HostOverhead, KernelSeconds, OperatingPoint, kernel_seconds, latencies

_RESERVED_BYTES = 3.5 * 2**30  # what aiconfigurator's sheets set aside for an engine
_SUFFIXES = ("-fp8", "-instruct")
_QUANTISED = {"fp8": "fp8", "fp8_block": "fp8"}
_FUSED_S = 12e-6
"""Most that fusing and overlapping kernels can save in a decoder layer: the four elementwise kernels of 3 µs each."""
_START = (1e-3, 1e-5, 1e-5, 2e-2)
_COLUMNS = (
    "id",
    "backend",
    "model_path",
    "system",
    "mode",
    "isl",
    "osl",
    "gemm_quant_mode",
    "batch_size",
    "tp_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiliconRow:
    """A measured operating point, and what the kernels alone would take."""

    row_id: str
    engine: str
    chip: str
    model: str
    dtype: str
    tensor_parallel: int
    point: OperatingPoint
    kernels: KernelSeconds
    ttft_s: float
    tpot_s: float

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(self.row_id.encode()) % 2 == 1


def read_rows(path: str | Path) -> tuple[list[SiliconRow], dict[str, int]]:
    """The usable rows, and how many were left out for which reason.

    Raises:
        ValueError: no such file, or columns that are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give silicon_sample.csv of the wheel aiconfigurator-core")
    table = pl.read_csv(path, infer_schema_length=None)
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    rows: list[SiliconRow] = []
    left: dict[str, int] = {}
    models: dict[tuple[str, str, str, int], tuple[CostModel, float]] = {}
    for entry in table.select(_COLUMNS).iter_rows(named=True):
        reason = _reason(entry)
        if reason is None:
            row = _row(entry, models)
            if row is not None:
                rows.append(row)
                continue
            reason = "the model does not fit the chips"
        left[reason] = left.get(reason, 0) + 1
    return rows, left


def _reason(entry: dict[str, Any]) -> str | None:
    """Why a row is not used."""
    if _model(entry["model_path"]) is None:
        return "not a dense model that is known here"
    if entry["mode"] != "agg":
        return "disaggregated"
    if SYSTEMS.get(entry["system"]) is None or shipped_profile(SYSTEMS[entry["system"]]) is None:
        return f"no profile of {entry['system']}"
    mode = entry["gemm_quant_mode"]
    if mode is not None and mode not in _QUANTISED:
        return f"products in {mode}"
    numbers = ("isl", "osl", "batch_size", "tp_size", "silicon_ttft_ms", "silicon_tpot_ms")
    if any(entry[name] is None or not entry[name] > 0 for name in numbers):
        return "a figure is missing"
    return None


def _model(path: str) -> str | None:
    name = path.rsplit("/", 1)[-1].lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name if name in MODEL_SHAPES else None


def _row(
    entry: dict[str, Any], models: dict[tuple[str, str, str, int], tuple[CostModel, float]]
) -> SiliconRow | None:
    chip, model = SYSTEMS[entry["system"]], _model(entry["model_path"])
    assert model is not None
    mode = entry["gemm_quant_mode"]
    dtype = "bfloat16" if mode is None else _QUANTISED[mode]
    if mode is None and "fp8" in entry["model_path"].lower():
        dtype = "fp8"
    key = chip, model, dtype, int(entry["tp_size"])
    if key not in models:
        try:
            models[key] = _cost_model(*key)
        except ValueError:
            return None
    cost_model, tokens = models[key]
    longest = int(entry["isl"]) + int(entry["osl"])
    if tokens < longest:
        return None
    point = OperatingPoint(
        prompt=int(entry["isl"]),
        output=int(entry["osl"]),
        concurrency=int(entry["batch_size"]),
        max_running=tokens / longest,
    )
    return SiliconRow(
        row_id=str(entry["id"]),
        engine=str(entry["backend"]),
        chip=chip,
        model=model,
        dtype=dtype,
        tensor_parallel=key[3],
        point=point,
        kernels=kernel_seconds(cost_model, point),
        ttft_s=float(entry["silicon_ttft_ms"]) * 1e-3,
        tpot_s=float(entry["silicon_tpot_ms"]) * 1e-3,
    )


def _cost_model(chip: str, model: str, dtype: str, tensor_parallel: int) -> tuple[CostModel, float]:
    """The model's cost, and the tokens that its KV memory holds."""
    hardware = load_hardware(chip)
    shape = MODEL_SHAPES[model].stored_as(dtype)
    cost_model = chip_cost_model(hardware, shape, tensor_parallel=tensor_parallel, dtype=dtype)
    blocks = kv_blocks(hardware, shape, tensor_parallel, reserved_bytes=_RESERVED_BYTES)
    return cost_model, 16.0 * blocks


def predict(rows: Sequence[SiliconRow], host: HostOverhead) -> tuple[FloatArray, FloatArray]:
    """TTFT and TPOT of each row, seconds."""
    pairs = [latencies(row.point, row.kernels, host) for row in rows]
    return np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])


def fit_host(rows: Sequence[SiliconRow]) -> HostOverhead:
    """The overheads with the least mean absolute log error, of TPOT for the first three, of TTFT for the last.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows to fit the host's overheads to")
    tpot_s = np.array([row.tpot_s for row in rows])
    ttft_s = np.array([row.ttft_s for row in rows])

    def host_of(logs: FloatArray, request_s: float) -> HostOverhead:
        step_s, layer_s, row_s = np.exp(np.clip(logs, -30.0, 0.0)).tolist()
        return HostOverhead(step_s=step_s, layer_s=layer_s - _FUSED_S, row_s=row_s, request_s=request_s)

    def tpot_error(logs: FloatArray) -> float:
        _, predicted = predict(rows, host_of(logs, 0.0))
        return float(np.mean(np.abs(np.log(predicted / tpot_s))))

    logs, _ = minimum(tpot_error, np.log(_START[:3]).tolist())

    def ttft_error(log: FloatArray) -> float:
        predicted, _ = predict(rows, host_of(logs, float(np.exp(log[0]))))
        return float(np.mean(np.abs(np.log(predicted / ttft_s))))

    request, _ = minimum(ttft_error, np.log(_START[3:]).tolist())
    return host_of(logs, float(np.exp(request[0])))
