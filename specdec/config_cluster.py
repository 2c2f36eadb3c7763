"""Schemas of the groups that say what a simulated cluster is: pools, admission, autoscaling, failures."""

from __future__ import annotations

from dataclasses import dataclass, fields

from specdec.config_experiments import MODEL_SHAPES
from specdec.config_schemas import check_choice, check_positive, require


@dataclass(frozen=True)
class PlainClusterConfig:
    """One pool: experiment.num_replicas of experiment.model."""

    name: str = "plain"


@dataclass(frozen=True)
class DisaggregatedConfig:
    """Prompts are computed in one pool, answers in another; the KV of a prompt moves between them.

    num_prefill, num_decode: replicas. link_bytes_per_s: of each prefill replica; null is the sheet's link of all its
    chips, and a network is slower than that (5e10 is 400 Gb/s a replica). link_latency_s: of a transfer; null is the
    sheet's."""

    name: str = "disaggregated"
    num_prefill: int = 1
    num_decode: int = 1
    link_bytes_per_s: float | None = None
    link_latency_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_prefill", "num_decode", "link_bytes_per_s"):
            if (value := getattr(self, name)) is not None:
                check_positive(f"cluster.{name}", value)
        if self.link_latency_s is not None:
            _check_not_negative("cluster.link_latency_s", self.link_latency_s)


@dataclass(frozen=True)
class ModelRoutingConfig:
    """A small model answers the simple requests, experiment.model the complex ones and what the small one fails at.

    small_model, small_tensor_parallel: its shape and the chips of a replica. num_small, num_large: replicas.
    simple_share: of the requests, 0.7 unless given; a replayed trace has tasks of its own, of which simple_tasks are
    the simple ones. escalation: share of the small model's answers that are thrown away and asked again of the large
    one."""

    name: str = "model_routing"
    small_model: str = "llama-3.2-1b"
    small_tensor_parallel: int = 1
    num_small: int = 1
    num_large: int = 1
    simple_share: float | None = None
    simple_tasks: list[str] | None = None
    escalation: float = 0.1

    def __post_init__(self) -> None:
        check_choice("cluster.small_model", self.small_model, MODEL_SHAPES)
        for name in ("small_tensor_parallel", "num_small", "num_large"):
            check_positive(f"cluster.{name}", getattr(self, name))
        share = self.simple_share
        require(
            share is None or 0.0 < share < 1.0,
            f"cluster.simple_share={share} must be in (0, 1): for one model use cluster=plain",
        )
        require(
            self.simple_tasks is None or len(self.simple_tasks) > 0,
            "cluster.simple_tasks is empty: name tasks of the trace, or use cluster=plain",
        )
        require(
            0.0 <= self.escalation <= 1.0,
            f"cluster.escalation={self.escalation} must be a share in [0, 1] (0: none)",
        )


@dataclass(frozen=True)
class AutoscalingOff:
    name: str = "off"


@dataclass(frozen=True)
class AutoscalingConfig:
    """Each pool has as many replicas as its requests need: one for each target_outstanding of them, looked at every
    interval_s; a new one takes requests after cold_start_s. It starts with the number that experiment or cluster says.
    """

    name: str = "on"
    target_outstanding: float = 32.0
    min_replicas: int = 1
    max_replicas: int = 4
    interval_s: float = 10.0
    cold_start_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("target_outstanding", "interval_s"):
            check_positive(f"autoscaling.{name}", getattr(self, name))
        _check_not_negative("autoscaling.cold_start_s", self.cold_start_s)
        require(
            1 <= self.min_replicas <= self.max_replicas,
            f"1 <= autoscaling.min_replicas={self.min_replicas} <= autoscaling.max_replicas={self.max_replicas} "
            "must hold",
        )


@dataclass(frozen=True)
class FailuresOff:
    name: str = "off"


@dataclass(frozen=True)
class FailuresConfig:
    """Each replica fails and comes back, at exponential times of these means; its requests start anew elsewhere, at
    most max_retries times each. The default is far worse than chips are, so that a short run shows some."""

    name: str = "on"
    mean_time_to_failure_s: float = 600.0
    mean_repair_s: float = 60.0
    max_retries: int = 3

    def __post_init__(self) -> None:
        for name in ("mean_time_to_failure_s", "mean_repair_s"):
            check_positive(f"failures.{name}", getattr(self, name))
        require(
            self.max_retries >= 0,
            f"failures.max_retries={self.max_retries} must be >= 0 (0: what a failure hits is lost)",
        )


@dataclass(frozen=True)
class LimitsConfig:
    """Admission control: a request that would exceed one of these when it arrives is rejected; null is no limit. Of
    the pool that it comes to: requests there, their prompts and output limits together, the same of the replica that
    it is routed to, and those in that replica's queue."""

    max_outstanding: int | None = None
    max_outstanding_tokens: int | None = None
    max_outstanding_per_replica: int | None = None
    max_outstanding_tokens_per_replica: int | None = None
    max_waiting_per_replica: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            if (value := getattr(self, item.name)) is not None:
                require(value >= 1, f"limits.{item.name}={value} must be >= 1, or null for no limit")


def _check_not_negative(key: str, value: float) -> None:
    require(0.0 <= value < float("inf"), f"{key}={value} must be a finite number >= 0")
