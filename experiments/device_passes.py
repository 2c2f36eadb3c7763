"""Passes of the target to be timed: which sizes there are, which of them a budget affords, and the timing itself.

Rows hold KV blocks of their own, whose content does not matter: what a pass takes depends on sizes alone. So an
engine must not hold any of the runner's blocks meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sim.step_features import StepFeatures
from specdec.rows import RowState, StepInput
from specdec.runner import Runner
from specdec.scheduler import SchedulerConfig
from specdec.scheduler.plan import IntArray
from specdec.tree import pack_trees

MIN_SIZES = 4
"""Of each kind, however slow the device."""
MIN_ROUNDS = 5
_PASS_SHARE = 1 / 200  # of the budget that one pass may take
_LOGITS_BYTES = 2**29
_CONTEXTS = (16, 64, 256, 1024, 4096, 16384, 65536)
_PER_ROW = (2, 4, 8, 16, 32, 64)
_TREES = (4, 16, 64)


class Size(NamedTuple):
    """``rows`` of so many ``tokens`` behind so much ``context`` each; ``head`` has logits of all, others of none; of a
    ``tree`` the first token is the root, and every token has two children as long as they last."""

    kind: str
    rows: int
    tokens: int
    context: int

    @property
    def total(self) -> int:
        return self.rows * self.tokens

    @property
    def work(self) -> float:
        """What orders the sizes of a kind: tokens, and KV entries as a small part of one."""
        return self.total * (1.0 + (self.context + self.tokens) / 500.0)


class WholeStep(NamedTuple):
    """A random step: int32 [R] contexts and tokens; of the first ``decoding`` rows all tokens have logits, the row
    behind them, if there is one, is a prompt's chunk."""

    contexts: IntArray
    counts: IntArray
    decoding: int

    @property
    def logits(self) -> IntArray:
        return np.where(np.arange(self.counts.size) < self.decoding, self.counts, 1).astype(np.int32)

    @property
    def features(self) -> StepFeatures[float]:
        """Without drafting, which is no part of the target's pass."""
        rows, total = self.decoding, int(self.counts.sum())
        decoded, chunk = int(self.counts[:rows].sum()), int(self.counts[rows:].sum())
        pairs = float(np.dot(self.counts[rows:], self.contexts[rows:] + 0.5 * (self.counts[rows:] + 1.0)))
        context = int(self.contexts[:rows].sum())
        logits = int(self.logits.sum())
        return StepFeatures(total, logits, rows, decoded, context, chunk, pairs, 0, 0, 0)


class DevicePasses:
    """Times passes of ``runner`` within the limits of an engine; its KV cache is overwritten."""

    def __init__(self, runner: Runner, limits: SchedulerConfig) -> None:
        self._runner, self._limits = runner, limits
        self.max_tokens = min(limits.max_num_batched_tokens, limits.num_blocks)
        self.longest = min(limits.max_model_len, limits.num_blocks * limits.block_size) - 1
        vocab = runner.config.vocab_size
        self._max_logits = max(1, min(self.max_tokens, _LOGITS_BYTES // (4 * vocab)))
        self._state = RowState(self.max_tokens, limits.max_model_len, 0)
        self._state.tokens[:] = np.random.default_rng(0).integers(0, vocab, self._state.tokens.shape)
        # What nobody wrote may not be in memory yet.
        blocks = np.arange(1, limits.num_blocks)
        self.seconds(np.ones(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.int32))
        runner.copy_blocks(np.stack([np.zeros_like(blocks), blocks], axis=1).astype(np.int32))

    def grid(self) -> list[Size]:
        """All sizes that the limits allow."""
        return [size for size in dict.fromkeys(self._grid()) if self._fits(size)]

    def _grid(self) -> Iterator[Size]:
        totals, rows = _powers(self.max_tokens), _powers(self._limits.max_num_seqs)
        between = [3 * total // 2 for total in totals if total >= 2 and 3 * total // 2 <= self.max_tokens]
        contexts = sorted({*(one for one in _CONTEXTS if one < self.longest), self.longest - 1})
        yield from (Size("dense", total, 1, 0) for total in sorted({*totals, *between}))
        yield from (Size("head", total, 1, 0) for total in totals if total <= self._max_logits)
        yield from (Size("decode", count, 1, context) for count in rows for context in contexts)
        for count, tokens, context in itertools.product(rows[::2], _PER_ROW, contexts[::2]):
            yield Size("verify", count, tokens, context)
        for count, tokens, context in itertools.product(rows[::2], _TREES, contexts[::2]):
            yield Size("tree", count, tokens, context)
        for chunk, context in itertools.product([total for total in totals if total >= 4], (0, *contexts)):
            yield Size("prefill", 1, chunk, min(context, self.longest - chunk))

    def _fits(self, size: Size) -> bool:
        blocks = size.rows * -(-(size.context + size.tokens) // self._limits.block_size)
        is_short = size.context >= 0 and size.context + size.tokens <= self.longest
        return is_short and blocks <= self._limits.num_blocks and size.total <= self.max_tokens

    def affordable(self, budget_s: float) -> list[Size]:
        """The sizes of which one pass takes no more than a small share of ``budget_s`` and one round no more than a
        fifth, the smallest ones, and the single tokens that all of these are compared with. They are warm then."""
        taken: dict[Size, float] = {}
        grid = self.grid()
        for _, sizes in itertools.groupby(grid, key=lambda size: size.kind):
            for number, size in enumerate(sorted(sizes, key=lambda size: size.work)):
                taken[size] = min(self.size_s(size) for _ in range(2))
                if number >= MIN_SIZES and taken[size] > _PASS_SHARE * budget_s:
                    break
        while sum(taken.values()) > budget_s / MIN_ROUNDS:
            kinds = Counter(size.kind for size in taken)
            totals = {size.total for size in taken if size.kind != "dense"}
            spare = [
                size
                for size in taken
                if kinds[size.kind] > MIN_SIZES and not (size.kind == "dense" and size.total in totals)
            ]
            if not spare:
                break
            del taken[max(spare, key=taken.__getitem__)]
        alone = {Size("dense", size.total, 1, 0) for size in taken}
        for size in sorted(alone - taken.keys()):
            taken[size] = min(self.size_s(size) for _ in range(2))
        return [size for size in grid if size in taken]

    def size_s(self, size: Size) -> float:
        counts = np.full(size.rows, size.tokens, np.int32)
        logits = counts if size.kind == "head" else np.zeros_like(counts)
        contexts = np.full(size.rows, size.context, np.int32)
        return self.seconds(counts, contexts, logits, is_tree=size.kind == "tree")

    def step_s(self, step: WholeStep) -> float:
        return self.seconds(step.counts, step.contexts, step.logits)

    def seconds(
        self, counts: IntArray, contexts: IntArray, logits: IntArray, *, is_tree: bool = False
    ) -> float:
        """One pass of int32 [R] tokens behind contexts, the last of each row with so many logits; chains, or trees,
        which all have as many tokens."""
        size = self._limits.block_size
        widths = -(-(contexts + counts) // size)
        first = np.cumsum(widths) - widths
        table = (first[:, None] + np.arange(int(widths.max()))) % self._limits.num_blocks
        self._wait()
        start_s = time.perf_counter()
        rows = np.arange(counts.size)
        depths, masks = _binary_trees(counts.size, int(counts[0]) - 1) if is_tree else (None, None)
        batch = StepInput(
            self._state,
            table.astype(np.int32),
            size,
            rows,
            contexts,
            counts,
            logits,
            depths=depths,
            tree_mask=masks,
        )
        self._runner.forward(batch)
        self._wait()
        return time.perf_counter() - start_s

    def _wait(self) -> None:
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize(self._runner.device)

    def whole_steps(self, number: int, sizes: Sequence[Size], rng: np.random.Generator) -> list[WholeStep]:
        """Random steps of decoding rows, with drafts or without, every other one beside a prompt's chunk; no larger
        than the measured ``sizes``."""
        most_tokens = max(size.rows for size in sizes if size.kind == "dense")
        most_rows = max(size.rows for size in sizes if size.kind == "decode")
        most_entries = max(size.rows * size.context for size in sizes if size.kind == "decode")
        most_chunk = max(size.tokens for size in sizes if size.kind == "prefill")
        steps: list[WholeStep] = []
        while len(steps) < number:
            rows = _log_uniform(rng, 1, most_rows)
            per_row = int(rng.choice((1, 1, 2, 5)))
            context = _log_uniform(rng, 1, max(1, min(self.longest - per_row, most_entries // rows)))
            contexts = rng.integers(1, context + 1, rows)
            counts = np.full(rows, per_row)
            if len(steps) % 2:
                chunk = _log_uniform(rng, 2, most_chunk)
                contexts = np.append(contexts, rng.integers(0, max(1, self.longest - chunk)))
                counts = np.append(counts, chunk)
            step = WholeStep(contexts.astype(np.int32), counts.astype(np.int32), rows)
            if self._holds(step, most_tokens):
                steps.append(step)
        return steps

    def _holds(self, step: WholeStep, most_tokens: int) -> bool:
        blocks = int((-(-(step.contexts + step.counts) // self._limits.block_size)).sum())
        few_logits = int(step.logits.sum()) <= self._max_logits
        return blocks <= self._limits.num_blocks and int(step.counts.sum()) <= most_tokens and few_logits


@functools.cache
def _binary_trees(rows: int, nodes: int) -> tuple[IntArray, NDArray[np.int64]]:
    """Depths int32 [T] and masks int64 [T, 2] of ``rows`` roots with binary trees of so many nodes."""
    parents = np.tile((np.arange(1, nodes + 1, dtype=np.int32) - 1) // 2 - 1, (rows, 1))
    depths, masks = pack_trees(parents, np.full(rows, nodes, np.int32))
    roots = np.zeros((rows, 1), np.int32)
    return np.concatenate([roots, depths], axis=1).ravel(), masks.reshape(rows * (nodes + 1), 2)


def _powers(most: int) -> list[int]:
    powers: NDArray[np.int64] = 2 ** np.arange(most.bit_length())
    return powers.tolist()


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return round(float(np.exp(rng.uniform(np.log(low), np.log(max(low, high))))))
