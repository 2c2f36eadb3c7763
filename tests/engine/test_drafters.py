"""Drafters alone: what they propose, and that draft distributions are those sampled from."""

from __future__ import annotations

import numpy as np
import pytest

from specdec import LLM, SamplingParams
from specdec.drafter.merged import MergedDrafter
from specdec.drafter.ngram import latest_match


def one_match(tokens: list[int], min_ngram: int = 1, max_ngram: int = 3) -> int:
    history = np.array([[*tokens, 0, 0]], np.int32)
    return int(latest_match(history, np.array([len(tokens)], np.int32), min_ngram, max_ngram)[0])


def brute_force(tokens: list[int], min_ngram: int, max_ngram: int) -> int:
    for n in range(max_ngram, min_ngram - 1, -1):
        if len(tokens) <= n:
            continue
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end - n + 1 : end + 1] == tokens[-n:]:
                return end
    return -1


def test_lookup_takes_the_longest_then_the_latest_match():
    assert one_match([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]) == 2
    assert one_match([1, 2, 3, 9, 2, 3, 8, 5, 2, 3]) == 5
    assert one_match([1, 2, 3]) == -1
    assert one_match([7]) == -1
    assert one_match([1, 2, 1], min_ngram=2) == -1


def test_lookup_agrees_with_a_brute_force_search():
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(0, 3, rng.integers(1, 20)).tolist()
        low = int(rng.integers(1, 4))
        high = int(rng.integers(low, 5))
        assert one_match(tokens, low, high) == brute_force(tokens, low, high), (tokens, low, high)


def test_lookup_of_ragged_rows_is_that_of_each_row_alone():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 40, 50)
    history = rng.integers(0, 4, (50, 40)).astype(np.int32)
    together = latest_match(history, lengths.astype(np.int32), 1, 3)
    alone = [brute_force(history[row, :length].tolist(), 1, 3) for row, length in enumerate(lengths)]
    assert together.tolist() == alone


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_synthetic_drafts_are_accepted_at_the_set_rate(alpha, tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "synthetic", "alpha": alpha},
        num_drafts=3,
        dtype="float32",
        max_model_len=256,
    )
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, 200, 8).tolist() for _ in range(24)]
    outs = llm.generate(prompts, SamplingParams(max_tokens=120, ignore_eos=True))
    accepted = sum(out.num_accepted for out in outs)
    table_rejected = sum(out.num_steps for out in outs)
    if alpha in (0.0, 1.0):
        assert accepted == alpha * sum(out.num_drafted for out in outs)
        return
    # τ − 1 accepted per step: α + α² + α³ for a constant rate.
    expected = alpha + alpha**2 + alpha**3
    assert accepted / table_rejected == pytest.approx(expected, rel=0.06)


def test_synthetic_rates_by_position_are_met(tiny_llama_dir):
    rates = [0.9, 0.5, 0.1]
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "synthetic", "rates": rates},
        num_drafts=3,
        dtype="float32",
        max_model_len=256,
    )
    rng = np.random.default_rng(3)
    prompts = [rng.integers(5, 200, 8).tolist() for _ in range(24)]
    drafted, accepted = np.zeros(3), np.zeros(3)
    leave = llm.engine._leave

    def count(job):
        leave(job)
        if job.position_drafted.any():
            np.add(drafted, job.position_drafted, out=drafted)
            np.add(accepted, job.position_accepted, out=accepted)

    llm.engine._leave = count
    llm.generate(prompts, SamplingParams(max_tokens=120, ignore_eos=True))
    conditional = accepted / np.array([drafted[0], accepted[0], accepted[1]])
    assert conditional == pytest.approx(rates, abs=0.08)


def test_synthetic_needs_greedy_decoding(tiny_llama_dir):
    llm = LLM(str(tiny_llama_dir), {"name": "synthetic", "alpha": 0.5}, dtype="float32", max_model_len=64)
    with pytest.raises(ValueError, match="set temperature=0"):
        llm.generate([[5, 6]], SamplingParams(temperature=1.0))


def test_a_draft_model_identical_to_the_target_is_always_accepted(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "draft_model", "model": str(tiny_llama_dir)},
        num_drafts=4,
        dtype="float32",
        max_model_len=128,
    )
    prompts = [[10, 11, 12], [20] * 20, [30, 31] * 9]
    for params in (
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=30, seed=1),
    ):
        outs = llm.generate(prompts, params)
        drafted, accepted = sum(o.num_drafted for o in outs), sum(o.num_accepted for o in outs)
        assert accepted >= 0.99 * drafted > 0, "the draft cache lags or holds wrong keys"


def test_a_draft_model_keeps_up_after_preemption_and_prefix_hits(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "draft_model", "model": str(tiny_llama_dir)},
        num_drafts=4,
        dtype="float32",
        max_model_len=128,
        num_blocks=12,
        watermark=0.0,
        max_num_batched_tokens=64,
    )
    prompts = [[10, 11, 12] * 7 + [index] for index in range(20, 28)]
    for _ in range(2):
        outs = llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
        assert sum(o.num_preemptions for o in outs) > 0
        assert sum(o.num_accepted for o in outs) >= 0.99 * sum(o.num_drafted for o in outs) > 0


def test_a_draft_model_keeps_up_when_other_drafts_are_verified_too(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {
            "name": "merged",
            "drafters": [{"name": "draft_model", "model": str(tiny_llama_dir)}, "recycling", "ngram"],
        },
        num_drafts=4,
        dtype="float32",
        max_model_len=128,
    )
    drafter, state = llm.engine.drafter, llm.engine.state
    assert isinstance(drafter, MergedDrafter)
    draft_model, drafted = drafter.sources[0], []
    propose = draft_model.propose

    def recording(plan):
        draft = propose(plan)
        for index, row in enumerate(plan.rows):
            tokens = draft.tokens[index, : draft.num_drafted[index]].tolist()
            drafted.append((int(plan.request_ids[index]), int(state.num_known[row]), tokens))
        return draft

    draft_model.propose = recording
    prompts = [[10, 11, 12], [20] * 20, [30, 31] * 9]
    outs = llm.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    texts = {out.request_id: out.prompt_token_ids + out.token_ids for out in outs}
    right = [tokens == texts[number][known : known + len(tokens)] for number, known, tokens in drafted]
    assert sum(right) >= 0.95 * len(right), "the draft cache lags or holds wrong keys"
    assert any(out.num_accepted < out.num_drafted for out in outs), "others' drafts were verified"


def test_samples_of_requests_kept_apart_are_the_same_alone_and_in_a_batch(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "suffix", "max_corpus_tokens": 0},
        num_drafts=6,
        dtype="float32",
        max_model_len=128,
        num_blocks=16,
        watermark=0.0,
    )
    prompts = [[10, 11, 12, 10, 11], [20] * 9, [30, 31] * 5]
    params = [
        SamplingParams(temperature=0.7, top_k=4, max_tokens=40, seed=seed, ignore_eos=True)
        for seed in (1, 2, 3)
    ]
    alone = [llm.generate([prompt], one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]
    outs = llm.generate(prompts, params)
    assert [out.token_ids for out in outs] == alone
    assert sum(out.num_accepted for out in outs) > 0
