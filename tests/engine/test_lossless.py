"""Greedy speculative output equals greedy plain output, token for token, whatever the drafter or the scheduler."""

from __future__ import annotations

import numpy as np
import pytest

from specdec import LLM, SamplingParams
from specdec.scheduler import POLICIES

BATCHES = (1, 3, 8)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def tiny_prompts(count: int) -> list[list[int]]:
    """Prompts over a small alphabet with a shared prefix of 32 tokens, so that lookups and prefixes hit."""
    rng = np.random.default_rng(7)
    shared = rng.integers(5, 25, 32).tolist()
    return [shared + rng.integers(5, 25, 3 + 5 * index).tolist() for index in range(count)]


def tiny_drafters(draft_dir) -> dict[str, dict]:
    return {
        "ngram": {"name": "ngram"},
        "layer_skip": {"name": "layer_skip", "num_skip": 1},
        "draft_model": {"name": "draft_model", "model": str(draft_dir)},
        "synthetic": {"name": "synthetic", "alpha": 0.7},
        "synthetic_tree": {"name": "synthetic", "alpha": 0.8, "width": 2},
        "suffix": {"name": "suffix"},
        "recycling": {"name": "recycling"},
        "merged": MERGED,
    }


MERGED = {"name": "merged", "drafters": ["suffix", "recycling", {"name": "ngram", "max_ngram": 2}]}
TINY_DRAFTERS = list(tiny_drafters(None))


ROOMY = {"num_blocks": 128, "max_num_batched_tokens": 256}
TIGHT = {"num_blocks": 14, "max_num_batched_tokens": 128}
CHUNKED = {"num_blocks": 128, "max_num_batched_tokens": 24}


@pytest.fixture(scope="module")
def roomy(tiny_llama_dir):
    return LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, num_blocks=ROOMY["num_blocks"])


def outputs(llm: LLM, prompts, params=GREEDY):
    return llm.generate(prompts, params)


@pytest.fixture(scope="module")
def tiny_plain(tiny_llama_dir):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, prefix_caching=False)
    return [out.token_ids for out in outputs(llm, tiny_prompts(8))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("drafter", TINY_DRAFTERS)
def test_every_drafter_under_every_policy_and_batch(
    drafter, policy, batch, tiny_plain, roomy, tiny_draft_dir
):
    roomy.configure(
        tiny_drafters(tiny_draft_dir)[drafter],
        policy=policy,
        max_num_seqs=batch,
        max_num_batched_tokens=ROOMY["max_num_batched_tokens"],
    )
    got = outputs(roomy, tiny_prompts(8))
    assert [out.token_ids for out in got] == tiny_plain
    assert sum(out.num_drafted for out in got) > 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("drafter", TINY_DRAFTERS)
def test_forced_preemption_keeps_the_output(drafter, policy, tiny_plain, tiny_llama_dir, tiny_draft_dir):
    llm = LLM(
        str(tiny_llama_dir),
        tiny_drafters(tiny_draft_dir)[drafter],
        dtype="float32",
        policy=policy,
        max_model_len=128,
        max_num_seqs=8,
        watermark=0.0,
        **TIGHT,
    )
    got = outputs(llm, tiny_prompts(8))
    assert [out.token_ids for out in got] == tiny_plain
    assert sum(out.num_preemptions for out in got) > 0


@pytest.mark.parametrize("drafter", TINY_DRAFTERS)
def test_swapped_out_requests_keep_their_output(drafter, tiny_plain, tiny_llama_dir, tiny_draft_dir):
    llm = LLM(
        str(tiny_llama_dir),
        tiny_drafters(tiny_draft_dir)[drafter],
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        watermark=0.0,
        num_swap_blocks=40,
        prefix_caching=False,
        **TIGHT,
    )
    computed, forward = [0], llm.runner.forward

    def counting(batch, layers=None, captured=None):
        computed[0] += batch.token_ids.size if layers is None else 0
        return forward(batch, layers, captured)

    llm.runner.forward = counting
    got = outputs(llm, tiny_prompts(8))
    assert [out.token_ids for out in got] == tiny_plain
    assert sum(out.num_preemptions for out in got) > 0
    if drafter == "ngram":  # whose target computes prompts, and 1 + drafts tokens a step, and nothing twice
        drafted, steps = (sum(getattr(out, name) for out in got) for name in ("num_drafted", "num_steps"))
        prompts = sum(len(prompt) for prompt in tiny_prompts(8))
        assert computed[0] == prompts + drafted + steps - len(got)


@pytest.mark.parametrize("drafter", TINY_DRAFTERS)
def test_chunked_prefill_and_prefix_hits_keep_the_output(drafter, tiny_plain, tiny_llama_dir, tiny_draft_dir):
    llm = LLM(
        str(tiny_llama_dir),
        tiny_drafters(tiny_draft_dir)[drafter],
        dtype="float32",
        policy="chunked",
        max_model_len=128,
        max_num_seqs=4,
        **CHUNKED,
    )
    first = outputs(llm, tiny_prompts(8))
    second = outputs(llm, tiny_prompts(8))
    assert [out.token_ids for out in first] == tiny_plain
    assert [out.token_ids for out in second] == tiny_plain
    assert all(out.num_cached > 0 for out in second), "the second run finds its prompts in the prefix cache"


def test_a_fully_cached_prompt_is_copied_on_write(tiny_llama_dir):
    """A prompt of whole blocks that is cached entirely recomputes its last token in a private block."""
    prompts = [tiny_prompts(1)[0][:32]] * 3
    reference = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, prefix_caching=False)
    expected = [out.token_ids for out in outputs(reference, prompts)]
    llm = LLM(str(tiny_llama_dir), "ngram", dtype="float32", max_model_len=128, **ROOMY)
    assert [out.token_ids for out in outputs(llm, prompts[:1])] == expected[:1]
    again = outputs(llm, prompts)
    assert [out.token_ids for out in again] == expected
    assert [out.num_cached for out in again] == [31, 31, 31]


def test_adaptive_speculation_keeps_the_output(tiny_plain, tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir), "ngram", speculation="adaptive", num_drafts=6, dtype="float32", max_model_len=128
    )
    assert [out.token_ids for out in outputs(llm, tiny_prompts(8))] == tiny_plain


def test_speculation_takes_fewer_steps_when_drafts_are_right(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "synthetic", "alpha": 1.0},
        num_drafts=4,
        dtype="float32",
        max_model_len=128,
    )
    got = outputs(llm, tiny_prompts(3))
    # 20 tokens: one from the prompt, then runs of 5, 5, 5 and 4 (the last draft would pass max_tokens).
    assert all(out.num_accepted == out.num_drafted == 4 + 4 + 4 + 3 for out in got)
    assert all(out.num_steps == 5 for out in got)


def test_trees_take_fewer_steps_when_one_of_the_siblings_is_right(tiny_plain, tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "synthetic", "alpha": 1.0, "width": 3},
        num_drafts=9,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
    )
    got = outputs(llm, tiny_prompts(8))
    assert [out.token_ids for out in got] == tiny_plain
    # 20 tokens: one from the prompt, then runs of 4 while 9 nodes fit, and the rest.
    assert all(out.num_steps <= 8 and out.num_accepted == 20 - out.num_steps for out in got)
    assert all(out.num_drafted > 2 * out.num_accepted for out in got)


@pytest.mark.parametrize("drafter", ["suffix", "recycling", "merged"])
def test_wide_trees_that_learn_keep_the_output(drafter, tiny_plain, tiny_llama_dir):
    """What earlier requests left behind changes the drafts, under preemption as well, and not the output."""
    llm = LLM(
        str(tiny_llama_dir),
        tiny_drafters(None)[drafter],
        num_drafts=14,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        watermark=0.0,
        **TIGHT,
    )
    runs = [outputs(llm, tiny_prompts(8)) for _ in range(3)]
    for got in runs:
        assert [out.token_ids for out in got] == tiny_plain
    accepted = [sum(out.num_accepted for out in got) for got in runs]
    assert 0 < accepted[0] < accepted[2]
    assert sum(out.num_preemptions for got in runs for out in got) > 0


SMOLLM2_PROMPTS = [
    "The capital of France is Paris. The capital of Italy is",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n",
    "List the days of the week: Monday, Tuesday,",
    "Water boils at 100 degrees. Water freezes at",
    "To be or not to be, that is the question. To be or not",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time there was a small fox who lived in a forest. The small fox",
    "Translate to French: good morning. Answer:",
]
SMOLLM2_DRAFTERS = {
    "ngram": {"name": "ngram"},
    "layer_skip": {"name": "layer_skip", "num_skip": 2},
    "draft_model": {"name": "draft_model"},
    "synthetic": {"name": "synthetic", "alpha": 0.8},
    "synthetic_tree": {"name": "synthetic", "alpha": 0.8, "width": 3},
    "merged": MERGED,
}
SMOLLM2_GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def smollm2(smollm2_float32):
    return LLM(smollm2_float32, dtype="float32", max_model_len=96, num_blocks=20)


@pytest.fixture(scope="module")
def smollm2_plain(smollm2):
    smollm2.configure(prefix_caching=False, max_num_seqs=4)
    return [out.token_ids for out in smollm2.generate(SMOLLM2_PROMPTS, SMOLLM2_GREEDY)]


# Every policy with a full batch, every batch with chunked prefill: the tiny model has all combinations.
@pytest.mark.parametrize(
    ("policy", "batch"),
    [(policy, max(BATCHES)) for policy in sorted(POLICIES)] + [("chunked", b) for b in BATCHES[:-1]],
)
@pytest.mark.parametrize("drafter", sorted(SMOLLM2_DRAFTERS))
def test_smollm2_every_drafter_under_every_policy_and_batch(
    drafter, policy, batch, smollm2, smollm2_float32, smollm2_plain
):
    options = dict(SMOLLM2_DRAFTERS[drafter])
    if drafter == "draft_model":
        options["model"] = smollm2_float32
    smollm2.configure(options, num_drafts=3, policy=policy, max_num_seqs=batch, watermark=0.0)
    got = smollm2.generate(SMOLLM2_PROMPTS[:batch], SMOLLM2_GREEDY)
    assert [out.token_ids for out in got] == smollm2_plain[:batch]
    assert sum(out.num_drafted for out in got) > 0
