"""A drafter without an engine: rows of tokens, and a target that is a function from a prefix to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from specdec.drafter.base import Draft, Drafter, Verified
from specdec.rows import RowState
from specdec.scheduler import SamplingParams
from specdec.scheduler.plan import StepOutcome, StepPlan

LogitsOf = Callable[[list[int]], np.ndarray]


class Rig:
    """Drives ``drafter`` as the engine does: propose, verify greedily, emit, observe.

    Args:
        logits_of: the target, float [vocab_size] after a prefix.
    """

    def __init__(
        self, drafter: Drafter, logits_of: LogitsOf | None = None, vocab_size: int = 8, max_rows: int = 4
    ):
        self.drafter, self.vocab_size = drafter, vocab_size
        self.logits_of = logits_of or (lambda prefix: np.zeros(vocab_size))
        self.state = RowState(max_rows, 512, 32)
        self.request_ids = np.full(max_rows, -1, np.int64)
        target = SimpleNamespace(backend="eager", config=SimpleNamespace(vocab_size=vocab_size))
        drafter.bind(SimpleNamespace(state=self.state, target=target))  # pyright: ignore[reportArgumentType]

    def load(
        self, row: int, request_id: int, tokens: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> None:
        """A request enters ``row``, new or resumed."""
        array = np.array(tokens, np.int32)
        self.state.load(row, array, array.size, SamplingParams(temperature=temperature), seed)
        self.request_ids[row] = request_id

    def known(self, row: int) -> list[int]:
        return self.state.known(row).tolist()

    def plan(self, rows: Sequence[int], num_drafts: Sequence[int]) -> StepPlan:
        size = len(rows)
        return StepPlan(
            step=0,
            now_s=0.0,
            rows=np.array(rows, np.int64),
            request_ids=self.request_ids[list(rows)],
            context=self.state.num_known[list(rows)] - 1,
            num_new=np.ones(size, np.int32),
            num_drafts=np.array(num_drafts, np.int32),
            emits=np.ones(size, np.bool_),
        )

    def propose(self, rows: Sequence[int], num_drafts: Sequence[int]) -> Draft:
        """A draft, checked to be one."""
        draft = self.drafter.propose(self.plan(rows, num_drafts))
        check(draft, num_drafts, self.vocab_size)
        return draft

    def step(
        self, rows: Sequence[int], num_drafts: Sequence[int], finished: Sequence[int] = ()
    ) -> tuple[Draft, list[int]]:
        """One step, at whose end the ``finished`` rows end; the draft and how many tokens of each were accepted."""
        plan, draft = self.plan(rows, num_drafts), self.propose(rows, num_drafts)
        self.state.write_drafts(plan.rows, draft.tokens)
        paths, emitted, logits, starts = [], [], [], []
        for index, row in enumerate(rows):
            starts.append(len(logits))
            prefixes = [self.known(row), *(self.known(row) + path for path in branches(draft, index))]
            laws = [self.logits_of(prefix) for prefix in prefixes]
            path, tokens, node = [], [], -1
            while node is not None:
                tokens.append(int(np.argmax(laws[node + 1])))
                node = child(draft, index, node, tokens[-1])
                path += [] if node is None else [node]
            logits += laws
            paths.append(path)
            emitted.append(tokens)
        counts = np.array([len(tokens) for tokens in emitted], np.int32)
        table = np.zeros((len(rows), int(counts.max())), np.int64)
        for index, tokens in enumerate(emitted):
            table[index, : len(tokens)] = tokens
        self.state.append(plan.rows, table, counts)
        path_table = np.zeros(draft.tokens.shape, np.int64)
        for index, path in enumerate(paths):
            path_table[index, : len(path)] = path
        ended = np.isin(plan.rows, np.array(finished, np.int64))
        outcome = StepOutcome(draft.num_drafted, counts - 1, counts, ended)
        verified = Verified(
            draft=draft,
            logits=torch.tensor(np.array(logits), dtype=torch.float32),
            logit_start=np.array(starts, np.int64),
            path=path_table,
            query_start=np.append(0, np.cumsum(draft.num_drafted + 1)).astype(np.int32),
        )
        self.drafter.observe(plan, outcome, verified)
        return draft, (counts - 1).tolist()


def parents_of(draft: Draft, index: int) -> list[int]:
    count = int(draft.num_drafted[index])
    return list(range(-1, count - 1)) if draft.parents is None else draft.parents[index, :count].tolist()


def branches(draft: Draft, index: int) -> list[list[int]]:
    """The tokens from the root down to each node of a row."""
    paths: list[list[int]] = []
    for parent, token in zip(parents_of(draft, index), draft.tokens[index].tolist(), strict=False):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def child(draft: Draft, index: int, node: int, token: int) -> int | None:
    for place, (parent, drafted) in enumerate(
        zip(parents_of(draft, index), draft.tokens[index].tolist(), strict=False)
    ):
        if parent == node and drafted == token:
            return place
    return None


def check(draft: Draft, num_drafts: Sequence[int], vocab_size: int) -> None:
    """The invariants of every draft."""
    assert (draft.num_drafted <= np.array(num_drafts)).all()
    assert draft.tokens.dtype == np.int64 and draft.num_drafted.dtype == np.int32
    for index, count in enumerate(draft.num_drafted.tolist()):
        tokens, parents = draft.tokens[index, :count].tolist(), parents_of(draft, index)
        assert all(0 <= token < vocab_size for token in tokens)
        assert all(-1 <= parent < node for node, parent in enumerate(parents))
        assert len(set(zip(parents, tokens, strict=True))) == count, "siblings have different tokens"
        if draft.confidence is not None:
            confidence = draft.confidence[index, :count]
            assert ((confidence > 0.0) & (confidence <= 1.0)).all()
