"""Trees, moved slots and captured layers through both runners: a node's logits are those of its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from specdec_kernels.cpu_decoder import is_available
from specdec_kernels.rms_norm import rms_norm
from specdec_kernels.tolerances import LOGITS, scaled_error
from torch import Tensor

from specdec.model.batch import Captured
from specdec.model.weights import load_model
from specdec.rows import RowState, StepInput
from specdec.runner import EagerRunner, NativeRunner, Runner
from tests.helpers.models import FAMILIES, VOCAB_SIZE, tiny_model_dir, tiny_transformers_model
from tests.kernels.trees import Tree, chain, random_tree

MAX_LEN, BLOCK_SIZE, TOLERANCE = 176, 16, 1e-5
NATIVE_SHAPE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
CPU = torch.device("cpu")


class Rows:
    """Rows of a runner's cache with shuffled blocks, NaN where nothing has been written."""

    def __init__(self, runner: Runner, num_rows: int) -> None:
        per_row = MAX_LEN // BLOCK_SIZE
        order = np.random.default_rng(0).permutation(num_rows * per_row).astype(np.int32)
        self.runner, self.state = runner, RowState(num_rows, MAX_LEN, 0)
        self.block_table, self.lengths = order.reshape(num_rows, per_row), [0] * num_rows
        cache = runner.kv_cache  # type: ignore[attr-defined]
        for part in (*cache.k, *cache.v):
            part.fill_(torch.nan)

    def input(self, new: Mapping[int, Sequence[int]], trees: Mapping[int, Tree]) -> StepInput:
        rows = np.array(list(new), np.int64)
        counts = np.array([len(tokens) for tokens in new.values()], np.int32)
        start = np.array([self.lengths[row] for row in new], np.int32)
        depths, masks = [], []
        for row, tokens in new.items():
            self.state.tokens[row, self.lengths[row] :][: len(tokens)] = tokens
            depths += trees[row].depths if row in trees else range(len(tokens))
            masks.append(trees[row].mask() if row in trees else np.zeros((len(tokens), 2), np.int64))
        options = {"depths": np.array(depths, np.int32), "tree_mask": np.concatenate(masks)} if trees else {}
        return StepInput(self.state, self.block_table, BLOCK_SIZE, rows, start, counts, counts, **options)

    def step(
        self, new: Mapping[int, Sequence[int]], trees: Mapping[int, Tree] | None = None, **options
    ) -> list[Tensor]:
        """Feed tokens to some rows; logits of each. Rows in ``trees`` keep their lengths."""
        logits = self.runner.forward(self.input(new, trees or {}), **options)
        for row, tokens in new.items():
            self.lengths[row] += 0 if trees and row in trees else len(tokens)
        return list(logits.split([len(tokens) for tokens in new.values()]))

    def accept(self, row: int, path: Sequence[int]) -> None:
        """Keep these tokens of the row's last tree."""
        start = self.lengths[row]
        kept = start + np.array([path, range(len(path))], np.int64)
        slots = self.block_table[row, kept // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + kept % BLOCK_SIZE
        self.runner.move_slots(*slots)
        self.lengths[row] += len(path)


MakeRunner = Callable[[int], Runner]  # by the number of rows


@pytest.fixture(scope="module", params=[*FAMILIES, "native"])
def make_runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    """Every family on the eager backend in float32, one on the native."""
    path, name = tmp_path_factory.mktemp(request.param), request.param
    if name != "native":
        model = load_model(tiny_model_dir(name, path, seed=3), dtype=torch.float32)
        return lambda rows: EagerRunner(model, torch.float32, rows * MAX_LEN // BLOCK_SIZE, BLOCK_SIZE, CPU)
    if not is_available()[0]:
        pytest.skip(is_available()[1])
    native = load_model(tiny_model_dir("gemma3_text", path, seed=3, **NATIVE_SHAPE), dtype=torch.bfloat16)
    return lambda rows: NativeRunner(native, rows * MAX_LEN // BLOCK_SIZE, BLOCK_SIZE)


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng([seed, count]).integers(VOCAB_SIZE, size=count).tolist()


def alone(make_runner: MakeRunner, tokens: Sequence[int]) -> Tensor:
    return Rows(make_runner(1), 1).step({0: tokens})[0]


def assert_same(runner: Runner, actual: Tensor, expected: Tensor) -> None:
    if runner.backend == "native":
        assert torch.equal(actual, expected)
    else:
        assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("seed", range(2))
def test_nodes_equal_their_paths(make_runner: MakeRunner, seed: int) -> None:
    """Small and large trees beside a prefill chunk, a decode and a chain with masks of its own."""
    rng = np.random.default_rng(seed)
    trees = {row: random_tree(rng, size) for row, size in enumerate((2, 4, 9, 31, 33, 65, 128))} | {
        7: chain(6)
    }
    contexts = [random_tokens(n, n) for n in rng.permutation([1, 15, 16, 17, 31, 32, 40, 22, 30, 3]).tolist()]
    tokens = {row: random_tokens(len(tree), row) for row, tree in trees.items()}
    rows = Rows(make_runner(10), 10)
    rows.step(dict(enumerate(contexts)))
    new = {8: random_tokens(50, 8), **tokens, 9: [7]}
    for (row, own), actual in zip(new.items(), rows.step(new, trees), strict=True):
        tree = trees.get(row, chain(len(own)))
        expected = torch.full_like(actual, torch.nan)
        for leaf in rng.permutation(tree.leaves)[:6].tolist():
            path = tree.path(leaf)
            plain = alone(make_runner, [*contexts[row], *(own[node] for node in path)])
            expected[path] = plain[len(contexts[row]) :]
        checked = ~expected.isnan().any(1)
        assert_same(rows.runner, actual[checked], expected[checked])


def test_decoding_goes_on_from_an_accepted_path(make_runner: MakeRunner) -> None:
    rng = np.random.default_rng(4)
    rows, known = Rows(make_runner(1), 1), random_tokens(29, 0)
    rows.step({0: known})
    for size in (12, 40, 1):
        tree, tokens = random_tree(rng, size), random_tokens(size, size)
        rows.step({0: tokens}, {0: tree})
        path = tree.path(int(rng.choice(tree.leaves)))
        rows.accept(0, path)
        known += [tokens[node] for node in path]
    more = random_tokens(4, 1)
    decoded = torch.cat([rows.step({0: [token]})[0] for token in more])
    assert_same(rows.runner, decoded, alone(make_runner, [*known, *more])[-4:])


def test_a_chain_with_masks_is_a_causal_chain(make_runner: MakeRunner) -> None:
    context, tokens = random_tokens(20, 0), random_tokens(9, 1)
    plain, masked = Rows(make_runner(1), 1), Rows(make_runner(1), 1)
    plain.step({0: context})
    masked.step({0: context})
    expected = plain.step({0: tokens})[0]
    assert torch.equal(masked.step({0: tokens}, {0: chain(9)})[0], expected)


def test_a_missing_ancestor_is_noticed(make_runner: MakeRunner) -> None:
    tree, rows = Tree([-1, 0, 1, 1]), Rows(make_runner(1), 1)
    rows.step({0: random_tokens(20, 0)})
    batch = rows.input({0: random_tokens(4, 1)}, {0: tree})
    expected = rows.runner.forward(batch)
    assert batch.tree_mask is not None
    batch.tree_mask[3, 0] &= ~0b10
    actual = rows.runner.forward(batch)
    assert torch.equal(actual[:3], expected[:3])
    assert (actual[3] - expected[3]).abs().max() > 1e-2
    batch.tree_mask[3, 0] = 0b111
    with pytest.raises(AssertionError, match="itself"):
        rows.runner.forward(batch)


def test_no_moves_are_no_call(make_runner: MakeRunner) -> None:
    runner, none = make_runner(1), np.zeros(0, np.int64)
    del runner.kv_cache  # type: ignore[attr-defined]
    runner.move_slots(none, none)


def test_captured_layers_are_those_of_transformers(tmp_path: Path) -> None:
    reference = tiny_transformers_model("llama", seed=3)
    model = load_model(tiny_model_dir("llama", tmp_path, seed=3), dtype=torch.float32)
    runner = EagerRunner(model, torch.float32, MAX_LEN // BLOCK_SIZE, BLOCK_SIZE, CPU)
    tokens, last = random_tokens(40, 0), model.config.num_layers - 1
    captured = Captured.empty((2, last, 0), len(tokens), model.config.hidden_size)
    logits = Rows(runner, 1).step({0: tokens}, captured=captured)[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        for actual, layer in zip(captured.hidden, captured.layers, strict=True):
            if layer == last:  # theirs is normalised
                normed = rms_norm(actual, reference.model.norm.weight, model.config.norm_eps)
                assert (normed - expected[-1][0]).abs().max() <= 1e-4
                assert torch.equal(runner.decoder.logits(actual), logits)
            else:
                assert (actual - expected[layer + 1][0]).abs().max() <= 1e-4


@pytest.mark.skipif(not is_available()[0], reason=is_available()[1])
@pytest.mark.parametrize("layers", [None, [0, 3]])
def test_both_backends_capture_the_same(tmp_path: Path, layers: list[int] | None) -> None:
    model = load_model(tiny_model_dir("llama", tmp_path, seed=3, **NATIVE_SHAPE), dtype=torch.bfloat16)
    num_blocks, tree = MAX_LEN // BLOCK_SIZE, random_tree(np.random.default_rng(0), 20)
    eager = EagerRunner(model, torch.float32, num_blocks, BLOCK_SIZE, CPU)
    hidden = []
    for runner in (eager, NativeRunner(model, num_blocks, BLOCK_SIZE)):
        rows = Rows(runner, 1)
        rows.step({0: random_tokens(30, 0)}, layers=layers)
        captured = Captured.empty((0, 3), len(tree), model.config.hidden_size)
        rows.step({0: random_tokens(20, 1)}, {0: tree}, captured=captured, layers=layers)
        hidden.append(captured.hidden)
        with pytest.raises(AssertionError, match="not all among"):
            rows.step({0: [1]}, layers=[0, 1], captured=Captured.empty((3,), 1, model.config.hidden_size))
    for native, expected in zip(hidden[1], hidden[0], strict=True):
        assert scaled_error(native, expected) <= LOGITS[torch.bfloat16]
