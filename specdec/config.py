"""Schemas of the experiment configuration: one frozen dataclass per group of ``conf/``.

:func:`register` puts them into Hydra's ConfigStore under ``schema/``, and every file of ``conf/`` starts from
its schema and holds only what differs. So Hydra itself refuses unknown keys and wrong types; :func:`validate`
checks the rest (appended keys, choices, ranges) and returns a frozen :class:`Config`. A group whose options
depend on a choice (``drafter``, ``policy``, ``speculation``, ``experiment``) has one schema per ``name``.
"""

from __future__ import annotations

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from specdec.names import unknown_name

# Allowed values of options that are words. A test holds them equal to the tables of the code that uses them.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("bfloat16", "float32", "float16"),
    "model.backend": ("auto", "eager", "native"),
    "verify.rule": ("token", "block"),
    "policy.order": ("fcfs", "sjf", "priority", "edf"),
    "tracking.mode": ("offline", "online", "disabled"),
    "experiment.arrivals": ("poisson", "gamma", "uniform", "all_at_once"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_rate(key: str, rate: float | None) -> None:
    _require(rate is not None and 0.0 <= rate <= 1.0, f"{key}: acceptance rate {rate} must lie in [0, 1]")


def _check_num_drafts(key: str, num_drafts: int) -> None:
    _require(num_drafts >= 0, f"{key}={num_drafts} must be >= 0 (0 turns speculation off)")


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

    def __post_init__(self) -> None:
        for rate in [self.alpha] if self.rates is None else self.rates:
            _require(rate is not None, "drafter.alpha is null: give it, or drafter.rates (one per position)")
            _check_rate("drafter.alpha" if self.rates is None else "drafter.rates", rate)


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

    def __post_init__(self) -> None:
        _require(self.window_s >= 0, f"policy.window_s={self.window_s} must be >= 0 seconds")


@dataclass(frozen=True)
class SpeculationOff:
    name: str = "off"


@dataclass(frozen=True)
class FixedConfig:
    """num_drafts: draft tokens per step, k."""

    name: str = "fixed"
    num_drafts: int = 4

    def __post_init__(self) -> None:
        _check_num_drafts("speculation.num_drafts", self.num_drafts)


@dataclass(frozen=True)
class AdaptiveConfig:
    """See ``specdec.scheduler.speculation.Adaptive``."""

    name: str = "adaptive"
    num_drafts: int = 8
    cost_ratio: float = 0.05
    probe_every: int = 16

    def __post_init__(self) -> None:
        _check_num_drafts("speculation.num_drafts", self.num_drafts)


@dataclass(frozen=True)
class VerifyConfig:
    """rule: how sampled drafts are verified, token or block; greedy requests always take the argmax."""

    rule: str = "token"


@dataclass(frozen=True)
class WorkloadConfig:
    """prompts: "builtin" or a path to JSON lines in Spec-Bench's form. tasks: only these. num_prompts: at
    most so many, evenly over the tasks."""

    prompts: str
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

    def __post_init__(self) -> None:
        for alpha in self.alphas:
            _check_rate("experiment.alphas", alpha)
        for num_drafts in self.num_drafts:
            _check_num_drafts("experiment.num_drafts", num_drafts)


@dataclass(frozen=True)
class ServeConfig:
    """arrivals: poisson, gamma, uniform or all_at_once. cv: coefficient of variation of gamma's gaps. slo_*:
    limits that a request must meet to count as good."""

    name: str = "serve"
    num_requests: int = 48
    arrivals: str = "poisson"
    rate_per_s: float = 4.0
    cv: float = 2.0
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_requests", "rate_per_s", "cv", "slo_ttft_s", "slo_tpot_s"):
            value = getattr(self, name)
            _require(value > 0, f"experiment.{name}={value} must be > 0")


@dataclass(frozen=True)
class CpuBenchConfig:
    """peers: engines to compare with when installed. repeats: interleaved rounds. threads: of each engine."""

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
    that their ``name`` chose (see ``VARIANTS``). ``output_root``: run directories are made below it."""

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
    seed: int = 0
    output_root: str = "runs"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in ``config.yaml``."""
        return asdict(self)


def register() -> None:
    """Store every schema under ``schema/`` in Hydra's ConfigStore; again is harmless."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=_open(_root_schema()))
    for group, schema in GROUPS.items():
        store.store(group="schema", name=group, node=_open(schema))
    for group, variants in VARIANTS.items():
        for name, schema in variants.items():
            store.store(group=f"schema/{group}", name=name, node=_open(schema))


def _root_schema() -> type:
    """:class:`Config` as Hydra fills it: each group is whatever schema its file starts from."""
    groups = [(name, Any, field(default=MISSING)) for name in (*GROUPS, *VARIANTS)]
    plain = [
        (item.name, type(item.default), field(default=item.default))
        for item in fields(Config)
        if item.default is not NO_DEFAULT
    ]
    return make_dataclass("Root", groups + plain)


def _open(schema: type) -> DictConfig:
    """The schema as a node that can be filled: only the filled object is frozen."""
    node = OmegaConf.structured(schema)
    OmegaConf.set_readonly(node, False)
    return node


def validate(raw: DictConfig) -> Config:
    """Check a composed configuration and freeze it.

    Raises:
        ValueError: an unknown key or choice (with the nearest ones), a missing value or one out of range,
            naming the key.
    """
    _check_keys(raw, "")
    if "experiment" in OmegaConf.missing_keys(raw):
        raise ValueError(
            f"no experiment chosen: add +experiment=NAME, one of {', '.join(VARIANTS['experiment'])}"
        )
    for key in sorted(OmegaConf.missing_keys(raw)):
        raise ValueError(f"{key} has no value: give it, e.g. {key}=…")
    for group, variants in VARIANTS.items():
        _check_variant(group, raw[group], variants)
    for key, choices in CHOICES.items():
        value = OmegaConf.select(raw, key)
        if value is not None and value not in choices:
            raise unknown_name(key, value, choices)
    return Config(**{str(key): _plain(node) for key, node in raw.items()})


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if isinstance(value, DictConfig) else value


def _check_keys(node: DictConfig, prefix: str) -> None:
    """No key beyond the schemas: Hydra lets ``+key=value`` append what they do not have."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        raise ValueError(f"{prefix.rstrip('.')} must be chosen by name, not {OmegaConf.to_container(node)}")
    known = [f"{prefix}{item.name}" for item in fields(schema)]
    for key in node:
        if f"{prefix}{key}" not in known:
            raise unknown_name("key", f"{prefix}{key}", known)
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            _check_keys(child, f"{prefix}{key}.")
        elif isinstance(child, ListConfig) and any(
            isinstance(item, DictConfig | ListConfig) for item in child
        ):
            raise ValueError(f"{prefix}{key}={child} must be a flat list")


def _check_variant(group: str, node: DictConfig, variants: dict[str, type]) -> None:
    """A choice is made by its group: ``drafter=ngram``, never ``drafter.name=ngram``."""
    name, schema = node["name"], OmegaConf.get_type(node)
    if name not in variants:
        raise unknown_name(f"{group} name", name, variants)
    if variants[name] is not schema:
        raise ValueError(f"{group}.name={name} does not fit the other options: choose it with {group}={name}")
