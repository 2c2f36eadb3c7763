"""The step loop under random traffic, and what it does in scenes small enough to check by hand.

Every random run goes through the driver of ``traffic.py``, which checks after each begin and each commit that
no block is leaked or doubled, that rows read only their own prefix, and that no budget is exceeded.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.scheduler import (
    ORDERS,
    Request,
    RequestState,
    SchedulerConfig,
    StepLoop,
    make_controller,
    make_policy,
)
from tests.scheduler.scenarios import CONTROLLER_NAMES, POLICY_NAMES, Scenario, scenarios
from tests.scheduler.traffic import Driver, Job, Traffic, assert_equal_records

REPEATABLE = settings(derandomize=True, deadline=None, database=None)


def a_driver(policy: str, drafts: int, jobs: list[Job], traffic: Traffic | None = None, **limits) -> Driver:
    """A driver over hand-made jobs; ``drafts=0`` is plain decoding."""
    controller = make_controller("fixed", max_drafts=drafts) if drafts else make_controller("off")
    traffic = traffic or Traffic(acceptance=1.0, short_drafts=0.0)
    return Driver(SchedulerConfig(**limits), make_policy(policy), controller, traffic, jobs)


def a_job(request_id: int, prompt: list[int], max_tokens: int, **options) -> Job:
    request = Request(request_id=request_id, prompt_len=len(prompt), max_tokens=max_tokens, **options)
    return Job(request, list(prompt))


@pytest.mark.parametrize("controller", CONTROLLER_NAMES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_request_ends_and_no_block_is_wrong(policy: str, order: str, controller: str) -> None:
    @settings(REPEATABLE, max_examples=12)
    @given(scenarios(policies=(policy,), orders=(order,), controllers=(controller,)))
    def holds(scenario: Scenario) -> None:
        for job in scenario.driver().run().jobs:
            request = job.request
            assert request.num_generated == len(job.tokens) - request.prompt_len
            assert request.num_accepted <= request.num_drafted
            if not (scenario.traffic.eos or job.cancelled):
                assert request.num_generated == request.max_tokens
            if not job.cancelled:
                assert request.arrival_s <= request.first_scheduled_s
                assert request.first_scheduled_s < request.first_token_s <= request.finish_s

    holds()


@settings(REPEATABLE, max_examples=1000)
@given(scenarios())
def test_random_scenarios(scenario: Scenario) -> None:
    scenario.driver().run()


@settings(REPEATABLE, max_examples=150)
@given(scenarios())
def test_plans_are_deterministic(scenario: Scenario) -> None:
    first, second = scenario.driver().run(), scenario.driver().run()
    assert len(first.plans) == len(second.plans)
    for left, right in zip(first.plans + first.outcomes, second.plans + second.outcomes, strict=True):
        assert_equal_records(left, right)


def test_other_traffic_gives_other_plans() -> None:
    """Negative control of the test above."""
    config = SchedulerConfig(max_num_seqs=4, num_blocks=16, block_size=4, max_model_len=24)
    runs = [
        Driver(config, make_policy("chunked"), make_controller("off"), Traffic(seed=seed)).run()
        for seed in (0, 1)
    ]
    with pytest.raises(AssertionError):
        for left, right in zip(*(run.plans for run in runs), strict=True):
            assert_equal_records(left, right)


@settings(REPEATABLE, max_examples=150)
@given(scenarios(orders=("fcfs",), ends_early=False))
def test_fcfs_never_starves(scenario: Scenario) -> None:
    """Requests start in order of arrival, and of those that started the oldest soon gets its turn."""
    driver = scenario.driver()
    since_served: Counter[int] = Counter()
    while any(job.request.state is not RequestState.FINISHED for job in driver.jobs):
        unfinished = [j for j in driver.jobs if j.request.state is not RequestState.FINISHED]
        oldest = unfinished[0].request.request_id
        plan = driver.step()
        if not plan.is_empty:
            since_served[oldest] = 0 if oldest in plan.request_ids else since_served[oldest] + 1
            assert since_served[oldest] <= scenario.config.max_num_seqs
    started_s = [job.request.first_scheduled_s for job in driver.jobs]
    assert started_s == sorted(started_s)
    admitted = [i for plan in driver.plans for i in plan.admitted.tolist()]
    first_admissions = list(dict.fromkeys(admitted))
    assert first_admissions == sorted(first_admissions)


def test_the_random_traffic_reaches_every_mechanism() -> None:
    """Or else the properties above would hold for want of trying."""
    counts: Counter[str] = Counter()
    for seed in range(80):
        config = SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=32, num_blocks=12, block_size=3, max_model_len=28,
            **({"preemption": "swap", "num_swap_blocks": 9} if seed % 3 == 0 else {}),
        )  # fmt: skip
        traffic = Traffic(seed=seed, num_requests=12, max_prompt=14, max_tokens=14)
        policy = make_policy(POLICY_NAMES[seed % 4])
        counts += Driver(config, policy, make_controller("fixed", max_drafts=3), traffic).run().counts
    for name in ("preempted", "swapped", "cached", "copied", "evicted", "promised"):
        assert counts[name] >= 20, f"{name}: {counts[name]}"


def test_a_full_prefix_hit_is_copied_before_its_last_token_is_computed() -> None:
    driver = a_driver(
        "continuous", 0, [a_job(i, [1, 0, 1, 0], 2, arrival_s=i * 0.05) for i in range(2)],
        num_blocks=8, block_size=2, max_model_len=8,
    )  # fmt: skip
    driver.run()
    second = next(plan for plan in driver.plans if 1 in plan.admitted)
    assert second.num_cached.tolist() == [3] and second.num_new.tolist() == [1]
    assert len(second.copies) == 1 and second.copies[0, 0] != second.copies[0, 1]


def test_a_preempted_request_resumes_with_its_tokens_and_hits_the_prefix_cache() -> None:
    """Two requests of up to 16 tokens in 20 slots: the later one yields, then goes on where it was."""
    jobs = [a_job(0, [0, 0, 0, 0], 8), a_job(1, [1, 1, 1, 1], 12)]
    driver = a_driver("continuous", 0, jobs, num_blocks=10, block_size=2, max_model_len=16, watermark=0.0)
    driver.run()
    left = next(plan for plan in driver.plans if plan.preempted.size)
    assert left.preempted.tolist() == [1]
    earlier = list(zip(driver.plans, driver.outcomes, strict=True))[: left.step]
    generated = sum(int(outcome.num_emitted[plan.request_ids == 1].sum()) for plan, outcome in earlier)
    back = next(plan for plan in driver.plans[left.step :] if 1 in plan.admitted)
    place = back.request_ids.tolist().index(1)
    assert generated == 7
    assert back.num_cached[0] == 8, "row 0 evicted one block of five; two of the others hold generated tokens"
    assert back.context[place] + back.num_new[place] == 4 + generated
    assert jobs[1].request.num_preemptions == 1 and jobs[1].request.num_generated == 12
    assert jobs[0].request.num_preemptions == 0


def test_preemption_takes_the_last_in_order() -> None:
    jobs = [a_job(0, [0, 0, 0, 0], 12, priority=2), a_job(1, [1, 1, 1, 1], 12, priority=1)]
    driver = a_driver(
        "continuous", 0, jobs, num_blocks=10, block_size=2, max_model_len=16, watermark=0.0, order="priority"
    ).run()
    assert [plan.preempted.tolist() for plan in driver.plans if plan.preempted.size] == [[0]]


def test_drafts_are_dropped_before_a_request_is_preempted() -> None:
    """7 blocks of 2 for two prompts of 4 and 3 new tokens each: plain decoding fits, drafts of 2 do not."""
    jobs = [a_job(i, [i, i, i, i], 4) for i in range(2)]
    driver = a_driver("continuous", 2, jobs, num_blocks=7, block_size=2, max_model_len=8, watermark=0.0)
    driver.step()
    plan = driver.step()
    assert plan.num_drafts.tolist() == [2, 1]
    driver.run()
    assert driver.counts["preempted"] == 0


def test_blocks_left_from_rejected_drafts_are_given_back_before_a_request_is_preempted() -> None:
    """Row 0 holds blocks for three drafts, all rejected; row 1 then needs one and nobody has to leave."""
    jobs = [a_job(0, [0, 0, 0], 6), a_job(1, [1], 4)]
    rejecting = Traffic(acceptance=0.0, short_drafts=0.0)
    driver = a_driver(
        "continuous", 3, jobs, rejecting, num_blocks=9, block_size=1, max_model_len=9, watermark=0.0
    )
    driver.step()
    assert driver.step().num_drafts.tolist() == [3, 0]
    assert driver.loop.pool.num_free == 0
    assert driver.step().request_ids.tolist() == [0, 1]
    assert driver.counts["preempted"] == 0


def test_drafts_count_against_the_token_budget_and_are_shared_evenly() -> None:
    jobs = [a_job(i, [i], 20) for i in range(3)]
    driver = a_driver(
        "chunked", 8, jobs, max_num_seqs=3, max_num_batched_tokens=10, num_blocks=64, max_model_len=32
    )
    driver.step()
    plan = driver.step()
    assert plan.num_new.tolist() == [1, 1, 1] and plan.num_drafts.tolist() == [3, 2, 2]
    assert plan.num_tokens == 10


def test_drafts_never_reach_past_max_tokens() -> None:
    driver = a_driver("continuous", 8, [a_job(0, [0], 4)], num_blocks=8, max_model_len=8)
    assert [plan.num_drafts.tolist() for plan in driver.run().plans] == [[0], [2]]


@settings(REPEATABLE, max_examples=40)
@given(scenarios(policies=("continuous", "chunked")), st.integers(0, 30))
def test_cancelling_everything_frees_everything(scenario: Scenario, steps: int) -> None:
    driver = scenario.driver()
    for _ in range(steps):
        driver.step()
    for job in driver.jobs:
        driver.loop.cancel(job.request.request_id)
    driver.loop.pool.check([])
    assert not driver.loop.has_work and driver.loop.begin(driver.now_s).is_empty


def test_an_unknown_id_cannot_be_cancelled_and_does_no_harm() -> None:
    driver = a_driver("continuous", 0, [a_job(0, [0], 4)], num_blocks=8, max_model_len=8)
    driver.step()
    driver.loop.cancel(7)
    assert driver.run().jobs[0].request.num_generated == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_len": 30, "max_tokens": 3}, "prompt of 30 tokens .* max_model_len=32: shorten the prompt"),
        ({"prompt_len": 20, "max_tokens": 5}, "needs 7 KV blocks .* num_blocks=6: enlarge the KV pool"),
        (
            {"prompt_len": 17, "max_tokens": 4},
            "max_num_batched_tokens=20 .* raise the budget or use .*'chunked'",
        ),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_once(changes: dict[str, int], message: str) -> None:
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=20, num_blocks=6, block_size=4, max_model_len=32
    )
    loop = StepLoop(config, make_policy("continuous"), make_controller("off"))
    with pytest.raises(ValueError, match=message):
        loop.submit(Request(request_id=0, **changes))
    assert not loop.has_work


def test_chunked_prefill_takes_prompts_beyond_the_token_budget() -> None:
    driver = a_driver(
        "chunked", 0, [a_job(0, [0, 1] * 20, 2)],
        max_num_seqs=1, max_num_batched_tokens=7, num_blocks=16, block_size=4, max_model_len=64,
    )  # fmt: skip
    plans = driver.run().plans
    assert [int(plan.num_new[0]) for plan in plans] == [7, 7, 7, 7, 7, 5, 1]
    assert [bool(plan.emits[0]) for plan in plans] == [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be >= 1"),
        ({"num_blocks": -1}, "num_blocks=-1 must be >= 1"),
        ({"block_size": 0}, "block_size=0 must be >= 1"),
        ({"max_model_len": 0}, "max_model_len=0 must be >= 1"),
        (
            {"max_num_seqs": 9, "max_num_batched_tokens": 8},
            "max_num_batched_tokens=8 is less than max_num_seqs=9",
        ),
        ({"watermark": 1.0}, r"watermark=1.0 must be in \[0, 1\)"),
    ],
)
def test_limits_that_make_no_sense(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**changes)


def test_the_watermark_keeps_blocks_free_for_those_who_run() -> None:
    jobs = [a_job(0, [0] * 4, 8), a_job(1, [1] * 4, 8)]
    limits = {"num_blocks": 5, "block_size": 4, "max_model_len": 12}
    without = a_driver("continuous", 0, jobs, watermark=0.0, **limits)
    assert without.step().admitted.tolist() == [0, 1]
    jobs = [a_job(0, [0] * 4, 8), a_job(1, [1] * 4, 8)]
    with_one_spare = a_driver("continuous", 0, jobs, watermark=0.9, **limits)
    assert with_one_spare.step().admitted.tolist() == [0]


def test_an_idle_loop_plans_nothing() -> None:
    plan = StepLoop(SchedulerConfig(), make_policy("continuous"), make_controller("off")).begin(1.5)
    assert plan.is_empty and plan.num_tokens == 0 and plan.wake_s == math.inf and plan.now_s == 1.5


def test_first_token_and_finish_times_are_ends_of_steps() -> None:
    driver = a_driver("continuous", 0, [a_job(0, [0, 1], 3)], num_blocks=8, max_model_len=8).run()
    request = driver.jobs[0].request
    np.testing.assert_allclose(
        [request.first_scheduled_s, request.first_token_s, request.finish_s], [0, 0.01, 0.03]
    )
    assert request.num_steps == 3
