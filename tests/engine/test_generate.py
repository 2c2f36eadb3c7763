"""What a request gives back: ends of output, streaming, logprobs, arrivals, seeds, and errors before work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specdec import LLM, SamplingParams

PROMPTS = [[10, 11, 12, 13, 10, 11], [20, 21, 22], [30, 31, 30, 31, 30]]


@pytest.fixture(scope="module")
def llm(tiny_llama_dir):
    return LLM(str(tiny_llama_dir), "ngram", dtype="float32", max_model_len=128, max_num_seqs=8)


@pytest.fixture(scope="module")
def plain(tiny_llama_dir):
    return LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, max_num_seqs=8)


def greedy(**options) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **options})


def test_max_tokens_ends_inside_an_accepted_run(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "synthetic", "alpha": 1.0},
        num_drafts=4,
        dtype="float32",
        max_model_len=128,
    )
    for max_tokens in range(1, 8):
        out = llm.generate([PROMPTS[0]], greedy(max_tokens=max_tokens))[0]
        assert len(out.token_ids) == max_tokens
        assert out.finish_reason == "length"


def test_a_stop_token_inside_an_accepted_run_ends_the_output(llm, plain):
    whole = plain.generate([PROMPTS[0]], greedy())[0].token_ids
    stop = whole[5]
    expected = whole[: whole.index(stop) + 1]
    out = llm.generate([PROMPTS[0]], greedy(stop_token_ids=(stop,)))[0]
    assert out.token_ids == expected
    assert out.finish_reason == "stop"


def test_end_of_sequence_ends_the_output_unless_ignored(llm, plain):
    whole = plain.generate([PROMPTS[1]], greedy())[0].token_ids
    saved = llm.engine._eos
    llm.engine._eos = np.array([whole[3]])
    try:
        out = llm.generate([PROMPTS[1]], greedy(ignore_eos=False))[0]
        assert out.token_ids == whole[: whole.index(whole[3]) + 1]
        assert out.finish_reason == "stop"
        assert llm.generate([PROMPTS[1]], greedy())[0].token_ids == whole
    finally:
        llm.engine._eos = saved


def test_a_stop_string_is_found_across_tokens_and_cut_from_the_text(smollm2_float32):
    llm = LLM(smollm2_float32, "ngram", dtype="float32", max_model_len=128)
    prompt = "1, 2, 3, 4, 5, 6,"
    whole = llm.generate(prompt, greedy())[0]
    assert ", 10, 1" in whole.text
    out = llm.generate(prompt, greedy(stop=(", 10, 1",)))[0]
    assert out.text == whole.text[: whole.text.index(", 10, 1")]
    assert out.finish_reason == "stop"
    assert whole.token_ids[: len(out.token_ids)] == out.token_ids


def test_streamed_pieces_add_up_to_the_output(smollm2_float32):
    llm = LLM(smollm2_float32, "ngram", dtype="float32", max_model_len=128)
    events = []
    outs = llm.generate(
        ["1, 2, 3, 4, 5, 6,", "Zażółć gęślą jaźń. Zażółć gęślą"],
        greedy(stop=("zzz",)),
        on_token=events.append,
    )
    for out in outs:
        mine = [event for event in events if event.request_id == out.request_id]
        assert [token for event in mine for token in event.token_ids] == out.token_ids
        assert "".join(event.text for event in mine) == out.text
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + ["length"]
        assert out.text == llm.tokenizer.decode(out.token_ids)


def test_logprobs_are_those_of_the_plain_model(llm, plain):
    got = llm.generate(PROMPTS, greedy(logprobs=3))
    expected = plain.generate(PROMPTS, greedy(logprobs=3))
    for mine, theirs in zip(got, expected, strict=True):
        assert len(mine.logprobs) == len(mine.token_ids)
        for ours, reference, token in zip(mine.logprobs, theirs.logprobs, mine.token_ids, strict=True):
            assert ours.token_id == reference.token_id == token == ours.top[0][0]
            assert ours.logprob == pytest.approx(reference.logprob, abs=1e-4)
            assert ours.logprob == ours.top[0][1] <= 0.0


@pytest.mark.parametrize("drafter", [None, "ngram", "layer_skip", "draft_model"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_seeded_samples_are_the_same_alone_and_in_a_batch(drafter, rule, tiny_llama_dir, tiny_draft_dir):
    spec = {"name": "draft_model", "model": str(tiny_draft_dir)} if drafter == "draft_model" else drafter
    llm = LLM(
        str(tiny_llama_dir), spec, rule=rule, dtype="float32", max_model_len=128, num_blocks=16, watermark=0.0
    )
    params = [
        SamplingParams(temperature=0.9, top_k=40, top_p=0.95, max_tokens=30, seed=100 + i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    alone = [llm.generate([prompt], one)[0].token_ids for prompt, one in zip(PROMPTS, params, strict=True)]
    together = [out.token_ids for out in llm.generate(PROMPTS, params)]
    assert alone == together
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)


def test_mixed_greedy_and_sampled_rows_do_not_disturb_each_other(llm, plain):
    params = [greedy(), SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True), greedy()]
    got = [out.token_ids for out in llm.generate(PROMPTS, params)]
    expected = [out.token_ids for out in plain.generate(PROMPTS, greedy())]
    assert [got[0], got[2]] == [expected[0], expected[2]]


def test_penalties_give_the_same_greedy_output_with_and_without_speculation(llm, plain):
    params = greedy(repetition_penalty=1.3, presence_penalty=0.5)
    expected = [out.token_ids for out in plain.generate(PROMPTS, params)]
    assert [out.token_ids for out in llm.generate(PROMPTS, params)] == expected
    assert expected != [out.token_ids for out in plain.generate(PROMPTS, greedy())]


def test_requests_arrive_in_real_time(llm):
    outs = llm.generate(PROMPTS, greedy(max_tokens=4), arrivals_s=[0.0, 0.05, 0.1])
    assert all(out.ttft_s > 0 and out.e2e_s >= out.ttft_s and math.isfinite(out.tpot_s) for out in outs)
    assert max(out.e2e_s for out in outs) < 5.0


def test_outputs_are_handed_out_as_they_finish(llm):
    order = []
    params = [greedy(max_tokens=20), greedy(max_tokens=2), greedy(max_tokens=8)]
    outs = llm.generate(PROMPTS, params, on_finish=lambda out: order.append(len(out.token_ids)))
    assert sorted(order) == [2, 8, 20] and order[0] == 2
    assert [len(out.token_ids) for out in outs] == [20, 2, 8]


def test_an_error_in_a_callback_leaves_the_engine_usable(llm):
    expected = [out.token_ids for out in llm.generate(PROMPTS, greedy())]

    def fail(event):
        raise RuntimeError("the listener broke")

    with pytest.raises(RuntimeError, match="the listener broke"):
        llm.generate(PROMPTS, greedy(), on_token=fail)
    assert [out.token_ids for out in llm.generate(PROMPTS, greedy())] == expected
    assert llm.engine.loop.pool.num_free == llm.engine.loop.config.num_blocks


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 0 is empty"),
        ("", "prompt 0 is empty"),
        ([5] * 128, "128 tokens, the context holds max_model_len=128"),
        ([5, 10**6], "outside the vocabulary"),
    ],
)
def test_bad_prompts_fail_before_work_starts(llm, prompt, message):
    steps = llm.engine.loop.next_step
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt], greedy())
    assert llm.engine.loop.next_step == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "ngrm"}, r"unknown drafter 'ngrm': did you mean ngram\?"),
        ({"drafter": {"name": "ngram", "max_gram": 3}}, "does not take these options"),
        ({"drafter": {"name": "synthetic", "alpha": 1.5}}, r"must lie in \[0, 1\], got \[1.5\]"),
        ({"drafter": "ngram", "num_drafts": -1}, "num_drafts k=-1 must be >= 0"),
        (
            {"drafter": "ngram", "speculation": "fixd"},
            "unknown speculation controller 'fixd': did you mean fixed",
        ),
        ({"policy": "continous"}, "unknown policy 'continous': did you mean continuous"),
        ({"order": "fifo"}, "unknown order 'fifo'"),
        ({"rule": "tokens"}, "unknown .*rule 'tokens': did you mean token"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"drafter": {"name": "layer_skip", "skip_layers": [0, 9]}}, r"give indices in 0\.\.\d"),
    ],
)
def test_bad_options_name_the_value_and_the_remedy(options, message, tiny_llama_dir):
    with pytest.raises(ValueError, match=message):
        LLM(str(tiny_llama_dir), **{"dtype": "float32", "max_model_len": 128, **options})


def test_unknown_models_are_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="smollm2-135m"):
        LLM("smollm2-135")


def test_a_kv_pool_too_small_for_one_request_is_refused(tiny_llama_dir):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, num_blocks=2)
    with pytest.raises(ValueError, match=r"needs 3 KV blocks .* the pool has num_blocks=2"):
        llm.generate([[5] * 20], greedy(max_tokens=20))


def test_nan_logits_name_the_request_and_finished_outputs_are_not_lost(tiny_llama_dir):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128)
    finished = []
    forward, steps = llm.engine.runner.forward, [0]

    def breaks_later(batch, layers=None, captured=None):
        steps[0] += 1
        logits = forward(batch, layers, captured).clone()
        if steps[0] == 5:
            logits[-1, 0] = torch.nan
        return logits

    llm.engine.runner.forward = breaks_later
    with pytest.raises(ValueError, match=r"NaN logits for request 1 in step \d+"):
        llm.generate(PROMPTS[:2], [greedy(max_tokens=2), greedy(max_tokens=20)], on_finish=finished.append)
    assert [out.request_id for out in finished] == [0]


def test_a_single_chat_and_a_single_text_are_one_prompt(smollm2_float32):
    llm = LLM(smollm2_float32, dtype="float32", max_model_len=128)
    chat = [{"role": "user", "content": "Say hello."}]
    as_chat = llm.generate(chat, greedy(max_tokens=2))
    assert len(as_chat) == 1
    assert "Say hello." in llm.tokenizer.decode(as_chat[0].prompt_token_ids)
    assert len(llm.generate("Hello", greedy(max_tokens=2))) == 1
