"""Published speed-ups of speculative decoding against what a chip's timings predict from the acceptance alone.

A step of a method takes the target's pass over its drafted tokens, the drafter's passes, and the host:

    speed-up = τ · plain step / (verification + drafting + host)

Where an engine launches every kernel from Python, a pass takes at least ``layer_s`` per decoder layer whatever the
device does, a drafter's pass that grows a tree ``expand_s`` more (probabilities, top-k, gathers, masks and positions
of the next level), and a tree costs ``tree_s`` per step beside. None is published; they are fitted to the other methods
of the table when one is predicted. With all at zero the device alone decides, as under CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from sim.cost_model import CostModel, StepFeatures
from sim.hardware import Hardware, load_hardware
from sim.model_shape import MODEL_SHAPES, ModelShape
from sim.profiles.chips import DATA, chip_cost_model
from sim.profiles.fitting import minimum

RTX_3090 = Hardware(
    name="rtx_3090",
    kind="gpu",
    flops_per_s={"bfloat16": 7.1e13, "float16": 7.1e13},
    memory_bytes=24 * 2**30,
    memory_bytes_per_s=9.36e11,
    sheet_source="NVIDIA Ampere GA102 whitepaper, GeForce RTX 3090; dense, float32 accumulation",
)
"""A consumer card with half of an A100's operations per byte. Not measured: roofline."""


_LAYER_S = (1e-4, 1.2e-3)  # 1.2 ms: gpt-fast's 25.5 tokens/s of Llama-7B on an A100 in plain eager mode
_TREE_S = (1e-5, 5e-2)
_EXPAND_S = (1e-5, 5e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of a published table; see the comments of the data file."""

    name: str
    speedup: float
    tau: float
    nodes: int
    passes: int
    layers: int
    heads: int
    rows: int
    width: float
    tree: bool
    host_ms: float


@dataclass(frozen=True, slots=True)
class Table:
    """A published table and the conditions it was measured under."""

    source: str
    chip: str
    target: ModelShape
    context: int
    methods: tuple[Method, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """Host seconds of an engine: per decoder layer of any pass, at least; per step with a tree; per pass that grows
    one."""

    layer_s: float = 0.0
    tree_s: float = 0.0
    expand_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepParts:
    """Seconds of a step of one method: the target's pass, the drafter, the host beside them; and of a plain step."""

    verify_s: float
    draft_s: float
    host_s: float
    plain_s: float

    @property
    def relative(self) -> float:
        """The step in plain steps."""
        return (self.verify_s + self.draft_s + self.host_s) / self.plain_s


def read_table(path: str | Path | None = None) -> Table:
    """The table that ships, or another of its form.

    Raises:
        ValueError: no such file, or entries that are missing or unknown.
    """
    path = DATA / "spec_bench_a100.yaml" if path is None else Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a table in the form of spec_bench_a100.yaml")
    try:
        plain = cast("dict[str, Any]", yaml.safe_load(path.read_text()))
        methods = tuple(Method(**entry) for entry in plain["methods"])
        return Table(
            plain["source"], plain["chip"], MODEL_SHAPES[plain["target"]], int(plain["context"]), methods
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not such a table: {error!r}") from error


class Predictor:
    """Step times of methods on one chip.

    Args:
        hardware: whose timings, fitted or roofline, are used; float16 throughout.
        target: the model that verifies.
        context: cached tokens.
    """

    def __init__(self, hardware: Hardware, target: ModelShape, context: int) -> None:
        self.hardware, self.target, self.context = hardware, target, context
        self.model = chip_cost_model(hardware, target, dtype="float16")
        self._drafters: dict[tuple[float, int], CostModel] = {}

    def parts(self, method: Method, engine: Engine, batch: int = 1) -> StepParts:
        floor_s = engine.layer_s * self.target.num_layers
        host_s = 1e-3 * method.host_ms + (engine.tree_s if method.tree else 0.0)
        return StepParts(
            verify_s=max(self.target_s(method.nodes, batch), floor_s),
            draft_s=method.passes * self._pass_s(method, engine, batch),
            host_s=batch * host_s,
            plain_s=max(self.target_s(0, batch), floor_s),
        )

    def speedup(self, method: Method, engine: Engine, batch: int = 1) -> float:
        return method.tau / self.parts(method, engine, batch).relative

    def target_s(self, drafts: int, batch: int = 1) -> float:
        """The target's pass over one known token and ``drafts`` more of each row, sampling included, no host."""
        rows, zero = float(batch), 0.0
        tokens = rows * (1 + drafts)
        cost = self.model.predict_scalar(
            StepFeatures(tokens, tokens, rows, tokens, rows * self.context, zero, zero, zero, zero, zero)
        )
        return cost.verify_s + cost.sample_s

    def _pass_s(self, method: Method, engine: Engine, batch: int) -> float:
        """One pass of the drafter: its layers and heads on the device, or the host's launches if they take longer."""
        if method.passes == 0:
            return 0.0
        drafter = self._drafter(method)
        operators, rows = drafter.operators, np.array([float(batch * method.rows)])
        entries = np.array([float(batch * self.context)])
        layer_s = float(operators.dense(rows)[0]) + float(operators.decode_attention(entries)[0])
        device_s = method.layers * layer_s + method.heads * float(operators.lm_head(rows)[0])
        launched_s = max(device_s, engine.layer_s * (method.layers + method.heads))
        return launched_s + (engine.expand_s if method.tree else 0.0)

    def _drafter(self, method: Method) -> CostModel:
        """A model of one layer, as wide as the method says, with the target's vocabulary."""
        key = method.width, method.layers
        if key not in self._drafters:
            heads = max(1, round(self.target.num_heads * method.width))
            shape = replace(
                self.target,
                name="drafter",
                num_layers=1,
                hidden_size=heads * self.target.head_dim,
                num_heads=heads,
                num_kv_heads=heads,
                intermediate_size=max(64, round(self.target.intermediate_size * method.width)),
            )
            self._drafters[key] = chip_cost_model(self.hardware, shape, dtype="float16")
        return self._drafters[key]


def fit_engine(predictor: Predictor, methods: Sequence[Method]) -> Engine:
    """The host seconds that bring the predicted speed-ups of ``methods`` closest to the published ones.

    Raises:
        ValueError: fewer than three methods: three figures are fitted.
    """
    if len(methods) < 3:
        raise ValueError(f"{len(methods)} methods cannot tell three figures of an engine")

    def error(logs: np.ndarray) -> float:
        engine = _engine(logs)
        logs_off = [np.log(predictor.speedup(one, engine) / one.speedup) for one in methods]
        return float(np.mean(np.abs(logs_off)))

    starts = ((5e-4, 3e-3, 3e-4), (1e-3, 6e-3, 1e-3), (2e-4, 1e-3, 1e-4))
    found = [minimum(error, np.log(start).tolist()) for start in starts]
    return _engine(min(found, key=lambda one: one[1])[0])


def _engine(logs: np.ndarray) -> Engine:
    """Once the host alone decides, only the ratios of the three show in speed-ups, hence the bounds."""
    bounds = zip(np.exp(logs).tolist(), (_LAYER_S, _TREE_S, _EXPAND_S), strict=True)
    return Engine(*(min(max(value, low), high) for value, (low, high) in bounds))


def left_out_predictions(predictor: Predictor, methods: Sequence[Method]) -> dict[str, float]:
    """Each method's speed-up with the engine fitted to all the others."""
    return {
        one.name: predictor.speedup(
            one, fit_engine(predictor, [other for other in methods if other is not one])
        )
        for one in methods
    }


def orders(predictors: Sequence[Predictor], table: Table, batch: int) -> Mapping[str, dict[str, float]]:
    """Chip → method → speed-up where the device alone decides, best first."""
    found: dict[str, dict[str, float]] = {}
    for predictor in predictors:
        chip = predictor.hardware
        speedups = {one.name: predictor.speedup(one, Engine(), batch) for one in table.methods}
        found[chip.name] = dict(sorted(speedups.items(), key=lambda item: -item[1]))
    return found


def known_chips(names: Sequence[str]) -> list[Hardware]:
    """Sheets by name; ``rtx_3090`` is the one above."""
    return [RTX_3090 if name == RTX_3090.name else load_hardware(name) for name in names]
