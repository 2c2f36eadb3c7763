"""Batches of draft chains and trees for the tests of ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.tree import Tree
from tests.verify.chi_square import softmax

LARGEST = 1 - 2**-24
"""The largest uniform that the engine draws."""


class Batch(NamedTuple):
    """Drafts of several rows, as ``verify`` takes them after the rule."""

    tokens: Tensor
    parents: Tensor | None
    num_drafted: Tensor
    logit_start: Tensor
    target_probs: Tensor
    draft_probs: Tensor | None
    draft_start: Tensor | None
    accept_uniforms: Tensor
    residual_uniforms: Tensor

    def to(self, device: torch.device) -> Batch:
        moved: list[Any] = [None if value is None else value.to(device) for value in self]
        return Batch(*moved)

    def deterministic(self) -> Batch:
        return self._replace(draft_probs=None, draft_start=None)


def make_batch(
    trees: list[Tree],
    vocab_size: int,
    seed: int,
    is_chain: bool = False,
    scales: Sequence[float] = (0.3, 1.5, 5.0),
    distances: Sequence[float] = (0.05, 0.5, 2.0),
    has_zeros: bool = True,
) -> Batch:
    """Flat and peaked laws, by ``scales``, drafts by their ``distances`` from the target, some tokens impossible.

    Children are drawn from the draft without replacement.

    What must not be read is NaN, or no token: gaps between rows, draft laws of leaves, tokens past a row's drafts.
    """
    rng = np.random.default_rng(seed)
    width = max(map(len, trees))
    tokens = np.full((len(trees), width), 10**9)
    parents = np.full((len(trees), width), -7, np.int32)
    target_rows, draft_rows, starts = [np.full(vocab_size, np.nan)], [np.full(vocab_size, np.nan)], []
    for row, tree in enumerate(trees):
        starts.append((len(target_rows), len(draft_rows)))
        parents[row, : len(tree)] = tree.parents
        for children in tree.children:
            logits = rng.standard_normal(vocab_size) * rng.choice(scales)
            noisy = logits + rng.standard_normal(vocab_size) * rng.choice(distances)
            zeros = rng.permutation(vocab_size)[: rng.integers(0, vocab_size - max(len(children), 1) + 1)]
            if has_zeros:  # impossible under both laws, but for one token each
                logits[zeros[1:]], noisy[zeros[:1]], noisy[zeros[2:]] = -np.inf, -np.inf, -np.inf
            target_rows.append(softmax(logits))
            draft_rows.append(softmax(noisy) if children else np.full(vocab_size, np.nan))
            keys = np.where(draft_rows[-1] > 0, noisy + rng.gumbel(size=vocab_size), -np.inf)
            tokens[row, list(children)] = np.argsort(-keys)[: len(children)]
        target_rows.append(np.full(vocab_size, np.nan))
    return Batch(
        torch.from_numpy(tokens),
        None if is_chain else torch.from_numpy(parents),
        torch.tensor([len(tree) for tree in trees], dtype=torch.int32),
        torch.tensor([start for start, _ in starts]),
        torch.from_numpy(np.array(target_rows, np.float32)),
        torch.from_numpy(np.array(draft_rows, np.float32)),
        torch.tensor([start for _, start in starts]),
        torch.from_numpy(rng.random((len(trees), width))),
        torch.from_numpy(rng.random(len(trees))),
    )


def row_laws(batch: Batch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Both laws after each entry of a row, [n + 1, V]."""
    assert batch.draft_probs is not None and batch.draft_start is not None
    count, target, draft = (
        int(batch.num_drafted[row]) + 1,
        int(batch.logit_start[row]),
        int(batch.draft_start[row]),
    )
    return batch.target_probs[target : target + count].numpy(), batch.draft_probs[
        draft : draft + count
    ].numpy()


def random_tree(rng: np.random.Generator, size: int, max_children: int) -> Tree:
    """Deep or wide, of no more children than a vocabulary has room for."""
    reach, parents = int(rng.integers(1, 12)), []
    while len(parents) < size:
        parent = int(rng.integers(max(-1, len(parents) - reach), len(parents)))
        if parents.count(parent) < max_children:
            parents.append(parent)
    return Tree(parents)


def differing(outcome: Sequence[Tensor], expected: Sequence[Tensor]) -> np.ndarray:
    """bool [R], the rows in which any of num_accepted, the path or the next token differs."""
    pairs = zip(outcome, expected, strict=True)
    return torch.stack([(a.cpu() != b).reshape(len(b), -1).any(1) for a, b in pairs]).any(0).numpy()
