"""With ``overlap`` the next step is planned while the device computes, and plans, tokens and traces stay the same.

Time is the number of the step here, so that requests arrive at the same place whatever the clock says.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import LLM, SamplingParams
from specdec.metrics import plans_ahead
from specdec.rows import StepLayout
from specdec.trace import TraceWriter, read_steps
from tests.engine.test_lossless import MERGED, tiny_prompts
from tests.scheduler.traffic import assert_equal_records

TIMES = ("draft_s", "verify_s", "sample_s", "overhead_s")
MAX_LEN = 128


@dataclass(frozen=True)
class Arrival:
    prompt: list[int]
    params: SamplingParams
    step: int = 0


@dataclass
class Served:
    """What came of a run: tokens, text and reason by request, plans, outcomes, and how plans made ahead fared."""

    answers: dict[int, tuple[list[int], str | None, str]]
    plans: list
    outcomes: list
    kept: Counter[bool | None]


@pytest.fixture(scope="module")
def roomy(tiny_llama_dir: Path) -> LLM:
    return LLM(str(tiny_llama_dir), dtype="float32", max_model_len=MAX_LEN, num_blocks=96, block_size=8)


@pytest.fixture(scope="module")
def tight(tiny_llama_dir: Path) -> LLM:
    return LLM(str(tiny_llama_dir), dtype="float32", max_model_len=MAX_LEN, num_blocks=26, block_size=8)


def serve(llm: LLM, arrivals: list[Arrival], *, eos: tuple[int, ...] = (), **options: Any) -> Served:
    """Run all ``arrivals``, each submitted before the step of its number."""
    llm.configure(**options)
    engine, loop = llm.engine, llm.engine.loop
    engine._eos = np.array(sorted(eos), np.int64)
    for one in arrivals:
        engine.add_request(np.array(one.prompt, np.int32), one.params, arrival_s=float(one.step))
    served, commit = Served({}, [], [], Counter()), loop.commit

    def noted(plan, outcome, now_s):
        served.plans.append(plan)
        served.outcomes.append(outcome._replace(**dict.fromkeys(TIMES, 0.0)))
        served.kept[loop.kept_ahead] += 1
        commit(plan, outcome, now_s)

    loop.commit = noted
    step = 0
    while engine._arrivals or loop.has_work:
        for job in engine.step(float(step))[1]:
            text = job.stream.text if job.stream else None
            answer = job.tokens[job.prompt.size :].tolist()
            served.answers[job.request.request_id] = answer, text, job.finish_reason
        step += 1
        assert step < 2000, "requests do not end"
    engine._catch_up()
    assert loop.pool.num_free == llm.num_blocks
    return served


def both(llm: LLM, arrivals: list[Arrival], **options: Any) -> Served:
    """The same run with ``overlap`` off and on, which must agree in everything; the latter."""
    plain, ahead = (serve(llm, arrivals, overlap=overlap, **options) for overlap in (False, True))
    assert plain.answers == ahead.answers and len(plain.answers) == len(arrivals)
    for pairs in ((plain.plans, ahead.plans), (plain.outcomes, ahead.outcomes)):
        for one, other in zip(*pairs, strict=True):
            assert_equal_records(one, other)
    assert set(plain.kept) == {None}
    return ahead


def greedy(max_tokens: int, ignore_eos: bool = True, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **options)


def apart(count: int, gap: int = 2, **options: Any) -> list[Arrival]:
    """Requests of different lengths that arrive every ``gap`` steps and share a prefix."""
    prompts = tiny_prompts(count)
    return [Arrival(prompt, greedy(7 + 3 * i, **options), gap * i) for i, prompt in enumerate(prompts)]


def test_plain_decoding_keeps_every_plan(roomy):
    ahead = both(roomy, apart(5), max_num_seqs=3)
    assert ahead.kept[True] > 20 and ahead.kept[False] == 0


@pytest.mark.parametrize("drafter", [{"name": "ngram"}, MERGED], ids=["ngram", "merged"])
def test_fixed_drafts(roomy, drafter):
    ahead = both(roomy, apart(5), drafter=drafter, num_drafts=3, max_num_seqs=3)
    assert ahead.kept[True] > 10
    assert any(out.num_accepted.any() for out in ahead.outcomes), "contexts were filled in late"


@pytest.mark.parametrize("drafter", [None, {"name": "ngram"}], ids=["plain", "ngram"])
def test_prompts_in_chunks(roomy, drafter):
    ahead = both(roomy, apart(5), drafter=drafter, max_num_seqs=4, max_num_batched_tokens=10, num_drafts=2)
    assert any((~plan.emits).any() for plan in ahead.plans) and ahead.kept[True] > 10


@pytest.mark.parametrize("policy", ["static", "continuous", {"name": "continuous", "decode_first": True}])
def test_other_policies(roomy, policy):
    assert both(roomy, apart(4), policy=policy, max_num_seqs=3).kept[True] > 10


@pytest.mark.parametrize("drafter", [None, {"name": "ngram"}], ids=["plain", "ngram"])
def test_ends_that_nobody_foresees_discard_the_plan(roomy, drafter):
    whole = serve(roomy, apart(3, stop=("never",)), max_num_seqs=4).answers
    eos, text = whole[1][0][4], whole[2][1]
    assert text is not None
    arrivals = [*apart(3), *apart(3, ignore_eos=False), *apart(3, stop=(text[5],))]
    ahead = both(roomy, arrivals, eos=(eos,), drafter=drafter, max_num_seqs=4)
    reasons = [ahead.answers[request_id][2] for request_id in range(9)]
    assert reasons[:3] == ["length"] * 3 and reasons[4] == "stop" and reasons[8] == "stop"
    assert ahead.kept[False] > 0 and ahead.kept[True] > 0


@pytest.mark.parametrize("swap", [0, 20])
@pytest.mark.parametrize("drafter", [None, {"name": "ngram"}], ids=["plain", "ngram"])
def test_preemption_pressure(tight, drafter, swap):
    arrivals = [Arrival(prompt, greedy(20)) for prompt in tiny_prompts(6)]
    options = {"max_num_seqs": 6, "watermark": 0.0, "prefix_caching": False, "num_swap_blocks": swap}
    ahead = both(tight, arrivals, drafter=drafter, **options)
    assert any(plan.preempted.size for plan in ahead.plans)
    assert swap == 0 or any(plan.swapped_in.size for plan in ahead.plans)
    assert ahead.kept[False] > 0 and ahead.kept[True] > 0


def test_the_prefix_cache_is_hit_by_the_same_tokens(tight):
    whole_blocks = tiny_prompts(1)[0][:32]
    prompts = [whole_blocks, *tiny_prompts(3), whole_blocks]
    arrivals = [Arrival(prompt, greedy(12), 9 * index) for index, prompt in enumerate(prompts)]
    ahead = both(tight, arrivals, max_num_seqs=2)
    assert any(plan.num_cached.any() for plan in ahead.plans) and any(len(p.copies) for p in ahead.plans)


def test_who_arrives_in_between_joins_the_very_next_step(roomy):
    arrivals = [Arrival(tiny_prompts(1)[0], greedy(20)), Arrival(tiny_prompts(2)[1], greedy(5), 6)]
    ahead = both(roomy, arrivals, max_num_seqs=4)
    joined = [plan.now_s for plan in ahead.plans if plan.admitted.size]
    assert joined == [0.0, 6.0] and ahead.kept[False] == 0


WORKLOADS = st.lists(
    st.tuples(
        st.integers(0, 5),  # prompt
        st.integers(0, 12),  # step of arrival
        st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 14),
            temperature=st.sampled_from((0.0, 1.0)),
            seed=st.integers(0, 9),
            ignore_eos=st.booleans(),
            stop=st.sampled_from(((), ("e",), ("a", "q"))),
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(
    workload=WORKLOADS,
    drafter=st.sampled_from((None, None, "ngram", MERGED)),
    policy=st.sampled_from(("chunked", "chunked", "continuous", "static")),
    max_num_seqs=st.integers(1, 4),
    budget=st.sampled_from((8, 24, None)),
    prefix_caching=st.booleans(),
)
def test_any_workload(tight, workload, drafter, policy, max_num_seqs, budget, prefix_caching):
    prompts = tiny_prompts(6)
    both(
        tight,
        [Arrival(prompts[index], params, step) for index, step, params in workload],
        eos=tuple(range(30, 60)),
        drafter=drafter,
        num_drafts=3,
        policy=policy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if policy == "chunked" else None,
        prefix_caching=prefix_caching,
        watermark=0.0,
    )


class Device:
    """Computes ``runner``'s passes on a thread that holds each back until the step after it has been planned."""

    def __init__(self, llm: LLM) -> None:
        self.events: list[str] = []
        self._forward, self._loop, self._acceptor = llm.runner.forward, llm.engine.loop, llm.engine.acceptor
        self._look_ahead, self._select = self._loop.look_ahead, self._acceptor.select
        self._planned, self._thread = threading.Event(), ThreadPoolExecutor(1)
        self._loop.look_ahead, self._acceptor.select = self.look_ahead, self.select

    def forward(self, *args: Any, **options: Any) -> Future:
        self.events.append("launch")
        return self._thread.submit(self._compute, *args, **options)

    def _compute(self, *args: Any, **options: Any) -> Any:
        assert self._planned.wait(30.0), "nothing was planned while the device computed"
        self._planned.clear()
        return self._forward(*args, **options)

    def look_ahead(self, plan) -> Any:
        self.events.append("plan")
        following = self._look_ahead(plan)
        self._planned.set()
        return following

    def select(self, plan, draft, logits: Future) -> Any:
        self.events.append("read")
        return self._select(plan, draft, logits.result(60.0))


def test_the_next_step_is_planned_before_the_outcome_is_read(roomy, monkeypatch):
    params, prompts = greedy(6), tiny_prompts(2)
    expected = [out.token_ids for out in roomy.configure(overlap=False).generate(prompts, params)]
    roomy.configure(overlap=True)
    device = Device(roomy)
    monkeypatch.setattr(roomy.runner, "forward", device.forward, raising=False)
    assert [out.token_ids for out in roomy.generate(prompts, params)] == expected
    assert device.events == ["launch", "plan", "read"] * 6


def test_nothing_is_planned_ahead_without_overlap(roomy, monkeypatch):
    roomy.configure(overlap=False)
    monkeypatch.setattr(roomy.engine.loop, "look_ahead", None)
    assert len(roomy.generate(tiny_prompts(1), greedy(3))[0].token_ids) == 3


def test_the_pass_is_laid_out_ahead_where_nothing_is_drafted(roomy, monkeypatch):
    made: list[int] = []

    class Counted(StepLayout):
        def __init__(self, *args: Any) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(
        "specdec.rows.StepLayout", Counted
    )  # made when a step begins; ahead, the engine's own is
    both(roomy, apart(1), max_num_seqs=1)
    assert sum(made) == 7 + 1, "each of 7 steps without overlap, and the first with it"


def test_the_trace_counts_plans_made_ahead(roomy, tmp_path: Path):
    for overlap, expected in ((False, {"kept": 0, "discarded": 0}), (True, {"kept": 5, "discarded": 0})):
        roomy.configure(overlap=overlap)
        name = f"overlap{overlap:d}"
        with TraceWriter(tmp_path, name) as trace:
            roomy.generate(tiny_prompts(2), greedy(6), trace=trace)
        steps = read_steps(tmp_path, name)
        assert plans_ahead(steps) == expected and steps.height == 6
