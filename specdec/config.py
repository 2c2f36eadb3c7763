"""Schemas of the experiment configuration: one frozen dataclass per group of ``conf/``.

Hydra composes plain YAML; :func:`validate` then checks every key and type against these classes and returns a
frozen :class:`Config`. A group whose options depend on a choice (``drafter``, ``policy``, ``speculation``,
``experiment``) has one schema per ``name``, so an option that the choice does not have is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from specdec.names import unknown_name


@dataclass(frozen=True)
class ModelConfig:
    """name: short name, hub id, directory or GGUF file. dtype, backend, device: see ``specdec.LLM``."""

    name: str = "smollm2-135m"
    dtype: str = "bfloat16"
    backend: str = "auto"
    device: str | None = None


@dataclass(frozen=True)
class NoDrafter:
    name: str = "none"


@dataclass(frozen=True)
class NgramConfig:
    name: str = "ngram"
    max_ngram: int = 3
    min_ngram: int = 1


@dataclass(frozen=True)
class LayerSkipConfig:
    name: str = "layer_skip"
    num_skip: int | None = None
    skip_layers: list[int] | None = None


@dataclass(frozen=True)
class DraftModelConfig:
    name: str = "draft_model"
    model: str = "smollm2-135m"
    backend: str = "auto"


@dataclass(frozen=True)
class SyntheticConfig:
    name: str = "synthetic"
    alpha: float | None = 0.8
    rates: list[float] | None = None
    seed: int = 0


@dataclass(frozen=True)
class PolicyConfig:
    """order: of the waiting queue (fcfs, sjf, priority, edf)."""

    name: str = "chunked"
    order: str = "fcfs"


@dataclass(frozen=True)
class DynamicPolicyConfig(PolicyConfig):
    """window_s: how long the oldest request waits for the batch to fill."""

    name: str = "dynamic"
    window_s: float = 0.05


@dataclass(frozen=True)
class SpeculationOff:
    name: str = "off"


@dataclass(frozen=True)
class FixedConfig:
    """num_drafts: draft tokens per step, k."""

    name: str = "fixed"
    num_drafts: int = 4


@dataclass(frozen=True)
class AdaptiveConfig:
    """See ``specdec.scheduler.speculation.Adaptive``."""

    name: str = "adaptive"
    num_drafts: int = 8
    cost_ratio: float = 0.05
    probe_every: int = 16


@dataclass(frozen=True)
class VerifyConfig:
    """rule: how sampled drafts are verified, token or block; greedy requests always take the argmax."""

    rule: str = "token"


@dataclass(frozen=True)
class WorkloadConfig:
    """prompts: "builtin" or a path to JSON lines in Spec-Bench's form. tasks: only these. num_prompts: at most
    so many, evenly over the tasks."""

    prompts: str = "builtin"
    tasks: list[str] | None = None
    num_prompts: int | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """See ``specdec.SamplingParams``."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    max_tokens: int = 96
    ignore_eos: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine; see ``specdec.LLM``. threads: of the CPU, null for torch's choice."""

    max_num_seqs: int = 16
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = 2048
    num_blocks: int | None = None
    kv_memory_mb: int = 512
    block_size: int = 16
    prefix_caching: bool = True
    watermark: float = 0.01
    threads: int | None = None


@dataclass(frozen=True)
class TrackingConfig:
    """mode: offline, online or disabled."""

    mode: str = "offline"
    project: str = "specdec"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QuickstartConfig:
    """drafters: compared with plain decoding. repeats: interleaved rounds, of which the median counts."""

    name: str = "quickstart"
    drafters: list[str] = field(default_factory=lambda: ["ngram", "layer_skip"])
    repeats: int = 2


@dataclass(frozen=True)
class AcceptanceSweepConfig:
    """alphas × num_drafts: the grid. batch: requests at once."""

    name: str = "acceptance_sweep"
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
    num_drafts: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    batch: int = 1
    repeats: int = 2


@dataclass(frozen=True)
class ServeConfig:
    """arrivals: poisson, gamma, uniform or at_once. cv: coefficient of variation of gamma's gaps. slo_*: limits
    that a request must meet to count as good."""

    name: str = "serve"
    num_requests: int = 48
    arrivals: str = "poisson"
    rate_per_s: float = 4.0
    cv: float = 2.0
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.1


@dataclass(frozen=True)
class CpuBenchConfig:
    """peers: engines to compare with when installed. repeats: interleaved rounds. threads: of every engine."""

    name: str = "cpu_bench"
    peers: list[str] = field(default_factory=lambda: ["transformers", "vllm", "llama_cpp"])
    repeats: int = 3
    threads: int = 2
    new_tokens: int = 128
    concurrency: list[int] = field(default_factory=lambda: [1, 16, 64])
    verify_tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    num_drafts: int = 10
    startup: bool = True


VARIANTS: dict[str, dict[str, type]] = {
    "drafter": {
        "none": NoDrafter,
        "ngram": NgramConfig,
        "layer_skip": LayerSkipConfig,
        "draft_model": DraftModelConfig,
        "synthetic": SyntheticConfig,
    },
    "policy": {
        "static": PolicyConfig,
        "dynamic": DynamicPolicyConfig,
        "continuous": PolicyConfig,
        "chunked": PolicyConfig,
    },
    "speculation": {"off": SpeculationOff, "fixed": FixedConfig, "adaptive": AdaptiveConfig},
    "experiment": {
        "quickstart": QuickstartConfig,
        "acceptance_sweep": AcceptanceSweepConfig,
        "serve": ServeConfig,
        "cpu_bench": CpuBenchConfig,
    },
}
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "verify": VerifyConfig,
    "workload": WorkloadConfig,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "tracking": TrackingConfig,
}


@dataclass(frozen=True)
class Config:
    """A validated configuration. ``drafter``, ``policy``, ``speculation`` and ``experiment`` hold the schema
    that their ``name`` chose (see ``VARIANTS``)."""

    experiment: Any
    model: ModelConfig
    drafter: Any
    verify: VerifyConfig
    policy: Any
    speculation: Any
    workload: WorkloadConfig
    sampling: SamplingConfig
    engine: EngineConfig
    tracking: TrackingConfig
    seed: int
    output_root: str

    def as_dict(self) -> dict[str, Any]:
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def validate(raw: DictConfig | Mapping[str, Any]) -> Config:
    """Check a composed configuration and freeze it.

    Raises:
        ValueError: an unknown key or choice (with the nearest ones) or a wrong type, naming the key.
    """
    content = OmegaConf.to_container(OmegaConf.create(dict(raw)), resolve=True)
    assert isinstance(content, dict)
    allowed = [item.name for item in fields(Config)]
    for key in content:
        if key not in allowed:
            raise unknown_name("configuration key", key, allowed)
    for key in allowed:
        if key not in content:
            raise ValueError(f"the configuration has no {key!r}: choose one, e.g. +{key}=…")
    values: dict[str, Any] = {"output_root": str(content["output_root"])}
    values["seed"] = _typed("seed", make_dataclass("Root", [("seed", int, 0)]), {"seed": content["seed"]}).seed
    for group in (*GROUPS, *VARIANTS):
        node = content[group]
        if not isinstance(node, dict):
            raise ValueError(f"{group}={node!r} must be a group of options")
        values[group] = _typed(group, _schema(group, node), node)
    return Config(**values)


def _schema(group: str, node: Mapping[Any, Any]) -> type:
    if group in GROUPS:
        return GROUPS[group]
    name = node.get("name")
    if name not in VARIANTS[group]:
        raise unknown_name(f"{group} name", name, VARIANTS[group])
    return VARIANTS[group][name]


def _typed(group: str, schema: type, node: Mapping[Any, Any]) -> Any:
    allowed = [item.name for item in fields(schema)]
    for key in node:
        if key not in allowed:
            raise unknown_name(f"key {group}.{key}: {schema.__name__} has no option", str(key), allowed)
    structured = OmegaConf.structured(schema)
    OmegaConf.set_readonly(structured, False)  # the schema is frozen, its filling is not
    try:
        return OmegaConf.to_object(OmegaConf.merge(structured, node))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ValueError(f"{group}.{key}: {str(error).splitlines()[0]}") from None
