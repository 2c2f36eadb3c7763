"""Splitwise's table of whole steps (MIT, github.com/Mutinifni/splitwise-sim, data/perf_model.csv) as a cost model.

Columns: model, hardware, prompt_size, batch_size, token_size, prompt_time, token_time (milliseconds, of the whole
prompt phase and of one token), tensor_parallel; power and end-to-end time are not used. There are no operators in
it: a step's seconds are taken as a curve of its tokens, the output head included, and what attention adds with the
context as a slope over all layers. So it stands for these models at these degrees, and for nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from sim.cost_model import CostModel
from sim.curves import Curve, Operators, fit_curve

LICENCE = "MIT, Copyright (c) the Splitwise authors"
_LAYERS = {"llama2-70b": 80, "bloom-176b": 70}
_COLUMNS = (
    "model",
    "hardware",
    "prompt_size",
    "batch_size",
    "token_size",
    "prompt_time",
    "token_time",
    "tensor_parallel",
)
_NOTHING_S = 1e-9


def read_cost_models(path: str | Path) -> dict[str, CostModel]:
    """``<hardware>-<model>-tp<degree>`` → the cost model of whole steps.

    Args:
        path: the CSV file, or the folder of ``perf_model.csv``.

    Raises:
        ValueError: no such file, or columns that are missing.
    """
    path = Path(path)
    path = path / "perf_model.csv" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give Splitwise's perf_model.csv")
    table = pl.read_csv(path, infer_schema_length=None)
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    models: dict[str, CostModel] = {}
    keys = ("hardware", "model", "tensor_parallel")
    for (hardware, model, devices), part in table.group_by(*keys, maintain_order=True):
        name = f"{hardware}-{model}-tp{devices}"
        models[name] = _cost_model(part, name, _LAYERS.get(str(model), 1))
    return dict(sorted(models.items()))


def _cost_model(part: pl.DataFrame, name: str, num_layers: int) -> CostModel:
    source = f"Splitwise, {name}"
    medians = part.group_by("prompt_size", "batch_size").agg(pl.col("prompt_time", "token_time").median())
    prompt, batch = (
        medians[column].to_numpy().astype(np.float64) for column in ("prompt_size", "batch_size")
    )
    prefill_s, decode_s = (medians[column].to_numpy() * 1e-3 for column in ("prompt_time", "token_time"))
    slope = _context_s(batch, batch * prompt, decode_s)
    base_s = np.maximum(decode_s - slope * batch * prompt, 0.5 * decode_s)
    tokens = np.concatenate([batch, batch * prompt])
    dense = fit_curve(tokens, np.concatenate([base_s, prefill_s]) / num_layers, source=source)
    nothing = Curve(x=(1.0, 1e9), seconds=(_NOTHING_S, _NOTHING_S), relative_std=0.0, source=source)
    reading = Curve(
        x=(1.0, 1e9),
        seconds=(_NOTHING_S, _NOTHING_S + slope / num_layers * 1e9),
        relative_std=dense.relative_std,
        source=source,
    )
    operators = Operators(
        dense=dense, decode_attention=reading, prefill_attention=nothing, lm_head=nothing, sampling=nothing
    )
    return CostModel(operators, num_layers=num_layers, metadata={"origin": source, "licence": LICENCE})


def _context_s(rows: np.ndarray, entries: np.ndarray, seconds: np.ndarray) -> float:
    """Seconds per KV entry of all layers: the slope over the contexts of equal batches, their median."""
    slopes: list[float] = []
    for number in np.unique(rows):
        mine = rows == number
        if np.unique(entries[mine]).size > 1:
            slopes.append(float(np.polyfit(entries[mine], seconds[mine], 1)[0]))
    return max(0.0, float(np.median(slopes))) if slopes else 0.0
