"""Hypothesis strategies for whole scheduling scenarios: small pools, tight budgets, shared prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from specdec.scheduler import ORDERS, SchedulerConfig, make_controller, make_policy
from tests.scheduler.traffic import Driver, Traffic

POLICY_NAMES = ("static", "dynamic", "continuous", "chunked")
CONTROLLER_NAMES = ("off", "fixed", "adaptive", "load_threshold", "goodput")


@dataclass(frozen=True)
class Scenario:
    config: SchedulerConfig
    policy: str
    policy_options: dict[str, Any]
    controller: str
    controller_options: dict[str, Any]
    traffic: Traffic

    def driver(self) -> Driver:
        policy = make_policy(self.policy, **self.policy_options)
        return Driver(
            self.config, policy, make_controller(self.controller, **self.controller_options), self.traffic
        )


@st.composite
def configs(draw: st.DrawFn, policy: str, order: str, longest: int) -> SchedulerConfig:
    """Limits under which a request of ``longest`` tokens just fits, or fits up to four times."""
    block_size = draw(st.integers(1, 4))
    fewest_blocks = -(-longest // block_size)
    max_num_seqs = draw(st.integers(1, 6))
    num_swap_blocks = draw(st.sampled_from((0, 0, 3, 50)))
    least_budget = max_num_seqs if policy == "chunked" else max(longest, max_num_seqs)
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least_budget + draw(st.integers(0, 24)),
        num_blocks=fewest_blocks + draw(st.integers(0, 3 * fewest_blocks)),
        block_size=block_size,
        max_model_len=longest,
        prefix_caching=draw(st.sampled_from((True, True, True, False))),
        watermark=draw(st.sampled_from((0.0, 0.1, 0.5))),
        order=order,
        ageing_s=draw(st.sampled_from((float("inf"), 0.05))) if order == "priority" else float("inf"),
        preemption="swap" if num_swap_blocks else "recompute",
        num_swap_blocks=num_swap_blocks,
        num_scheduler_steps=draw(st.sampled_from((1, 1, 1, 3))),
    )


@st.composite
def traffics(draw: st.DrawFn, *, ends_early: bool = True) -> Traffic:
    """Random traffic; with ``ends_early=False`` no request ends before its ``max_tokens``."""
    return Traffic(
        seed=draw(st.integers(0, 2**32)),
        num_requests=draw(st.integers(1, 12)),
        max_prompt=draw(st.integers(1, 16)),
        max_tokens=draw(st.integers(1, 16)),
        vocab_size=draw(st.integers(1, 3)),
        mean_gap_s=draw(st.sampled_from((0.0, 0.01, 0.05))),
        acceptance=draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))),
        eos=draw(st.sampled_from((0.0, 0.05))) if ends_early else 0.0,
        cancel=draw(st.sampled_from((0.0, 0.0, 0.05))) if ends_early else 0.0,
    )


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    policies: tuple[str, ...] = POLICY_NAMES,
    orders: tuple[str, ...] = tuple(ORDERS),
    controllers: tuple[str, ...] = CONTROLLER_NAMES,
    ends_early: bool = True,
) -> Scenario:
    policy, order = draw(st.sampled_from(policies)), draw(st.sampled_from(orders))
    controller = draw(st.sampled_from(controllers))
    traffic = draw(traffics(ends_early=ends_early))
    config = draw(configs(policy, order, traffic.max_prompt + traffic.max_tokens))
    policy_options: dict[str, Any] = {"decode_first": draw(st.sampled_from((None, True, False)))}
    if policy == "dynamic":
        policy_options["window_s"] = draw(st.sampled_from((0.0, 0.02, 0.2)))
    controller_options: dict[str, Any] = {}
    if controller != "off":
        controller_options["max_drafts"] = draw(st.integers(0, 6))
    if controller == "adaptive":
        controller_options["cost_ratio"] = draw(st.sampled_from((0.05, 0.5, 2.0)))
        controller_options["probe_every"] = draw(st.integers(1, 4))
    if controller == "load_threshold":
        controller_options["max_running"] = draw(st.integers(0, 4))
    if controller == "goodput":
        controller_options |= {"step_tokens": (1, 8, 9, 40), "step_s": (1.0, 1.1, 1.6, 4.0)}
        controller_options["draft_step_s"] = draw(st.sampled_from((0.0, 0.02, 1.0)))
    return Scenario(config, policy, policy_options, controller, controller_options, traffic)
