"""A traced run of the real scheduler with made-up outcomes: a trace for tests of what reads traces."""

from __future__ import annotations

import numpy as np

from specdec.scheduler import (
    Request,
    SchedulerConfig,
    StepLoop,
    StepOutcome,
    StepPlan,
    make_controller,
    make_policy,
)
from specdec.trace import RequestRecord, TraceWriter

PROMPT_LEN, MAX_TOKENS, BLOCK_SIZE = 50, 24, 8


def make_loop(num_drafts: int = 4, num_blocks: int = 64) -> StepLoop:
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=48,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=128,
    )
    controller = make_controller("fixed", max_drafts=num_drafts) if num_drafts else make_controller("off")
    return StepLoop(config, make_policy("chunked"), controller)


def make_requests(num: int, gap_s: float = 0.03) -> list[Request]:
    """Prompts of 50 tokens, of which every other shares its first 16 with the one before."""
    return [
        Request(
            request_id=i,
            prompt_len=PROMPT_LEN,
            max_tokens=MAX_TOKENS,
            arrival_s=i * gap_s,
            block_hashes=[
                1 + 100 * (i // 2 * (b < 2) + i * (b >= 2)) + b for b in range(PROMPT_LEN // BLOCK_SIZE)
            ],
            task=("chat", "code")[i % 2],
        )
        for i in range(num)
    ]


def traced_run(
    trace: TraceWriter, *, num_requests: int = 6, num_drafts: int = 4, alpha: float = 0.7, seed: int = 0
) -> list[tuple[StepPlan, StepOutcome]]:
    """Serve the requests, each draft token accepted with ``alpha``; every step's plan and outcome."""
    rng = np.random.default_rng(seed)
    # So few blocks that some requests are preempted.
    loop, waiting, now_s = make_loop(num_drafts, num_blocks=36), make_requests(num_requests), 0.0
    done: list[tuple[StepPlan, StepOutcome]] = []
    requests = list(waiting)
    while waiting or loop.has_work:
        while waiting and waiting[0].arrival_s <= now_s:
            loop.submit(waiting.pop(0))
        plan = loop.begin(now_s)
        if plan.is_empty:
            now_s = waiting[0].arrival_s
            continue
        outcome = _outcome(plan, loop, alpha, rng)
        end_s = now_s + outcome.step_s
        loop.commit(plan, outcome, end_s)
        trace.step(plan, outcome, now_s, end_s, loop.num_running, loop.num_waiting, loop.pool.num_free)
        done.append((plan, outcome))
        for request in requests:
            if request.request_id in plan.request_ids[outcome.finished]:
                trace.request(record_of(request))
        now_s = end_s
    return done


def _outcome(plan: StepPlan, loop: StepLoop, alpha: float, rng: np.random.Generator) -> StepOutcome:
    draws = rng.random((plan.rows.size, 1 + int(plan.num_drafts.max(initial=0)))) < alpha
    accepted = np.minimum(np.cumprod(draws, axis=1).sum(axis=1), plan.num_drafts).astype(np.int32)
    left = loop.table.num_left(plan.rows)
    emitted = np.where(plan.emits, np.minimum(accepted + 1, left), 0).astype(np.int32)
    known = loop.table.num_known[plan.rows]
    completed = (known + emitted) // BLOCK_SIZE - known // BLOCK_SIZE
    hashed_rows = np.repeat(plan.rows, np.where(emitted > 0, completed, 0))
    return StepOutcome(
        num_drafted=plan.num_drafts,
        num_accepted=accepted,
        num_emitted=emitted,
        finished=emitted == left,
        draft_s=1e-4 * float(plan.num_drafts.sum()),
        verify_s=0.012 + 1e-4 * plan.num_tokens + float(rng.exponential(5e-4)),
        sample_s=5e-4,
        overhead_s=3e-4,
        hashed_rows=hashed_rows,
        block_hashes=rng.integers(2**63, 2**64, hashed_rows.size, dtype=np.uint64),
    )


def record_of(request: Request) -> RequestRecord:
    return RequestRecord.of(request, BLOCK_SIZE, "length", [3, 2], [2, 0])
