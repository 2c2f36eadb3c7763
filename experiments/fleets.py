"""Fleets to simulate: a policy, a controller and a way to draft by name, on the configured chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import simulations
from experiments.options import controller_options, policy_options
from sim.cluster_spec import ClusterSpec
from sim.cost_model import CostModel
from sim.model_shape import ModelShape
from sim.perturbation import perturbed
from sim.speculative_step import LOOKUP, draft_shape

if TYPE_CHECKING:
    from specdec.config import Config

Case = Mapping[str, Any]
"""``policy``, ``speculation``, ``acceptance``: options of these groups; ``draft``: what drafts, see ``draft_shape``."""


@dataclass(frozen=True)
class _Replicas(simulations._Replicas):
    """Drafting with what a case says instead of ``experiment.draft``."""

    how: str = LOOKUP

    @property
    def draft(self) -> ModelShape | None:
        shape = draft_shape(self.how, self.shape()) if self.controller.get("max_drafts") else None
        return shape and shape.stored_as(self.config.experiment.dtype)


def fleet(config: Config, case: Case, num_replicas: int, key: str) -> ClusterSpec:
    """``num_replicas`` of the configured chips and model that serve as ``case`` says.

    Args:
        key: where the case stands, for errors.

    Raises:
        ValueError: unknown options, or a model that does not fit.
    """
    from specdec.config import (
        choose,
    )  # not at import: a worker process that only simulates does without Hydra

    policy = choose("policy", case.get("policy", asdict(config.policy)), f"{key}.policy")
    speculation = choose("speculation", case.get("speculation", {"name": "off"}), f"{key}.speculation")
    if "acceptance" in case:
        config = replace(config, acceptance=choose("acceptance", case["acceptance"], f"{key}.acceptance"))
    if "draft" in case and not controller_options(speculation).get("max_drafts"):
        raise ValueError(f"{key}.draft={case['draft']} was given, but its speculation never drafts: drop one")
    replicas = _Replicas(
        config,
        simulations.hardware(config),
        None,
        policy_options(policy),
        controller_options(speculation),
        case.get("draft", LOOKUP),
    )
    pool = simulations._pool(config, replicas.of(), f"{key}.replicas", num_replicas)
    return ClusterSpec(pools={"main": pool})


def with_other_times(cluster: ClusterSpec, rng: np.random.Generator) -> ClusterSpec:
    """The cluster on chips whose seconds differ as the cost model's errors allow.

    A controller goes on deciding by the times that it was given: it does not know of the error either.
    """
    pool = cluster.pools["main"]
    model = pool.replica.cost_model
    assert isinstance(model, CostModel)
    replica = replace(pool.replica, cost_model=perturbed(model, rng))
    return replace(cluster, pools={"main": replace(pool, replica=replica)})
