"""From a corpus to packed batches: whole sequences, no padding, an order that a seed fixes.

Legend: T tokens of a batch, N places whose next token is taught, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.heads.unroll import Packed
from specdec.training.corpus import Corpus
from specdec.training.loss import Targets
from specdec.training.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences and what the target says of them.

    Attributes:
        packed: their tokens.
        hidden: float32 [L, T, H].
        rows: int64 [N], the taught places within T: from each prompt's last token to the last but one of all.
        place_of: int64 [T], a token's index in ``rows``, or −1.
        targets: of ``rows``.
    """

    packed: Packed
    hidden: Tensor
    rows: Tensor
    place_of: Tensor
    targets: Targets


class Batches:
    """Batches of one part of a corpus.

    Args:
        corpus: where from.
        indices: which answers.
        places: int64 [V], see ``heads.borrowed.Borrowed``.
        teacher: computes hidden states that are not stored; ``None`` if all are.
        tokens_per_batch: least T, except for the last batch of an epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        indices: Sequence[int],
        places: Tensor,
        teacher: Teacher | None,
        tokens_per_batch: int,
    ) -> None:
        if not indices:
            raise ValueError("no answers to make batches of: raise the time budget, or give more prompts")
        self.corpus, self.indices, self._places = corpus, list(indices), places
        self._teacher, self._tokens_per_batch = teacher, tokens_per_batch

    def epoch(self, seed: int | None) -> list[list[int]]:
        """The answers of each batch, in an order drawn from ``seed``; ``None`` keeps that of the corpus."""
        order = self.indices
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order).tolist()
        batches: list[list[int]] = [[]]
        count = 0
        for index in order:
            if count >= self._tokens_per_batch:
                batches.append([])
                count = 0
            batches[-1].append(index)
            count += len(self.corpus.answers[index].tokens)
        return batches

    def load(self, indices: Sequence[int]) -> Batch:
        answers = [self.corpus.answers[index] for index in indices]
        packed = Packed.of([torch.tensor(answer.tokens) for answer in answers])
        taught = [self.corpus.teacher(index) for index in indices]
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in taught])).long()
        probs = torch.from_numpy(np.concatenate([probs for _, probs in taught]))
        rows = torch.cat(
            [
                torch.arange(start + answer.num_prompt - 1, end - 1)
                for answer, (start, end) in zip(answers, packed.spans, strict=True)
            ]
        )
        place_of = torch.full((packed.tokens.numel(),), -1)
        place_of[rows] = torch.arange(rows.numel())
        hidden = torch.cat([self._hidden(index) for index in indices], dim=1).float()
        return Batch(packed, hidden, rows, place_of, Targets(self._places[ids], probs))

    def _hidden(self, index: int) -> Tensor:
        hidden = self.corpus.hidden(index)
        if hidden is None:
            assert self._teacher is not None, "hidden states are neither stored nor can they be computed"
            hidden = self._teacher.hidden(self.corpus.answers[index])
        return hidden

    def __iter__(self) -> Iterator[Batch]:
        """All of them once, in the corpus's order."""
        for indices in self.epoch(None):
            yield self.load(indices)
