"""``horizon`` promises equal plans. The driver checks each promise; here it meets traffic that earns many."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.scheduler import Request, SchedulerConfig, StepLoop, make_controller, make_policy
from tests.scheduler.scenarios import Scenario, scenarios
from tests.scheduler.traffic import Driver, Job, Traffic

REPEATABLE = settings(derandomize=True, deadline=None, database=None)


def decoding(
    num_requests: int, max_tokens: int, drafts: int = 0, acceptance: float = 0.5, **limits
) -> Driver:
    """A driver whose requests, of two-token prompts, have been computed and decode from here."""
    requests = [Request(request_id=i, prompt_len=2, max_tokens=max_tokens) for i in range(num_requests)]
    jobs = [Job(request, [request.request_id] * 2) for request in requests]
    controller = make_controller("fixed", max_drafts=drafts) if drafts else make_controller("off")
    traffic = Traffic(acceptance=acceptance, vocab_size=3, short_drafts=0.0)
    driver = Driver(SchedulerConfig(**limits), make_policy("continuous"), controller, traffic, jobs)
    driver.step()
    return driver


@settings(REPEATABLE, max_examples=250)
@given(scenarios(controllers=("off", "fixed"), ends_early=False), st.integers(0, 40))
def test_the_next_plans_are_equal_whatever_is_accepted(scenario: Scenario, steps: int) -> None:
    """From any state: freeze arrivals, ask once, then take exactly the promised steps."""
    driver = scenario.driver()
    for _ in range(steps):
        driver.step()
    arrived = driver._num_submitted
    driver.jobs = driver.jobs[:arrived]
    driver.loop.draining = True
    horizon = driver.loop.horizon(driver.now_s)
    plans = [driver.step() for _ in range(horizon)]
    for plan in plans:
        assert not plan.is_empty and plan.admitted.size == plan.preempted.size == 0
        assert plan.rows.tolist() == plans[0].rows.tolist()
        assert plan.num_new.tolist() == plans[0].num_new.tolist()
        assert plan.num_drafts.tolist() == plans[0].num_drafts.tolist()
    driver.run()


def test_plain_decoding_is_foretold_to_the_last_token() -> None:
    driver = decoding(4, 100, num_blocks=64, block_size=16, max_model_len=128)
    assert driver.loop.horizon(driver.now_s) == 99
    driver.run()
    assert driver.counts["promised"] == 98


def test_drafts_are_foretold_as_if_all_were_accepted() -> None:
    driver = decoding(4, 100, drafts=3, num_blocks=64, block_size=16, max_model_len=128)
    assert driver.loop.horizon(driver.now_s) == 99 // 4
    driver.run()
    assert driver.counts["promised"] > 0.8 * len(driver.plans)


def test_the_free_blocks_end_the_horizon() -> None:
    driver = decoding(2, 40, num_blocks=12, block_size=4, max_model_len=48, watermark=0.0)
    # 24 tokens each fit in 6 blocks each; two are computed, so 22 more steps can be written.
    assert driver.loop.horizon(driver.now_s) == 22
    driver.run()
    assert driver.counts["preempted"] > 0


@pytest.mark.parametrize("max_num_seqs", [2, 3])
def test_a_queue_does_not_end_the_horizon_while_nobody_can_leave_it(max_num_seqs: int) -> None:
    """The third request waits for a row (of 2), or for blocks (of 10) although there is a prefix cache."""
    driver = decoding(2, 12, max_num_seqs=max_num_seqs, num_blocks=10, block_size=4, max_model_len=40)
    driver.add(Job(Request(request_id=2, prompt_len=39, max_tokens=1), [2] * 39))
    for _ in range(3):
        driver.step()
    assert driver.loop.num_waiting == 1
    assert driver.loop.horizon(driver.now_s) == 8
    driver.run()
    assert driver.counts["promised"] >= 7


def a_blocked_loop(shares_first: bool) -> StepLoop:
    """One request decodes in its second block; the head of the queue lacks blocks, perhaps that very one."""
    driver = decoding(1, 6, max_num_seqs=2, num_blocks=4, block_size=2, max_model_len=8, watermark=0.25)
    first = driver.loop.table.request(0).block_hashes[0] if shares_first else 6
    driver.loop.submit(Request(request_id=1, prompt_len=7, max_tokens=1, block_hashes=[first, 7, 8]))
    return driver.loop


def test_a_row_that_may_complete_the_block_the_head_lacks_ends_the_horizon() -> None:
    assert a_blocked_loop(shares_first=True).horizon(0.0) == 0
    assert a_blocked_loop(shares_first=False).horizon(0.0) > 0


def test_a_row_lets_the_head_in_by_completing_a_block_that_it_lacks() -> None:
    """The head needs 5 blocks and 4 are free, until row 0 names its first: no promise may reach so far."""
    driver = decoding(1, 20, drafts=3, acceptance=0.0, num_blocks=6, block_size=4, max_model_len=24)
    driver.step()
    own = driver.jobs[0].tokens
    assert len(own) == 4 and driver.loop.pool.num_free == 4
    driver.add(Job(Request(request_id=1, prompt_len=20, max_tokens=1), own + [2] * 16))
    assert [driver.step().admitted.tolist() for _ in range(2)] == [[], [1]]


def test_drafts_cut_by_the_token_budget_are_foretold_too() -> None:
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 104, "num_blocks": 64, "max_model_len": 102}
    driver = decoding(3, 100, drafts=40, **limits)
    assert driver.loop.horizon(driver.now_s) == 2
    assert [driver.step().num_drafts.tolist() for _ in range(2)] == [[34, 34, 33]] * 2


@pytest.mark.parametrize("policy", ["continuous", "chunked"])
def test_no_horizon_while_a_prompt_is_computed_or_the_lengths_adapt(policy: str) -> None:
    config = SchedulerConfig(num_blocks=64, max_model_len=64, max_num_batched_tokens=64)
    for controller, expected in (("fixed", True), ("adaptive", False)):
        loop = StepLoop(config, make_policy(policy), make_controller(controller))
        assert loop.horizon(0.0) == 0
        driver = Driver(config, loop.policy, loop.speculation, Traffic(num_requests=1, seed=2, max_tokens=30))
        driver.jobs[0].request.max_tokens = 40
        driver.step()
        assert (driver.loop.horizon(driver.now_s) > 0) is expected
