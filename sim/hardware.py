"""A chip's sheet: what the vendor prints, what renting it costs, where each figure is from, and what fits on it.

One YAML file per chip under ``conf/hardware``; a figure nobody publishes is ``null`` there and ``None`` here.

>>> load_hardware("h100").memory_bytes_per_s
3350000000000.0
"""

from __future__ import annotations

import datetime
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml

from sim.model_shape import ModelShape

HARDWARE_NAMES = ("a100", "b200", "h100", "h200", "l40s", "rtx_4090", "rtx_pro_6000", "tpu_v5e", "tpu_v6e")
KINDS = ("cpu", "gpu", "tpu")
TIMINGS = ("auto", "fitted", "roofline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device.

    Attributes:
        name: as in ``conf/hardware``.
        kind: "gpu", "tpu" or "cpu".
        flops_per_s: peak dense operations per second, by data type ("bfloat16", "float16", "fp8", "int8").
        memory_bytes: capacity.
        memory_bytes_per_s: peak bandwidth.
        sheet_source: where the figures are from.
        link_bytes_per_s: to its peers in one direction (NVLink, ICI, PCIe); ``None`` for a device without.
        link_latency_s: of one message.
        tdp_w: thermal design power, watts.
        idle_w: watts when idle.
        price_per_hour_usd: rent of one device; ``None`` if no price was found: ``economics`` asks for one.
        price_source: who charges that.
        price_date: ISO date on which the price was read; ``None`` when the source bears no date.
        timings: which seconds this chip's operators take. "auto": those fitted to measurements, where they come with
            the package and the sheet's rates were not changed, else the roofline of this sheet; "fitted": those or an
            error; "roofline": the formulas always; the path of a profile that ``import_timings`` wrote; or the folder
            of one model's cost model that ``calibrate`` or ``CostModel.save`` wrote.

    Raises:
        ValueError: naming the field, its value and what it must be.
    """

    name: str
    kind: str
    flops_per_s: dict[str, float]
    memory_bytes: int
    memory_bytes_per_s: float
    sheet_source: str
    link_bytes_per_s: float | None = None
    link_latency_s: float | None = None
    tdp_w: float | None = None
    idle_w: float | None = None
    price_per_hour_usd: float | None = None
    price_source: str | None = None
    price_date: str | None = None
    timings: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if not self.flops_per_s:
            raise ValueError("flops_per_s is empty: give the operations per second of at least one data type")
        for dtype, rate in self.flops_per_s.items():
            _check_positive(f"flops_per_s.{dtype}", rate)
        for name in ("memory_bytes", "memory_bytes_per_s"):
            _check_positive(name, getattr(self, name))
        for name in ("link_bytes_per_s", "link_latency_s", "tdp_w", "idle_w", "price_per_hour_usd"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        is_file = self.timings.endswith(".json") or holds_cost_model(self.timings)
        if self.timings not in TIMINGS and not is_file:
            raise ValueError(
                f"timings={self.timings!r} must be one of {', '.join(TIMINGS)} or a profile's .json file, or a folder "
                "with a cost_model.yaml as calibrate writes it"
            )
        if self.price_per_hour_usd is not None and not self.price_source:
            raise ValueError(f"price_per_hour_usd={self.price_per_hour_usd} needs a price_source")
        if self.price_date is not None:
            datetime.date.fromisoformat(self.price_date)  # its own message names the value

    def peak_flops_per_s(self, dtype: str) -> float:
        """Peak operations per second in ``dtype``.

        Raises:
            ValueError: the chip has no units for it.
        """
        if dtype not in self.flops_per_s:
            raise _unknown(f"data type of {self.name}", dtype, self.flops_per_s)
        return self.flops_per_s[dtype]


def holds_cost_model(timings: str) -> bool:
    """Whether ``timings`` names a folder that ``CostModel.save`` wrote."""
    return timings not in TIMINGS and (Path(timings) / "cost_model.yaml").is_file()


def conf_dir() -> Path:
    """The folder ``conf``: beside the packages in a checkout, inside ``specdec`` in an installation."""
    root = Path(__file__).resolve().parent.parent
    return root / "conf" if (root / "conf").is_dir() else root / "specdec" / "conf"


def load_hardware(name_or_path: str | Path) -> Hardware:
    """The sheet of a chip by its name, or from a YAML file of the same form.

    Raises:
        ValueError: unknown name, with the nearest ones; or a file with missing, unknown or impossible entries.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in HARDWARE_NAMES:
            raise _unknown("hardware", str(name_or_path), HARDWARE_NAMES)
        path = conf_dir() / "hardware" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(f"hardware file {path} does not exist: known names are {', '.join(HARDWARE_NAMES)}")
    try:
        return hardware_from_mapping(yaml.safe_load(path.read_text()))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def hardware_from_mapping(entries: object) -> Hardware:
    """A sheet from the plain mapping of its YAML file or of a configuration.

    Raises:
        ValueError: missing, unknown or impossible entries.
    """
    if not isinstance(entries, Mapping):
        raise ValueError(f"a hardware sheet is a mapping, not {type(entries).__name__}")
    values = {str(key): value for key, value in cast("Mapping[object, Any]", entries).items()}
    known = {field.name: field.default for field in fields(Hardware)}
    for key in values:
        if key not in known:
            raise _unknown("entry of a hardware sheet", key, known)
    required = ("name", "kind", "flops_per_s", "memory_bytes", "memory_bytes_per_s", "sheet_source")
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise ValueError(f"a hardware sheet needs {', '.join(missing)}")
    rates = values["flops_per_s"]
    if not isinstance(rates, Mapping):
        raise ValueError(f"flops_per_s={rates!r} must map data types to rates")
    values["flops_per_s"] = dict(cast("Mapping[str, float]", rates))
    return Hardware(**values)


def kv_blocks(
    hardware: Hardware,
    model: ModelShape,
    tensor_parallel: int = 1,
    block_size: int = 16,
    memory_utilisation: float = 0.9,
    *,
    draft: ModelShape | None = None,
    reserved_bytes: float = 0.0,
) -> int:
    """How many KV blocks fit beside the weights.

    Args:
        block_size: tokens of a block.
        memory_utilisation: share of each device's memory to use at all.
        draft: a draft model, whole on each device, which needs as many blocks of its own.
        reserved_bytes: of each device, for activations and buffers: what an engine of your kind needs (vLLM's
            profiled peak; aiconfigurator's sheets assume 3.5 GiB).

    Raises:
        ValueError: the weights do not fit, or not one block does.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be >= 1 token")
    if not 0.0 <= reserved_bytes < math.inf:
        raise ValueError(f"reserved_bytes={reserved_bytes} must be finite and >= 0")
    free = free_bytes(hardware, model, tensor_parallel, memory_utilisation, draft=draft) - reserved_bytes
    share = model.kv_heads_per_device(tensor_parallel) / model.num_kv_heads
    token_bytes = model.kv_bytes_per_token * share + (draft.kv_bytes_per_token if draft else 0.0)
    blocks = int(free // (block_size * token_bytes))
    if blocks < 1:
        raise ValueError(
            f"no KV block of {block_size} tokens fits: {free / 1e9:.2f} GB are free, a token takes "
            f"{token_bytes:.0f} bytes: raise memory_utilisation or tensor_parallel, or reserve less"
        )
    return blocks


def free_bytes(
    hardware: Hardware,
    model: ModelShape,
    tensor_parallel: int = 1,
    memory_utilisation: float = 1.0,
    *,
    draft: ModelShape | None = None,
) -> float:
    """Bytes of each device that the weights leave.

    Raises:
        ValueError: they do not fit, or a share outside (0, 1].
    """
    if not 0.0 < memory_utilisation <= 1.0:
        raise ValueError(f"memory_utilisation={memory_utilisation} must be in (0, 1]")
    model.kv_heads_per_device(tensor_parallel)
    usable = hardware.memory_bytes * memory_utilisation
    weights = model.weight_bytes / tensor_parallel + (draft.weight_bytes if draft else 0.0)
    if weights >= usable:
        raise ValueError(
            f"{model.name} does not fit: {weights / 1e9:.1f} GB of weights on each of {tensor_parallel} "
            f"{hardware.name} with {usable / 1e9:.1f} GB to use: raise tensor_parallel or store smaller weights"
        )
    return usable - weights


def _check_positive(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number > 0 (write powers of ten as 1.0e+12)")


def _unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")
