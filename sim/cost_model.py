"""Seconds of a step, from what its plan asks for.

The seconds are composed from the operators of :class:`sim.curves.Operators` over the layers of the target, plus
drafting, sampling and the host. Operators are fitted to measurements or, without any, come from a roofline:

>>> model = roofline_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
>>> model.predict(features(plan)).total_s
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from sim.curves import BoundedCurve, FloatArray, Operators, operators_from_tables
from sim.hardware import Hardware, free_bytes, kv_blocks
from sim.model_shape import ModelShape
from sim.roofline import Efficiencies, roofline_operators
from sim.step_features import StepCost, StepFeatures, check_features, features, stack_features
from sim.surface import BoundedSurface

__all__ = [
    "CostModel",
    "Efficiencies",
    "StepCost",
    "StepFeatures",
    "features",
    "kv_blocks",
    "roofline_cost_model",
    "stack_features",
]

log = logging.getLogger(__name__)

_TABLE_SIZE = 16_384  # most tokens, or rows of logits, of a step that are looked up instead of computed
_FORMAT = 1


class CostModel:
    """Predicts the seconds of steps of one model on one group of devices.

    Args:
        operators: on one device of the group.
        num_layers: decoder layers of the target.
        reduced_bytes_per_token: bytes of a token in each of the two all-reduces of a layer.
        metadata: what it was made for and from, kept by :meth:`save`.

    Attributes:
        extrapolated: operators asked far outside their fitted range, with the first such size, in the order in
            which that happened. Each was also warned of, once.
    """

    def __init__(
        self,
        operators: Operators,
        *,
        num_layers: int,
        reduced_bytes_per_token: float = 0.0,
        metadata: Mapping[str, str | int | float | None] | None = None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be >= 1")
        if operators.all_reduce and not 0.0 < reduced_bytes_per_token < math.inf:
            raise ValueError(
                f"reduced_bytes_per_token={reduced_bytes_per_token} must be > 0 where there is an all-reduce"
            )
        self.operators = operators
        self.num_layers = num_layers
        self.reduced_bytes_per_token = reduced_bytes_per_token
        self.metadata = dict(metadata or {})
        self.extrapolated: dict[str, float] = {}
        self._curves = dict(operators.curves())
        self._compile()

    @property
    def sources(self) -> dict[str, str]:
        """What each operator is from, for reports."""
        named = {name: curve.source for name, curve in self._curves.items()}
        return named | {
            "verification": "modelled: the longer of one read of the KV cache and all query-key pairs"
        }

    @overload
    def predict(self, features: StepFeatures[float]) -> StepCost[float]: ...
    @overload
    def predict(self, features: StepFeatures[FloatArray]) -> StepCost[FloatArray]: ...
    def predict(
        self, features: StepFeatures[float] | StepFeatures[FloatArray]
    ) -> StepCost[float] | StepCost[FloatArray]:
        """The cost of one plan, or of P plans at once if the features are arrays.

        Raises:
            ValueError: features that no plan has: negative, NaN, a fraction of a token, …
        """
        if isinstance(features.num_tokens, np.ndarray):
            return self._predict_arrays(cast("StepFeatures[FloatArray]", features))
        return self.predict_scalar(cast("StepFeatures[float]", features))

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        """The cost of one plan: :meth:`predict` without its choice.

        This runs once per simulated step, hence tables and plain floats. Whatever is out of the ordinary (an
        empty plan, a size out of range, impossible input) ends in a KeyError and takes the way of the arrays.
        """
        tokens, logits, rows, row_tokens, context, chunk, pairs, steps, draft_rows, drafts = features
        (
            num_layers,
            pair_s,
            row_context_s,
            row_entries,
            context_s,
            token_pairs,
            overhead_s,
            overhead_row_s,
            has_draft,
        ) = self._scalars
        decode_variance, prefill_variance, draft_variance, overhead_variance = self._variances
        draft_s = 0.0
        try:
            verify_s, variance = self._by_tokens[tokens]
            head_s, sample_s, row_variance = self._by_rows[logits]
            if rows or row_tokens or context:
                if not (0.0 < rows <= row_tokens and context >= 0.0):
                    raise KeyError
                entries = context + row_tokens
                if chunk and self._mixed:
                    layer_s = self._mixed(entries) + rows * self._mixed_row(chunk, pairs)
                elif self._decode_surface:
                    layer_s = self._decode_surface(rows, entries / rows)
                elif row_entries and row_entries * rows > entries:
                    layer_s = self._decode(row_entries * rows)
                else:
                    layer_s = self._decode(entries)
                entry_s = pair_s * row_tokens
                if row_context_s > entry_s:
                    entry_s = row_context_s
                computing_s = entry_s * entries / rows
                attention_s = num_layers * (computing_s if computing_s > layer_s else layer_s)
                verify_s += attention_s
                variance += decode_variance * attention_s * attention_s
            if chunk or pairs:
                if not 0.0 < chunk <= pairs:
                    raise KeyError
                layer_s = self._prefill(pairs + token_pairs * chunk)
                reading_s = context_s * pairs / chunk
                attention_s = num_layers * (reading_s if reading_s > layer_s else layer_s)
                verify_s += attention_s
                variance += prefill_variance * attention_s * attention_s
            if drafts or steps or draft_rows or has_draft:
                draft_s = self._draft_seconds(rows, context, chunk, steps, draft_rows, drafts)
                variance += draft_variance * draft_s * draft_s
        except KeyError:
            return self._predict_one(features)
        verify_s += head_s
        host_s = overhead_s + overhead_row_s * rows
        variance += row_variance + overhead_variance * host_s * host_s
        total_s = draft_s + verify_s + sample_s + host_s
        return StepCost(draft_s, verify_s, sample_s, host_s, math.sqrt(variance) / total_s)

    def _mixed_row(self, chunk: float, pairs: float) -> float:
        """Seconds of a decoding row beside chunks, but for its entries; the longest chunk follows from the pairs if
        all of them are alike and nothing of them is cached."""
        longest = min(chunk, 2.0 * pairs / chunk)
        return self.operators.mixed_row_s + self.operators.mixed_row_token_s * longest

    def _draft_seconds(
        self, rows: float, context: float, chunk: float, steps: float, draft_rows: float, drafts: float
    ) -> float:
        """The drafter's share of :meth:`predict_scalar`."""
        operators = self.operators
        seconds = operators.draft_row_s * draft_rows
        if drafts or steps or draft_rows:
            if not (0.0 < draft_rows <= rows and 1.0 <= steps <= drafts <= steps * draft_rows):
                raise KeyError
            if self._draft_step:
                read_s = operators.draft_context_s * context * drafts / rows
                seconds += steps * self._draft_step(drafts / steps) + read_s
        if chunk and self._draft_prefill:
            seconds += self._draft_prefill(chunk)
        return seconds

    def _predict_one(self, features: StepFeatures[float]) -> StepCost[float]:
        return StepCost(*(value.item() for value in self._predict_arrays(stack_features([features]))))

    def _predict_arrays(self, features: StepFeatures[FloatArray]) -> StepCost[FloatArray]:
        check_features(features)
        tokens, logits, rows, row_tokens, context, chunk, pairs, steps, draft_rows, drafts = features
        operators, busy = self.operators, tokens > 0.0
        some_rows, some_chunk, some_steps = (
            np.where(count > 0.0, count, 1.0) for count in (rows, chunk, steps)
        )
        parts: dict[str, FloatArray] = {"dense": self.num_layers * self._seconds("dense", tokens)}
        if operators.all_reduce:
            size = tokens * self.reduced_bytes_per_token
            parts["all_reduce"] = 2 * self.num_layers * self._seconds("all_reduce", size)
        entries = context + row_tokens
        per_entry_s = np.maximum(operators.verify_pair_s * row_tokens, operators.decode_context_s)
        computing_s = per_entry_s * entries / some_rows
        layer_s = self._decode_seconds(entries, rows, chunk, pairs / some_chunk)
        parts["decode_attention"] = self.num_layers * np.maximum(layer_s, computing_s)
        reading_s = operators.prefill_context_s * pairs / some_chunk
        sizes = pairs + operators.prefill_token_pairs * chunk
        layer_s = np.maximum(self._seconds("prefill_attention", sizes), reading_s)
        parts["prefill_attention"] = self.num_layers * layer_s
        parts["lm_head"] = self._seconds("lm_head", logits)
        verify_s = np.sum(list(parts.values()), axis=0)
        parts["sampling"] = self._seconds("sampling", logits)
        draft_s = operators.draft_row_s * draft_rows
        if operators.draft_step:
            step_s = self._seconds("draft_step", drafts / some_steps)
            read_s = operators.draft_context_s * context * drafts / some_rows
            draft_s = draft_s + steps * step_s + read_s + self._seconds("draft_prefill", chunk)
        parts["draft_step"] = draft_s
        overhead_s = np.where(busy, operators.overhead_s + operators.overhead_row_s * rows, 0.0)
        variance = (operators.overhead_relative_std * overhead_s) ** 2
        for name, seconds in parts.items():
            variance = variance + (self._relative_std(name) * seconds) ** 2
        total_s = draft_s + verify_s + parts["sampling"] + overhead_s
        relative_std = np.sqrt(variance) / np.where(total_s > 0.0, total_s, 1.0)
        return StepCost(draft_s, verify_s, parts["sampling"], overhead_s, relative_std)

    def _decode_seconds(
        self, entries: FloatArray, rows: FloatArray, chunk: FloatArray, mean_pairs: FloatArray
    ) -> FloatArray:
        """One layer's attention of the decoding rows; ``mean_pairs``: of a prompt token."""
        operators = self.operators
        if operators.mixed_attention is None:
            return self._decode_alone(entries, rows)
        mixed = (chunk > 0.0) & (rows > 0.0)
        row_s = operators.mixed_row_s + operators.mixed_row_token_s * np.minimum(chunk, 2.0 * mean_pairs)
        together_s = self._seconds("mixed_attention", np.where(mixed, entries, 0.0)) + rows * row_s
        alone_s = self._decode_alone(np.where(mixed, 0.0, entries), np.where(mixed, 0.0, rows))
        return np.where(mixed, together_s, alone_s)

    def _decode_alone(self, entries: FloatArray, rows: FloatArray) -> FloatArray:
        """The same where there is no prompt chunk."""
        operators, name = self.operators, "decode_surface"
        surface = operators.decode_surface
        if surface is None:
            return self._seconds("decode_attention", np.maximum(entries, operators.decode_row_entries * rows))
        contexts = entries / np.where(rows > 0.0, rows, 1.0)
        most_rows, longest = surface.limits
        far = (rows > most_rows) | (contexts > longest)
        if name not in self.extrapolated and far.any():
            first = int(np.argmax(far))
            self.extrapolated[name] = float(entries[first])
            log.warning(
                "decode_surface at %g rows of %g tokens is far outside its grid, up to %g and %g (%s): extrapolated",
                rows[first],
                contexts[first],
                surface.rows[-1],
                surface.contexts[-1],
                surface.source,
            )
            self._compile()
        return surface(rows, contexts)

    def _relative_std(self, name: str) -> float:
        curve = self._curves.get(name)
        return curve.relative_std if curve else self.operators.overhead_relative_std

    def _seconds(self, name: str, sizes: FloatArray) -> FloatArray:
        """A curve at some sizes; the first one far out of its range is warned of and noted."""
        curve = self._curves[name]
        if name not in self.extrapolated:
            low, high = curve.limits
            far = sizes[(sizes > 0.0) & ((sizes < low) | (sizes > high))]
            if far.size:
                self.extrapolated[name] = float(far[0])
                log.warning(
                    "%s at size %g is far outside the range it was fitted on, %g to %g (%s): extrapolated",
                    name,
                    far[0],
                    curve.x[0],
                    curve.x[-1],
                    curve.source,
                )
                self._compile()
        return curve(sizes)

    def _compile(self) -> None:
        """What :meth:`predict_scalar` looks up: sizes within range, or of operators that were warned of."""
        operators = self.operators
        counts = np.arange(_TABLE_SIZE + 1.0)
        layers_s = self.num_layers * operators.dense(counts)
        variance = (operators.dense.relative_std * layers_s) ** 2
        known = self._within("dense", counts) & (counts > 0.0)
        if operators.all_reduce:
            sizes = counts * self.reduced_bytes_per_token
            reduce_s = 2 * self.num_layers * operators.all_reduce(sizes)
            layers_s = layers_s + reduce_s
            variance = variance + (operators.all_reduce.relative_std * reduce_s) ** 2
            known &= self._within("all_reduce", sizes)
        self._by_tokens = _table(counts[known], layers_s[known], variance[known])
        head_s, sample_s = operators.lm_head(counts), operators.sampling(counts)
        variance = (operators.lm_head.relative_std * head_s) ** 2
        variance = variance + (operators.sampling.relative_std * sample_s) ** 2
        known = self._within("lm_head", counts) & self._within("sampling", counts)
        self._by_rows = _table(counts[known], head_s[known], sample_s[known], variance[known])
        at = {name: BoundedCurve(curve, self._bounds(name)) for name, curve in self._curves.items()}
        self._decode, self._prefill = at["decode_attention"], at["prefill_attention"]
        self._mixed = at.get("mixed_attention")
        self._decode_surface = None
        if surface := operators.decode_surface:
            beyond = (math.inf, math.inf) if "decode_surface" in self.extrapolated else surface.limits
            self._decode_surface = BoundedSurface(surface, beyond)
        self._draft_step, self._draft_prefill = at.get("draft_step"), at.get("draft_prefill")
        self._scalars = (
            self.num_layers,
            operators.verify_pair_s,
            operators.decode_context_s,
            operators.decode_row_entries,
            operators.prefill_context_s,
            operators.prefill_token_pairs,
            operators.overhead_s,
            operators.overhead_row_s,
            operators.draft_step is not None,
        )
        self._variances = tuple(
            self._relative_std(name) ** 2
            for name in ("decode_attention", "prefill_attention", "draft_step", "overhead")
        )

    def _bounds(self, name: str) -> tuple[float, float]:
        return (0.0, sys.float_info.max) if name in self.extrapolated else self._curves[name].limits

    def _within(self, name: str, sizes: FloatArray) -> NDArray[np.bool_]:
        low, high = self._bounds(name)
        return (sizes == 0.0) | ((sizes >= low) & (sizes <= high))

    def save(self, folder: str | Path) -> None:
        """Write ``cost_model.yaml`` and ``curves.parquet`` into ``folder``, which may exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        points, entries = self.operators.tables()
        points.write_parquet(folder / "curves.parquet")
        document = {
            "format": _FORMAT,
            "num_layers": self.num_layers,
            "reduced_bytes_per_token": self.reduced_bytes_per_token,
            "metadata": self.metadata,
            **entries,
        }
        (folder / "cost_model.yaml").write_text(yaml.safe_dump(document, sort_keys=False))

    @classmethod
    def load(cls, folder: str | Path) -> CostModel:
        """The model that :meth:`save` wrote, equal to the last bit.

        Raises:
            ValueError: files that are missing, of another format or inconsistent.
        """
        folder = Path(folder)
        for name in ("cost_model.yaml", "curves.parquet"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}: give a folder that CostModel.save wrote")
        document = cast("dict[str, Any]", yaml.safe_load((folder / "cost_model.yaml").read_text()) or {})
        try:
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']!r}, this version reads {_FORMAT}")
            return cls(
                operators_from_tables(pl.read_parquet(folder / "curves.parquet"), document),
                num_layers=document["num_layers"],
                reduced_bytes_per_token=document["reduced_bytes_per_token"],
                metadata=document["metadata"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} is not a cost model: {error!r}") from error


def roofline_cost_model(
    hardware: Hardware,
    model: ModelShape,
    *,
    tensor_parallel: int = 1,
    draft: ModelShape | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    efficiencies: Efficiencies | None = None,
) -> CostModel:
    """The cost model of a chip that nobody measured, from its sheet.

    Args:
        tensor_parallel: devices that share the target; a draft model runs whole on each of them.
        draft: the draft model; without one, drafting takes no device time (n-gram lookup).
        dtype: of the matrix products; weights are stored in it unless they are smaller already.
        kv_dtype: of the KV cache; by default as ``model`` says.
        efficiencies: shares of the peaks, and latencies.

    Raises:
        ValueError: weights that do not fit, heads that do not divide, a chip without the data type or a link.
    """
    model = model.stored_as(dtype, kv_dtype)
    draft = draft.stored_as(dtype, kv_dtype) if draft else None
    operators = roofline_operators(
        hardware,
        model,
        tensor_parallel=tensor_parallel,
        draft=draft,
        dtype=dtype,
        efficiencies=efficiencies or Efficiencies(),
    )
    free_bytes(hardware, model, tensor_parallel, draft=draft)
    metadata = {
        "hardware": hardware.name,
        "model": model.name,
        "tensor_parallel": tensor_parallel,
        "draft": draft.name if draft else None,
        "dtype": dtype,
        "kv_bytes_per_element": model.kv_bytes_per_element,
        "origin": "roofline",
    }
    return CostModel(
        operators,
        num_layers=model.num_layers,
        reduced_bytes_per_token=model.hidden_size * 2.0 if tensor_parallel > 1 else 0.0,
        metadata=metadata,
    )


def _table(keys: FloatArray, *columns: FloatArray) -> dict[float, tuple[float, ...]]:
    return dict(zip(keys.tolist(), zip(*(column.tolist() for column in columns), strict=True), strict=True))
