"""From a configuration to a simulated cluster; its workload is in ``workloads``, what a run of it costs in ``bill``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.options import controller_options, policy_options
from experiments.workloads import at_once, mean_turns, sessions, simple_tasks, source
from sim.cluster_spec import (
    Autoscaling,
    ClusterSpec,
    Disaggregation,
    Failures,
    Limits,
    PoolSpec,
    ReplicaSpec,
)
from sim.cost_model import CostModel, StepFeatures
from sim.hardware import Hardware, hardware_from_mapping, kv_blocks, load_hardware
from sim.model_shape import MODEL_SHAPES, ModelShape
from sim.profiles.chips import chip_cost_model, draft_cost_model
from sim.remote_draft import RemoteDraft
from specdec.metrics import Slo
from specdec.scheduler import SchedulerConfig, make_policy

if TYPE_CHECKING:
    from specdec.config import Config  # a worker process that only simulates does without Hydra

__all__ = [
    "at_once",
    "cluster",
    "draft_hardware",
    "hardware",
    "mean_turns",
    "quiet",
    "sessions",
    "slo",
    "source",
    "with_step_times",
]

DEFAULT_BATCHED_TOKENS = 8192
SMALL_RUN = 2000
"""Requests up to which every step is recorded without being asked."""
OFF = {"name": "off"}


def hardware(config: Config) -> Hardware:
    """The configured chip."""
    try:
        return hardware_from_mapping(asdict(config.hardware))
    except ValueError as error:
        raise ValueError(f"hardware: {error}") from error


def draft_hardware(config: Config) -> Hardware | None:
    """The draft model's own chip, if it has one; of the same name, the configured chip with all that was changed."""
    name = config.experiment.draft_hardware
    if name is None:
        return None
    return hardware(config) if name == config.hardware.name else load_hardware(name)


def slo(config: Config) -> Slo:
    return Slo(ttft_s=config.experiment.slo_ttft_s, tpot_s=config.experiment.slo_tpot_s)


def cluster(config: Config, policy: Any = None, speculation: Any = None) -> ClusterSpec:
    """The configured cluster; ``policy`` and ``speculation`` are schemas to take instead of the configured ones.

    Raises:
        ValueError: what does not fit: into the memory, to the policy, or to each other.
    """
    _check_together(config)
    replicas = _Replicas(
        config,
        hardware(config),
        draft_hardware(config),
        policy_options(policy or config.policy),
        controller_options(speculation or config.speculation),
    )
    if config.cluster.name == "disaggregated":
        return _disaggregated(replicas)
    if config.cluster.name == "model_routing":
        return _model_routing(replicas)
    number = config.experiment.num_replicas
    return ClusterSpec(pools={"main": _pool(config, replicas.of(), "experiment.num_replicas", number)})


def _check_together(config: Config) -> None:
    """Options that are fine each, but not with each other."""
    options, kind = config.experiment, config.cluster.name
    if kind != "plain" and options.num_replicas != 1:
        numbers = (
            "num_prefill and cluster.num_decode"
            if kind == "disaggregated"
            else "num_small and cluster.num_large"
        )
        raise ValueError(
            f"experiment.num_replicas={options.num_replicas} is of cluster=plain: with cluster={kind} give "
            f"cluster.{numbers}"
        )
    for name in ("autoscaling", "failures"):
        if options.trace_steps and getattr(config, name).name == "on":
            raise ValueError(
                f"experiment.trace_steps=true does not go with {name}=on, under which replicas come and go: drop one"
            )


@dataclass(frozen=True)
class _Replicas:
    """What the replicas of all pools have in common.

    Attributes:
        chip, draft_chip: of the target, and of a draft model that has one of its own.
        scheduling, controller: see ``policy_options`` and ``controller_options``.
    """

    config: Config
    chip: Hardware
    draft_chip: Hardware | None
    scheduling: dict[str, Any]
    controller: dict[str, Any]

    @property
    def draft(self) -> ModelShape | None:
        """The draft model, if anything drafts with one."""
        name = self.config.experiment.draft
        return self.shape(name) if name and self.controller.get("max_drafts") else None

    def shape(self, name: str | None = None) -> ModelShape:
        options = self.config.experiment
        return MODEL_SHAPES[name or options.model].stored_as(options.dtype)

    def of(self, *, speculates: bool = True) -> ReplicaSpec:
        """Of the configured model; not speculating, it still computes prompts for a draft model on the same chips."""
        return self.build(self.shape(), self.config.experiment.tensor_parallel, self.draft, speculates)

    def build(
        self, target: ModelShape, tensor_parallel: int, draft: ModelShape | None, speculates: bool
    ) -> ReplicaSpec:
        options = self.config.experiment
        near, far = (draft, None) if self.draft_chip is None else (None, draft if speculates else None)
        cost_model = chip_cost_model(
            self.chip, target, tensor_parallel=tensor_parallel, draft=near, dtype=options.dtype
        )
        own = self._draft_cost_model(far) if far else None
        round_trip_s = options.draft_round_trip_s if far else 0.0
        controller = self.controller if speculates else OFF
        if controller["name"] == "goodput":
            drafter = RemoteDraft(cost_model, own, round_trip_s) if own else None
            controller = with_step_times(controller, cost_model, drafter)
        block_bytes = target.kv_bytes_per_token * options.block_size / tensor_parallel
        return ReplicaSpec(
            self._scheduler(target, tensor_parallel, near, far),
            cost_model,
            policy=self.scheduling["policy"],
            speculation=controller,
            acceptance=asdict(self.config.acceptance),
            swap_block_s=block_bytes / options.host_link_bytes_per_s if options.num_swap_blocks else 0.0,
            draft_cost_model=own,
            draft_round_trip_s=round_trip_s,
            tensor_parallel=tensor_parallel,
            chips=tensor_parallel + 1 if far else None,
        )

    def _draft_cost_model(self, draft: ModelShape) -> CostModel:
        """Of the draft model on its own chip."""
        assert self.draft_chip is not None
        return draft_cost_model(self.draft_chip, draft, self.config.experiment.dtype)

    def _scheduler(
        self, target: ModelShape, tensor_parallel: int, near: ModelShape | None, far: ModelShape | None
    ) -> SchedulerConfig:
        options, scheduling = self.config.experiment, self.scheduling
        budget, num_blocks = options.max_num_batched_tokens, options.num_blocks
        if budget is None:
            # A policy that computes prompts whole must be able to compute the longest one.
            chunked = make_policy(**scheduling["policy"]).chunked_prefill
            budget = DEFAULT_BATCHED_TOKENS if chunked else max(DEFAULT_BATCHED_TOKENS, options.max_model_len)
        if num_blocks is None:
            room = options.block_size, options.memory_utilisation
            num_blocks = kv_blocks(self.chip, target, tensor_parallel, *room, draft=near)
            if far and self.draft_chip:  # which needs the KV of the same tokens
                num_blocks = min(num_blocks, kv_blocks(self.draft_chip, far, 1, *room))
        return SchedulerConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=budget,
            num_blocks=num_blocks,
            block_size=options.block_size,
            max_model_len=options.max_model_len,
            prefix_caching=options.prefix_caching,
            watermark=options.watermark,
            order=scheduling["order"],
            ageing_s=scheduling["ageing_s"],
            preemption="swap" if options.num_swap_blocks else "recompute",
            num_swap_blocks=options.num_swap_blocks,
            num_scheduler_steps=options.num_scheduler_steps,
        )


def _pool(config: Config, replica: ReplicaSpec, key: str, number: int, *, admits: bool = True) -> PoolSpec:
    """``number`` replicas, as the option ``key`` says; ``admits``: requests come here first."""
    limits, failures = asdict(config.limits), asdict(config.failures)
    scaling = asdict(config.autoscaling)
    if scaling.pop("name") == "on" and not scaling["min_replicas"] <= number <= scaling["max_replicas"]:
        raise ValueError(
            f"{key}={number} is not within autoscaling.min_replicas={scaling['min_replicas']} and "
            f"autoscaling.max_replicas={scaling['max_replicas']}: start with a number between"
        )
    return PoolSpec(
        replica=replica,
        num_replicas=number,
        router=config.experiment.router,
        limits=Limits(**limits) if admits and any(limits.values()) else None,
        autoscaling=Autoscaling(**scaling) if scaling else None,
        failures=Failures(**failures) if failures.pop("name") == "on" else None,
    )


def _disaggregated(replicas: _Replicas) -> ClusterSpec:
    config, options, chip = replicas.config, replicas.config.cluster, replicas.chip
    link_bytes_per_s, link_latency_s = options.link_bytes_per_s, options.link_latency_s
    if link_bytes_per_s is None and chip.link_bytes_per_s is not None:
        link_bytes_per_s = chip.link_bytes_per_s * config.experiment.tensor_parallel
    if link_latency_s is None:
        link_latency_s = chip.link_latency_s
    for name, value in (("link_bytes_per_s", link_bytes_per_s), ("link_latency_s", link_latency_s)):
        if value is None:
            raise ValueError(
                f"cluster=disaggregated needs a link, but hardware.{name} of {chip.name} is null: give cluster.{name}"
            )
    assert link_bytes_per_s is not None and link_latency_s is not None
    # A draft model on the target's chips computes its prompts there as well, and its KV moves with the target's.
    moved = [replicas.shape(), *([replicas.draft] if replicas.draft and replicas.draft_chip is None else [])]
    prefill, decode = replicas.of(speculates=False), replicas.of()
    return ClusterSpec(
        pools={
            "prefill": _pool(config, prefill, "cluster.num_prefill", options.num_prefill),
            "decode": _pool(config, decode, "cluster.num_decode", options.num_decode, admits=False),
        },
        disaggregation=Disaggregation(
            kv_bytes_per_token=sum(shape.kv_bytes_per_token for shape in moved),
            link_bytes_per_s=link_bytes_per_s,
            link_latency_s=link_latency_s,
        ),
    )


def _model_routing(replicas: _Replicas) -> ClusterSpec:
    config, options, tasks = replicas.config, replicas.config.cluster, simple_tasks(replicas.config)
    # A draft model is one of the large model; the small one then decodes plainly.
    small = replicas.build(
        replicas.shape(options.small_model),
        options.small_tensor_parallel,
        None,
        config.experiment.draft is None,
    )
    routing: dict[str, Any] = {"pools": dict.fromkeys(tasks, "small"), "default": "large"}
    if options.escalation:
        routing |= {"escalation": dict.fromkeys(tasks, options.escalation), "escalate_to": "large"}
    pools = {
        "small": _pool(config, small, "cluster.num_small", options.num_small),
        "large": _pool(config, replicas.of(), "cluster.num_large", options.num_large),
    }
    return ClusterSpec(pools=pools, model_routing=routing)


def with_step_times(
    controller: dict[str, Any], cost_model: CostModel, drafter: RemoteDraft | None = None
) -> dict[str, Any]:
    """What the goodput controller must know of its device, where it was not given: the cost model's own times.

    Reading the context takes the same time whatever is drafted, so it is asked for apart.
    """
    filled = dict(controller)
    if not filled["step_tokens"]:
        tokens: NDArray[np.float64] = np.asarray(2.0 ** np.arange(14), np.float64)
        nothing = np.zeros_like(tokens)
        cost = cost_model.predict(StepFeatures(tokens, tokens, tokens, tokens, *[nothing] * 6))
        filled["step_tokens"] = tuple(tokens.tolist())
        filled["step_s"] = tuple(np.maximum.accumulate(cost.verify_s + cost.sample_s).tolist())
        for name in ("overhead_s", "overhead_row_s"):
            filled.setdefault(name, getattr(cost_model.operators, name))
    if "context_token_s" not in filled:
        rows, context = 128.0, np.array([0.0, 128_000.0])
        alone = np.full_like(context, rows)
        features = StepFeatures(alone, alone, alone, alone, context, *[np.zeros_like(context)] * 5)
        filled["context_token_s"] = float(np.diff(cost_model.predict(features).total_s)[0] / context[1])
    if "verify_context_token_s" not in filled:
        filled["verify_context_token_s"] = _verify_context_token_s(
            cost_model, float(max(1, filled["max_drafts"]))
        )
    if "draft_step_s" not in filled:
        most = float(max(1, filled["max_drafts"]))
        one_row = StepFeatures(1.0 + most, 1.0 + most, 1.0, 1.0 + most, 0.0, 0.0, 0.0, most, 1.0, most)
        row_s = 0.0 if drafter else cost_model.operators.draft_row_s
        filled.setdefault("draft_row_s", row_s)
        # The controller knows passes only, so a network's round trip is shared out among them.
        one_s = ((drafter or cost_model).predict_scalar(one_row).draft_s - row_s) / most
        many, context = 128.0, 128_000.0
        all_tokens = many * (1.0 + most)
        rows = StepFeatures(all_tokens, all_tokens, many, all_tokens, 0.0, 0.0, 0.0, most, many, many * most)
        with_context = rows._replace(decode_context=context)
        many_s, reading_s = (
            ((drafter or cost_model).predict_scalar(step).draft_s - many * row_s) / most
            for step in (rows, with_context)
        )
        token_s = max(0.0, (many_s - one_s) / (many - 1.0))
        filled.setdefault("draft_token_s", token_s)
        filled.setdefault("draft_context_token_s", max(0.0, reading_s - many_s) / context)
        filled["draft_step_s"] = max(0.0, one_s - token_s)
    return filled


def _verify_context_token_s(cost_model: CostModel, drafts: float) -> float:
    """What each of so many drafts a row adds for each cached token of its row, seconds."""
    rows, context = 32.0, 32_000.0

    def seconds(tokens: float, context: float) -> float:
        step = StepFeatures(rows * tokens, rows * tokens, rows, rows * tokens, context, *[0.0] * 5)
        return cost_model.predict_scalar(step).total_s

    drafted_s, alone_s = (seconds(tokens, context) - seconds(tokens, 0.0) for tokens in (1.0 + drafts, 1.0))
    return max(0.0, drafted_s - alone_s) / (context * drafts)


@contextmanager
def quiet() -> Iterator[None]:
    """Operators asked far outside their range stand in the rows; one warning for each cell and process would drown
    the rest."""
    logger = logging.getLogger("sim.cost_model")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
