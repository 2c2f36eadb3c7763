"""Schemas of the experiments: one frozen dataclass each, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.config_schemas import check_choice, check_num_drafts, check_positive, check_rate, require

# Names that the code's tables hold too; a test holds them equal.
SERVE_ARRIVALS = ("poisson", "gamma", "uniform", "all_at_once")
ARRIVALS: dict[str, tuple[str, ...]] = {
    "poisson": (),
    "gamma": ("cv",),
    "uniform": (),
    "all_at_once": (),
    "mmpp": ("rates_per_s", "dwell_s"),
    "diurnal": ("amplitude", "period_s"),
    "trace": ("rate_factor",),
    "closed_loop": ("num_users", "think_time_s"),
}
"""How requests come to a simulation, and the options that belong to each; rate_per_s is for all that have one."""
LENGTHS: dict[str, tuple[str, ...]] = {
    "conversation": (),
    "code": (),
    "fixed": ("prompt_len", "output_len"),
    "trace": (),
}
"""How long they are, likewise."""
ROUTERS = (
    "round_robin",
    "random",
    "power_of_two",
    "least_outstanding",
    "prefix_affinity",
    "central_queue",
)
HARDWARE = ("a100", "b200", "h100", "h200", "l40s", "rtx_4090", "rtx_pro_6000", "tpu_v5e", "tpu_v6e")
MODEL_SHAPES = ("smollm2-135m", "llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "qwen3-32b", "llama-3.1-70b")
SIM_CASES = ("azure_fixed", "goodput_prefix", "linear", "simpy_timeouts")
SIM_DTYPES = ("bfloat16", "float16", "fp8", "int8")


@dataclass(frozen=True)
class QuickstartConfig:
    """drafters: compared with plain decoding; null is ngram, merged, layer_skip and the EAGLE head that comes for this
    model, if one does. repeats: interleaved rounds, of which the median counts; no round but the first is begun that
    would end after budget_s."""

    name: str = "quickstart"
    drafters: list[str] | None = None
    repeats: int = 2
    budget_s: float = 60.0


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
            check_rate("experiment.alphas", alpha)
        for num_drafts in self.num_drafts:
            check_num_drafts("experiment.num_drafts", num_drafts)


def _swept_drafters() -> dict[str, Any]:
    merged = {"name": "merged", "drafters": ["suffix", "recycling"]}
    plain = ("ngram", "suffix", "recycling", "layer_skip")
    return {name: {"name": name} for name in plain} | {"merged": merged}


@dataclass(frozen=True)
class DraftSweepConfig:
    """drafters: what is compared, by name, each with its options as ``LLM`` takes them. only: some of them, null for
    all. num_drafts: tokens of a chain or nodes of a tree. batch: requests at once."""

    name: str = "draft_sweep"
    drafters: dict[str, Any] = field(default_factory=_swept_drafters)
    only: list[str] | None = None
    num_drafts: list[int] = field(default_factory=lambda: [4, 16])
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    batch: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in self.only or ():
            check_choice("experiment.only", name, self.drafters)
        for num_drafts in self.num_drafts:
            check_num_drafts("experiment.num_drafts", num_drafts)
            require(
                num_drafts > 0, "experiment.num_drafts=0 drafts nothing: plain decoding is measured anyway"
            )
        for temperature in self.temperatures:
            require(temperature >= 0.0, f"experiment.temperatures={temperature} must be >= 0")
        for name in ("batch", "repeats"):
            check_positive(f"experiment.{name}", getattr(self, name))


@dataclass(frozen=True)
class LosslessConfig:
    """temperature, num_samples: of each of the first num_sampled_prompts prompts, num_tokens long; 0 samples leaves
    that part out. significance: least p-value over all positions. control: how many times as hot the law is that
    the same test should reject."""

    name: str = "lossless"
    temperature: float = 1.0
    num_samples: int = 200
    num_sampled_prompts: int = 3
    num_tokens: int = 6
    significance: float = 1e-3
    control: float = 1.3

    def __post_init__(self) -> None:
        for name in ("temperature", "num_sampled_prompts", "num_tokens", "control"):
            check_positive(f"experiment.{name}", getattr(self, name))
        require(
            self.num_samples >= 0, f"experiment.num_samples={self.num_samples} must be >= 0 (0: no sampling)"
        )
        check_rate("experiment.significance", self.significance)


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
        check_choice("experiment.arrivals", self.arrivals, SERVE_ARRIVALS)
        for name in ("num_requests", "rate_per_s", "cv", "slo_ttft_s", "slo_tpot_s"):
            value = getattr(self, name)
            require(value > 0, f"experiment.{name}={value} must be > 0")


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


@dataclass(frozen=True)
class SimulationConfig:
    """A simulated cluster and what it is asked.

    model, draft: shapes (``sim.model_shape``); without a draft model, drafting takes no device time.
    draft_hardware: each replica's draft model has such a chip of its own, draft_round_trip_s of network away in
    each step that drafts; null is on the chips of the target. dtype: of weights and matrix products.
    tensor_parallel: chips of a replica, without the draft's. num_replicas: of cluster=plain; the others have
    numbers of their own. arrivals, lengths: see ``ARRIVALS`` and ``LENGTHS``; each option that belongs to another
    choice must stay null. trace: a file that ``specdec.workload.load_trace`` reads, for arrivals=trace (which
    replays its lengths as well) or lengths=trace (which draws from them). rate_factor: times as many requests per
    second as in the trace. num_requests: null is a trace as it is. multi_turn: sessions whose turns share
    prefixes; rate_per_s is that of turns in the long run, think_time_s the time between them (30 unless given).
    max_tokens: limit that the scheduler sees, and that cuts longer answers; null is each answer's own length.
    slo_*: limits that a request must meet to count as good.

    max_num_batched_tokens: null is 8192, or max_model_len if that is more and the policy computes prompts whole.
    num_blocks: null is what fits into memory_utilisation of the memory beside the weights. num_swap_blocks: KV
    blocks in host memory for preempted requests, moved at host_link_bytes_per_s (PCIe 4.0 x16 unless given).
    until_s: stop then. workers: processes for one simulation; its replicas must be independent. trace_steps:
    record every step; null is for at most 2,000 requests and one worker. sweep_jobs: runs of a --multirun that go
    at the same time, -1 for one per core (see conf/hydra/launcher/local.yaml). prediction_error: of the output
    lengths that the order sjf goes by, as the standard deviation of their logarithm; null predicts nothing.
    """

    name: str = "simulate"
    model: str = "llama-3.1-8b"
    draft: str | None = None
    draft_hardware: str | None = None
    draft_round_trip_s: float | None = None
    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    num_replicas: int = 1
    router: str = "round_robin"
    arrivals: str = "poisson"
    rate_per_s: float = 10.0
    cv: float | None = None
    rates_per_s: list[float] | None = None
    dwell_s: list[float] | None = None
    amplitude: float | None = None
    period_s: float | None = None
    num_users: int | None = None
    think_time_s: float | None = None
    trace: str | None = None
    rate_factor: float | None = None
    num_requests: int | None = 2000
    lengths: str | None = None
    prompt_len: int | None = None
    output_len: int | None = None
    multi_turn: bool = False
    max_tokens: int | None = None
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.05
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_model_len: int = 16_384
    block_size: int = 16
    num_blocks: int | None = None
    memory_utilisation: float = 0.9
    prefix_caching: bool = True
    watermark: float = 0.01
    num_swap_blocks: int = 0
    host_link_bytes_per_s: float = 3.2e10
    num_scheduler_steps: int = 1
    until_s: float | None = None
    workers: int = 1
    trace_steps: bool | None = None
    sweep_jobs: int = -1
    prediction_error: float | None = None

    def __post_init__(self) -> None:
        check_choice("experiment.model", self.model, MODEL_SHAPES)
        if self.draft is not None:
            check_choice("experiment.draft", self.draft, MODEL_SHAPES)
        self._check_draft_hardware()
        check_choice("experiment.dtype", self.dtype, SIM_DTYPES)
        check_choice("experiment.router", self.router, ROUTERS)
        check_choice("experiment.arrivals", self.arrivals, ARRIVALS)
        check_choice("experiment.lengths", self.length_law, LENGTHS)
        self._check_numbers()
        self._check_belonging("arrivals", self.arrivals, ARRIVALS)
        self._check_belonging("lengths", self.length_law, LENGTHS)
        self._check_trace()
        error = self.prediction_error
        require(error is None or error >= 0.0, f"experiment.prediction_error={error} must be >= 0, or null")
        require(self.sweep_jobs != 0, "experiment.sweep_jobs=0 must be >= 1, or -1 for one per core")

    @property
    def length_law(self) -> str:
        """``lengths``, or what it is where it is null."""
        if self.lengths is not None:
            return self.lengths
        return "trace" if self.arrivals == "trace" else "conversation"

    def _check_draft_hardware(self) -> None:
        hardware, round_trip_s = self.draft_hardware, self.draft_round_trip_s
        if hardware is None:
            require(
                round_trip_s is None,
                f"experiment.draft_round_trip_s={round_trip_s} is of a draft on a chip of its own: add "
                "experiment.draft_hardware, or leave it out",
            )
            return
        check_choice("experiment.draft_hardware", hardware, HARDWARE)
        require(
            self.draft is not None,
            f"experiment.draft_hardware={hardware} was given without a draft model: add experiment.draft",
        )
        require(
            round_trip_s is not None and 0.0 <= round_trip_s < float("inf"),
            f"experiment.draft_hardware={hardware} needs experiment.draft_round_trip_s, seconds >= 0 of network in "
            f"each step, not {round_trip_s}",
        )

    def _check_numbers(self) -> None:
        positive = [
            "tensor_parallel num_replicas rate_per_s slo_ttft_s slo_tpot_s max_num_seqs max_model_len block_size",
            "host_link_bytes_per_s num_scheduler_steps cv period_s num_users rate_factor num_requests",
            "prompt_len output_len max_tokens max_num_batched_tokens num_blocks until_s",
        ]
        for name in " ".join(positive).split():
            if (value := getattr(self, name)) is not None:
                check_positive(f"experiment.{name}", value)

    def _is_given(self, name: str) -> bool:
        thinks = name == "think_time_s" and self.multi_turn  # sessions do so too
        return getattr(self, name) is not None and not thinks

    def _check_belonging(self, option: str, chosen: str, table: dict[str, tuple[str, ...]]) -> None:
        """Options of what was not chosen are an error, never ignored; so are those that a choice lacks."""
        for choice, names in table.items():
            for name in names:
                if self._is_given(name) and name not in table[chosen]:
                    raise ValueError(
                        f"experiment.{name} was given, but it is for experiment.{option}={choice}, not {chosen}"
                    )
        missing = [name for name in table[chosen] if getattr(self, name) is None and name != "rate_factor"]
        if missing:
            named = ", ".join(f"experiment.{name}" for name in missing)
            raise ValueError(f"experiment.{option}={chosen} needs {named}")

    def _check_trace(self) -> None:
        replayed = self.arrivals == "trace"
        needs_trace = replayed or self.length_law == "trace"
        require(
            self.trace is not None or not needs_trace,
            "experiment.trace has no value: give the trace's file, e.g. experiment.trace=requests.csv",
        )
        require(
            needs_trace or self.trace is None,
            f"experiment.trace={self.trace} is not used: add experiment.arrivals=trace or experiment.lengths=trace",
        )
        require(
            not replayed or self.length_law == "trace",
            f"experiment.arrivals=trace replays the trace's lengths, not experiment.lengths={self.lengths}",
        )
        require(
            replayed or self.num_requests is not None,
            "experiment.num_requests is null: only a trace has an end of its own",
        )
        require(
            not self.multi_turn or self.arrivals not in ("trace", "closed_loop"),
            f"experiment.multi_turn=true needs sessions that start by themselves, not experiment.arrivals="
            f"{self.arrivals}",
        )


@dataclass(frozen=True)
class SimulateConfig(SimulationConfig):
    """One run."""

    def _check_numbers(self) -> None:
        check_positive("experiment.workers", self.workers)
        super()._check_numbers()


def _sweep_policies() -> dict[str, Any]:
    names = ("static", "dynamic", "continuous", "chunked")
    chunked, threshold = {"name": "chunked"}, {"name": "load_threshold", "num_drafts": 4, "max_running": 32}
    return {name: {"policy": {"name": name}} for name in names} | {
        "chunked_sjf": {"policy": {"name": "chunked", "order": "sjf"}},
        "chunked_fixed": {"policy": chunked, "speculation": {"name": "fixed", "num_drafts": 4}},
        "chunked_load_threshold": {"policy": chunked, "speculation": threshold},
        "chunked_goodput": {"policy": chunked, "speculation": {"name": "goodput"}},
    }


@dataclass(frozen=True)
class PolicySweepConfig(SimulationConfig):
    """policies: what is compared, by name, each with the options of ``policy`` and ``speculation`` (without: off).
    sjf goes by max_tokens, so without that limit it knows the true lengths. only: some of them, null for all.
    loads: in shares of the capacity, which is the highest throughput that a policy of these reaches when everything
    arrives at once; capacity_per_s: the capacity, if it is known; rate_per_s has no meaning here. num_requests: of
    each cell. min_share: of the requests within the SLO, for the highest load that a policy serves well. workers:
    cells that are simulated at the same time, -1 for one per core."""

    name: str = "policy_sweep"
    policies: dict[str, Any] = field(default_factory=_sweep_policies)
    only: list[str] | None = None
    loads: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
    capacity_per_s: float | None = None
    min_share: float = 0.9
    workers: int = -1
    sweep_jobs: int = 1

    def _check_numbers(self) -> None:
        require(self.workers != 0, "experiment.workers=0 must be >= 1, or -1 for one per core")
        require(len(self.loads) > 0, "experiment.loads is empty: give shares of the capacity")
        for load in self.loads:
            check_positive("experiment.loads", load)
        if self.capacity_per_s is not None:
            check_positive("experiment.capacity_per_s", self.capacity_per_s)
        require(0.0 < self.min_share <= 1.0, f"experiment.min_share={self.min_share} must be in (0, 1]")
        for name, parts in self.policies.items():
            key = f"experiment.policies.{name}"
            require(isinstance(parts, dict) and len(parts) > 0, f"{key}={parts} must hold a policy")
            for part in parts:
                check_choice(f"key {key}", part, ("policy", "speculation"))
        for name in self.only or ():
            check_choice("experiment.only", name, self.policies)
        require(
            self.arrivals not in ("all_at_once", "closed_loop"),
            f"experiment.arrivals={self.arrivals} has no rate to sweep: choose another process",
        )
        super()._check_numbers()


@dataclass(frozen=True)
class ControlConfig:
    """The configured drafter under each controller: off, fixed, adaptive and the configured goodput, whose num_drafts
    is the most of adaptive too.

    batches: requests at once; empty measures nothing. fixed: draft lengths. rounds: interleaved, of which the median
    counts. waves: requests of a cell, in batches. traps: replay published traps in the simulator.
    """

    name: str = "control"
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    fixed: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    rounds: int = 3
    waves: int = 1
    traps: bool = True

    def __post_init__(self) -> None:
        for name in ("batches", "fixed"):
            for value in getattr(self, name):
                check_positive(f"experiment.{name}", value)
        for name in ("rounds", "waves"):
            check_positive(f"experiment.{name}", getattr(self, name))
        require(len(self.fixed) > 0, "experiment.fixed is empty: goodput is compared with fixed lengths")


@dataclass(frozen=True)
class SimBenchConfig:
    """cases: which to run. num_requests, num_prefix_requests: of azure_fixed and goodput_prefix. max_requests: of the
    longest run of linear, which begins at 1,000. replicas, rate_per_s: of all cases, at a load near capacity. million:
    also 10^6 requests in two processes."""

    name: str = "sim_bench"
    cases: list[str] = field(default_factory=lambda: list(SIM_CASES))
    num_requests: int = 50_000
    num_prefix_requests: int = 8000
    max_requests: int = 30_000
    replicas: int = 8
    rate_per_s: float = 200.0
    million: bool = False

    def __post_init__(self) -> None:
        require(len(self.cases) > 0, f"experiment.cases is empty: choose of {', '.join(SIM_CASES)}")
        for case in self.cases:
            check_choice("experiment.cases", case, SIM_CASES)
        for name in ("num_requests", "num_prefix_requests", "replicas", "rate_per_s"):
            check_positive(f"experiment.{name}", getattr(self, name))
        require(self.max_requests >= 1000, f"experiment.max_requests={self.max_requests} must be >= 1000")
