"""Schemas of the experiments that extrapolate: where speculation pays, large fleets, the cheapest one, what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.config_experiments import HARDWARE, MODEL_SHAPES, SIM_DTYPES, SimulationConfig
from specdec.config_schemas import check_choice, check_positive, check_rate, require

DRAFT_KINDS = ("lookup", "eagle")
"""Ways to draft beside draft models, which go by the name of their shape; a test holds them equal to the code's."""
TASKS = ("chat", "code", "maths", "writing", "summarisation", "translation", "extraction", "rag")
"""Tasks of which an acceptance rate is assumed where none was measured; a test holds them equal to the code's."""
MIXES = ("conversation", "code", "fixed")


def check_chip(key: str, name: str) -> None:
    """A chip is named as in conf/hardware, or by a sheet of one's own."""
    if not name.endswith((".yaml", ".yml")):
        check_choice(key, name, HARDWARE)


def check_draft(key: str, name: str) -> None:
    check_choice(key, name, (*DRAFT_KINDS, *MODEL_SHAPES))


def _check_list(key: str, values: list[Any]) -> None:
    require(len(values) > 0, f"{key} is empty: give at least one")


@dataclass(frozen=True)
class PhaseDiagramConfig:
    """chips: of conf/hardware, or paths of sheets of the same form. models: shapes. contexts: cached tokens of
    each request. drafts: lookup (takes no device time), eagle (one decoder layer of the target and its head) or a
    model's shape; the first is coloured, of the others the break-even line alone is drawn. batches × alphas: the
    grid. num_drafts: of the fixed length; max_drafts: longest that is tried for the best. tensor_parallel: null
    is the fewest chips that hold the model and min_batch requests of the longest context. draft_cost_ratio: a
    pass of an eagle draft takes this share of a plain step; null is what the cost model says."""

    name: str = "phase_diagram"
    chips: list[str] = field(default_factory=lambda: ["a100", "h100", "b200", "l40s", "rtx_4090"])
    models: list[str] = field(default_factory=lambda: ["llama-3.1-8b", "llama-3.1-70b"])
    contexts: list[int] = field(default_factory=lambda: [1024, 8192])
    drafts: list[str] = field(default_factory=lambda: ["eagle", "lookup"])
    batches: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    )
    alphas: list[float] = field(default_factory=lambda: [round(0.05 * step, 2) for step in range(20)])
    num_drafts: int = 4
    max_drafts: int = 8
    dtype: str = "bfloat16"
    tensor_parallel: int | None = None
    min_batch: int = 4
    memory_utilisation: float = 0.9
    draft_cost_ratio: float | None = None

    def __post_init__(self) -> None:
        for name in ("chips", "models", "contexts", "drafts", "batches", "alphas"):
            _check_list(f"experiment.{name}", getattr(self, name))
        for chip in self.chips:
            check_chip("experiment.chips", chip)
        for model in self.models:
            check_choice("experiment.models", model, MODEL_SHAPES)
        for draft in self.drafts:
            check_draft("experiment.drafts", draft)
        for name in ("contexts", "batches"):
            values = getattr(self, name)
            require(values == sorted(set(values)), f"experiment.{name}={values} must rise")
            for value in values:
                check_positive(f"experiment.{name}", value)
        require(
            self.alphas == sorted(set(self.alphas)) and len(self.alphas) > 1,
            f"experiment.alphas={self.alphas} must be at least two that rise",
        )
        for alpha in self.alphas:
            check_rate("experiment.alphas", alpha)
        for name in ("num_drafts", "max_drafts", "min_batch"):
            check_positive(f"experiment.{name}", getattr(self, name))
        _check_device(self)


def _check_device(options: Any) -> None:
    """What the experiments without a simulation have in common."""
    check_choice("experiment.dtype", options.dtype, SIM_DTYPES)
    if options.tensor_parallel is not None:
        check_positive("experiment.tensor_parallel", options.tensor_parallel)
    share, ratio = options.memory_utilisation, options.draft_cost_ratio
    require(0.0 < share <= 1.0, f"experiment.memory_utilisation={share} must be in (0, 1]")
    require(ratio is None or ratio >= 0.0, f"experiment.draft_cost_ratio={ratio} must be >= 0, or null")


@dataclass(frozen=True)
class AdviseConfig:
    """The chip is hardware=…; profile: a folder with this device's own cost model of this model instead, as
    ``calibrate`` writes it; its hardware.yaml, if there, is the chip. model: shape. rate_per_s: requests a second
    of the whole fleet of num_replicas. lengths: conversation, code (Azure's mixes) or fixed with prompt_len and
    output_len. tasks: what is asked, in shares, e.g. {chat: 0.7, code: 0.3}, chat alone unless given, for the
    acceptance that is assumed where none was measured.

    drafts: what to choose from. Of a measured acceptance give exactly one of these: acceptance_run, a run directory of
    an experiment that drafted (acceptance_name: which of its traces); rates by draft position, with num_judged drafts
    at the first one behind them; or alpha, a guess. It is that of the single entry of drafts. rank_rates: acceptance of
    the first, second, … candidate of each node, for trees.

    max_drafts: longest chain; max_nodes: largest tree. slo_tpot_s, slo_ttft_s: mean latencies that a served load must
    keep. num_draws: cost models and acceptance rates that are tried for the intervals."""

    name: str = "advise"
    model: str = "llama-3.1-8b"
    profile: str | None = None
    tensor_parallel: int | None = None
    dtype: str = "bfloat16"
    num_replicas: int = 1
    rate_per_s: float = 4.0
    lengths: str = "conversation"
    prompt_len: int | None = None
    output_len: int | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    drafts: list[str] = field(default_factory=lambda: ["lookup", "eagle"])
    acceptance_run: str | None = None
    acceptance_name: str | None = None
    rates: list[float] | None = None
    num_judged: int | None = None
    alpha: float | None = None
    rank_rates: list[float] | None = None
    max_drafts: int = 8
    max_nodes: int = 32
    max_num_seqs: int = 256
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.05
    memory_utilisation: float = 0.9
    draft_cost_ratio: float | None = None
    num_draws: int = 24

    def __post_init__(self) -> None:
        check_choice("experiment.model", self.model, MODEL_SHAPES)
        check_choice("experiment.lengths", self.lengths, MIXES)
        _check_list("experiment.drafts", self.drafts)
        for draft in self.drafts:
            check_draft("experiment.drafts", draft)
        for name in "num_replicas rate_per_s max_drafts max_nodes max_num_seqs slo_ttft_s slo_tpot_s".split():
            check_positive(f"experiment.{name}", getattr(self, name))
        require(self.num_draws >= 5, f"experiment.num_draws={self.num_draws} must be >= 5 for an interval")
        _check_device(self)
        self._check_lengths()
        self._check_tasks()
        self._check_acceptance()

    def _check_lengths(self) -> None:
        for name in ("prompt_len", "output_len"):
            value, fixed = getattr(self, name), self.lengths == "fixed"
            require(
                (value is not None) == fixed,
                f"experiment.{name}={value}: it is needed with experiment.lengths=fixed, and for that alone",
            )
            if value is not None:
                check_positive(f"experiment.{name}", value)

    def _check_tasks(self) -> None:
        for task, share in self.tasks.items():
            check_choice("experiment.tasks", task, TASKS)
            check_positive(f"experiment.tasks.{task}", share)

    def _check_acceptance(self) -> None:
        given = [name for name in ("acceptance_run", "rates", "alpha") if getattr(self, name) is not None]
        require(
            len(given) <= 1,
            f"{' and '.join(f'experiment.{name}' for name in given)} were given: acceptance comes from one of them",
        )
        require(
            not given or len(self.drafts) == 1,
            f"experiment.{(given or [''])[0]} is the acceptance of one way to draft: name it, "
            f"e.g. experiment.drafts=[{self.drafts[0]}], not {self.drafts}",
        )
        require(
            self.rank_rates is None or len(self.drafts) == 1,
            f"experiment.rank_rates are of one way to draft: name it, not {self.drafts}",
        )
        require(
            self.acceptance_name is None or self.acceptance_run is not None,
            f"experiment.acceptance_name={self.acceptance_name} is a trace of experiment.acceptance_run: give that too",
        )
        require(
            self.num_judged is None or self.rates is not None,
            f"experiment.num_judged={self.num_judged} is of experiment.rates: give these too",
        )
        if self.num_judged is not None:
            check_positive("experiment.num_judged", self.num_judged)
        for name in ("rates", "rank_rates"):
            values = getattr(self, name)
            require(values is None or len(values) > 0, f"experiment.{name} is empty: leave it out")
            for rate in values or ():
                check_rate(f"experiment.{name}", rate)
        if self.alpha is not None:
            check_rate("experiment.alpha", self.alpha)
        require(
            self.rank_rates is None or sum(self.rank_rates) <= 1.0 + 1e-9,
            f"experiment.rank_rates={self.rank_rates} must sum to at most 1: one candidate is accepted",
        )


def _cases() -> dict[str, Any]:
    """Acceptance is assumed: see ``experiments.assumed_acceptance`` (chat)."""
    chunked, static = {"name": "chunked"}, {"name": "static"}
    lookup, eagle = {"name": "constant", "alpha": 0.39}, {"name": "constant", "alpha": 0.63}
    fixed, goodput = {"name": "fixed", "num_drafts": 3}, {"name": "goodput", "num_drafts": 6}
    return {
        "static": {"policy": static},
        "chunked": {"policy": chunked},
        "chunked_lookup": {
            "policy": chunked,
            "speculation": fixed,
            "draft": "lookup",
            "acceptance": lookup,
        },
        "chunked_eagle": {"policy": chunked, "speculation": fixed, "draft": "eagle", "acceptance": eagle},
        "chunked_eagle_goodput": {
            "policy": chunked,
            "speculation": goodput,
            "draft": "eagle",
            "acceptance": eagle,
        },
    }


def check_cases(key: str, cases: dict[str, Any]) -> None:
    """Policies × speculation by name; their own options are checked where they are used."""
    require(len(cases) > 0, f"{key} is empty: give at least one")
    for name, parts in cases.items():
        require(isinstance(parts, dict) and len(parts) > 0, f"{key}.{name}={parts} must hold a policy")
        for part in parts:
            check_choice(f"key {key}.{name}", part, ("policy", "speculation", "draft", "acceptance"))
        if "draft" in parts:
            check_draft(f"{key}.{name}.draft", parts["draft"])


@dataclass(frozen=True)
class ExtrapolateConfig(SimulationConfig):
    """cases: policies × speculation by name, each with the options of ``policy``, ``speculation`` and
    ``acceptance`` and with what drafts; only: some of them. mixes: workloads. fleets: numbers of replicas. load:
    arrivals in shares of what plain chunked decoding holds within the SLO, of mean latencies and by formulas; or
    rate_per_replica. num_requests: of each cell. num_seeds: simulations with other seeds; num_perturbed: with
    other cost models, within their stated errors. workers: cells at the same time, -1 for one per core. What the
    schema of simulate has beyond these holds for every cell, but for rate_per_s, num_replicas, lengths and draft."""

    name: str = "extrapolate"
    cases: dict[str, Any] = field(default_factory=_cases)
    only: list[str] | None = None
    mixes: list[str] = field(default_factory=lambda: ["conversation", "code"])
    fleets: list[int] = field(default_factory=lambda: [16])
    load: float = 0.8
    rate_per_replica: float | None = None
    num_requests: int | None = 100_000
    num_seeds: int = 2
    num_perturbed: int = 2
    workers: int = -1
    router: str = "round_robin"

    def _check_numbers(self) -> None:
        check_cases("experiment.cases", self.cases)
        for name in self.only or ():
            check_choice("experiment.only", name, self.cases)
        for name in ("mixes", "fleets"):
            _check_list(f"experiment.{name}", getattr(self, name))
        for mix in self.mixes:
            check_choice("experiment.mixes", mix, MIXES[:2])
        for fleet in self.fleets:
            check_positive("experiment.fleets", fleet)
        check_positive("experiment.load", self.load)
        if self.rate_per_replica is not None:
            check_positive("experiment.rate_per_replica", self.rate_per_replica)
        require(self.num_seeds >= 1, f"experiment.num_seeds={self.num_seeds} must be >= 1")
        require(self.num_perturbed >= 0, f"experiment.num_perturbed={self.num_perturbed} must be >= 0")
        require(self.workers != 0, "experiment.workers=0 must be >= 1, or -1 for one per core")
        super()._check_numbers()


@dataclass(frozen=True)
class EconomicsConfig:
    """chips: of conf/hardware or paths of sheets, with prices. model, small_model: shapes. lengths: Azure's mix.
    max_rows: of the policy that batches badly, half of what the better one holds. gain: of each technique, 2 is
    twice as good. slo_*: of mean latencies. draft: what drafts. escalation: share of the small model's answers
    that are asked again of the large one. num_draws: cost models for the intervals."""

    name: str = "economics"
    chips: list[str] = field(
        default_factory=lambda: ["a100", "h100", "h200", "b200", "l40s", "rtx_4090", "rtx_pro_6000"]
    )
    model: str = "llama-3.1-8b"
    small_model: str = "llama-3.2-1b"
    lengths: str = "conversation"
    max_rows: int = 32
    gain: float = 2.0
    draft: str = "eagle"
    escalation: float = 0.1
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.05
    dtype: str = "bfloat16"
    tensor_parallel: int | None = None
    memory_utilisation: float = 0.9
    draft_cost_ratio: float | None = None
    num_draws: int = 20

    def __post_init__(self) -> None:
        _check_list("experiment.chips", self.chips)
        for chip in self.chips:
            check_chip("experiment.chips", chip)
        for name in ("model", "small_model"):
            check_choice(f"experiment.{name}", getattr(self, name), MODEL_SHAPES)
        check_choice("experiment.lengths", self.lengths, MIXES[:2])
        check_draft("experiment.draft", self.draft)
        for name in ("max_rows", "slo_ttft_s", "slo_tpot_s"):
            check_positive(f"experiment.{name}", getattr(self, name))
        require(1.0 < self.gain <= 8.0, f"experiment.gain={self.gain} must be in (1, 8]: 2 is twice as good")
        require(0.0 <= self.escalation <= 1.0, f"experiment.escalation={self.escalation} must be in [0, 1]")
        require(self.num_draws >= 5, f"experiment.num_draws={self.num_draws} must be >= 5 for an interval")
        _check_device(self)


@dataclass(frozen=True)
class CapacityConfig(SimulationConfig):
    """rate_per_s: the load. chips, tensor_parallels, replicas, cases: what may be chosen, cases as in extrapolate.
    min_share: of the requests within the SLO. num_trials: fleets that are looked at. short_requests: of the simulation
    that comes first; num_requests: of the one that counts. budget_s: no trial begins after that. router: of every
    fleet."""

    name: str = "capacity"
    rate_per_s: float = 20.0
    chips: list[str] = field(default_factory=lambda: ["a100", "h100", "l40s", "rtx_4090"])
    tensor_parallels: list[int] = field(default_factory=lambda: [1, 2, 4])
    replicas: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16])
    cases: dict[str, Any] = field(default_factory=_cases)
    only: list[str] | None = None
    min_share: float = 0.95
    num_trials: int = 80
    short_requests: int = 400
    num_requests: int | None = 3000
    budget_s: float = 300.0
    router: str = "least_outstanding"

    def _check_numbers(self) -> None:
        for name in ("chips", "tensor_parallels", "replicas"):
            _check_list(f"experiment.{name}", getattr(self, name))
        for chip in self.chips:
            check_chip("experiment.chips", chip)
        for name in ("tensor_parallels", "replicas"):
            for value in getattr(self, name):
                check_positive(f"experiment.{name}", value)
        check_cases("experiment.cases", self.cases)
        for name in self.only or ():
            check_choice("experiment.only", name, self.cases)
        for name in ("num_trials", "short_requests", "budget_s"):
            check_positive(f"experiment.{name}", getattr(self, name))
        require(0.0 < self.min_share <= 1.0, f"experiment.min_share={self.min_share} must be in (0, 1]")
        require(
            self.draft is None,
            f"experiment.draft={self.draft} is for simulate: cases say what drafts here",
        )
        require(
            self.arrivals not in ("all_at_once", "closed_loop", "trace"),
            f"experiment.arrivals={self.arrivals} has no rate of its own: choose another process",
        )
        super()._check_numbers()
