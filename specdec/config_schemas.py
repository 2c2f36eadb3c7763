"""Schemas of the groups of ``conf/`` but the experiments: one frozen dataclass each, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from specdec.names import unknown_name

# Names that the code's tables hold too; a test holds them equal.
QUANTIZATIONS = ("int4", "int8", "fp8")
GROUP_SIZES = (32, 64, 128)
PRUNERS = ("magnitude", "semi_structured", "layers")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_rate(key: str, rate: float | None) -> None:
    require(rate is not None and 0.0 <= rate <= 1.0, f"{key}: acceptance rate {rate} must lie in [0, 1]")


def check_num_drafts(key: str, num_drafts: int) -> None:
    require(num_drafts >= 0, f"{key}={num_drafts} must be >= 0 (0 turns speculation off)")


def check_positive(key: str, value: float) -> None:
    require(0.0 < value < math.inf, f"{key}={value} must be a finite number > 0")


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    known = list(choices)
    if value not in known:
        raise unknown_name(key, value, known)


def check_quantization(group: str, quantization: str | None, group_size: int | None) -> None:
    if quantization is not None:
        check_choice(f"{group}.quantization", quantization, QUANTIZATIONS)
    if group_size is not None:
        require(
            quantization is not None,
            f"{group}.group_size={group_size} is for quantisation only: add {group}.quantization=int4, or leave it out",
        )
        require(
            quantization != "fp8",
            f"{group}.group_size={group_size}: fp8 has one scale for each output channel; "
            f"set {group}.quantization=int4 or int8, or leave it out",
        )
        require(
            group_size in GROUP_SIZES,
            f"{group}.group_size={group_size} must be one of {', '.join(map(str, GROUP_SIZES))}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """name: short name, hub id, directory or GGUF file. The others: see ``specdec.LLM``."""

    name: str = "smollm2-135m"
    dtype: str = "bfloat16"
    backend: str = "auto"
    kv_dtype: str | None = None
    batch_invariant: bool = False
    graphs: str = "auto"
    device: str | None = None
    quantization: str | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_quantization("model", self.quantization, self.group_size)


@dataclass(frozen=True)
class NoDrafter:
    name: str = "none"


@dataclass(frozen=True)
class NgramConfig:
    name: str = "ngram"
    max_ngram: int = 3
    min_ngram: int = 1


@dataclass(frozen=True)
class SuffixConfig:
    """max_corpus_tokens: of finished outputs, kept for later requests. min_probability: of the nodes drafted."""

    name: str = "suffix"
    max_corpus_tokens: int = 65_536
    min_probability: float = 0.02
    tree: bool = True

    def __post_init__(self) -> None:
        require(
            self.max_corpus_tokens >= 0, f"drafter.max_corpus_tokens={self.max_corpus_tokens} must be >= 0"
        )
        require(
            0.0 < self.min_probability < 1.0,
            f"drafter.min_probability={self.min_probability} must lie in (0, 1)",
        )


@dataclass(frozen=True)
class RecyclingConfig:
    """num_successors: kept of each token."""

    name: str = "recycling"
    num_successors: int = 8

    def __post_init__(self) -> None:
        require(self.num_successors >= 1, f"drafter.num_successors={self.num_successors} must be >= 1")


@dataclass(frozen=True)
class MergedConfig:
    """drafters: names, each with its own defaults, or options: {name: eagle, path: head}. step_tokens, sure, least:
    see ``specdec.drafter.merged.MergedDrafter``."""

    name: str = "merged"
    drafters: list[Any] = field(default_factory=lambda: ["suffix", "recycling"])
    step_tokens: int | None = None
    sure: float = 0.7
    least: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.drafters) > 0, "drafter.drafters is empty: name some, e.g. [suffix,recycling]")
        require(
            self.step_tokens is None or self.step_tokens >= 1,
            f"drafter.step_tokens={self.step_tokens} must be >= 1, or null",
        )
        for one in self.drafters:
            is_named = isinstance(one, str) or (isinstance(one, dict) and isinstance(one.get("name"), str))
            require(
                is_named, f"drafter.drafters: {one!r} is neither a name nor options with one, {{name: …}}"
            )
        require(0.0 < self.sure <= 1.0, f"drafter.sure={self.sure} must lie in (0, 1]")
        require(0.0 <= self.least < 1.0, f"drafter.least={self.least} must lie in [0, 1)")


@dataclass(frozen=True)
class LayerSkipConfig:
    """tree: chains if empty, else what ``specdec.tree.make_tree`` takes: {name: k_ary, branching: [4, 2, 1]}."""

    name: str = "layer_skip"
    num_skip: int | None = None
    skip_layers: list[int] | None = None
    tree: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DraftModelConfig:
    """tree: as for layer_skip. quantization, group_size, pruning: draft with such a copy of the model; see
    ``specdec.drafter.draft_model.DraftModelDrafter``. pruning: {name: layers, num_drop: 5}, {name: magnitude,
    sparsity: 0.5} or {name: semi_structured}."""

    name: str = "draft_model"
    model: str = "smollm2-135m"
    backend: str = "auto"
    tree: dict[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    group_size: int | None = None
    pruning: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_quantization("drafter", self.quantization, self.group_size)
        if self.pruning:
            check_choice("drafter.pruning.name", str(self.pruning.get("name")), PRUNERS)


@dataclass(frozen=True)
class EagleConfig:
    """path: directory of a trained head. See ``specdec.drafter.eagle.EagleDrafter``."""

    name: str = "eagle"
    path: str = "experiments/artifacts/smollm2-135m-eagle3"
    shape: str = "chain"
    sampled: str = "tree"
    top_k: int = 8
    depth: int = 6
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("drafter.shape", self.shape, ("chain", "tree"))
        check_choice("drafter.sampled", self.sampled, ("chain", "tree"))
        for name in ("top_k", "depth"):
            check_positive(f"drafter.{name}", getattr(self, name))


@dataclass(frozen=True)
class MedusaConfig:
    """path: directory of trained heads."""

    name: str = "medusa"
    path: str = "experiments/artifacts/smollm2-135m-medusa"


@dataclass(frozen=True)
class SyntheticConfig:
    name: str = "synthetic"
    alpha: float | None = 0.7
    rates: list[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for rate in [self.alpha] if self.rates is None else self.rates:
            require(rate is not None, "drafter.alpha is null: give it, or drafter.rates (one per position)")
            check_rate("drafter.alpha" if self.rates is None else "drafter.rates", rate)


@dataclass(frozen=True)
class PolicyConfig:
    """order: of the waiting queue (fcfs, sjf, priority, edf). decode_first: decodes take their share of the token
    budget before prompts do; null is the policy's own way. ageing_s: under the order priority, waiting so long
    raises a request's priority by one."""

    name: str = "chunked"
    order: str = "fcfs"
    decode_first: bool | None = None
    ageing_s: float | None = None

    def __post_init__(self) -> None:
        if self.ageing_s is not None:
            check_positive("policy.ageing_s", self.ageing_s)
            require(
                self.order == "priority",
                f"policy.ageing_s={self.ageing_s} is for policy.order=priority only, not {self.order}",
            )


@dataclass(frozen=True)
class DynamicPolicyConfig(PolicyConfig):
    """window_s: how long the oldest request waits for the batch to fill."""

    name: str = "dynamic"
    window_s: float = 0.05

    def __post_init__(self) -> None:
        PolicyConfig.__post_init__(self)
        require(self.window_s >= 0, f"policy.window_s={self.window_s} must be >= 0 seconds")


@dataclass(frozen=True)
class SpeculationOff:
    name: str = "off"


@dataclass(frozen=True)
class FixedConfig:
    """num_drafts: draft tokens per step, k."""

    name: str = "fixed"
    num_drafts: int = 4

    def __post_init__(self) -> None:
        check_num_drafts("speculation.num_drafts", self.num_drafts)


@dataclass(frozen=True)
class AdaptiveConfig:
    """See ``specdec.scheduler.speculation.Adaptive``."""

    name: str = "adaptive"
    num_drafts: int = 8
    cost_ratio: float = 0.05
    probe_every: int = 16

    def __post_init__(self) -> None:
        check_num_drafts("speculation.num_drafts", self.num_drafts)


@dataclass(frozen=True)
class LoadThresholdConfig(FixedConfig):
    """num_drafts while at most max_running requests run, none beyond."""

    name: str = "load_threshold"
    max_running: int = 16

    def __post_init__(self) -> None:
        FixedConfig.__post_init__(self)
        require(self.max_running >= 0, f"speculation.max_running={self.max_running} must be >= 0")


@dataclass(frozen=True)
class GoodputConfig:
    """See ``specdec.scheduler.speculation.Goodput``. Where step_tokens and step_s are not given, the engine measures
    the times of its device, and a simulation takes those of its cost model."""

    name: str = "goodput"
    num_drafts: int = 8
    context_token_s: float | None = None
    verify_context_token_s: float | None = None
    overhead_s: float | None = None
    overhead_row_s: float | None = None
    draft_step_s: float | None = None
    draft_token_s: float | None = None
    draft_context_token_s: float | None = None
    draft_row_s: float | None = None
    step_tokens: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    rank_rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_num_drafts("speculation.num_drafts", self.num_drafts)
        require(
            len(self.step_tokens) == len(self.step_s) != 1,
            f"speculation.step_tokens has {len(self.step_tokens)} entries and speculation.step_s {len(self.step_s)}: "
            "give equally many, at least two, or none of both",
        )


@dataclass(frozen=True)
class ConstantAcceptanceConfig:
    """Drafts that simulated verifications accept: each with probability alpha."""

    name: str = "constant"
    alpha: float = 0.7

    def __post_init__(self) -> None:
        check_rate("acceptance.alpha", self.alpha)


@dataclass(frozen=True)
class PositionalAcceptanceConfig:
    """rates: by draft position, given that all before were accepted; the last one goes on."""

    name: str = "positional"
    rates: list[float] = field(default_factory=lambda: [0.8, 0.7, 0.6, 0.5])

    def __post_init__(self) -> None:
        require(len(self.rates) > 0, "acceptance.rates is empty: give one rate per draft position")
        for rate in self.rates:
            check_rate("acceptance.rates", rate)


@dataclass(frozen=True)
class BetaAcceptanceConfig:
    """Each request has a rate of its own, Beta distributed; the larger the concentration, the more alike."""

    name: str = "beta"
    mean: float = 0.7
    concentration: float = 5.0

    def __post_init__(self) -> None:
        check_rate("acceptance.mean", self.mean)
        check_positive("acceptance.concentration", self.concentration)


@dataclass(frozen=True)
class MarkovAcceptanceConfig:
    """Bursts: each request is in a good or a bad state, which may switch after every step."""

    name: str = "markov"
    alpha_good: float = 0.85
    alpha_bad: float = 0.4
    good_to_bad: float = 0.1
    bad_to_good: float = 0.1

    def __post_init__(self) -> None:
        for key in ("alpha_good", "alpha_bad"):
            check_rate(f"acceptance.{key}", getattr(self, key))
        for key in ("good_to_bad", "bad_to_good"):
            value = getattr(self, key)
            require(0.0 <= value <= 1.0, f"acceptance.{key}={value} must be a probability in [0, 1]")
        require(
            self.good_to_bad + self.bad_to_good > 0.0,
            "acceptance.good_to_bad and acceptance.bad_to_good are both 0: for one state use acceptance=constant",
        )


@dataclass(frozen=True)
class HardwareConfig:
    """A chip's sheet, as ``sim.hardware.Hardware`` describes it; null is a figure that nobody publishes."""

    name: str = MISSING
    kind: str = MISSING
    sheet_source: str = MISSING
    flops_per_s: dict[str, float] = MISSING
    memory_bytes: int = MISSING
    memory_bytes_per_s: float = MISSING
    link_bytes_per_s: float | None = None
    link_latency_s: float | None = None
    tdp_w: float | None = None
    idle_w: float | None = None
    price_per_hour_usd: float | None = None
    price_source: str | None = None
    price_date: str | None = None
    timings: str = "auto"


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
    """Limits of the engine; see ``specdec.LLM``. threads: of the CPU, null for torch's choice. num_swap_blocks: KV
    blocks in host memory for preempted requests; 0 computes them again. num_scheduler_steps: requests join a
    running batch at every so-manyth step only. overlap: see ``specdec.LLM.configure``."""

    max_num_seqs: int = 16
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = 2048
    num_blocks: int | None = None
    kv_memory_mb: int = 512
    block_size: int = 16
    prefix_caching: bool = True
    watermark: float = 0.01
    num_swap_blocks: int = 0
    num_scheduler_steps: int = 1
    overlap: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class TrackingConfig:
    """mode: offline, online or disabled."""

    mode: str = "offline"
    project: str = "specdec"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
