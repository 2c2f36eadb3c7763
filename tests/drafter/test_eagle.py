"""The EAGLE drafter: what it drafts is what its head says, whatever happened before; and the output stays lossless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec import LLM, SamplingParams
from specdec.drafter import make_drafter
from specdec.drafter.base import Draft
from specdec.drafter.eagle import EagleDrafter
from specdec.heads import unroll
from specdec.heads.files import load_head
from specdec.random import Stream, uniforms
from specdec.sampling import sample_from_probs
from specdec.scheduler.plan import StepPlan
from tests.helpers.heads import drafter_of, packed_hidden, plain_llm, tiny_prompts, trained_eagle_dir
from tests.helpers.models import tiny_model_dir

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
NORMAL = {"num_blocks": 128}
CHUNKED = {"num_blocks": 128, "max_num_batched_tokens": 24}
TIGHT = {"num_blocks": 12, "max_num_batched_tokens": 128, "watermark": 0.0}


@pytest.fixture(scope="module", params=["eagle1", "eagle3"])
def head_dir(request, tiny_llama_dir, tmp_path_factory) -> Path:
    return trained_eagle_dir(tiny_llama_dir, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def eagle3_dir(tiny_llama_dir, tmp_path_factory) -> Path:
    return trained_eagle_dir(tiny_llama_dir, tmp_path_factory.mktemp("only"), "eagle3")


def long_prompts() -> list[list[int]]:
    """With a common prefix of two blocks."""
    shared = tiny_prompts(1, seed=9)[0] * 8
    return [shared[:32] + prompt + [7] * (11 * index) for index, prompt in enumerate(tiny_prompts(4))]


def eagle_llm(model_dir: Path, head_dir: Path, num_drafts: int = 4, **options) -> LLM:
    names = ("shape", "sampled", "top_k", "depth")
    drafter = {name: options.pop(name) for name in names if name in options}
    return plain_llm(
        model_dir,
        drafter={"name": "eagle", "path": str(head_dir), **drafter},
        num_drafts=num_drafts,
        **{"max_num_seqs": 4, **options},
    )


class Watcher:
    """Compares each draft with what the head gives over whole sequences."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.drafter = llm, drafter_of(llm)
        self.worst, self.rows, self.accepted = 0.0, 0, []
        propose, observe = self.drafter.propose, self.drafter.observe

        def watched(plan: StepPlan) -> Draft:
            draft = propose(plan)
            for index in np.flatnonzero(draft.num_drafted).tolist():
                self.compare(plan, draft, index)
            return draft

        def learning(plan, outcome, verified) -> None:
            drafted = outcome.num_drafted > 0
            self.accepted += outcome.num_accepted[drafted].tolist()
            observe(plan, outcome, verified)

        self.drafter.propose, self.drafter.observe = watched, learning

    def log_probs(self, known: list[int], drafts: list[int]) -> torch.Tensor:
        """The head's law after the known tokens and after each draft, [len(drafts) + 1, D]."""
        drafter = self.drafter
        tokens = torch.tensor(known + drafts)
        packed = unroll.Packed.of([tokens])
        hidden = packed_hidden(self.llm, tokens.tolist(), drafter.captures)
        with torch.no_grad():
            head, borrowed, anchors = drafter._head, drafter._borrowed, torch.tensor([len(known) - 1])
            entries = unroll.forward(head, borrowed, packed, hidden, anchors)
            outputs = [entries.outputs]
            outputs += unroll.chains(head, borrowed, packed, entries, anchors, entries.outputs, len(drafts))
            return drafter._borrowed.logits(torch.cat(outputs)).log_softmax(-1)

    def compare(self, plan: StepPlan, draft: Draft, index: int) -> None:
        known = self.llm.engine.state.known(int(plan.rows[index])).tolist()
        places = self.drafter._borrowed.places
        self.rows += 1
        for path, nodes in leaf_paths(draft, index):
            expected = self.log_probs(known, path[:-1])[range(len(path)), places[path]].exp()
            found = torch.from_numpy(draft.confidence[index, nodes])
            self.worst = max(self.worst, float((expected - found).abs().max()))


def leaf_paths(draft: Draft, index: int) -> list[tuple[list[int], list[int]]]:
    """Tokens and nodes from the root to each leaf."""
    count = int(draft.num_drafted[index])
    tokens = draft.tokens[index].tolist()
    parents = list(range(-1, count - 1)) if draft.parents is None else draft.parents[index, :count].tolist()
    paths = []
    for leaf in sorted(set(range(count)) - set(parents)):
        nodes = []
        while leaf >= 0:
            nodes.insert(0, leaf)
            leaf = parents[leaf]
        paths.append(([tokens[node] for node in nodes], nodes))
    return paths


@pytest.mark.parametrize("room", [NORMAL, CHUNKED, TIGHT], ids=["normal", "chunked", "preempted"])
def test_cached_drafting_is_the_full_sequence_forward(room, head_dir, tiny_llama_dir):
    """The path that is trained equals the one that drafts, after rejections, full acceptance and recomputation."""
    llm = eagle_llm(tiny_llama_dir, head_dir, num_drafts=2, **room)
    watcher = Watcher(llm)
    outs = llm.generate(long_prompts(), GREEDY)
    assert watcher.worst < 1e-5
    assert watcher.rows > 20
    assert set(watcher.accepted) >= {0, 2}, "rejections and full acceptance both happened"
    if room is TIGHT:
        assert sum(out.num_preemptions for out in outs) > 0


def test_speculation_that_pauses_leaves_no_gap(eagle3_dir, tiny_llama_dir):
    """Rows that stop drafting for a while are fed late, and all at once."""
    llm = eagle_llm(tiny_llama_dir, eagle3_dir, num_drafts=3, max_num_seqs=2)
    watcher = Watcher(llm)
    controller = llm.engine.loop.speculation
    num_drafts = type(controller).num_drafts

    class Pausing:
        max_drafts, is_constant = controller.max_drafts, False

        def num_drafts(self, table, rows, now_s):
            steps = table.num_steps[rows]
            return np.where((steps < 3) | (steps > 36), num_drafts(controller, table, rows, now_s), 0).astype(
                np.int32
            )

    llm.engine.loop.speculation = Pausing()
    llm.generate(long_prompts()[:2], SamplingParams(max_tokens=50, ignore_eos=True))
    assert watcher.worst < 1e-5
    assert watcher.rows > 10


@pytest.mark.parametrize("depth", [1, 3])
def test_trees_hold_the_best_nodes_that_the_head_knows(depth, head_dir, tiny_llama_dir):
    """Against a brute-force EAGLE-2: every node's probability, and which nodes are chosen."""
    llm = eagle_llm(tiny_llama_dir, head_dir, num_drafts=7, shape="tree", top_k=3, depth=depth)
    watcher, drafter = Watcher(llm), drafter_of(llm)
    compare, chosen = watcher.compare, []

    def checked(plan: StepPlan, draft: Draft, index: int) -> None:
        compare(plan, draft, index)
        known = llm.engine.state.known(int(plan.rows[index])).tolist()
        best = brute_force(watcher, known, top_k=3, depth=depth, size=int(plan.num_drafts[index]))
        found = {tuple(path[:end]) for path, _ in leaf_paths(draft, index) for end in range(1, len(path) + 1)}
        chosen.append(found == best)

    watcher.compare = checked
    llm.generate(long_prompts()[:2], SamplingParams(max_tokens=7, ignore_eos=True))
    assert watcher.worst < 1e-5
    assert np.mean(chosen) > 0.95, "but for near ties"
    assert len(chosen) >= 4
    assert drafter.shape == "tree"


def brute_force(
    watcher: Watcher, known: list[int], top_k: int, depth: int, size: int
) -> set[tuple[int, ...]]:
    """EAGLE-2 without any cache: expand the best of each level, then take the best of all."""
    token_ids = watcher.drafter._token_ids
    scores: dict[tuple[int, ...], float] = {}
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(depth):
        level = []
        for score, path in beam:
            best = watcher.log_probs(known, list(path))[-1].topk(top_k)
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                level.append((score + value, (*path, int(token_ids[place]))))
        scores |= {path: score for score, path in level}
        beam = sorted(level, reverse=True)[:top_k]
    ranked = sorted(scores, key=lambda path: (-scores[path], len(path)))
    return set(ranked[:size])


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("room", [NORMAL, CHUNKED, TIGHT], ids=["normal", "chunked", "preempted"])
@pytest.mark.parametrize("caching", [False, True], ids=["", "prefix_cache"])
def test_greedy_output_is_lossless(caching, room, shape, eagle3_dir, tiny_llama_dir):
    expected = [out.token_ids for out in plain_llm(tiny_llama_dir).generate(long_prompts(), GREEDY)]
    llm = eagle_llm(
        tiny_llama_dir,
        eagle3_dir,
        num_drafts=6 if shape == "tree" else 3,
        shape=shape,
        top_k=3,
        depth=4,
        prefix_caching=caching,
        **room,
    )
    for _ in range(2):
        outs = llm.generate(long_prompts(), GREEDY)
        assert [out.token_ids for out in outs] == expected
        assert sum(out.num_accepted for out in outs) > 0
    assert not caching or sum(out.num_cached for out in outs) > 0


def test_swapped_requests_draft_on(eagle3_dir, tiny_llama_dir):
    """What was swapped in has no entries; the head makes do with the tokens."""
    expected = [out.token_ids for out in plain_llm(tiny_llama_dir).generate(long_prompts(), GREEDY)]
    llm = eagle_llm(tiny_llama_dir, eagle3_dir, num_drafts=3, num_swap_blocks=40, **TIGHT)
    outs = llm.generate(long_prompts(), GREEDY)
    assert [out.token_ids for out in outs] == expected
    swapped = [out for out in outs if out.num_preemptions]
    assert swapped and all(out.num_drafted > 0 for out in swapped)


def test_a_cached_prefix_keeps_its_entries(eagle3_dir, tiny_llama_dir):
    """Where another request has filled the blocks of a prefix, acceptance is that of the first time."""
    llm = eagle_llm(tiny_llama_dir, eagle3_dir, num_drafts=3, prefix_caching=True, **NORMAL)
    first = llm.generate(long_prompts(), GREEDY)
    again = llm.generate(long_prompts(), GREEDY)
    assert sum(out.num_cached for out in again) > sum(out.num_cached for out in first)
    rate = [sum(o.num_accepted for o in outs) / sum(o.num_drafted for o in outs) for outs in (first, again)]
    assert rate[1] > 0.8 * rate[0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.01}], ids=str)
def test_sampled_chains_report_the_law_they_were_drawn_from(filters, eagle3_dir, tiny_llama_dir):
    llm = eagle_llm(tiny_llama_dir, eagle3_dir, num_drafts=3)
    watcher, state = Watcher(llm), llm.engine.state
    drafter, params = (
        drafter_of(llm),
        SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True, seed=5, **filters),
    )
    seen = []

    def compare(plan: StepPlan, draft: Draft, index: int) -> None:
        row, count = int(plan.rows[index]), int(draft.num_drafted[index])
        tokens = draft.tokens[index, :count]
        laws = torch.from_numpy(draft.probs[index, :count])
        outside = np.setdiff1d(np.arange(laws.shape[1]), drafter._token_ids)
        assert torch.allclose(laws.sum(-1), torch.ones(count), atol=1e-5)
        assert laws[:, outside].sum() == 0.0
        logits = watcher.log_probs(state.known(row).tolist(), tokens[:-1].tolist())
        expected = state.probs(logits, np.full(count, row))
        assert torch.allclose(laws[:, drafter._token_ids], expected, atol=1e-5)
        noise = uniforms(state.seeds[[row]], state.num_known[[row]], Stream.DRAFT, count)[0]
        places = sample_from_probs(laws[:, drafter._token_ids], noise)
        assert drafter._token_ids[places].tolist() == tokens.tolist()
        seen.append(count)

    watcher.compare = compare
    llm.generate(tiny_prompts(3), params)
    assert sum(seen) > 20


def test_a_sampled_request_may_have_a_chain_beside_trees(eagle3_dir, tiny_llama_dir):
    llm = eagle_llm(tiny_llama_dir, eagle3_dir, num_drafts=5, shape="tree", sampled="chain", top_k=3, depth=3)
    drafter, kinds = drafter_of(llm), set()
    propose = drafter.propose

    def watched(plan: StepPlan) -> Draft:
        draft = propose(plan)
        temperature = llm.engine.state.temperature[plan.rows]
        for index in np.flatnonzero(draft.num_drafted).tolist():
            count = int(draft.num_drafted[index])
            chain = draft.parents is None or draft.parents[index, :count].tolist() == list(
                range(-1, count - 1)
            )
            has_law = draft.probs is not None and draft.probs[index].any()
            kinds.add((float(temperature[index]) > 0, chain, has_law, draft.parents is None))
        return draft

    drafter.propose = watched
    params = [
        SamplingParams(max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=8, seed=1),
    ]
    outs = llm.generate(tiny_prompts(2), params)
    assert outs[0].token_ids == plain_llm(tiny_llama_dir).generate(tiny_prompts(1), params[0])[0].token_ids
    assert (False, False, False, False) in kinds
    assert (True, True, True, False) in kinds
    assert not any(sampled != has_law for sampled, _, has_law, _ in kinds)


def test_the_native_head_agrees_with_the_eager_one(tmp_path):
    """bfloat16 weights and keys against float32: probabilities within a few per cent."""
    from specdec_kernels import cpu_decoder

    if not cpu_decoder.is_available()[0]:
        pytest.skip(cpu_decoder.is_available()[1])
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "num_attention_heads": 2}
    model_dir = tiny_model_dir("qwen3", tmp_path, **sizes, num_key_value_heads=1)
    head_dir = trained_eagle_dir(model_dir, tmp_path / "head", num_steps=60)
    outs = {}
    for backend in ("eager", "native"):
        drafter = {"name": "eagle", "path": str(head_dir), "shape": "tree", "top_k": 3, "backend": backend}
        llm = LLM(str(model_dir), drafter, num_drafts=6, backend="native", max_model_len=128)
        laws = []
        propose = drafter_of(llm).propose

        def watched(plan, propose=propose, laws=laws):
            draft = propose(plan)
            if draft.confidence is not None:
                laws.append(draft.confidence[:, 0])
            return draft

        drafter_of(llm).propose = watched
        outs[backend] = llm.generate(tiny_prompts(4), GREEDY), np.concatenate(laws)
    eager, native = (outs[name] for name in ("eager", "native"))
    assert [out.token_ids for out in eager[0]] == [out.token_ids for out in native[0]]
    assert np.abs(eager[1][:8] - native[1][:8]).max() < 0.05
    accepted = [sum(out.num_accepted for out in outs[name][0]) for name in outs]
    assert accepted[1] == pytest.approx(accepted[0], rel=0.15)
    assert accepted[0] > 0


def test_bad_options_are_refused(eagle3_dir):
    path = str(eagle3_dir)
    for options, message in [
        ({"shape": "forest"}, "unknown shape 'forest'"),
        ({"sampled": "trees"}, "did you mean tree"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"top_k": 0}, "top_k=0 must be >= 1"),
        ({"depth": 0}, "depth=0 must be >= 1"),
        ({"beam": 2}, "does not take these options"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_drafter({"name": "eagle", "path": path, **options})


def test_wrong_heads_are_refused(eagle3_dir, tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match=r"has no head\.json: give the directory of a trained head"):
        EagleDrafter(str(tmp_path / "nowhere"))
    assert isinstance(EagleDrafter(str(eagle3_dir)), EagleDrafter)
    for key, value, message in [
        ("hidden_size", 64, "hidden_size=64, but the target .* has hidden_size=48"),
        ("num_layers", 9, "num_layers=9, but the target"),
        ("vocabulary", "other", "vocabulary=other, but the target"),
    ]:
        changed = copied(eagle3_dir, tmp_path / key)
        content = json.loads((changed / "head.json").read_text())
        content["target"][key] = value
        (changed / "head.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            eagle_llm(tiny_llama_dir, changed)
    damaged = copied(eagle3_dir, tmp_path / "damaged")
    (damaged / "head.safetensors").write_bytes(b"not a head")
    with pytest.raises(ValueError, match="no head that can be read"):
        load_head(damaged, "eagle")
    with pytest.raises(ValueError, match="kind 'eagle3', not for drafter=medusa: use drafter=eagle"):
        load_head(eagle3_dir, "medusa")


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
