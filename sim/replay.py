"""Exact replay: the outcomes of a recorded run, fed to a fresh scheduler, bring about the very same plans.

This is the proof that a policy measured on hardware is the policy that is simulated. Whatever a policy could read
besides the table, the blocks, past outcomes and ``now`` would show here as a plan that differs.

>>> num_steps = replay(read_steps(directory), read_requests(directory), loop)
"""

from __future__ import annotations

import numpy as np
import polars as pl

from specdec.scheduler import Request, StepLoop, StepPlan
from specdec.trace import iter_steps


class ReplayError(ValueError):
    """A plan differs from the recorded one."""


def requests_of(requests: pl.DataFrame) -> list[Request]:
    """The recorded requests as they were submitted, in the order of arrival."""
    return [
        Request(
            request_id=row["request_id"],
            prompt_len=row["prompt_len"],
            max_tokens=row["max_tokens"],
            arrival_s=row["arrival_s"],
            priority=row["priority"],
            deadline_s=row["deadline_s"],
            block_hashes=list(row["prompt_hashes"]),
            task=row["task"],
        )
        for row in requests.sort("arrival_s", "request_id").iter_rows(named=True)
    ]


def replay(steps: pl.DataFrame, requests: pl.DataFrame, loop: StepLoop) -> int:
    """Plan the recorded run again, step by step, and compare every array of every plan.

    Args:
        steps, requests: a complete trace: every request that arrived has finished.
        loop: a fresh scheduler, configured as the recorded one was.

    Returns:
        The number of plans that were equal: all of them.

    Raises:
        ReplayError: naming the first step that differs and the field.
    """
    waiting = requests_of(requests)
    waiting.reverse()
    count = 0
    for recorded, outcome in iter_steps(steps):
        while waiting and waiting[-1].arrival_s <= recorded.now_s:
            loop.submit(waiting.pop())
        loop.draining = not waiting
        plan = loop.begin(recorded.now_s)
        _compare(plan, recorded)
        loop.commit(plan, outcome, recorded.now_s + outcome.step_s)
        count += 1
    if loop.has_work or waiting:
        raise ReplayError(
            f"the trace ends after {count} steps with {loop.num_running} requests running and "
            f"{loop.num_waiting + len(waiting)} waiting: give a trace whose requests all finished"
        )
    return count


def _compare(plan: StepPlan, recorded: StepPlan) -> None:
    for name in StepPlan._fields:
        ours, theirs = getattr(plan, name), getattr(recorded, name)
        if not np.array_equal(ours, theirs):
            raise ReplayError(f"step {recorded.step}: {name} is {ours}, the recorded plan has {theirs}")
