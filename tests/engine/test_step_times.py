"""Step times for the goodput controller: what is measured, that it is measured once, and what it then decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specdec import LLM, SamplingParams, step_times
from specdec.rows import StepInput
from specdec.scheduler import SchedulerConfig
from specdec.scheduler.speculation import Goodput
from specdec.step_times import measure_draft_times, measure_host_times, measure_step_times, needs_times
from specdec.trace import TraceWriter, read_steps
from tests.engine.test_lossless import MERGED, tiny_prompts

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
# A token costs a tenth of a plain step.
LINEAR = {"step_tokens": (1, 64), "step_s": (1.0, 7.3)}
LIMITS = SchedulerConfig(max_num_seqs=12, num_blocks=256, block_size=4, max_model_len=256)


class ClockedRunner:
    """Takes (1, 0.5, 0.001) virtual seconds a pass, a token and a cached token; every third pass a tenth longer."""

    def __init__(self, scale: float = 1.0) -> None:
        self.now_s, self.num_passes, self.scale = 0.0, 0, scale
        self.seen: list[tuple[int, int, int]] = []

    def perf_counter(self) -> float:
        return self.now_s

    def forward(self, batch: StepInput) -> torch.Tensor:
        assert np.unique(batch.slot_mapping).size == batch.token_ids.size, "rows share KV slots"
        assert batch.logit_rows.size == batch.token_ids.size, "every token is verified"
        tokens, context = batch.token_ids.size, int(batch.context_lens.sum())
        self.seen.append((batch.context_lens.size, tokens, context))
        self.num_passes += 1
        drafts = int(((np.diff(batch.query_start) - 1) * batch.context_lens).sum())
        seconds = 1.0 + 0.5 * tokens + 0.001 * context + 0.0002 * drafts
        self.now_s += self.scale * seconds * (1.0 if self.num_passes % 3 else 1.1)
        return torch.zeros(tokens, 3)

    def copy_blocks(self, copies: np.ndarray) -> None:
        assert copies.max(initial=0) < LIMITS.num_blocks


def measured(monkeypatch, scale: float, budget_s: float, limits: SchedulerConfig = LIMITS, k: int = 3):
    runner = ClockedRunner(scale)
    monkeypatch.setattr(step_times, "time", runner)
    return measure_step_times(runner, limits, k, budget_s), runner  # pyright: ignore[reportArgumentType]


def test_medians_find_the_times_of_the_device(monkeypatch):
    times, runner = measured(monkeypatch, 1e-3, 10.0)
    assert times.step_tokens == (1, 2, 3, 4, 6, 8, 12, 16, 17, 32, 33, 48) and times.max_tokens == 48
    assert times.step_s == pytest.approx([1e-3 * (1 + 0.5 * t) for t in times.step_tokens], rel=0.101)
    assert times.context_token_s == pytest.approx(1e-6, rel=0.6)
    assert times.verify_context_token_s == pytest.approx(0.2e-6, rel=0.6)
    assert times.num_rounds == step_times.MAX_ROUNDS
    assert times.measured_s == pytest.approx(runner.now_s)
    assert (12, 48, 0) in runner.seen, "as in verification: twelve rows of a token and three drafts"
    assert (8, 8, 0) in runner.seen and (8, 8, 8 * 124) in runner.seen, "the KV blocks hold 8 · 128 tokens"
    assert (8, 32, 0) in runner.seen and (8, 32, 8 * 124) in runner.seen


@pytest.mark.parametrize("budget_s", [60.0, 300.0])
def test_a_slow_device_is_measured_within_the_budget(monkeypatch, budget_s: float):
    times, _ = measured(monkeypatch, 1.0, budget_s)
    assert step_times.MIN_SIZES <= len(times.step_tokens) < 12
    assert times.measured_s < 1.2 * budget_s
    assert (np.diff(times.step_s) >= 0).all() and times.step_s[0] > 0


def test_kv_blocks_limit_the_sizes(monkeypatch):
    limits = SchedulerConfig(max_num_seqs=12, num_blocks=5, block_size=4, max_model_len=20)
    times, _ = measured(monkeypatch, 1e-3, 10.0, limits)
    assert times.step_tokens == (1, 2, 3, 4, 6, 8, 12, 16, 17)


def test_real_passes_are_positive_and_monotone(tiny_llama_dir: Path):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=6)
    times = measure_step_times(llm.runner, llm.engine.loop.config, 4, 0.5)
    assert times.step_tokens[-1] <= 30
    assert times.step_s[0] > 0 and (np.diff(times.step_s) >= 0).all()
    assert times.context_token_s >= 0
    Goodput(max_drafts=4, **times.options())


@pytest.fixture
def counted(monkeypatch):
    """Counts what is measured, and makes it quick."""
    counts = {"steps": 0, "drafts": 0}
    steps, drafts = step_times.measure_step_times, step_times.measure_draft_times

    def count_steps(*args):
        counts["steps"] += 1
        return steps(*args, budget_s=0.2)

    def count_drafts(*args, **options):
        counts["drafts"] += 1
        return drafts(*args, **options)

    monkeypatch.setattr(step_times, "measure_step_times", count_steps)
    monkeypatch.setattr(step_times, "measure_draft_times", count_drafts)
    return counts


def test_times_are_measured_once_and_reused(tiny_llama_dir: Path, counted: dict[str, int]):
    llm = LLM(str(tiny_llama_dir), "ngram", speculation="goodput", dtype="float32", max_model_len=128)
    first = llm.engine.loop.speculation
    assert isinstance(first, Goodput) and first.max_drafts == 4
    assert counted == {"steps": 1, "drafts": 1}
    llm.configure("ngram", speculation={"name": "goodput", "step_tokens": [], "step_s": []}, max_num_seqs=8)
    assert llm.engine.loop.speculation == first
    llm.configure("suffix", speculation="goodput", num_drafts=2)
    assert counted == {"steps": 1, "drafts": 2}
    llm.configure("ngram", speculation="goodput", num_drafts=8)
    assert counted["steps"] == 2, "larger steps were never measured"
    llm.configure(None, speculation="goodput")
    llm.configure("ngram", speculation="goodput", num_drafts=0)
    llm.configure("ngram", speculation={"name": "goodput", **LINEAR})
    given = llm.engine.loop.speculation
    assert isinstance(given, Goodput) and (given.context_token_s, given.draft_step_s) == (0.0, 0.0)
    llm.configure("layer_skip", speculation={"name": "goodput", "draft_step_s": 2.5})
    kept = llm.engine.loop.speculation
    assert isinstance(kept, Goodput) and kept.draft_step_s == 2.5
    assert counted == {"steps": 2, "drafts": 3}


def test_needs_times_is_for_goodput_without_any():
    assert needs_times({"name": "goodput"}) and needs_times(
        {"name": "goodput", "step_tokens": [], "step_s": []}
    )
    assert not needs_times({"name": "fixed"}) and not needs_times({"name": "goodput", "step_s": [1.0]})


def test_drafters_that_run_a_model_take_time_by_step_and_others_by_row(
    tiny_llama_dir: Path, tiny_draft_dir: Path
):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=4)
    model = {"name": "draft_model", "model": str(tiny_draft_dir)}

    def measure(drafter, **options) -> dict[str, float]:
        limits = llm.engine.loop.config
        return measure_draft_times(llm.runner, llm.tokenizer, drafter, limits, 3, **options)

    assert measure(None) == {"draft_step_s": 0.0, "draft_token_s": 0.0, "draft_row_s": 0.0}
    for free in ("ngram", "recycling", MERGED):
        times = measure(free)
        assert times["draft_step_s"] == 0.0 < times["draft_row_s"] < 1.0
    for drafter in ("layer_skip", model, {"name": "merged", "drafters": ["ngram", model]}):
        times = measure(drafter)
        assert times["draft_row_s"] == 0.0 < times["draft_step_s"] + times["draft_token_s"] < 1.0
        assert min(times.values()) >= 0.0


def test_a_trees_time_is_shared_among_its_levels_if_the_controller_counts_them(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=4)
    tree = {"name": "k_ary", "branching": [3, 1]}
    drafter = {"name": "layer_skip", "tree": tree}
    depths: list[int] = []
    original = step_times._short_run

    def known_seconds(*args):
        outcomes = [outcome._replace(draft_s=1.0) for outcome in original(*args)]
        depths.extend(int(outcome.draft_depths.max()) for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(step_times, "_short_run", known_seconds)
    limits = llm.engine.loop.config
    by_level = measure_draft_times(llm.runner, llm.tokenizer, drafter, limits, 6, by_level=True)
    by_token = measure_draft_times(llm.runner, llm.tokenizer, drafter, limits, 6)
    assert set(depths) == {2}
    assert by_level["draft_step_s"] == 1 / 2 and by_token["draft_step_s"] == 1 / 6


def test_host_times_are_of_one_row_and_of_each_further_one(tiny_llama_dir: Path):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=4)
    times = measure_host_times(llm.runner, llm.tokenizer, llm.engine.loop.config)
    assert times.max_rows == 4
    assert 0.0 < times.overhead_s + times.overhead_row_s < 1.0 and times.overhead_row_s >= 0.0


def test_wrong_options_are_refused_before_anything_is_overwritten(
    tiny_llama_dir: Path, counted: dict[str, int]
):
    llm = LLM(str(tiny_llama_dir), "ngram", dtype="float32", max_model_len=128)
    expected = [out.token_ids for out in llm.generate(tiny_prompts(3), GREEDY)]
    for options, message in (
        ({"rule": "tokn"}, "unknown verification rule"),
        ({"speculation": {"name": "goodput", "prior_rejected": 0.0}}, "prior_rejected=0.0"),
        ({"speculation": {"name": "goodput", "step_s": (1.0, 2.0)}}, "step_tokens has 0 entries"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.configure("ngram", **{"speculation": "goodput", **options})
    assert counted == {"steps": 0, "drafts": 0}
    again = llm.generate(tiny_prompts(3), GREEDY)
    assert [out.token_ids for out in again] == expected and again[0].num_cached > 0


@pytest.mark.parametrize("drafter", ["ngram", "layer_skip", MERGED], ids=["ngram", "layer_skip", "merged"])
def test_goodput_with_measured_times_keeps_the_output(drafter, tiny_llama_dir: Path, counted: dict[str, int]):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=3)
    plain = [out.token_ids for out in llm.generate(tiny_prompts(5), GREEDY)]
    llm.configure(drafter, speculation="goodput", num_drafts=5, max_num_seqs=3)
    assert [out.token_ids for out in llm.generate(tiny_prompts(5), GREEDY)] == plain
    assert counted["steps"] == 1


def test_nothing_is_drafted_where_nothing_is_accepted_and_all_where_all_is(
    tiny_llama_dir: Path, tmp_path: Path
):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=3)
    prompts = tiny_prompts(3)
    plain = [out.token_ids for out in llm.generate(prompts, GREEDY)]
    drafts = {}
    for alpha in (0.0, 1.0):
        drafter = {"name": "synthetic", "alpha": alpha}
        llm.configure(drafter, speculation={"name": "goodput", **LINEAR}, num_drafts=6, max_num_seqs=3)
        with TraceWriter(tmp_path, f"alpha{alpha:g}") as trace:
            outputs = llm.generate(prompts, GREEDY, trace=trace)
        assert [out.token_ids for out in outputs] == plain
        steps = read_steps(tmp_path, f"alpha{alpha:g}")
        drafts[alpha] = steps.filter(steps["num_prefill_rows"] == 0)["num_drafts"].to_list()
    # Each rejection lowers a row's estimate, 2 / (3 + n); below a quarter a draft is worth less than it costs.
    assert max(drafts[0.0][0]) > 0
    later = drafts[0.0][6:]
    assert max(max(row) for row in later) <= 1, "more than a probe"
    assert sum(map(sum, later)) <= len(later) * 3 / 16
    # Each acceptance raises it, until all six pay; the last token comes from the target.
    assert len(drafts[1.0][3:-1]) >= 2 and all(row == [6, 6, 6] for row in drafts[1.0][3:-1])
