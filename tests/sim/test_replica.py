"""The simulated engine: fast-forward changes nothing, its traces replay, and its tokens follow the closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.acceptance import make_acceptance
from sim.closed_form import expected_tokens, speedup
from sim.replay import replay
from sim.replica import Replica, SimRequest
from sim.step_features import StepCost, StepFeatures
from specdec.metrics import acceptance_rate, decode_rows, tokens_per_step
from specdec.scheduler import Request, SchedulerConfig, StepLoop, make_controller, make_policy
from specdec.trace import TraceWriter, read_requests, read_steps

REPEATABLE = settings(derandomize=True, deadline=None, database=None)


class Times:
    """Step times whose every term matters, so that a wrong feature shows."""

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        f = features
        verify_s = 1e-3 + 1e-5 * f.num_tokens + 1e-7 * f.decode_context + 1e-8 * f.prefill_pairs
        return StepCost(1e-4 * f.draft_steps, verify_s, 1e-6 * f.num_logits, 2e-4, 0.0)


@dataclass(frozen=True)
class Workload:
    config: SchedulerConfig
    policy: str
    controller: str
    options: dict[str, Any]
    acceptance: dict[str, Any]
    seed: int
    num_requests: int
    mean_gap_s: float
    longest_prompt: int
    longest_output: int
    known_lengths: bool
    prefixes: str

    def requests(self) -> list[SimRequest]:
        rng = np.random.default_rng(self.seed)
        gaps_s = rng.exponential(self.mean_gap_s, self.num_requests) if self.mean_gap_s else [0.0]
        arrivals_s = np.cumsum(np.resize(gaps_s, self.num_requests))
        requests = []
        for index, arrival_s in enumerate(arrivals_s.tolist()):
            output_len = int(rng.integers(1, self.longest_output + 1))
            prompt_len = int(rng.integers(1, self.longest_prompt + 1))
            group, size = int(rng.integers(3)), self.config.block_size
            covered = {"none": 0, "prompt": prompt_len, "output": prompt_len + output_len}[self.prefixes]
            # Requests of a group share a prefix of up to four blocks.
            hashes = [1 + 1000 * (group if b < 4 else 10 + index) + b for b in range(covered // size)]
            request = SimRequest(
                request_id=index,
                prompt_len=prompt_len,
                max_tokens=output_len if self.known_lengths else self.longest_output,
                output_len=output_len,
                arrival_s=arrival_s,
                priority=int(rng.integers(3)),
                deadline_s=arrival_s + float(rng.random()),
                block_hashes=hashes,
                task=("easy", "hard")[index % 2],
            )
            requests.append(request)
        return requests

    def loop(self) -> StepLoop:
        return StepLoop(
            self.config, make_policy(self.policy), make_controller(self.controller, **self.options)
        )


def simulate(
    workload: Workload, *, fast_forward: bool, directory: Path | None = None
) -> tuple[list[SimRequest], Replica]:
    """Serve a workload; the finished requests in order of their ends."""
    env, finished = simpy.Environment(), []
    trace = TraceWriter(directory) if directory else None
    replica = Replica(
        env,
        workload.loop(),
        Times(),
        make_acceptance(**workload.acceptance),
        seed=workload.seed,
        on_finish=finished.append,
        trace=trace,
        fast_forward=fast_forward,
        swap_block_s=1e-5,
    )

    def clients():
        for request in workload.requests():
            if request.arrival_s > env.now:
                yield env.timeout(request.arrival_s - env.now)
            replica.submit(request)
        replica.drain()

    env.process(clients())
    env.run()
    if trace:
        trace.close()
    replica.loop.pool.check([])
    assert len(finished) == workload.num_requests and not replica.loop.has_work
    return finished, replica


ACCEPTANCES = (
    {"name": "constant", "alpha": 0.7},
    {"name": "constant", "alpha": 1.0},
    {"name": "constant", "alpha": 0.0},
    {"name": "positional", "rates": [0.9, 0.5, 0.2]},
    {"name": "beta", "mean": 0.6, "concentration": 3.0},
    {"name": "markov", "alpha_good": 0.9, "alpha_bad": 0.2, "good_to_bad": 0.1, "bad_to_good": 0.2},
    {
        "name": "task",
        "models": {"easy": {"name": "constant", "alpha": 0.9}},
        "default": {"name": "constant", "alpha": 0.3},
    },
)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    policy = draw(st.sampled_from(("static", "dynamic", "continuous", "chunked")))
    longest_prompt, longest_output = draw(st.integers(1, 60)), draw(st.integers(1, 80))
    longest, block_size = longest_prompt + longest_output, draw(st.integers(1, 8))
    fewest, max_num_seqs = -(-longest // block_size), draw(st.integers(1, 8))
    swap_blocks = draw(st.sampled_from((0, 0, 20)))
    order = draw(st.sampled_from(("fcfs", "sjf", "priority", "edf")))
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=(max_num_seqs if policy == "chunked" else longest + 8)
        + draw(st.integers(0, 60)),
        num_blocks=fewest + draw(st.integers(0, 4 * fewest)),
        block_size=block_size,
        max_model_len=longest,
        prefix_caching=draw(st.booleans()),
        watermark=draw(st.sampled_from((0.0, 0.1))),
        order=order,
        preemption="swap" if swap_blocks else "recompute",
        num_swap_blocks=swap_blocks,
        num_scheduler_steps=draw(st.sampled_from((1, 1, 4))),
    )
    controller = draw(st.sampled_from(("off", "fixed", "fixed", "adaptive")))
    options = {} if controller == "off" else {"max_drafts": draw(st.integers(0, 5))}
    return Workload(
        config=config,
        policy=policy,
        controller=controller,
        options=options,
        acceptance=draw(st.sampled_from(ACCEPTANCES)),
        seed=draw(st.integers(0, 2**32)),
        num_requests=draw(st.integers(1, 14)),
        mean_gap_s=draw(st.sampled_from((0.0, 0.004, 0.05, 0.3))),
        longest_prompt=longest_prompt,
        longest_output=longest_output,
        known_lengths=draw(st.booleans()),
        prefixes=draw(st.sampled_from(("none", "prompt", "output"))) if config.prefix_caching else "none",
    )


def life(request: Request) -> tuple[Any, ...]:
    """All that a run decides about a request."""
    return (
        request.request_id,
        request.first_scheduled_s,
        request.first_token_s,
        request.finish_s,
        request.num_generated,
        request.num_steps,
        request.num_drafted,
        request.num_accepted,
        request.num_rejected,
        request.num_cached,
        request.num_preemptions,
    )


@settings(REPEATABLE, max_examples=400)
@given(workloads())
def test_fast_forward_changes_nothing(workload: Workload) -> None:
    """Bit for bit: every time, count and end of every request, on random workloads of every kind."""
    quick, slow = (simulate(workload, fast_forward=ahead) for ahead in (True, False))
    assert [life(request) for request in quick[0]] == [life(request) for request in slow[0]]
    assert quick[1].num_steps == slow[1].num_steps
    assert quick[1].now_s == slow[1].now_s


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_last_token_of_a_prompt_is_not_skipped(num_drafts: int) -> None:
    """A chunk may leave one token, which the scheduler plans as if it were decoded: its end is a first token."""
    budget = 8
    for first_prompt in range(1, 3 * budget):
        config = SchedulerConfig(
            max_num_seqs=2, max_num_batched_tokens=budget, num_blocks=64, block_size=4, max_model_len=100
        )
        lives = []
        for ahead in (True, False):
            env, done = simpy.Environment(), []
            controller = make_controller("fixed", max_drafts=num_drafts)
            loop = StepLoop(config, make_policy("chunked"), controller)
            acceptance = make_acceptance("constant", alpha=0.5)
            replica = Replica(env, loop, Times(), acceptance, on_finish=done.append, fast_forward=ahead)
            for index, prompt_len in enumerate((2, first_prompt, budget + 1)):
                replica.submit(
                    SimRequest(request_id=index, prompt_len=prompt_len, max_tokens=60, output_len=40 - index)
                )
            env.run()
            lives.append([life(request) for request in done])
            assert all(request.first_token_s <= request.finish_s for request in done)
        assert lives[0] == lives[1]


LONG = Workload(
    config=SchedulerConfig(num_blocks=400, block_size=16, max_model_len=600, max_num_seqs=8),
    policy="chunked",
    controller="fixed",
    options={"max_drafts": 4},
    acceptance={"name": "constant", "alpha": 0.7},
    seed=1,
    num_requests=40,
    mean_gap_s=0.05,
    longest_prompt=200,
    longest_output=400,
    known_lengths=False,
    prefixes="none",
)


@pytest.mark.parametrize("prefixes", ["none", "prompt"])
def test_fast_forward_writes_the_same_trace(prefixes: str, tmp_path: Path) -> None:
    workload = replace(LONG, prefixes=prefixes)
    quick, _ = simulate(workload, fast_forward=True, directory=tmp_path / "quick")
    simulate(workload, fast_forward=False, directory=tmp_path / "slow")
    tables = {name: read_steps(tmp_path / name) for name in ("quick", "slow")}
    assert tables["quick"].equals(tables["slow"])
    assert read_requests(tmp_path / "quick").equals(read_requests(tmp_path / "slow"))
    assert tables["quick"].height > 300 and len(quick) == 40


def test_fast_forward_takes_few_events() -> None:
    """Or else the equality above would hold for want of trying."""
    events = {}
    for ahead in (True, False):
        _, replica = simulate(replace(LONG, mean_gap_s=0.5), fast_forward=ahead)
        events[ahead] = replica.num_plans
    assert events[True] < events[False] / 5


def test_a_simulated_trace_replays(tmp_path: Path) -> None:
    workload = replace(LONG, config=replace(LONG.config, num_blocks=60, watermark=0.0))
    simulate(workload, fast_forward=True, directory=tmp_path)
    steps = read_steps(tmp_path)
    assert replay(steps, read_requests(tmp_path), workload.loop()) == steps.height
    assert steps["num_preempted"].sum() > 0


def one_long_answer(
    tmp_path: Path, alpha: float, num_drafts: int, seed: int = 0
) -> tuple[pl.DataFrame, float]:
    """The steps of one request of 20,000 tokens, and its seconds."""
    length = 20_000
    config = SchedulerConfig(num_blocks=length, block_size=16, max_model_len=length + 20)
    workload = replace(
        LONG,
        config=config,
        controller="fixed" if num_drafts else "off",
        options={"max_drafts": num_drafts} if num_drafts else {},
        acceptance={"name": "constant", "alpha": alpha},
        seed=seed,
        num_requests=1,
        longest_prompt=1,
        longest_output=length,
    )
    request = SimRequest(request_id=0, prompt_len=1, max_tokens=length, output_len=length)
    env = simpy.Environment()
    with TraceWriter(tmp_path / f"{alpha}-{num_drafts}") as trace:
        Replica(
            env, workload.loop(), _Flat(), make_acceptance(**workload.acceptance), seed=seed, trace=trace
        ).submit(request)
        env.run()
    return read_steps(tmp_path / f"{alpha}-{num_drafts}"), request.finish_s - request.first_token_s


class _Flat:
    """A step of the target takes 10 ms and 0.1 ms a token, a draft pass 1 ms."""

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        return StepCost(1e-3 * features.draft_steps, 0.01 + 1e-4 * features.num_tokens, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("alpha", "num_drafts"), [(0.0, 3), (0.5, 1), (0.8, 4), (0.95, 8), (1.0, 5)])
def test_tokens_per_step_and_speedup_are_the_closed_forms(
    alpha: float, num_drafts: int, tmp_path: Path
) -> None:
    steps, seconds = one_long_answer(tmp_path, alpha, num_drafts)
    rows = decode_rows(steps)
    tau = float(expected_tokens(alpha, num_drafts))
    survival = alpha ** np.arange(1, num_drafts + 1)
    variance = float((survival * (2 * np.arange(1, num_drafts + 1) - 1)).sum() - survival.sum() ** 2)
    # Five standard errors; the prompt and the last step are shorter than the others.
    error = 5.0 * math.sqrt(variance / rows.height) + 2 * (num_drafts + 1) / rows.height
    assert tokens_per_step(rows) == pytest.approx(tau, abs=error)
    judged = rows.height * (1.0 - alpha**num_drafts) / max(1.0 - alpha, 1e-9) if alpha < 1 else rows.height
    spread = 5.0 * math.sqrt(alpha * (1 - alpha) / judged)
    assert acceptance_rate(rows) == pytest.approx(alpha, abs=spread + 1e-12)
    _, plain_s = one_long_answer(tmp_path, alpha, 0)
    predicted = speedup(tau, 0.0101, 1e-3, 0.01 + 1e-4 * (num_drafts + 1), 0.0, num_drafts)
    assert plain_s / seconds == pytest.approx(float(predicted), rel=error / tau + 1e-3)


def test_a_wrong_rate_misses_the_closed_form(tmp_path: Path) -> None:
    """Negative control: a rate 0.02 off is outside the bounds above."""
    steps, _ = one_long_answer(tmp_path, 0.78, 4)
    rows = decode_rows(steps)
    assert abs(tokens_per_step(rows) - float(expected_tokens(0.8, 4))) > 5.0 * 1.6 / math.sqrt(rows.height)


def test_output_lengths_are_hidden_from_the_scheduler() -> None:
    """Drafts are planned up to ``max_tokens``, and an answer that ends early wastes some."""
    known, hidden = (simulate(replace(LONG, known_lengths=k), fast_forward=True)[0] for k in (True, False))
    assert sum(r.num_drafted for r in hidden) > sum(r.num_drafted for r in known)
    assert sum(r.num_generated for r in hidden) == sum(r.num_generated for r in known)


@pytest.mark.parametrize("output_len", [0, 9])
def test_an_output_beyond_its_limit_is_refused(output_len: int) -> None:
    with pytest.raises(ValueError, match=rf"output_len={output_len} must be in \[1, max_tokens=8\]"):
        SimRequest(request_id=3, prompt_len=1, max_tokens=8, output_len=output_len)
