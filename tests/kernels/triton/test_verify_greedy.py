"""``verify_greedy``: every small tree, large ones, ties, NaN, against ``specdec.verify`` and the torch form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from specdec_kernels.verify.reference import verify_greedy as reference
from torch import Tensor

from specdec.tree import Tree
from specdec.verify import verify_greedy_trees
from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken
from tests.kernels.triton.drafts import differing, random_tree

from specdec_kernels.verify import greedy  # isort: skip
from specdec_kernels.verify import triton as op  # isort: skip


def all_parents(max_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Every vector of parents, int32 [trees, max_nodes], and the number of nodes of each."""
    parts, counts = [], []
    for size in range(max_nodes + 1):
        grids = np.meshgrid(*(np.arange(-1, node) for node in range(size)), indexing="ij")
        part = np.stack([grid.ravel() for grid in grids], 1) if size else np.zeros((1, 0), int)
        parts.append(np.pad(part, ((0, 0), (0, max_nodes - size)), constant_values=-7))
        counts += [size] * len(part)
    return np.concatenate(parts).astype(np.int32), np.array(counts, np.int32)


def tokens_of(parents: np.ndarray, counts: np.ndarray, vocab_size: int, seed: int) -> np.ndarray:
    """Random tokens that differ between siblings; something else past a row's nodes."""
    rng = np.random.default_rng(seed)
    firsts = rng.integers(0, vocab_size, (len(parents), parents.shape[1] + 1))
    tokens, rows = np.zeros(parents.shape, np.int64), np.arange(len(parents))
    for node in range(parents.shape[1]):
        ranks = (parents[:, :node] == parents[:, node : node + 1]).sum(1)
        tokens[:, node] = (firsts[rows, parents[:, node].clip(-1) + 1] + ranks) % vocab_size
    return np.where(np.arange(parents.shape[1]) < counts[:, None], tokens, -1)


def test_greedy_walks_all_trees_of_up_to_eight_nodes(device, monkeypatch):
    if runtime.IS_INTERPRETED:  # few programs, each of many rows
        monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(greedy_entries=1 << 16)})
    parents, counts = all_parents(8)
    tokens = tokens_of(parents, counts, 8, 0)
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.standard_normal((40, 8)).astype(np.float32))
    start = rng.integers(0, 40 - 8, len(parents))  # rows may share logits
    args = [torch.from_numpy(a) for a in (tokens, parents, counts, start)]
    outcome = op.verify_greedy(*(a.to(device) for a in (*args, logits)))
    argmax = logits.argmax(1).numpy()[start[:, None] + np.arange(9)]
    path, accepted, next_token = verify_greedy_trees(argmax, tokens, parents, counts)
    assert len(parents) == 46_234 and accepted.max() >= 4
    path[np.arange(8) >= accepted[:, None]] = 0  # means nothing to the host
    assert not differing(outcome, [torch.from_numpy(a) for a in (accepted, path, next_token)]).any()


class Greedy(NamedTuple):
    """What ``verify_greedy`` takes."""

    tokens: Tensor
    parents: Tensor | None
    num_drafted: Tensor
    logit_start: Tensor
    logits: Tensor

    def to(self, device: torch.device) -> Greedy:
        moved: list[Any] = [None if value is None else value.to(device) for value in self]
        return Greedy(*moved)


def greedy_batch(vocab_size: int, dtype: torch.dtype, is_chain: bool, sizes=(64, 0, 14, 5, 1)) -> Greedy:
    """Trees or chains, which the argmax often follows, with logits that are often equal; the last emits nothing."""
    rng = np.random.default_rng(vocab_size)
    trees = [Tree.chain(n) if is_chain else random_tree(rng, n, min(3, vocab_size)) for n in sizes]
    counts = np.array(sizes, np.int32)
    parents = np.full((len(sizes), max(sizes)), -7, np.int32)
    for row, tree in enumerate(trees):
        parents[row, : len(tree)] = tree.parents
    tokens = tokens_of(parents, counts, vocab_size, 2)
    start = (counts + 1).cumsum() - counts - 1
    logits = rng.integers(-4, 4, (int((counts + 1).sum()), vocab_size))
    for row, tree in enumerate(trees):
        for entry, children in enumerate(tree.children):
            if children and rng.random() < 0.9:
                logits[start[row] + entry, tokens[row, rng.choice(children)]] = 5
    start[-1] = -1
    tensors: list[Any] = [torch.from_numpy(values) for values in (tokens, parents, counts, start)]
    if is_chain:
        tensors[1] = None
    return Greedy(*tensors, logits=torch.from_numpy(logits).to(dtype))


@pytest.mark.parametrize("is_chain", (False, True))
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(3, torch.float32), (17, torch.bfloat16), (1000, torch.float16)], ids=str
)
def test_greedy_takes_the_first_of_equal_logits(vocab_size, dtype, is_chain, device, monkeypatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(part=8 if vocab_size < 100 else 256)})
    batch = greedy_batch(vocab_size, dtype, is_chain)
    expected = reference(*batch)
    assert not differing(op.verify_greedy(*batch.to(device)), expected).any()
    assert expected[0].max() >= 2 and expected[2][-1] == -1


def test_greedy_with_nan_and_infinities(device, monkeypatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(part=8)})
    logits = torch.full((6, 20), -torch.inf)
    logits[1, 13] = torch.nan
    logits[1, 2] = torch.inf
    logits[2, 7], logits[2, 15] = torch.inf, torch.inf
    logits[4, 3] = 1.0
    logits[5, 1] = torch.nan
    none = torch.zeros(4, 1, dtype=torch.int64) + 3
    counts = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    args = Greedy(none, None, counts, torch.tensor([0, 1, 2, 4]), logits)
    assert not differing(op.verify_greedy(*args.to(device)), reference(*args)).any()
    assert op.verify_greedy(*args.to(device))[2].tolist() == [0, -1, 7, -1]
    empty = Greedy(none[:0], None, counts[:0], counts[:0].long(), logits)
    assert [len(out) for out in op.verify_greedy(*empty.to(device))] == [0, 0, 0]


def broken_copy(old: str, new: str) -> Any:
    """A copy of the op with broken kernels, and several parts of a small vocabulary."""
    copy: Any = broken(op, '"""', '"""')
    copy.greedy = broken(greedy, old, new)
    copy.CONFIGS = {"default": op.Config(part=8)}
    return copy


@pytest.mark.parametrize(
    "change",
    [
        ("(value > largest) |", "(value >= largest) |"),
        ("entry == child[:, None]", "entry == child[:, None] - 1"),
        (" & (tokens == wanted[:, None])", ""),
        ("entry == num_accepted[:, None]", "entry == num_accepted[:, None] + 1"),
        ("part * BLOCK", "part"),
        ("(token < 0)", "(token > 0)"),
    ],
    ids=("ties", "argmax", "tokens", "path", "part", "nan"),
)
def test_a_broken_greedy_copy_is_noticed(change, device):
    batch = greedy_batch(17, torch.float32, False, sizes=(9, 0, 12, 5, 1))
    copy = broken_copy(*change)
    assert differing(copy.verify_greedy(*batch.to(device)), reference(*batch)).any()
