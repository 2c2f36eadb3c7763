"""Planning ahead changes no plan: what was made ahead is used only where it is what would be planned anyway."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from specdec.scheduler import (
    POLICIES,
    Request,
    SchedulerConfig,
    StepLoop,
    StepOutcome,
    StepPlan,
    make_controller,
    make_policy,
)
from tests.scheduler.scenarios import scenarios
from tests.scheduler.traffic import Driver, Traffic, assert_equal_records


def state_of(loop: StepLoop) -> dict:
    """Everything that decides what ``loop`` will do but for the plan made ahead, in copies."""
    table, pool = loop.table, loop.pool
    state = {"queue": [entry[1] for entry in loop.queue._heap], "silent": list(loop._silent)}
    requests = [table.request(row) for row in table.active.tolist()]
    state |= {"requests": [(r.request_id, r.state, r.num_cached, list(r.block_hashes)) for r in requests]}
    for name in ("next_step", "num_swapped_blocks", "draining", "_longest_known"):
        state[name] = getattr(loop, name)
    for name in ("active", "request_ids", "_columns", "block_table", "_free_rows", "_order"):
        state[name] = copy.deepcopy(getattr(table, name))
    for name in ("ref_counts", "_stack", "_stack_size", "_block_of_hash", "_hash_of_block"):
        state[name] = copy.deepcopy(getattr(pool, name))
    return state | {"cached": list(pool._cached)}


def assert_equal_states(one: dict, other: dict) -> None:
    for name, value in one.items():
        np.testing.assert_equal(other[name], value, err_msg=name)


class AheadDriver(Driver):
    """Plans the next step ahead while it executes one."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.states: list[dict] = []
        self.kept: Counter[bool | None] = Counter()
        self.looks_ahead = True

    def _execute(self, plan: StepPlan) -> StepOutcome:
        self.kept[self.loop.kept_ahead] += 1
        before = state_of(self.loop)
        self.states.append(before)
        if self.looks_ahead:
            self.loop.look_ahead(plan)
            assert_equal_states(before, state_of(self.loop))
        return super()._execute(plan)


def both(config, policy, controller, traffic) -> tuple[AheadDriver, AheadDriver]:
    """The same traffic with and without planning ahead, step by step in equal states."""
    drivers = []
    for looks_ahead in (False, True):
        driver = AheadDriver(config, policy, controller, traffic)
        driver.looks_ahead = looks_ahead
        drivers.append(driver.run())
    plain, ahead = drivers
    assert len(plain.plans) == len(ahead.plans)
    for index in range(len(plain.plans)):
        assert_equal_records(plain.plans[index], ahead.plans[index])
        assert_equal_records(plain.outcomes[index], ahead.outcomes[index])
        assert_equal_states(plain.states[index], ahead.states[index])
    assert set(plain.kept) <= {None}
    assert plain.loop.pool._stack.tolist() == ahead.loop.pool._stack.tolist()
    return plain, ahead


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_plans_and_states_are_those_of_planning_step_by_step(scenario):
    policy = make_policy(scenario.policy, **scenario.policy_options)
    controller = make_controller(scenario.controller, **scenario.controller_options)
    both(scenario.config, policy, controller, scenario.traffic)


ROOMY = SchedulerConfig(max_num_seqs=4, num_blocks=64, block_size=4, max_model_len=32)
TIGHT = SchedulerConfig(max_num_seqs=4, num_blocks=12, block_size=2, max_model_len=24, watermark=0.0)
CHUNKED, OFF, FIXED = make_policy("chunked"), make_controller("off"), make_controller("fixed", max_drafts=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_drafts_and_early_ends_every_plan_is_kept(policy):
    """Prompts are computed, requests come and end at ``max_tokens``: all of that is foreseen or left to ``begin``."""
    _, ahead = both(ROOMY, make_policy(policy), OFF, Traffic(seed=3, num_requests=20, mean_gap_s=0.02))
    assert ahead.kept[True] > 30 and ahead.kept[False] == 0
    assert any(plan.admitted.size for plan in ahead.plans[1:])


def test_a_plan_that_takes_in_somebody_keeps_the_shares_made_ahead():
    for policy in POLICIES:
        traffic = Traffic(seed=5, num_requests=20, mean_gap_s=0.01, max_tokens=20)
        _, ahead = both(ROOMY, make_policy(policy), OFF, traffic)
        joined = sum(plan.admitted.size > 0 for plan in ahead.plans)
        assert joined > 0 and ahead.kept[False] == 0


def test_an_early_end_discards_the_plan():
    _, ahead = both(ROOMY, CHUNKED, OFF, Traffic(seed=1, num_requests=20, max_tokens=20, eos=0.1))
    assert ahead.kept[False] > 5 and ahead.kept[True] > 5


def test_drafts_are_planned_ahead_until_one_may_be_shortened():
    traffic = Traffic(seed=2, num_requests=12, max_prompt=8, max_tokens=24, short_drafts=0.3)
    _, ahead = both(ROOMY, CHUNKED, FIXED, traffic)
    assert ahead.kept[True] > 10 and ahead.kept[False] > 0


def test_blocks_are_held_for_drafts_that_the_budget_cuts():
    """As they are without planning ahead; the step after prompts, which draft nothing, is planned with its blocks."""
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=6, num_blocks=99, block_size=1, max_model_len=24
    )
    _, ahead = both(config, CHUNKED, FIXED, Traffic(seed=0, num_requests=4, max_prompt=1, mean_gap_s=0.0))
    assert ahead.kept[True] and any(0 < plan.num_drafts.sum() < plan.rows.size for plan in ahead.plans)


@pytest.mark.parametrize("controller", [OFF, FIXED], ids=["off", "fixed"])
def test_block_pressure_discards_the_plan(controller):
    traffic = Traffic(seed=0, num_requests=12, mean_gap_s=0.0)
    _, ahead = both(TIGHT, CHUNKED, controller, traffic)
    assert ahead.counts["preempted"] > 0 and ahead.kept[False] > 0 and ahead.kept[True] > 0


def test_a_cancelled_request_discards_the_plan():
    _, ahead = both(ROOMY, CHUNKED, OFF, Traffic(seed=4, num_requests=20, max_tokens=20, cancel=0.2))
    assert ahead.kept[False] > 0


def test_under_a_controller_that_may_change_nothing_is_planned_ahead():
    _, ahead = both(ROOMY, CHUNKED, make_controller("adaptive", max_drafts=3), Traffic(seed=0))
    assert ahead.kept == {None: len(ahead.plans)}


def test_the_plan_is_told_ahead_where_no_draft_can_move_it():
    loop = StepLoop(ROOMY, CHUNKED, OFF)
    loop.submit(Request(request_id=0, prompt_len=3, max_tokens=3))
    plan = loop.begin(0.0)
    following = loop.look_ahead(plan)
    assert following is not None and following.context.tolist() == [3] and following.emits.all()
    one, none = np.ones(1, np.int32), np.zeros(1, np.int32)
    loop.commit(plan, StepOutcome(none, none, one, np.zeros(1, np.bool_)), 0.5)
    taken = loop.begin(1.0)
    assert taken.now_s == 1.0 and taken.rows is following.rows and loop.kept_ahead
    assert loop.look_ahead(taken) is not None
    loop.commit(taken, StepOutcome(none, none, one, np.zeros(1, np.bool_)), 1.5)
    last = loop.begin(2.0)
    assert loop.look_ahead(last) is None, "the request reaches max_tokens"
