"""The head that comes with the packages: found from anywhere, lossless, and better than chance."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec import LLM, SamplingParams
from specdec.drafter import make_drafter
from specdec.heads.files import load_head, shipped
from specdec.workload import builtin_prompts

PATH = "experiments/artifacts/smollm2-135m-eagle3"


def test_the_default_path_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    stored = load_head(PATH, "eagle")
    assert stored.target["name"] == "smollm2-135m" and "train_draft" in stored.about["command"]
    assert shipped("experiments/artifacts/nothing-eagle3") is None
    assert make_drafter({"name": "eagle", "path": PATH}) is not None


def test_it_drafts_tokens_that_the_target_accepts(smollm2_bfloat16):
    prompts = [item.prompt for item in builtin_prompts()[:3]]
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    llm = LLM(smollm2_bfloat16, max_model_len=512)
    plain = llm.generate(prompts, greedy)
    llm.configure({"name": "eagle", "path": PATH}, num_drafts=2)
    drafted = llm.generate(prompts, greedy)
    if llm.runner.backend == "native":
        assert [out.token_ids for out in drafted] == [out.token_ids for out in plain]
    accepted, steps = (sum(getattr(out, name) for out in drafted) for name in ("num_accepted", "num_steps"))
    assert accepted > 0.08 * steps  # one token of 49,152 by chance would be next to never
