"""``tree_build``: every choice, ties included, is that of ``specdec.tree``, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from specdec_kernels.tree_build import reference
from torch import Tensor

import specdec.tree as host
from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken

from specdec_kernels.tree_build import kernels  # isort: skip
from specdec_kernels.tree_build import triton as op  # isort: skip

SMALL = op.Config(block=32, others=16, compress=32, entries=64)
"""Several programs and rounds even for a few candidates."""


@pytest.fixture(params=("real", "small"))
def pieces(request, monkeypatch: pytest.MonkeyPatch):
    """Blocks as they are, and small ones."""
    if request.param == "small":
        monkeypatch.setattr(op, "CONFIGS", {"default": SMALL})


def children(rng: np.random.Generator, num_rows: int, num_parents: int, num_children: int):
    """Tokens and log-probabilities that are often equal, sometimes of no child, some rounded to just above 0."""
    tokens = rng.integers(0, 50, (num_rows, num_parents, num_children))
    logprobs = -rng.integers(0, 6, tokens.shape).astype(np.float32) / 2
    logprobs[rng.random(tokens.shape) < 0.15] = -np.inf
    logprobs[rng.random(tokens.shape) < 0.1] = 1e-4
    logprobs[rng.random(tokens.shape) < 0.3] -= np.float32(rng.random())
    return tokens, logprobs


def grow_all(module, device, seed: int, num_rows=3, num_children=4, width=5, depth=4):
    """Levels of ``module`` and of the host, from the same children."""
    rng = np.random.default_rng(seed)
    levels, expected = [], []
    for _ in range(depth):
        num_parents = expected[-1].beam.shape[1] if expected else 1
        tokens, logprobs = children(rng, num_rows, num_parents, num_children)
        expected.append(host.grow(expected[-1] if expected else None, tokens, logprobs, width))
        below = levels[-1] if levels else None
        tensors = (torch.from_numpy(values).to(device) for values in (tokens, logprobs))
        levels.append(module.grow(below, *tensors, width))
    return levels, expected


def same(actual: Tensor, expected: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit but that of a zero's sign."""
    values = actual.numpy(force=True)
    return (
        values.dtype == expected.dtype and values.shape == expected.shape and np.array_equal(values, expected)
    )


def same_levels(levels, expected) -> bool:
    """Parents are places in their level for the host and among all candidates for the op."""
    before = 0
    for level, wanted in zip(levels, expected, strict=True):
        parents = np.where(wanted.parents < 0, -1, wanted.parents + before)
        before = level.start
        fields = (
            ("tokens", wanted.tokens),
            ("scores", wanted.scores),
            ("parents", parents),
            ("beam", wanted.beam),
        )
        if not all(same(getattr(level, name), values) for name, values in fields):
            return False
    return True


def same_trees(trees, wanted: host.DynamicTrees, levels, expected) -> bool:
    used = np.arange(wanted.tokens.shape[1]) < wanted.counts[:, None]
    starts = np.array([level.start for level in levels])
    candidates = np.where(used, starts[wanted.level] + wanted.place, 0)
    scores = np.concatenate([level.scores for level in expected], axis=1)
    scores = np.where(used, np.take_along_axis(scores, candidates, axis=1), 0.0)
    pairs = (
        (trees.parents, wanted.parents),
        (trees.tokens, wanted.tokens),
        (trees.counts, wanted.counts),
        (trees.candidates, candidates),
        (trees.scores, scores),
    )
    return all(same(actual, values) for actual, values in pairs)


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("shape", ((1, 1, 1, 2), (3, 4, 5, 3), (2, 8, 10, 3), (2, 3, 40, 3)), ids=str)
def test_levels_and_trees_are_the_hosts(shape, seed, device, pieces):
    for module in (op, reference):
        levels, expected = grow_all(module, device, seed, *shape)
        assert same_levels(levels, expected)
        for size in (0, 7, 31, 300):
            trees = module.rerank(levels, size)
            assert same_trees(trees, host.rerank(expected, size), levels, expected)
            depths, masks = op.pack_trees(trees.parents[:, :127], trees.counts.clamp(max=127))
            assert (depths <= shape[3]).all()
            if size <= 31:
                wanted = host.pack_trees(trees.parents.numpy(force=True), trees.counts.numpy(force=True))
                assert same(depths, wanted[0]) and same(masks, wanted[1])


def test_rows_may_have_sizes_of_their_own(device, pieces):
    levels, expected = grow_all(op, device, 2)
    sizes = np.array([0, 9, 40], np.int32)
    trees = op.rerank(levels, 12, torch.from_numpy(sizes).to(device))
    assert trees.counts.tolist()[:2] == [0, 9] and int(trees.counts[2]) <= 12
    for row, size in enumerate(sizes.tolist()):
        alone = host.rerank(expected, min(size, 12))
        count = int(alone.counts[row])
        assert int(trees.counts[row]) == count
        assert trees.tokens[row, :count].tolist() == alone.tokens[row, :count].tolist()
        assert trees.parents[row, :count].tolist() == alone.parents[row, :count].tolist()
    on_host = reference.rerank([to_cpu(level) for level in levels], 12, torch.from_numpy(sizes))
    for name in ("parents", "tokens", "counts", "candidates", "scores"):
        assert same(getattr(trees, name), getattr(on_host, name).numpy())


def to_cpu(level: reference.Level) -> reference.Level:
    return reference.Level(
        level.tokens.cpu(), level.scores.cpu(), level.parents.cpu(), level.beam.cpu(), level.start
    )


def test_a_tree_of_equal_scores_is_cut_from_the_right(device):
    """All log-probabilities are 0: of equal candidates the shallow and then the left ones stay."""
    zeros, level = torch.zeros(1, 1, 3), None
    levels = []
    for num_parents in (1, 2, 2):
        tokens = torch.arange(num_parents * 3).reshape(1, num_parents, 3)
        level = op.grow(level, tokens.to(device), zeros.expand(1, num_parents, 3).to(device), 2)
        levels.append(level)
    trees = op.rerank(levels, 7)
    assert trees.candidates.tolist() == [list(range(7))]
    assert trees.parents.tolist() == [[-1, -1, -1, 0, 0, 0, 1]]


def test_no_child_where_the_log_probability_is_nan(device):
    logprobs = torch.tensor([[[-1.0, torch.nan, -2.0]]]).to(device)
    level = op.grow(None, torch.tensor([[[5, 6, 7]]]).to(device), logprobs, 3)
    assert level.scores.tolist() == [[-1.0, -torch.inf, -2.0]] and level.beam.tolist() == [[0, 2, 1]]
    assert op.rerank([level], 3).tokens.tolist() == [[5, 7, 0]]


def test_low_precision_scores_are_summed_in_float64(device):
    rng = np.random.default_rng(3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        levels, expected = [], []
        for num_parents in (1, 4):
            tokens = torch.from_numpy(rng.integers(0, 9, (2, num_parents, 4)))
            logprobs = torch.from_numpy(-rng.random((2, num_parents, 4)) * 8).to(dtype)
            for module, into in ((op, levels), (reference, expected)):
                into.append(
                    module.grow(into[-1] if into else None, tokens.to(device), logprobs.to(device), 4)
                )
        assert torch.equal(levels[1].scores, expected[1].scores) and torch.equal(
            levels[1].beam, expected[1].beam
        )


def test_nothing_to_build(device):
    tokens = torch.zeros(0, 1, 4, dtype=torch.int64, device=device)
    level = op.grow(None, tokens, tokens.float(), 2)
    assert level.beam.shape == (0, 2)
    assert op.rerank([level], 5).tokens.shape == (0, 5)
    depths, masks = op.pack_trees(tokens[:, 0].int(), torch.zeros(0, dtype=torch.int32, device=device))
    assert depths.shape == (0, 4) and masks.shape == (0, 5, 2)


def test_what_does_not_fit_is_said():
    tokens = torch.zeros(1, 1, 4, dtype=torch.int64)
    for module in (op, reference):
        with pytest.raises(ValueError, match="plus the children"):
            module.grow(None, tokens.expand(1, 2, 4), tokens.expand(1, 2, 4).float(), 2)
        with pytest.raises(ValueError, match="width=0"):
            module.grow(None, tokens, tokens.float(), 0)
        with pytest.raises(ValueError, match="at least one level"):
            module.rerank([], 3)
        with pytest.raises(ValueError, match="at most 127"):
            module.pack_trees(torch.zeros(1, 128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def all_parents(max_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Every vector of parents, int32 [trees, max_nodes], and the number of nodes of each."""
    vectors = [
        vector
        for size in range(max_nodes + 1)
        for vector in itertools.product(*(range(-1, node) for node in range(size)))
    ]
    padded = np.full((len(vectors), max_nodes), 99, np.int32)
    for row, vector in enumerate(vectors):
        padded[row, : len(vector)] = vector
    return padded, np.array([len(vector) for vector in vectors], np.int32)


def test_masks_of_all_trees_of_up_to_eight_nodes(device, monkeypatch):
    if runtime.IS_INTERPRETED:  # few programs, each of many rows
        monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(entries=1 << 16)})
    parents, counts = all_parents(8)
    depths, masks = op.pack_trees(torch.from_numpy(parents).to(device), torch.from_numpy(counts).to(device))
    expected = host.pack_trees(parents, counts)
    assert len(parents) == 46_234
    assert same(depths, expected[0]) and same(masks, expected[1])


def large_trees(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random trees of up to 127 nodes, a chain among them, in int32 [6, 127]."""
    rng = np.random.default_rng(seed)
    counts = np.array([127, 64, 63, 1, 0, 127], np.int32)
    parents = np.full((6, 127), 99, np.int32)
    for row, count in enumerate(counts):
        reach = int(rng.integers(1, 30))
        parents[row, :count] = [rng.integers(max(-1, node - reach), node) for node in range(count)]
    parents[5] = np.arange(-1, 126)
    return parents, counts


def test_masks_of_large_trees(device, pieces):
    parents, counts = large_trees(4)
    expected = host.pack_trees(parents, counts)
    for module in (op, reference):
        depths, masks = module.pack_trees(
            torch.from_numpy(parents).to(device), torch.from_numpy(counts).to(device)
        )
        assert same(depths, expected[0]) and same(masks, expected[1])


def broken_copy(old: str, new: str) -> Any:
    copy: Any = broken(op, '"""', '"""')
    copy.kernels = broken(kernels, old, new)
    copy.CONFIGS = {"default": SMALL}
    return copy


@pytest.mark.parametrize(
    "change",
    [
        ("(other == key) &", "(other != key) &"),
        ("other_place[None, :] < place[:, None]", "other_place[None, :] > place[:, None]"),
        ("tl.where(logprob > 0.0, 0.0, logprob)", "logprob"),
        ("beam_ptr + place // num_children", "beam_ptr + place % num_children"),
        ("previous_start + tl.load", "tl.load"),
        ('(score > float("-inf"))', '(score >= float("-inf"))'),
        ("count + tl.cumsum", "tl.cumsum"),
        ("mask=chosen & (above >= 0), other=-1", "mask=chosen & (above > 0), other=-1"),
        ("unused = (rest >= count)", "unused = (rest > count)"),
    ],
    ids="ties side positive parent start missing count root padding".split(),
)
def test_a_broken_copy_is_noticed(change, device):
    copy = broken_copy(*change)
    agrees = same_levels(*grow_all(copy, device, 0, depth=1))
    if agrees:  # else the beam may lead out of memory
        levels, expected = grow_all(copy, device, 0)
        agrees = same_levels(levels, expected)
        for size in (9, 60):
            wanted = host.rerank(expected, size)
            agrees = agrees and same_trees(copy.rerank(levels, size), wanted, levels, expected)
    assert not agrees


@pytest.mark.parametrize(
    "change",
    [
        ("(at & 63)", "at"),
        ("low = used", "low = inside"),
        ("at >= 64", "at > 64"),
        ("(at > 0) & (at < 64)", "at > 0"),
    ],
    ids=("shift", "unused", "second word", "first word"),
)
def test_a_broken_copy_packs_other_masks(change, device):
    parents, counts = large_trees(4)
    tensors = (torch.from_numpy(values).to(device) for values in (parents, counts))
    masks = broken_copy(*change).pack_trees(*tensors)[1]
    assert not same(masks, host.pack_trees(parents, counts)[1])
