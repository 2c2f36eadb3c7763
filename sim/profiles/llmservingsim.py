"""Operator profiles in the format of LLMServingSim 2 (github.com/casys-kaist/LLMServingSim): one model on one chip.

A folder holds, for one tensor-parallel degree, microseconds of the kernels of one decoder layer under vLLM:

* ``dense.csv``: layer, tokens, time_us; ``embedding`` and ``final_layernorm`` once per step, ``layernorm`` twice per
  decoder layer, the others once per decoder layer;
* ``attention.csv`` (or ``.csv.gz``): prefill_chunk, kv_prefill, n_decode, kv_decode, time_us: one chunk over that many
  cached tokens and so many decoding rows over that many each, in one kernel launch;
* ``per_sequence.csv``: layer (``lm_head``, ``sampler``), sequences, time_us;
* ``moe.csv``, of a mixture of experts, in place of the feed-forward layers of ``dense.csv``: tokens,
  activated_experts, time_us.

>>> profile = read_profile("profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16", tensor_parallel=1)
>>> model = profile.cost_model(num_layers=32)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from sim.cost_model import CostModel
from sim.curves import Curve, FloatArray, Operators, fit_curve
from sim.profiles.fitting import (
    DecodeFit,
    HeldOut,
    MixedFit,
    PrefillFit,
    fit_decode,
    fit_mixed,
    fit_prefill,
    hold_out,
)
from sim.surface import Surface

ONCE = ("embedding", "final_layernorm")
"""Layers of the dense table that a step runs once, not once per decoder layer."""
TWICE = ("layernorm",)
_ALL = 512  # points of the dense curve: all that a profile has, as tiles make steps of it
_COLUMNS = {
    "dense": ("layer", "tokens", "time_us"),
    "per_sequence": ("layer", "sequences", "time_us"),
    "attention": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "moe": ("tokens", "activated_experts", "time_us"),
}
_FEED_FORWARD = ("down_proj", "moe")
"""Without one of these layers a profile lacks most of what a step computes."""


@dataclass(frozen=True, slots=True)
class AttentionTable:
    """Attention of one decoder layer, columns of float64 [n]; a chunk or rows of 0 are not there."""

    chunk: FloatArray
    chunk_context: FloatArray
    rows: FloatArray
    row_context: FloatArray
    seconds: FloatArray

    @property
    def entries(self) -> FloatArray:
        return self.rows * self.row_context

    @property
    def pairs(self) -> FloatArray:
        return self.chunk * (self.chunk_context + 0.5 * (self.chunk + 1.0))

    def where(self, mask: NDArray[np.bool_]) -> AttentionTable:
        return AttentionTable(*(getattr(self, name)[mask] for name in self.__slots__))


@dataclass(frozen=True)
class OperatorProfile:
    """Measured seconds of the operators of one model on one chip; on one of the devices that share it.

    Attributes:
        model: as the profile names it, e.g. "meta-llama/Llama-3.1-8B".
        chip: likewise, e.g. "NVIDIA GeForce RTX 4090".
        measured_with: library and its version, for reports.
        tensor_parallel: devices that share the model.
        dense: seconds of each layer of the dense table by tokens: (tokens [n], seconds [n]).
        lm_head, sampling: by rows of logits, likewise.
        attention: of one decoder layer.
    """

    model: str
    chip: str
    measured_with: str
    tensor_parallel: int
    dense: dict[str, tuple[FloatArray, FloatArray]]
    lm_head: tuple[FloatArray, FloatArray]
    sampling: tuple[FloatArray, FloatArray]
    attention: AttentionTable

    @property
    def source(self) -> str:
        return f"LLMServingSim profile of {self.model} on {self.chip} ({self.measured_with})"

    @cached_property
    def decode(self) -> DecodeFit:
        return self._fit_decode(np.ones(self._alone.seconds.size, np.bool_))

    @cached_property
    def prefill(self) -> PrefillFit:
        return self._fit_prefill(np.ones(self._chunks.seconds.size, np.bool_))

    @cached_property
    def mixed(self) -> MixedFit | None:
        """``None`` where no chunk was measured together with decoding rows."""
        mixed, _ = self._mixed
        return self._fit_mixed(np.ones(mixed.seconds.size, np.bool_)) if mixed.seconds.size else None

    @cached_property
    def _alone(self) -> AttentionTable:
        return self.attention.where((self.attention.chunk == 0.0) & (self.attention.rows > 0.0))

    @cached_property
    def _chunks(self) -> AttentionTable:
        return self.attention.where((self.attention.chunk > 0.0) & (self.attention.rows == 0.0))

    @cached_property
    def _mixed(self) -> tuple[AttentionTable, FloatArray]:
        """Points with both, and the seconds of the same chunk alone; those without such a point are left out."""
        table = self.attention
        mixed = table.where((table.chunk > 0.0) & (table.rows > 0.0))
        alone = {
            (chunk, context): seconds
            for chunk, context, seconds in zip(
                self._chunks.chunk.tolist(),
                self._chunks.chunk_context.tolist(),
                self._chunks.seconds.tolist(),
                strict=True,
            )
        }
        keys = zip(mixed.chunk.tolist(), mixed.chunk_context.tolist(), strict=True)
        before_s = np.array([alone.get(key, np.nan) for key in keys], np.float64)
        known = np.isfinite(before_s)
        return mixed.where(known), before_s[known]

    def _fit_decode(self, mask: NDArray[np.bool_]) -> DecodeFit:
        part = self._alone.where(mask)
        return fit_decode(part.rows, part.entries, part.seconds, self.source)

    def _fit_surface(self, mask: NDArray[np.bool_]) -> Surface:
        part = self._alone.where(mask)
        return Surface.of(part.rows, part.row_context, part.seconds, self.source)

    def _fit_prefill(self, mask: NDArray[np.bool_]) -> PrefillFit:
        part = self._chunks.where(mask)
        return fit_prefill(part.chunk, part.chunk_context, part.seconds, self.source)

    def _fit_mixed(self, mask: NDArray[np.bool_]) -> MixedFit:
        mixed, before_s = self._mixed
        part = mixed.where(mask)
        return fit_mixed(part.rows, part.entries, part.chunk, part.seconds - before_s[mask], self.source)

    def layer_seconds(self) -> tuple[FloatArray, FloatArray]:
        """Tokens [n], and seconds [n] of all dense kernels of one decoder layer."""
        return self._sum({name: 2.0 if name in TWICE else 1.0 for name in self.dense if name not in ONCE})

    def once_seconds(self) -> tuple[FloatArray, FloatArray]:
        """The same of what a step runs once: embedding and final norm."""
        return self._sum(dict.fromkeys((name for name in ONCE if name in self.dense), 1.0))

    def _sum(self, factors: dict[str, float]) -> tuple[FloatArray, FloatArray]:
        tokens = next(iter(self.dense.values()))[0]
        seconds = np.zeros(tokens.size)
        for name, factor in factors.items():
            seconds = seconds + factor * np.interp(tokens, *self.dense[name])
        return tokens, seconds

    def dense_curve(self, num_layers: int) -> Curve:
        """Dense kernels of a decoder layer, with its share of what a step runs once."""
        tokens, layer_s = self.layer_seconds()
        seconds = layer_s + self.once_seconds()[1] / num_layers
        return fit_curve(tokens, seconds, source=self.source, max_points=_ALL)

    def operators(self, num_layers: int, all_reduce: Curve | None = None) -> Operators:
        """The operators of this model; verification is modelled, see ``sim.curves.Operators.verify_pair_s``."""
        decode, prefill, mixed = self.decode, self.prefill, self.mixed
        return Operators(
            dense=self.dense_curve(num_layers),
            decode_attention=decode.curve,
            decode_row_entries=decode.row_entries,
            decode_surface=self._fit_surface(np.ones(self._alone.seconds.size, np.bool_)),
            prefill_attention=prefill.curve,
            prefill_token_pairs=prefill.token_pairs,
            prefill_context_s=prefill.context_s,
            verify_pair_s=_slope(prefill.curve),
            mixed_attention=mixed.curve if mixed else None,
            mixed_row_s=mixed.row_s if mixed else 0.0,
            mixed_row_token_s=mixed.row_token_s if mixed else 0.0,
            lm_head=fit_curve(*self.lm_head, source=self.source, max_points=_ALL),
            sampling=fit_curve(*self.sampling, source=self.source, max_points=_ALL),
            all_reduce=all_reduce,
        )

    def cost_model(
        self, num_layers: int, *, all_reduce: Curve | None = None, reduced_bytes_per_token: float = 0.0
    ) -> CostModel:
        """Of the profiled model, which has ``num_layers`` decoder layers. Nothing is added for the host: an engine
        that plans the next step while the device works hides it.

        Raises:
            ValueError: several devices without the seconds of an all-reduce among them.
        """
        if self.tensor_parallel > 1 and all_reduce is None:
            raise ValueError(
                f"the profile is of {self.tensor_parallel} devices and holds no all-reduce: give its curve, e.g. of "
                "the chip's roofline"
            )
        metadata: dict[str, str | int | float | None] = {
            "origin": self.source,
            "model": self.model,
            "hardware": self.chip,
            "tensor_parallel": self.tensor_parallel,
        }
        return CostModel(
            self.operators(num_layers, all_reduce),
            num_layers=num_layers,
            reduced_bytes_per_token=reduced_bytes_per_token if all_reduce else 0.0,
            metadata=metadata,
        )

    def held_out(self) -> dict[str, dict[str, float]]:
        """Errors by operator on sizes left out: tokens (dense), rows of logits, rows, chunks."""
        alone, chunks = self._alone, self._chunks
        errors = {
            "dense": _curve_error(*self.layer_seconds(), self.source),
            "lm_head": _curve_error(*self.lm_head, self.source),
            "sampling": _curve_error(*self.sampling, self.source),
            "decode_attention": hold_out(
                lambda kept: lambda left: self._fit_surface(kept)(alone.rows[left], alone.row_context[left]),
                alone.rows.astype(np.int64),
                alone.seconds,
            ),
            "prefill_attention": hold_out(
                lambda kept: lambda left: self._fit_prefill(kept)(chunks.chunk[left], chunks.pairs[left]),
                chunks.chunk.astype(np.int64),
                chunks.seconds,
            ),
        }
        if self.mixed:
            errors["mixed_attention"] = self._mixed_error()
        return {name: asdict(error) for name, error in errors.items()}

    def _mixed_error(self) -> HeldOut:
        """Of the whole attention of a mixed step: chunk and rows."""
        mixed, _ = self._mixed

        def fit(kept: NDArray[np.bool_]) -> Any:
            found = self._fit_mixed(kept)

            def seconds(left: NDArray[np.bool_]) -> FloatArray:
                part = mixed.where(left)
                chunk_s = self.prefill(part.chunk, part.pairs)
                return chunk_s + found(part.rows, part.entries, part.chunk)

            return seconds

        return hold_out(fit, mixed.rows.astype(np.int64), mixed.seconds)


def _slope(curve: Curve) -> float:
    """Seconds per query-key pair where attention is bound by computing: over the second half of the range."""
    return curve.slopes[-1]


def _curve_error(sizes: FloatArray, seconds: FloatArray, source: str) -> HeldOut:
    def fit(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], FloatArray]:
        curve = fit_curve(sizes[kept], seconds[kept], source=source, max_points=_ALL)
        return lambda left: curve(sizes[left])

    return hold_out(fit, sizes.astype(np.int64), seconds)


def read_profile(folder: str | Path, tensor_parallel: int = 1) -> OperatorProfile:
    """Read the profile in ``folder``, or in its subfolder ``tp<tensor_parallel>``.

    Raises:
        ValueError: files or columns that are missing, or a table without usable rows.
    """
    folder = Path(folder)
    inner = folder / f"tp{tensor_parallel}" if (folder / f"tp{tensor_parallel}").is_dir() else folder
    if inner is folder and folder.name.startswith("tp") and folder.name != f"tp{tensor_parallel}":
        raise ValueError(
            f"{folder} is of another tensor-parallel degree than {tensor_parallel}: give its parent"
        )
    dense, sequences, attention = (_read(inner, name) for name in ("dense", "per_sequence", "attention"))
    meta = _meta(inner)
    layers = {
        str(name): _points(part, "tokens") for (name,), part in dense.group_by("layer", maintain_order=True)
    }
    if _path(inner, "moe"):
        layers["moe"] = _expert_points(_read(inner, "moe"))
    if not any(name in layers for name in _FEED_FORWARD):
        raise ValueError(
            f"{inner} has no feed-forward layer, neither down_proj in dense.csv nor moe.csv: it is not a whole profile"
        )
    rows = {str(name): _points(part, "sequences") for (name,), part in sequences.group_by("layer")}
    for name in ("lm_head", "sampler"):
        if name not in rows:
            raise ValueError(f"{inner / 'per_sequence.csv'} has no layer {name!r}: it has {', '.join(rows)}")
    columns = [attention[name].to_numpy().astype(np.float64) for name in _COLUMNS["attention"]]
    return OperatorProfile(
        model=model_of(inner),
        chip=str(meta.get("gpu", meta.get("hardware", "unnamed chip"))),
        measured_with=f"vLLM {meta.get('vllm_version', '?')}, CUDA {meta.get('cuda_version', '?')}",
        tensor_parallel=tensor_parallel,
        dense=layers,
        lm_head=rows["lm_head"],
        sampling=rows["sampler"],
        attention=AttentionTable(columns[0], columns[1], columns[2], columns[3], columns[4] * 1e-6),
    )


def model_of(folder: str | Path) -> str:
    """The model of the profile in ``folder``, of one tensor-parallel degree, as the profile names it."""
    return str(_meta(Path(folder)).get("model", Path(folder).parent.parent.name))


def _meta(folder: Path) -> dict[str, Any]:
    for place in (folder, folder.parent):
        if (place / "meta.yaml").is_file():
            return cast("dict[str, Any]", yaml.safe_load((place / "meta.yaml").read_text()) or {})
    return {}


def _path(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}.csv", folder / f"{name}.csv.gz")
    return next((path for path in paths if path.is_file()), None)


def _read(folder: Path, name: str) -> pl.DataFrame:
    path = _path(folder, name)
    if path is None:
        raise ValueError(f"{folder} has no {name}.csv or {name}.csv.gz: give a folder of an operator profile")
    frame = pl.read_csv(path, infer_schema_length=None)
    missing = [column for column in _COLUMNS[name] if column not in frame.columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}: it has {', '.join(frame.columns)}")
    frame = frame.filter(pl.col("time_us") > 0.0)
    if frame.is_empty():
        raise ValueError(f"{path} has no row with a time above 0")
    return frame


def _points(frame: pl.DataFrame, size: str) -> tuple[FloatArray, FloatArray]:
    frame = frame.filter(pl.col(size) > 0).group_by(size).agg(pl.col("time_us").median()).sort(size)
    return frame[size].to_numpy().astype(np.float64), frame["time_us"].to_numpy() * 1e-6


def _expert_points(frame: pl.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Seconds by tokens, [n] each, with as many experts at work as tokens wake that choose evenly: of E experts, k for
    each of T tokens, E (1 - (1 - k/E)^T). Routers that were trained wake some fewer."""
    medians = frame.group_by("tokens", "activated_experts").agg(pl.col("time_us").median()).sort(pl.all())
    counts, awake, times = (medians[name].to_numpy().astype(np.float64) for name in _COLUMNS["moe"])
    chosen, known = awake.min(), awake.max()
    tokens = np.unique(counts)
    woken: FloatArray = known * (1.0 - (1.0 - chosen / known) ** tokens)
    seconds: list[float] = [
        float(np.interp(float(each), awake[counts == count], times[counts == count]))
        for count, each in zip(tokens.tolist(), woken.tolist(), strict=True)
    ]
    return tokens, 1e-6 * np.array(seconds)


def profile_folders(root: str | Path) -> Sequence[Path]:
    """All folders below ``root`` that hold a profile of one tensor-parallel degree, in order."""
    return sorted({path.parent for path in Path(root).rglob("per_sequence.csv")})
