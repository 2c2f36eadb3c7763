"""Deterministic random traffic for a :class:`StepLoop`, with a shadow model of what every KV slot holds.

The driver plays the engine: it submits requests, executes each plan on a shadow cache and commits an outcome.
The KV of a token depends on all tokens before it, so the shadow cache stores, per slot, a name of the whole
prefix that ends there. A row that would read a slot with any other name fails at once: wrong sharing, a
missed copy, a rejected draft in the prefix cache and an eviction of a needed block all look like that.

    driver = Driver(config, make_policy("continuous"), make_controller("fixed"), Traffic(seed=1))
    driver.run()
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specdec.scheduler import (
    BatchPolicy,
    Request,
    RequestState,
    SchedulerConfig,
    SpeculationController,
    StepLoop,
    StepOutcome,
    StepPlan,
    hash_blocks,
)

JUNK = -1


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What arrives and what the pretended model does with it.

    Args:
        seed: of every random choice.
        num_requests: how many arrive.
        max_prompt: longest prompt; a prompt starts like an earlier one with probability ``shared``.
        max_tokens: largest ``max_tokens``.
        vocab_size: few tokens make equal prefixes, and equal outputs of different requests, frequent.
        shared: probability that a prompt extends or repeats a prefix of earlier tokens.
        mean_gap_s: mean time between arrivals; a step takes 0.01 s. 0 lets all arrive at once.
        acceptance: probability that a draft is accepted.
        short_drafts: probability that the drafter proposes fewer tokens than planned.
        eos: probability that an emitted token ends its request.
        cancel: probability, per step, that some unfinished request is cancelled.
    """

    seed: int = 0
    num_requests: int = 8
    max_prompt: int = 12
    max_tokens: int = 12
    vocab_size: int = 2
    shared: float = 0.7
    mean_gap_s: float = 0.01
    acceptance: float = 0.6
    short_drafts: float = 0.1
    eos: float = 0.0
    cancel: float = 0.0


@dataclass(eq=False)
class Job:
    """The driver's side of a request; ``names[i]`` names the prefix ``tokens[: i + 1]``."""

    request: Request
    tokens: list[int]
    names: list[int] = field(default_factory=list)
    cancelled: bool = False


def random_jobs(traffic: Traffic) -> list[Job]:
    """Requests in order of arrival."""
    rng = np.random.default_rng([traffic.seed, 0])
    jobs: list[Job] = []
    arrival_s = 0.0
    for request_id in range(traffic.num_requests):
        length = int(rng.integers(1, traffic.max_prompt + 1))
        tokens: list[int] = []
        if jobs and rng.random() < traffic.shared:
            tokens = jobs[int(rng.integers(len(jobs)))].tokens[:length]
            length = max(len(tokens), int(rng.integers(1, length + 1)))
        tokens = tokens + rng.integers(0, traffic.vocab_size, length - len(tokens)).tolist()
        request = Request(
            request_id=request_id,
            prompt_len=len(tokens),
            max_tokens=int(rng.integers(1, traffic.max_tokens + 1)),
            arrival_s=arrival_s,
            priority=int(rng.integers(3)),
            deadline_s=arrival_s + float(rng.random()),
            predicted_tokens=int(rng.integers(1, traffic.max_tokens + 1)) if rng.random() < 0.5 else None,
        )
        jobs.append(Job(request, tokens))
        arrival_s += float(rng.exponential(traffic.mean_gap_s)) if traffic.mean_gap_s else 0.0
    return jobs


class Driver:
    """Runs traffic through a loop, checks every invariant in every step, and keeps what happened.

    Args:
        config, policy, speculation: of the loop.
        traffic: what arrives.
        jobs: the requests to run instead of random ones.

    Attributes:
        plans, outcomes: of every step that was not empty.
        counts: how often something happened: preempted, swapped (back in), cached (prefix-hit tokens), copied,
            evicted, waited (empty plans), promised (steps that ``horizon`` had foretold before the step ahead of them).
    """

    def __init__(
        self,
        config: SchedulerConfig,
        policy: BatchPolicy,
        speculation: SpeculationController,
        traffic: Traffic,
        jobs: list[Job] | None = None,
    ) -> None:
        self.loop = StepLoop(config, policy, speculation)
        self.config, self.traffic = config, traffic
        self.jobs = random_jobs(traffic) if jobs is None else jobs
        self.rng = np.random.default_rng([traffic.seed, 1])
        self.now_s = 0.0
        self.plans: list[StepPlan] = []
        self.outcomes: list[StepOutcome] = []
        self.counts: Counter[str] = Counter()
        self._slots = np.full((config.num_blocks, config.block_size), JUNK, np.int64)
        self._name_of: dict[tuple[int, int], int] = {}
        self._names_of_hash: dict[int, list[int]] = {}
        self._num_submitted = 0
        self._promised = 0
        self._host: dict[int, list[int]] = {}
        for job in self.jobs:
            self._prepare(job)

    def add(self, job: Job) -> None:
        """One more request, whose id is the number of those before it and which arrives last."""
        assert job.request.request_id == len(self.jobs)
        self._prepare(job)
        self.jobs.append(job)

    def _prepare(self, job: Job) -> None:
        job.names = self._names(job.tokens)
        job.request.block_hashes = self._new_hashes(job)

    def _names(self, tokens: list[int], parent: int = 0) -> list[int]:
        names: list[int] = []
        for token in tokens:
            parent = self._name_of.setdefault((parent, token), len(self._name_of) + 1)
            names.append(parent)
        return names

    def _new_hashes(self, job: Job) -> list[int]:
        """Hashes of the full blocks of ``job`` that have none yet; what each stands for is remembered."""
        if not self.config.prefix_caching:
            return []
        size, have = self.config.block_size, job.request.block_hashes
        tail = np.array(job.tokens[len(have) * size :], np.int32)
        hashes = hash_blocks(tail, size, have[-1] if have else 0)
        for index, value in enumerate(hashes, start=len(have)):
            content = job.names[index * size : (index + 1) * size]
            assert self._names_of_hash.setdefault(value, content) == content, "one hash, two contents"
        return hashes

    def run(self, max_steps: int = 5000) -> Driver:
        """Step until every request is finished; fails if that takes more than ``max_steps`` steps."""
        while self._num_submitted < len(self.jobs) or self.loop.has_work:
            self.step()
            assert len(self.plans) <= max_steps, "requests do not end"
        self.loop.pool.check([])
        assert all(job.request.state is RequestState.FINISHED for job in self.jobs)
        return self

    def step(self) -> StepPlan:
        """Submit what arrived, then one begin and, unless the plan is empty, one commit."""
        self._submit()
        if self.traffic.cancel and self.rng.random() < self.traffic.cancel:
            self._cancel()
        horizon = self.loop.horizon(self.now_s)
        named = dict(self.loop.pool._hash_of_block)
        must_preempt = self._plain_shortage() > 0
        plan = self.loop.begin(self.now_s)
        now_named = self.loop.pool._hash_of_block
        self.counts["evicted"] += sum(now_named.get(block) != value for block, value in named.items())
        self._check_pool()
        self._check_plan(plan)
        assert (plan.preempted.size > 0) == must_preempt, "preempted although dropping drafts was enough"
        self._check_promise(plan, horizon)
        if plan.is_empty:
            self._wait(plan)
            return plan
        self._swap(plan)
        self._copy(plan)
        outcome = self._execute(plan)
        self.now_s += 0.01
        self.loop.commit(plan, outcome, self.now_s)
        self._check_pool()
        self.plans.append(plan)
        self.outcomes.append(outcome)
        self.counts["preempted"] += plan.preempted.size
        self.counts["cached"] += int(plan.num_cached.sum())
        self.counts["copied"] += len(plan.copies)
        return plan

    def _submit(self) -> None:
        while self._num_submitted < len(self.jobs):
            request = self.jobs[self._num_submitted].request
            if request.arrival_s > self.now_s:
                break
            self.loop.submit(request)
            self._num_submitted += 1
            self._promised = 0
        self.loop.draining = self._num_submitted == len(self.jobs)

    def _cancel(self) -> None:
        alive = [j for j in self.jobs[: self._num_submitted] if j.request.state is not RequestState.FINISHED]
        if alive:
            job = alive[int(self.rng.integers(len(alive)))]
            self.loop.cancel(job.request.request_id)
            job.request.state, job.cancelled = RequestState.FINISHED, True
            self._host.pop(job.request.request_id, None)
            self._promised = 0
            self._check_pool()

    def _wait(self, plan: StepPlan) -> None:
        """Jump to when something can change."""
        self.counts["waited"] += 1
        arrivals = [job.request.arrival_s for job in self.jobs[self._num_submitted :]]
        wake_s = min([plan.wake_s, *arrivals])
        if self.loop.has_work or arrivals:
            assert self.now_s < wake_s < math.inf, "idle with requests waiting and nothing to wait for"
            self.now_s = wake_s

    def _plain_shortage(self) -> int:
        """Blocks lacking to give each decoding row one token, were all blocks held for drafts given back."""
        table, pool = self.loop.table, self.loop.pool
        rows = table.active
        computed = table.num_computed[rows]
        decode = table.num_known[rows] - computed == 1
        need = -(-(computed + 1) // self.config.block_size) - table.num_blocks[rows]
        return int(need[decode].sum()) - pool.num_free

    def _check_pool(self) -> None:
        """No block leaked or doubled, and every named block holds what its name says."""
        table, pool = self.loop.table, self.loop.pool
        pool.check([table.blocks(row) for row in table.active.tolist()])
        for block, value in pool._hash_of_block.items():
            assert self._slots[block].tolist() == self._names_of_hash[value], "not what the block's hash says"

    def _check_plan(self, plan: StepPlan) -> None:
        """Budgets, and that the plan says about its rows what the table says."""
        config, table, rows = self.config, self.loop.table, plan.rows
        assert plan.num_tokens <= config.max_num_batched_tokens
        assert self.loop.num_running <= config.max_num_seqs
        assert plan.is_empty == (self.loop.num_running == 0), "running requests, but none is scheduled"
        assert plan.is_empty or plan.wake_s == math.inf
        assert len(set(rows.tolist())) == rows.size
        assert set(plan.admitted.tolist()) <= set(table.request_ids[table.active].tolist())
        assert not set(plan.preempted.tolist()) & set(table.request_ids[table.active].tolist())
        assert (plan.context == table.num_computed[rows]).all()
        assert (plan.num_new > 0).all() and (plan.num_drafts >= 0).all()
        known = table.num_known[rows]
        assert (plan.emits == (plan.context + plan.num_new == known)).all()
        assert (plan.emits | (plan.num_drafts == 0)).all()
        assert (plan.num_drafts <= self.loop.speculation.max_drafts).all()
        left = table.num_left(rows)
        assert (plan.num_drafts < left).all()
        assert (
            plan.context + plan.num_new + plan.num_drafts <= table.num_blocks[rows] * config.block_size
        ).all()
        if not self.loop.policy.chunked_prefill:
            assert plan.emits.all(), "a prompt was split"

    def _check_promise(self, plan: StepPlan, horizon: int) -> None:
        """A plan that an earlier ``horizon`` promised is the one before it, with nobody coming or going."""
        if self._promised:
            self.counts["promised"] += 1
            before = self.plans[-1]
            for name in ("rows", "request_ids", "num_new", "num_drafts"):
                assert np.array_equal(getattr(plan, name), getattr(before, name)), f"horizon broke: {name}"
        if self._promised or horizon:
            assert plan.admitted.size == plan.preempted.size == 0 and not plan.is_empty, "horizon broke"
        self._promised = max(self._promised - 1, horizon - 1, 0)

    def _swap(self, plan: StepPlan) -> None:
        """KV to and from host memory, which never holds more than it may."""
        size, used = self.config.block_size, 0
        for request_id in plan.swapped_out.tolist():
            count = -(-self.jobs[request_id].request.num_swapped // size)
            blocks = plan.swapped_out_blocks[used : used + count]
            self._host[request_id], used = self._slots[blocks].ravel().tolist(), used + count
        assert used == plan.swapped_out_blocks.size
        cached = dict(zip(plan.admitted.tolist(), plan.num_cached.tolist(), strict=True))
        rows = dict(zip(plan.request_ids.tolist(), plan.rows.tolist(), strict=True))
        for request_id in plan.swapped_in.tolist():
            content = self._host.pop(request_id)
            blocks = self.loop.table.blocks(rows[request_id])[: -(-cached[request_id] // size)]
            self._slots[blocks] = np.array(content).reshape(-1, size)
        self.counts["swapped"] += plan.swapped_in.size
        assert sum(map(len, self._host.values())) <= self.config.num_swap_blocks * size

    def _copy(self, plan: StepPlan) -> None:
        sources, targets = plan.copies.T
        assert len(set(targets.tolist())) == targets.size
        together = self._slots.copy()
        together[targets] = self._slots[sources]
        for source, target in plan.copies.tolist():
            self._slots[target] = self._slots[source]
        assert (together == self._slots).all(), "the order of copies matters"

    def _execute(self, plan: StepPlan) -> StepOutcome:
        """Run the plan on the shadow cache."""
        counts = np.zeros((3, plan.rows.size), np.int32)
        finished = np.zeros(plan.rows.size, np.bool_)
        written: set[int] = set()
        hashed_rows: list[int] = []
        hashes: list[int] = []
        for index, row in enumerate(plan.rows.tolist()):
            job = self.jobs[int(plan.request_ids[index])]
            known = len(job.tokens)
            num_drafts, emits = int(plan.num_drafts[index]), bool(plan.emits[index])
            drafted, accepted, emitted, is_last = self._draw(job, num_drafts, emits)
            counts[:, index], finished[index] = (drafted, accepted, len(emitted)), is_last
            job.names += self._names(emitted, job.names[-1])
            job.tokens += emitted
            start = int(plan.context[index])
            names = job.names[start : start + int(plan.num_new[index])]
            kept = min(accepted, len(emitted))
            names += job.names[known : known + kept] + [JUNK] * (drafted - kept)
            self._write(row, job.names[:start], names, written)
            new = self._new_hashes(job)
            hashed_rows += [row] * len(new)
            hashes += new
        return StepOutcome(
            num_drafted=counts[0],
            num_accepted=counts[1],
            num_emitted=counts[2],
            finished=finished,
            hashed_rows=np.array(hashed_rows, np.int64),
            block_hashes=np.array(hashes, np.uint64),
        )

    def _draw(self, job: Job, num_drafts: int, emits: bool) -> tuple[int, int, list[int], bool]:
        """Drafts proposed, drafts accepted, tokens emitted, and whether the request ends."""
        if not emits:
            return 0, 0, [], False
        drafted, accepted = num_drafts, 0
        if self.rng.random() < self.traffic.short_drafts:
            drafted = int(self.rng.integers(num_drafts + 1))
        while accepted < drafted and self.rng.random() < self.traffic.acceptance:
            accepted += 1
        emitted: list[int] = []
        tokens = job.tokens.copy()
        ended = False
        while len(emitted) <= accepted and not ended:
            # Greedy decoding of a fixed model: equal prefixes go on alike, and generated blocks are shared.
            next_token = (tokens[-1] + 3 * tokens[len(tokens) // 2] + len(tokens)) % self.traffic.vocab_size
            emitted.append(next_token)
            tokens.append(emitted[-1])
            ended = self.rng.random() < self.traffic.eos
        if ended:
            self._promised = 0
        is_last = ended or len(tokens) - job.request.prompt_len == job.request.max_tokens
        return drafted, accepted, emitted, is_last

    def _write(self, row: int, before: list[int], names: list[int], written: set[int]) -> None:
        """Read the prefix ``before`` and write ``names`` behind it, through the row's blocks."""
        size, pool = self.config.block_size, self.loop.pool
        blocks = self.loop.table.blocks(row)
        read = self._slots[blocks].reshape(-1)[: len(before)]
        assert read.tolist() == before, "a row reads KV that is not its own prefix"
        for position, name in enumerate(names, start=len(before)):
            block = int(blocks[position // size])
            assert pool.ref_counts[block] == 1, "a shared block is written"
            assert block not in pool._hash_of_block, "a block of the prefix cache is written"
            slot = block * size + position % size
            assert slot not in written, "two rows write one slot"
            written.add(slot)
            self._slots[block, position % size] = name


def assert_equal_records(left: StepPlan | StepOutcome, right: StepPlan | StepOutcome) -> None:
    """Equal field by field, dtypes included."""
    for name in left._fields:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, np.ndarray):
            array: NDArray[np.generic] = a
            assert array.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert a == b, f"{name}: {a} != {b}"
