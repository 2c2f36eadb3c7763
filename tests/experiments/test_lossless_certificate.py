"""The certificate holds for lossless verification, and does not for a rule that favours drafts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.lossless import _law, _p_value, _places
from specdec import LLM, SamplingParams, acceptor
from specdec.run import execute
from tests.experiments.tiny import run_tiny
from tests.test_configs import build

SMALL = (
    "workload.num_prompts=2",
    "sampling.max_tokens=12",
    "experiment.num_sampled_prompts=2",
    "experiment.num_samples=150",
    "experiment.num_tokens=4",
)


def certificate(model: Path, directory: Path, *overrides: str) -> dict:
    return run_tiny("lossless", model, directory, *SMALL, *overrides)


@pytest.mark.parametrize("drafter", ["layer_skip", "recycling"])
def test_a_lossless_engine_gets_a_certificate(drafter, tiny_llama_dir, tmp_path):
    summary = certificate(tiny_llama_dir, tmp_path / "run", f"drafter={drafter}", "speculation.num_drafts=6")
    assert summary["holds"]
    assert summary["greedy"]["num_equal"] == summary["greedy"]["num_prompts"] == 2
    assert summary["sampled"]["num_samples"] == 300
    page = (tmp_path / "run" / "certificate.md").read_text()
    assert page.startswith(f"# Lossless: {drafter}") and "2 of 2 outputs equal" in page
    assert (tmp_path / "run" / "plots" / "places.png").is_file()


def test_a_rule_that_accepts_too_much_gets_none(tiny_llama_dir, tmp_path, monkeypatch):
    def keeps_everything(rule, target, draft, tokens, num_drafts, accept, residual):
        _, next_token = honest(rule, target, draft, tokens, num_drafts, accept, residual)
        return num_drafts.astype(np.int32), next_token

    honest = acceptor.verify_chains
    monkeypatch.setattr(acceptor, "verify_chains", keeps_everything)
    summary = certificate(tiny_llama_dir, tmp_path / "run", "drafter=layer_skip", "drafter.num_skip=1")
    assert summary["greedy"]["num_equal"] == 2, "greedy verification was not touched"
    assert summary["sampled"]["p_value"] < 1e-3
    assert not summary["holds"]
    assert (tmp_path / "run" / "certificate.md").read_text().startswith("# Not lossless")


def test_places_are_uniform_for_the_law_itself_and_not_for_a_hotter_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 32)).astype(np.float32)
    import torch

    law = _law(torch.from_numpy(logits), SamplingParams(temperature=1.0))
    tokens = [int(rng.choice(32, p=row / row.sum())) for row in law]
    noise = rng.random(len(tokens))
    assert _p_value(_places(law, tokens, noise)) > 1e-3
    hotter = _law(torch.from_numpy(logits), SamplingParams(temperature=1.3))
    assert _p_value(_places(hotter, tokens, noise)) < 1e-6


def test_continuation_logits_are_those_of_the_whole_text(tiny_llama_dir):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=64)
    prompt, tokens = np.arange(5, 25, dtype=np.int32), [7, 8, 9]
    first, second = llm.continuation_logits(prompt, [tokens, tokens[:1]])
    assert first.shape == (4, llm.runner.config.vocab_size) and second.shape[0] == 2
    (whole,) = llm.continuation_logits(prompt[:1], [[*prompt[1:].tolist(), *tokens]])
    np.testing.assert_allclose(first.numpy(), whole[-4:].numpy(), atol=1e-5)
    np.testing.assert_allclose(second.numpy(), first[:2].numpy(), atol=1e-5)
    assert llm.engine.loop.pool.num_free == llm.num_blocks, "the blocks are given back"
    with pytest.raises(ValueError, match="max_model_len=64"):
        list(llm.continuation_logits(prompt, [[5] * 60]))


def test_nothing_to_certify_is_refused(tmp_path):
    config = build("drafter=none", "tracking=disabled", experiment="lossless")
    with pytest.raises(ValueError, match="nothing is drafted"):
        execute(config, tmp_path, None)
