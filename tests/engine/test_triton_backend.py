"""The whole engine over Triton's kernels, interpreted here: the same tokens as over torch's ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specdec import LLM, SamplingParams
from specdec.drafter.eagle import EagleDrafter
from specdec.graphs import TOKEN_SIZES, size_of
from specdec.heads.runner import EagerHeadRunner
from specdec.model.batch import Captured
from specdec.rows import RowState, StepInput
from specdec.runner import EagerRunner, RunnerOptions
from tests.helpers.heads import trained_eagle_dir, trained_medusa_dir
from tests.helpers.models import tiny_model_dir

PROMPTS = [[7, 8, 9, 10, 7, 8], [7, 8, 9, 10, 11], [13, 14]]
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
SAMPLED = [
    SamplingParams(max_tokens=3, ignore_eos=True, temperature=1.0, seed=1),
    SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, seed=2),
    GREEDY,
]
LIMITS = {"dtype": "float32", "max_model_len": 32, "block_size": 4, "num_blocks": 24, "max_num_seqs": 3}
TREE = {"name": "k_ary", "branching": [2, 1]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("two_layers"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def eager(model_dir: Path) -> LLM:
    return LLM(str(model_dir), backend="eager", **LIMITS)


@pytest.fixture(scope="module")
def triton(model_dir: Path) -> LLM:
    llm = LLM(str(model_dir), backend="triton", **LIMITS)
    assert llm.runner.backend == llm.runner.ops.name == "triton"
    return llm


@pytest.fixture(scope="module")
def heads(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("heads")
    return {
        "eagle": str(trained_eagle_dir(model_dir, folder / "eagle", num_steps=4)),
        "medusa": str(trained_medusa_dir(model_dir, folder / "medusa", num_steps=4)),
    }


@pytest.fixture(scope="module")
def plain(eager: LLM) -> list[tuple[int, ...]]:
    eager.configure(None, max_num_seqs=3)
    return tokens_of(eager, GREEDY)


def tokens_of(llm: LLM, params) -> list[tuple[int, ...]]:
    return [tuple(out.token_ids) for out in llm.generate(PROMPTS, params)]


DRAFTERS = {
    "plain": None,
    "ngram": {"name": "ngram"},
    "suffix": {"name": "suffix"},
    "recycling": {"name": "recycling"},
    "merged": {"name": "merged", "drafters": ["suffix", "ngram"]},
    "layer_skip": {"name": "layer_skip", "num_skip": 1},
    "layer_skip tree": {"name": "layer_skip", "num_skip": 1, "tree": TREE},
    "draft_model": {"name": "draft_model", "model": "MODEL"},
    "eagle": {"name": "eagle", "path": "eagle"},
    "eagle tree": {"name": "eagle", "path": "eagle", "shape": "tree"},
    "medusa": {"name": "medusa", "path": "medusa"},
}


def drafter(name: str, model_dir: Path, heads: dict[str, str]):
    spec = DRAFTERS[name]
    if spec is None:
        return None
    spec = {key: str(model_dir) if value == "MODEL" else value for key, value in spec.items()}
    return {**spec, "path": heads[spec["path"]]} if "path" in spec else spec


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(DRAFTERS))
def test_every_drafter_gives_the_tokens_of_plain_decoding(name, plain, triton, model_dir, heads):
    triton.configure(drafter(name, model_dir, heads), num_drafts=4, max_num_seqs=3)
    assert tokens_of(triton, GREEDY) == plain


@pytest.mark.gpu
def test_a_head_says_over_triton_what_it_says_over_torch(eager, triton, model_dir, heads):
    x = torch.randn(6, eager.runner.config.hidden_size, generator=torch.Generator().manual_seed(0))
    counts = np.array([4, 2], np.int32)
    found = []
    for llm in (eager, triton):
        llm.configure(drafter("eagle", model_dir, heads), num_drafts=4, max_num_seqs=3)
        eagle = llm.engine.drafter
        assert isinstance(eagle, EagleDrafter)
        runner = eagle._runner
        assert isinstance(runner, EagerHeadRunner) and runner.ops is llm.runner.ops
        table, start = np.arange(4, dtype=np.int32).reshape(2, 2), np.zeros(2, np.int32)
        batch = StepInput(RowState(2, 8, 8), table, 4, np.arange(2), start, counts, counts)
        found.append([part.cpu() for part in runner.forward(x.to(llm.runner.device), batch)])
    for one, other in zip(*found, strict=True):
        assert one.std() > 0.1 and torch.allclose(one, other, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("name", ["plain", "layer_skip", "layer_skip tree", "recycling"])
def test_sampled_tokens_are_those_of_verification_on_the_host(name, rule, eager, triton, model_dir, heads):
    found = []
    for llm in (eager, triton):
        llm.configure(drafter(name, model_dir, heads), num_drafts=4, rule=rule, max_num_seqs=3)
        found.append(tokens_of(llm, SAMPLED))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("preemption", [{}, {"num_swap_blocks": 16}], ids=["recompute", "swap"])
def test_preemption_and_the_prefix_cache_change_nothing(preemption, plain, model_dir):
    limits = {**LIMITS, "num_blocks": 6, "watermark": 0.0}
    llm = LLM(str(model_dir), {"name": "ngram"}, backend="triton", **limits, **preemption)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [tuple(out.token_ids) for out in outputs] == plain
    assert sum(out.num_preemptions for out in outputs) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_quantised_kv_cache_gives_what_it_gives_over_torch(kv_dtype, model_dir):
    found = []
    for backend in ("eager", "triton"):
        llm = LLM(str(model_dir), {"name": "recycling"}, backend=backend, kv_dtype=kv_dtype, **LIMITS)
        found.append(tokens_of(llm, GREEDY))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "layer_skip tree", "eagle tree"])
def test_padded_steps_give_the_same_tokens(name, plain, model_dir, heads):
    """What a GPU records as a graph, run as it is: padding changes nothing."""
    llm = LLM(str(model_dir), backend="triton", graphs="padded", **LIMITS)
    llm.configure(drafter(name, model_dir, heads), num_drafts=3, max_num_seqs=3)
    assert tokens_of(llm, GREEDY) == plain
    assert isinstance(llm.runner, EagerRunner) and llm.runner.graphs is not None
    assert 0 < llm.runner.graphs.num_recorded < 12


class Rows:
    """Sequences side by side in one runner's cache."""

    def __init__(self, llm: LLM, num_rows: int) -> None:
        self.runner, self.state = llm.runner, RowState(num_rows, 32, 8)
        self.table = np.arange(num_rows * 8, dtype=np.int32).reshape(num_rows, 8)
        self.lengths = np.zeros(num_rows, np.int32)

    def step(self, new: dict[int, list[int]], **options) -> torch.Tensor:
        rows = np.array(list(new), np.int64)
        counts = np.array([len(tokens) for tokens in new.values()], np.int32)
        for row, tokens in new.items():
            start = self.lengths[row]
            self.state.tokens[row, start : start + len(tokens)] = tokens
        batch = StepInput(self.state, self.table, 4, rows, self.lengths[rows], counts, counts)
        logits = self.runner.forward(batch, **options)
        self.lengths[rows] += counts
        return logits.clone()


def _row_by_row(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.stack([row @ b for row in a.astype(dtype)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_logits_do_not_depend_on_the_step(dtype, model_dir, monkeypatch):
    # The interpreter multiplies tiles by numpy, whose BLAS sums a row in an order that depends on its place in the
    # tile; matrix instructions do not. Rows multiplied one by one are as on a GPU.
    monkeypatch.setattr(np, "matmul", _row_by_row)
    limits = {**LIMITS, "dtype": dtype}
    llm = LLM(str(model_dir), backend="triton", batch_invariant=True, graphs="off", **limits)
    tokens, other = [5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24]
    whole = Rows(llm, 1).step({0: tokens})
    single = Rows(llm, 1)
    steps = torch.cat([single.step({0: [token]}) for token in tokens])
    mixed = Rows(llm, 2)
    mixed.step({1: other[:2]})
    parts = torch.cat(
        [mixed.step({0: tokens[:3], 1: other[2:4]})[:3], mixed.step({1: [24], 0: tokens[3:]})[1:]]
    )
    assert torch.equal(steps, whole) and torch.equal(parts, whole)


def test_batch_invariance_is_refused_where_there_is_none(model_dir):
    with pytest.raises(ValueError, match="batch_invariant=True needs backend"):
        LLM(str(model_dir), backend="eager", batch_invariant=True, **LIMITS)


def test_captured_hidden_states_survive_padding(model_dir):
    llms = [LLM(str(model_dir), backend="triton", graphs=mode, **LIMITS) for mode in ("off", "padded")]
    seen = []
    for llm in llms:
        captured = Captured.empty((0, 2), 3, llm.runner.config.hidden_size)
        seen.append((Rows(llm, 2).step({0: [5, 6], 1: [7]}, captured=captured), captured.hidden))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-5)
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-5)


def input_of(counts: list[int], logit_counts: list[int] | None = None) -> StepInput:
    state, sizes = RowState(len(counts), 1024, 8), np.array(counts, np.int32)
    table = np.zeros((len(counts), 256), np.int32)
    wanted = sizes if logit_counts is None else np.array(logit_counts, np.int32)
    return StepInput(state, table, 4, np.arange(len(counts)), np.zeros(len(counts), np.int32), sizes, wanted)


def test_steps_are_padded_to_few_sizes():
    plain = size_of(input_of([1] * 5), None, None, 12)
    assert plain is not None and (plain.rows, plain.tokens, plain.num_logits) == (8, 8, 8)
    chains = size_of(input_of([5] * 9), None, None, 12)
    assert chains is not None and (chains.rows, chains.tokens, chains.num_logits) == (12, 48, 48)
    drafting = size_of(input_of([2, 1, 1], [1, 1, 1]), None, None, 12)
    assert drafting is not None and (drafting.rows, drafting.tokens, drafting.num_logits) == (4, 4, 4)
    assert size_of(input_of([TOKEN_SIZES[-1] + 1]), None, None, 12) is None
    assert size_of(input_of([1] * 13), None, None, 12) is None
    sizes = {
        size_of(input_of([per_row] * rows), None, None, 64)
        for rows in range(1, 65)
        for per_row in range(1, 18)
    }
    assert len(sizes) < 200


def test_triton_needs_a_gpu_or_the_interpreter(model_dir, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(type(knobs.runtime), "interpret", False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: there is no GPU"):
        LLM(str(model_dir), backend="triton", **LIMITS)


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="kv_dtype 'int3'"):
        RunnerOptions(kv_dtype="int3")
    with pytest.raises(ValueError, match="graphs 'on'"):
        RunnerOptions(graphs="on")
