"""Medusa: its tree, its drafts, and the output that stays lossless."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec import SamplingParams
from specdec.drafter import make_drafter
from specdec.drafter.medusa import best_paths
from tests.helpers.heads import drafter_of, packed_hidden, plain_llm, tiny_prompts, trained_medusa_dir

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def heads_dir(tiny_llama_dir, tmp_path_factory) -> Path:
    return trained_medusa_dir(tiny_llama_dir, tmp_path_factory.mktemp("medusa"))


def medusa_llm(model_dir: Path, heads_dir: Path, **options):
    options = {"max_num_seqs": 4, "num_drafts": 6, **options}
    return plain_llm(model_dir, drafter={"name": "medusa", "path": str(heads_dir)}, **options)


def test_the_tree_has_the_most_probable_paths():
    rates = np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.05]])
    paths = [path for depth in (1, 2) for path in product(range(3), repeat=depth)]
    worth = {path: np.prod([rates[level, rank] for level, rank in enumerate(path)]) for path in paths}
    for size in range(1, 13):
        found = [tuple(path) for path in best_paths(rates, size)]
        assert sorted(worth[path] for path in found) == pytest.approx(sorted(worth.values())[-size:])
        assert len(set(found)) == min(size, 12)
    assert best_paths(rates, 3) == [[0], [0, 0], [1]]


def test_ranks_that_were_seldom_right_by_chance_keep_their_elders():
    paths = [tuple(path) for path in best_paths(np.array([[0.5, 0.0, 0.4], [0.0, 0.0, 0.0]]), 6)]
    for path in paths:
        assert len(path) == 1 or path[:-1] in paths
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths


def test_drafts_are_the_heads_candidates(heads_dir, tiny_llama_dir):
    llm = medusa_llm(tiny_llama_dir, heads_dir)
    drafter, state, seen = drafter_of(llm), llm.engine.state, []
    propose = drafter.propose

    def watched(plan):
        draft = propose(plan)
        for index in np.flatnonzero(draft.num_drafted).tolist():
            known = state.known(int(plan.rows[index])).tolist()
            hidden = packed_hidden(llm, known, drafter.captures)[-1, -2:-1]
            with torch.no_grad():
                outputs = drafter._heads(drafter._borrowed.normed(hidden))
                best = drafter._borrowed.head(outputs)[:, 0].topk(4).indices
            tree, ranks = drafter._tree(int(plan.num_drafts[index]))
            expected = drafter._token_ids[best[tree.depths - 1, ranks]]
            seen.extend((draft.tokens[index, : len(tree)] == expected).tolist())
        return draft

    drafter.propose = watched
    outs = llm.generate(tiny_prompts(4), GREEDY)
    assert np.mean(seen) > 0.95, "but for near ties"
    assert len(seen) > 8
    assert sum(out.num_accepted for out in outs) > 0


@pytest.mark.parametrize(
    "room",
    [
        {"num_blocks": 128},
        {"num_blocks": 128, "max_num_batched_tokens": 24, "prefix_caching": True},
        {"num_blocks": 9, "watermark": 0.0, "max_num_batched_tokens": 128},
        {"num_blocks": 9, "watermark": 0.0, "max_num_batched_tokens": 128, "num_swap_blocks": 40},
    ],
    ids=["normal", "chunked", "preempted", "swapped"],
)
def test_greedy_output_is_lossless(room, heads_dir, tiny_llama_dir):
    prompts = [prompt * 3 for prompt in tiny_prompts(6)]
    expected = [out.token_ids for out in plain_llm(tiny_llama_dir).generate(prompts, GREEDY)]
    llm = medusa_llm(tiny_llama_dir, heads_dir, **room)
    for _ in range(2):
        outs = llm.generate(prompts, GREEDY)
        assert [out.token_ids for out in outs] == expected
        assert sum(out.num_accepted for out in outs) > 0


def test_sampled_requests_get_deterministic_drafts(heads_dir, tiny_llama_dir):
    params = SamplingParams(temperature=0.8, max_tokens=12, ignore_eos=True, seed=4)
    llm = medusa_llm(tiny_llama_dir, heads_dir)
    outs = llm.generate(tiny_prompts(3), params)
    assert sum(out.num_drafted for out in outs) > 0
    assert all(len(out.token_ids) == 12 for out in outs)


def test_wrong_heads_are_refused(heads_dir, tmp_path):
    with pytest.raises(ValueError, match=r"has no head\.json"):
        make_drafter({"name": "medusa", "path": str(tmp_path)})
    content = json.loads((heads_dir / "head.json").read_text())
    (tmp_path / "head.safetensors").write_bytes((heads_dir / "head.safetensors").read_bytes())
    (tmp_path / "head.json").write_text(json.dumps({**content, "about": {}}))
    with pytest.raises(ValueError, match="no measured acceptance by rank"):
        make_drafter({"name": "medusa", "path": str(tmp_path)})
    (tmp_path / "head.json").write_text(json.dumps({**content, "kind": "hydra"}))
    with pytest.raises(ValueError, match="kind 'hydra', not for drafter=medusa: known kinds are"):
        make_drafter({"name": "medusa", "path": str(tmp_path)})
