"""Batch invariance: a token's attention has the same bits in a prompt, a decode, a chain, a tree, beside any rows.

Every token of a batch is computed again from a row of its own or with some of those before it, whose keys are the same
numbers: those of its context and, in a tree, of its path.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.trees import Tree, random_tree
from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.ragged import Batch, Shape, broken_kernels, make_batch, split_contexts

from specdec_kernels.paged_attention import kernels, plan, tiles  # isort: skip
from specdec_kernels.paged_attention import triton as op  # isort: skip

NARROW = plan.Tile(64, 32, 4, 1)


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """Tiles of 32 keys, so that short contexts have several."""
    tiles = plan.Tiles(NARROW, NARROW, NARROW)
    for arch in plan.CONFIGS:
        monkeypatch.setitem(plan.CONFIGS, arch, dict.fromkeys((64, 128, 256), tiles))


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch):
    """Interpreted products sum key by key; numpy's own depend on where in a matrix a row lies, no GPU's do."""

    def create_dot(_, a, b, acc, *__):
        total = np.zeros_like(acc.data)
        for place in range(a.data.shape[1]):
            total += a.data[:, place, None] * b.data[place]
        return interpreter.TensorHandle(total + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


class Rows:
    """Rows of a batch, and each token's keys by their index in its row."""

    def __init__(self, rows: list[tuple[int, int]], trees: dict[int, Tree]) -> None:
        self.rows, self.trees = rows, trees
        self.tokens = [(row, place) for row, (_, count) in enumerate(rows) for place in range(count)]

    def keys(self, row: int, place: int) -> list[int]:
        context = self.rows[row][0]
        own = self.trees[row].path(place) if row in self.trees else range(place + 1)
        return [*range(context), *(context + node for node in own)]

    def alone(self, batch: Batch, tokens: list[int], num_queries: int) -> tuple[Batch, Tensor]:
        """A row for each of ``tokens``, with up to ``num_queries`` - 1 of those before it, and where it is itself."""
        device = batch.tensors["q"].device
        picked, keys, counts = [], [], []
        for token in tokens:
            row, place = self.tokens[token]
            indices = self.keys(row, place)
            new = [index - self.rows[row][0] for index in indices][-num_queries:]
            first = self.tokens.index((row, 0))
            queries = [first + node for node in new if node >= 0]
            picked += queries
            counts.append(len(queries))
            keys.append(self._slots(batch, row, indices))
        tensors = {"q": batch.tensors["q"][picked]}
        tensors["query_start"] = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        contexts = [len(slots) - count for slots, count in zip(keys, counts, strict=True)]
        tensors["context_lens"] = torch.tensor(contexts, dtype=torch.int32, device=device)
        width = -(-max(map(len, keys)) // 4) + 40
        tables = torch.arange(len(keys) * width, device=device).flip(0)
        tensors["block_tables"] = tables.view(len(keys), width).int()
        for name, old in batch.tensors.items():
            if name.startswith(("k_", "v_")):
                tensors[name] = self._repack(old, keys, tensors["block_tables"])
        return Batch(tensors, batch.options), tensors["query_start"][1:].long() - 1

    @staticmethod
    def _slots(batch: Batch, row: int, indices: list[int]) -> Tensor:
        size, place = batch.tensors["k_cache"].shape[1], torch.tensor(indices)
        table = batch.tensors["block_tables"][row].cpu().long()
        return table[place // size] * size + place % size

    @staticmethod
    def _repack(cache: Tensor, keys: list[Tensor], tables: Tensor) -> Tensor:
        """A cache in blocks of four with the slots ``keys`` of each row in order."""
        flat = cache.flatten(0, 1).cpu()
        packed = torch.zeros((tables.numel() * 4, *flat.shape[1:]), dtype=torch.uint8).to(flat.dtype)
        for slots, table in zip(keys, tables.cpu().long(), strict=True):
            place = torch.arange(len(slots))
            packed.view(torch.uint8)[table[place // 4] * 4 + place % 4] = flat[slots].view(torch.uint8)
        return packed.view(-1, 4, *flat.shape[1:]).to(cache.device)


def trees_and_prompts() -> Rows:
    rng = np.random.default_rng(0)
    trees = {0: random_tree(rng, 9), 2: random_tree(rng, 33), 3: Tree([-1, 0, 0, 0])}
    return Rows([(61, 9), (0, 40), (20, 33), (94, 4), (7, 3), (70, 1)], trees)


def both(rows: Rows, shape: Shape, device, num_queries: int, stride: int, **options) -> tuple[Tensor, Tensor]:
    """Outputs of every ``stride``-th token in its batch and alone."""
    batch = make_batch(rows.rows, shape, device, rows.trees, **options)
    tokens = list(range(0, len(rows.tokens), stride))[::-1]
    alone, places = rows.alone(batch, tokens, num_queries)
    together = batch.run(op.paged_attention, batch_invariant=True)
    return together[tokens], alone.run(op.paged_attention, batch_invariant=True)[places]


@pytest.mark.parametrize(
    ("dtype", "num_queries"),
    ((torch.float32, 1), (torch.float32, 5), (torch.float16, 3), (torch.bfloat16, 1)),
)
def test_in_any_batch(dtype, num_queries, device):
    together, alone = both(trees_and_prompts(), Shape(1, 3, 16, dtype=dtype), device, num_queries, 4)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("cache_dtype", (torch.int8, torch.float8_e4m3fn), ids=str)
def test_with_quantised_caches_and_soft_cap(cache_dtype, device):
    shape = Shape(1, 2, 16, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    together, alone = both(trees_and_prompts(), shape, device, 1, 5, softcap=3.0)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("window", (None, 20))
def test_with_splits(window, device, monkeypatch):
    split_contexts(monkeypatch, plan, 32)
    together, alone = both(
        trees_and_prompts(), Shape(1, 2, 16, dtype=torch.bfloat16), device, 2, 7, sliding_window=window
    )
    assert torch.equal(together, alone)


def test_with_windows(device):
    together, alone = both(trees_and_prompts(), Shape(1, 2, 16), device, 3, 5, sliding_window=25)
    assert torch.equal(together, alone)


BREAKS = {
    "splits by the row": (
        "    if IS_INVARIANT:\n        start = tl.max",
        "    if False:\n        start = tl.max",
    ),
    "tiles from where a window starts": (" // BLOCK_N * BLOCK_N\n    if IS_SPLIT:", "\n    if IS_SPLIT:"),
    "lines of other paths": ("line // GROUP == place - first", "line // GROUP <= place - first"),
}


@pytest.mark.parametrize("name", (None, *BREAKS))
def test_a_broken_copy_is_noticed(name, device, monkeypatch):
    split_contexts(monkeypatch, plan, 64)
    if name is not None:
        monkeypatch.setattr(op, "kernels", broken_kernels(kernels, tiles, *BREAKS[name]))
    together, alone = both(trees_and_prompts(), Shape(1, 2, 16), device, 1, 7, sliding_window=45)
    assert torch.equal(together, alone) == (name is None)


def test_without_the_mode_the_bits_of_a_tree_differ(device):
    rows = trees_and_prompts()
    batch = make_batch(rows.rows, Shape(1, 2, 16), device, rows.trees)
    alone, places = rows.alone(batch, list(range(0, len(rows.tokens), 5)), 1)
    assert not torch.equal(batch.run(op.paged_attention)[::5], alone.run(op.paged_attention)[places])
