"""The synthetic drafter sees whole answers, whatever the order in which requests with one prompt come."""

from __future__ import annotations

from specdec import LLM, SamplingParams


def test_a_shorter_answer_to_the_same_prompt_takes_no_drafts_from_a_longer_one(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "synthetic", "alpha": 1.0},
        num_drafts=3,
        dtype="float32",
        max_model_len=64,
    )
    long, short = (SamplingParams(max_tokens=count, ignore_eos=True) for count in (25, 3))
    first, _ = llm.generate([[7, 8, 9], [7, 8, 9]], [long, short])
    # One token of the prompt's step and four of each step after it.
    assert first.num_steps == 1 + 24 // 4 and first.num_accepted == 18
