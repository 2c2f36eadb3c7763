"""Trees drafted by a model: greedy output equals plain output, sampled output follows the target's law."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.lossless import _law, _p_value, _places
from specdec import LLM, SamplingParams
from specdec.drafter.draft_tree import breadth_first
from specdec.scheduler import POLICIES
from specdec.tree import Tree, make_tree
from tests.engine.test_lossless import GREEDY, ROOMY, TIGHT, tiny_prompts

K_ARY = {"name": "k_ary", "branching": [3, 2, 1]}
SEQUOIA = {"name": "sequoia", "rates": [0.6, 0.2, 0.1], "size": 9, "max_depth": 4}


def drafters(draft_dir) -> dict[str, dict]:
    return {
        "layer_skip": {"name": "layer_skip", "num_skip": 1, "tree": K_ARY},
        "draft_model": {"name": "draft_model", "model": str(draft_dir), "tree": SEQUOIA},
    }


@pytest.fixture(scope="module")
def plain(tiny_llama_dir):
    llm = LLM(str(tiny_llama_dir), dtype="float32", max_model_len=128, prefix_caching=False)
    return [out.token_ids for out in llm.generate(tiny_prompts(8), GREEDY)]


@pytest.mark.parametrize("limits", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("drafter", ["layer_skip", "draft_model"])
def test_greedy_output_is_the_plain_one(drafter, policy, limits, plain, tiny_llama_dir, tiny_draft_dir):
    llm = LLM(
        str(tiny_llama_dir),
        drafters(tiny_draft_dir)[drafter],
        num_drafts=12,
        dtype="float32",
        policy=policy,
        max_model_len=128,
        max_num_seqs=8,
        watermark=0.0,
        **limits,
    )
    got = llm.generate(tiny_prompts(8), GREEDY)
    assert [out.token_ids for out in got] == plain
    assert sum(out.num_drafted for out in got) > 3 * sum(out.num_steps for out in got), "trees, not chains"
    if limits is TIGHT:
        assert sum(out.num_preemptions for out in got) > 0


def test_a_draft_equal_to_the_target_is_accepted_to_the_leaves(plain, tiny_llama_dir):
    """Its best child is always right, also after acceptance, when the draft cache has lagged behind."""
    drafter = {"name": "draft_model", "model": str(tiny_llama_dir), "tree": K_ARY}
    llm = LLM(str(tiny_llama_dir), drafter, num_drafts=15, dtype="float32", max_model_len=128, **ROOMY)
    got = llm.generate(tiny_prompts(3), SamplingParams(max_tokens=41, ignore_eos=True))
    # One token from the prompt, then 3 + 1 a step while 15 nodes fit into what is left.
    assert all(out.num_steps <= 1 + 7 + 6 for out in got)
    assert [out.token_ids[:20] for out in got] == plain[:3]


@pytest.mark.parametrize(
    ("rule", "drafter", "filters"),
    [
        ("recursive", "layer_skip", {}),
        ("traversal", "draft_model", {}),
        ("traversal", "layer_skip", {"top_k": 3}),
    ],
)
def test_sampled_output_follows_the_target(rule, drafter, filters, tiny_llama_dir, tiny_draft_dir):
    """With ``top_k=3``, laws run out of tokens before the tree runs out of children."""
    params = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True, **filters)
    llm = LLM(
        str(tiny_llama_dir),
        drafters(tiny_draft_dir)[drafter],
        num_drafts=12,
        rule=rule,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=64,
    )
    prompt = np.array(tiny_prompts(1)[0], np.int32)
    every = [SamplingParams(**{**_fields(params), "seed": seed}) for seed in range(600)]
    got = llm.generate([prompt.tolist()] * len(every), every)
    assert sum(out.num_accepted for out in got) > 100
    laws = llm.continuation_logits(prompt, [out.token_ids[:-1] for out in got])
    rng = np.random.default_rng(0)
    places = np.array(
        [
            _places(_law(logits, params), out.token_ids, rng.random(5))
            for out, logits in zip(got, laws, strict=True)
        ]
    )
    assert all(_p_value(places[:, position]) > 1e-4 for position in range(5))


def test_the_wrong_law_reported_is_found(tiny_llama_dir, monkeypatch):
    """Control: the draft says that siblings were drawn from a flatter law than they were."""
    from specdec.drafter import draft_tree

    draft = draft_tree.TreeDraft._draft

    def flattened(self):
        made = draft(self)
        probs = made.probs
        assert probs is not None
        np.sqrt(probs, out=probs)
        probs /= np.maximum(probs.sum(axis=-1, keepdims=True), 1e-9)
        return made

    monkeypatch.setattr(draft_tree.TreeDraft, "_draft", flattened)
    with pytest.raises(AssertionError):
        test_sampled_output_follows_the_target("recursive", "layer_skip", {}, tiny_llama_dir, None)


def test_seeded_samples_are_the_same_alone_and_in_a_batch(tiny_llama_dir):
    llm = LLM(
        str(tiny_llama_dir),
        {"name": "layer_skip", "num_skip": 1, "tree": K_ARY},
        num_drafts=12,
        rule="traversal",
        dtype="float32",
        max_model_len=128,
    )
    prompts = tiny_prompts(5)
    params = [SamplingParams(temperature=0.8, max_tokens=12, seed=seed, ignore_eos=True) for seed in range(5)]
    together = [out.token_ids for out in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone


def test_level_by_level_is_the_same_tree():
    tree = Tree([-1, 0, 1, -1, 0, 3])
    ordered = breadth_first(tree)
    assert ordered.depths.tolist() == sorted(tree.depths.tolist())
    assert sorted(map(len, ordered.children)) == sorted(map(len, tree.children))
    assert ordered.parents == (-1, -1, 0, 0, 1, 2)
    assert breadth_first(make_tree(K_ARY)).parents == make_tree(K_ARY).parents


def test_a_wrong_tree_is_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="unknown tree 'k_arry': did you mean k_ary"):
        LLM(str(tiny_llama_dir), {"name": "layer_skip", "tree": {"name": "k_arry"}}, dtype="float32")


def _fields(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in ("temperature", "max_tokens", "ignore_eos", "top_k")}
