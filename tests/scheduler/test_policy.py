"""Who joins the batch, when, and in which order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from specdec.scheduler import (
    ORDERS,
    POLICIES,
    Request,
    SchedulerConfig,
    StepLoop,
    make_controller,
    make_policy,
)
from specdec.scheduler.policy import WaitingQueue
from tests.scheduler.scenarios import Scenario, scenarios
from tests.scheduler.traffic import Driver, Job, Traffic

REPEATABLE = settings(derandomize=True, deadline=None, database=None)
LIMITS = SchedulerConfig(
    max_num_seqs=3, max_num_batched_tokens=32, num_blocks=64, block_size=4, max_model_len=32
)


def a_loop(policy: str, config: SchedulerConfig = LIMITS, **options: float) -> StepLoop:
    return StepLoop(config, make_policy(policy, **options), make_controller("off"))


def a_request(request_id: int, prompt_len: int = 4, max_tokens: int = 4, **options) -> Request:
    return Request(request_id=request_id, prompt_len=prompt_len, max_tokens=max_tokens, **options)


def a_driver(
    policy: str, requests: list[Request], config: SchedulerConfig = LIMITS, **options: float
) -> Driver:
    jobs = [Job(request, [request.request_id] * request.prompt_len) for request in requests]
    return Driver(config, make_policy(policy, **options), make_controller("off"), Traffic(), jobs)


def test_static_waits_for_a_full_batch() -> None:
    loop = a_loop("static")
    loop.submit(a_request(0))
    loop.submit(a_request(1))
    plan = loop.begin(100.0)
    assert plan.is_empty and plan.wake_s == math.inf
    loop.submit(a_request(2))
    assert loop.begin(100.0).admitted.tolist() == [0, 1, 2]


def test_static_runs_a_partial_batch_when_draining() -> None:
    loop = a_loop("static")
    loop.submit(a_request(0))
    loop.draining = True
    assert loop.begin(0.0).admitted.tolist() == [0]


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_nobody_joins_a_batch_that_runs(policy: str) -> None:
    requests = [a_request(i, max_tokens=2 + 6 * (i % 3 == 0)) for i in range(6)]
    driver = a_driver(policy, requests).run()
    assert [plan.admitted.tolist() for plan in driver.plans if plan.admitted.size] == [[0, 1, 2], [3, 4, 5]]
    second = next(plan for plan in driver.plans if 3 in plan.admitted)
    assert second.step == 8, "the batch runs until its longest request ends"


def test_dynamic_waits_for_its_window() -> None:
    loop = a_loop("dynamic", window_s=0.3)
    loop.submit(a_request(0, arrival_s=0.1))
    loop.submit(a_request(1, arrival_s=0.2))
    early = loop.begin(0.2)
    assert early.is_empty and early.wake_s == pytest.approx(0.4)
    assert loop.begin(early.wake_s).admitted.tolist() == [0, 1]


def test_dynamic_does_not_wait_when_the_batch_is_full() -> None:
    loop = a_loop("dynamic", window_s=100.0)
    for i in range(4):
        loop.submit(a_request(i))
    assert loop.begin(0.0).admitted.tolist() == [0, 1, 2]


def test_continuous_lets_requests_join_while_others_run() -> None:
    driver = a_driver("continuous", [a_request(i, max_tokens=8, arrival_s=0.02 * i) for i in range(3)]).run()
    joined = [int(plan.step) for plan in driver.plans if plan.admitted.size]
    assert joined == [0, 2, 4]


@settings(REPEATABLE, max_examples=100)
@given(scenarios(policies=("static", "dynamic", "continuous")))
def test_prompts_are_computed_whole(scenario: Scenario) -> None:
    for plan in scenario.driver().run().plans:
        assert plan.emits.all()


def test_continuous_holds_back_a_prompt_that_does_not_fit_the_step() -> None:
    driver = a_driver("continuous", [a_request(0, 20), a_request(1, 20)])
    assert driver.step().num_new.tolist() == [20]
    assert sorted(driver.step().num_new.tolist()) == [1, 20]


def test_chunked_gives_decodes_their_token_first_and_splits_the_prompt() -> None:
    limits = SchedulerConfig(
        max_num_seqs=3, max_num_batched_tokens=6, num_blocks=64, block_size=4, max_model_len=32
    )
    driver = a_driver("chunked", [a_request(0, 4), a_request(1, 12)], limits)
    assert driver.step().num_new.tolist() == [4, 2]
    second = driver.step()
    assert second.num_new.tolist() == [1, 5] and second.emits.tolist() == [True, False]
    assert driver.step().num_new.tolist() == [1, 5]
    assert driver.step().num_new.tolist() == [1, 1]


ORDERED = {
    "fcfs": [3, 1, 0, 2],
    "sjf": [2, 3, 0, 1],
    "priority": [1, 3, 2, 0],
    "edf": [0, 3, 1, 2],
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: str) -> None:
    queue = WaitingQueue(order)
    queue.push(a_request(0, 4, 8, arrival_s=0.3, priority=2, deadline_s=1.0))
    queue.push(a_request(1, 4, 8, arrival_s=0.2, priority=0, deadline_s=3.0, predicted_tokens=9))
    queue.push(a_request(2, 4, 8, arrival_s=0.4, priority=1, predicted_tokens=1))
    queue.push(a_request(3, 5, 8, arrival_s=0.1, priority=1, deadline_s=2.0, predicted_tokens=7))
    queue.push(a_request(9))
    queue.discard(9)
    assert [queue.pop().request_id for _ in range(len(queue))] == ORDERED[order]


@pytest.mark.parametrize("order", ORDERS)
def test_ties_go_to_the_smaller_id(order: str) -> None:
    queue = WaitingQueue(order)
    for request_id in (2, 0, 1):
        queue.push(a_request(request_id))
    assert [queue.pop().request_id for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_the_loop_admits_in_the_queue_order(order: str) -> None:
    limits = SchedulerConfig(max_num_seqs=1, num_blocks=64, block_size=4, max_model_len=32, order=order)
    requests = [
        a_request(0, 4, 8, priority=2, deadline_s=3.0),
        a_request(1, 4, 2, priority=1, deadline_s=2.0),
        a_request(2, 4, 5, priority=0, deadline_s=1.0),
    ]
    driver = a_driver("continuous", requests, limits).run()
    admitted = [i for plan in driver.plans for i in plan.admitted.tolist()]
    assert admitted == {"fcfs": [0, 1, 2], "sjf": [1, 2, 0], "priority": [2, 1, 0], "edf": [2, 1, 0]}[order]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_by_name(policy: str) -> None:
    assert make_policy(policy) == POLICIES[policy]()


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'continous': did you mean continuous\?"):
        make_policy("continous")


def test_an_unknown_order_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown order 'fcsf': did you mean fcfs "):
        a_loop("continuous", SchedulerConfig(order="fcsf"))


@pytest.mark.parametrize("policy", ["static", "continuous", "chunked"])
def test_a_window_is_refused_where_there_is_none(policy: str) -> None:
    with pytest.raises(
        ValueError, match=f"window_s=0.1 was given, but the policy '{policy}' has no such option"
    ):
        make_policy(policy, window_s=0.1)


@pytest.mark.parametrize("window_s", [-0.1, math.inf, math.nan])
def test_a_window_that_makes_no_sense(window_s: float) -> None:
    with pytest.raises(ValueError, match=f"window_s={window_s} must be a finite number of seconds >= 0"):
        make_policy("dynamic", window_s=window_s)
