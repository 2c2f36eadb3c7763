"""What can be trained: EAGLE heads and Medusa heads. Students are in ``student.py``.

A learner turns a batch into a loss and, on held-out answers, into acceptance by draft position. Legend: N taught
places, A anchors, D draft vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from specdec.heads import unroll
from specdec.heads.borrowed import Borrowed
from specdec.heads.eagle import EagleHead
from specdec.heads.linear import product_dtype
from specdec.heads.medusa import MedusaHeads
from specdec.training.batches import Batch
from specdec.training.loss import Targets, acceptance_overlap, agreement, distillation_loss, rank_hits


@dataclass(frozen=True, slots=True)
class Hits:
    """Draft position by draft position, at places where all earlier drafts agreed with the target.

    Attributes:
        agrees: bool [n], the most likely draft token is the target's.
        ranks: bool [n, R], the candidate of each rank is.
        overlap: float32 [n], acceptance when sampling at temperature 1.
    """

    agrees: Tensor
    ranks: Tensor
    overlap: Tensor


class Learner(Protocol):
    """Something with parameters that a trainer improves."""

    @property
    def module(self) -> nn.Module:
        """What holds its parameters."""
        ...

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Scalar to minimise; ``generator`` is for whatever it samples."""
        ...

    def hits(self, batch: Batch, num_drafts: int, num_ranks: int) -> Iterator[Hits]:
        """Of draft positions 1, 2, …, ``num_drafts`` in turn."""
        ...


def anchors_of(batch: Batch, num_steps: int) -> Tensor:
    """Places from which ``num_steps`` more tokens are taught, int64 [A] indices into T."""
    if batch.rows.numel() <= num_steps:
        return batch.rows[:0]
    first, last = batch.rows[: batch.rows.numel() - num_steps], batch.rows[num_steps:]
    # Between two sequences there is a gap of places that are not taught.
    return first[last - first == num_steps]


class EagleLearner:
    """Trains an EAGLE head.

    Args:
        head, borrowed: the head and its target's parts.
        unroll_steps: how far chains are unrolled beyond the first draft; 0 trains on the target's features alone.
        anchor_share: share of the entries from which chains grow.
        decay: weight of each further step relative to the one before.
        sharpness: the temperature of the target's probabilities in the loss; 1 leaves them, lower ones favour its
            most likely token.
        unknown_share: share of the sequences in which the features of a prefix of random length are withheld, as those
            of a cached prefix are.
        regression: weight of the distance between normed outputs and the target's normed last hidden state (EAGLE's
            feature regression, smooth L1); needs the last layer to be captured.
    """

    def __init__(
        self,
        head: EagleHead,
        borrowed: Borrowed,
        *,
        unroll_steps: int = 3,
        anchor_share: float = 0.25,
        decay: float = 0.5,
        sharpness: float = 1.0,
        unknown_share: float = 0.1,
        regression: float = 0.0,
    ) -> None:
        self.head = head
        self.borrowed = borrowed
        self.unroll_steps, self.anchor_share, self.decay = unroll_steps, anchor_share, decay
        self.sharpness, self.unknown_share, self.regression = sharpness, unknown_share, regression

    @property
    def module(self) -> nn.Module:
        return self.head

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        targets = batch.targets.sharpened(self.sharpness)
        known = self._known(batch, generator)
        entries = unroll.forward(self.head, self.borrowed, batch.packed, batch.hidden, batch.rows, known)
        total = self._step_loss(batch, entries.outputs, batch.rows, targets)
        weight, weights = 1.0, 1.0
        anchors = self._sampled(anchors_of(batch, self.unroll_steps), generator)
        if anchors.numel() == 0:
            return total
        outputs = self._chains(batch, entries, anchors, self.unroll_steps)
        for step, output in enumerate(outputs, start=1):
            weight *= self.decay
            weights += weight
            at = anchors + step
            total = total + weight * self._step_loss(batch, output, at, targets[batch.place_of[at]])
        return total / weights

    def _step_loss(self, batch: Batch, output: Tensor, at: Tensor, targets: Targets) -> Tensor:
        normed = self.borrowed.normed(output)
        loss = borrowed_loss(self.borrowed, normed, targets)
        if self.regression:
            aim = self.borrowed.normed(batch.hidden[-1, at])
            loss = loss + self.regression * nn.functional.smooth_l1_loss(normed, aim)
        return loss

    def _known(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Which entries keep the target's feature, bool [T]."""
        lengths = torch.tensor(batch.packed.lengths)
        draws = torch.rand(2, lengths.numel(), generator=generator)
        withheld = (draws[0] < self.unknown_share) * (draws[1] * lengths).long()
        return batch.packed.positions >= torch.repeat_interleave(withheld, lengths)

    def _sampled(self, anchors: Tensor, generator: torch.Generator) -> Tensor:
        if self.unroll_steps == 0:
            return anchors[:0]
        return anchors[torch.rand(anchors.numel(), generator=generator) < self.anchor_share]

    def _chains(
        self, batch: Batch, entries: unroll.Entries, anchors: Tensor, num_steps: int
    ) -> Iterator[Tensor]:
        output = entries.outputs[batch.place_of[anchors]]
        return unroll.chains(self.head, self.borrowed, batch.packed, entries, anchors, output, num_steps)

    def hits(self, batch: Batch, num_drafts: int, num_ranks: int) -> Iterator[Hits]:
        entries = unroll.forward(self.head, self.borrowed, batch.packed, batch.hidden, batch.rows)
        anchors = anchors_of(batch, num_drafts - 1)
        outputs = self._chains(batch, entries, anchors, num_drafts - 1)
        alive = torch.ones(anchors.numel(), dtype=torch.bool)
        for step, output in enumerate([entries.outputs[batch.place_of[anchors]], *outputs]):
            targets = batch.targets[batch.place_of[anchors + step]]
            found = hits_of(self.borrowed.logits(output[alive]), targets[alive], num_ranks)
            yield found
            alive[alive.clone()] = found.agrees


class MedusaLearner:
    """Trains Medusa heads, each on the target's law so many places further on (arXiv 2401.10774, section 2.2.1).

    Args:
        heads, borrowed: the heads and their target's parts; the batches' last captured layer is the target's last.
        decay: weight of each head relative to the one before.
        sharpness: see :class:`EagleLearner`.
    """

    def __init__(
        self, heads: MedusaHeads, borrowed: Borrowed, *, decay: float = 0.8, sharpness: float = 1.0
    ) -> None:
        self.heads = heads
        self.borrowed, self.decay, self.sharpness = borrowed, decay, sharpness

    @property
    def module(self) -> nn.Module:
        return self.heads

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        targets = batch.targets.sharpened(self.sharpness)
        outputs = self.heads(self.borrowed.normed(batch.hidden[-1, batch.rows]))
        total, weights = torch.zeros(()), 0.0
        for index, output in enumerate(outputs):
            anchors = anchors_of(batch, index + 1)
            if anchors.numel() == 0:
                break
            weight = self.decay**index
            aim = targets[batch.place_of[anchors + index + 1]]
            loss = borrowed_loss(self.borrowed, output[batch.place_of[anchors]], aim)
            total, weights = total + weight * loss, weights + weight
        return total / max(weights, 1.0)

    def hits(self, batch: Batch, num_drafts: int, num_ranks: int) -> Iterator[Hits]:
        anchors = anchors_of(batch, num_drafts)
        outputs = self.heads(self.borrowed.normed(batch.hidden[-1, anchors]))
        alive = torch.ones(anchors.numel(), dtype=torch.bool)
        for step, output in enumerate(outputs[:num_drafts], start=1):
            targets = batch.targets[batch.place_of[anchors + step]]
            found = hits_of(self.borrowed.head(output[alive]), targets[alive], num_ranks)
            yield found
            alive[alive.clone()] = found.agrees


def borrowed_loss(borrowed: Borrowed, normed: Tensor, targets: Targets) -> Tensor:
    """Mean distillation loss of normed hidden states [N, H] through the target's LM head."""
    head = borrowed.lm_head_in(product_dtype(borrowed.lm_head))
    return distillation_loss(normed, head, targets, softcap=borrowed.logit_softcap).mean()


def hits_of(logits: Tensor, targets: Targets, num_ranks: int) -> Hits:
    return Hits(
        agreement(logits, targets), rank_hits(logits, targets, num_ranks), acceptance_overlap(logits, targets)
    )


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Over held-out answers, by draft position, given that all drafts before it were accepted.

    Attributes:
        greedy: how often the draft is the target's most likely token.
        ranks: for the first position to the last, how often the candidate of each rank is.
        sampled: Σ min of both laws at temperature 1, over the target's likely tokens.
        tau: tokens per step of greedy chains of full length, 1 + Σ_j Π_(i≤j) greedy_i.
        num_places: chains looked at.
    """

    greedy: list[float]
    ranks: list[list[float]]
    sampled: list[float]
    tau: float
    num_places: int


@torch.no_grad()
def acceptance(learner: Learner, batches: Iterable[Batch], num_drafts: int, num_ranks: int = 8) -> Acceptance:
    """Measure a learner on ``batches``, without an engine."""
    agrees, counts = torch.zeros(num_drafts), torch.zeros(num_drafts)
    ranks, overlap = torch.zeros(num_drafts, num_ranks), torch.zeros(num_drafts)
    for batch in batches:
        for position, found in enumerate(learner.hits(batch, num_drafts, num_ranks)):
            counts[position] += found.agrees.numel()
            agrees[position] += found.agrees.sum()
            ranks[position] += found.ranks.sum(0)
            overlap[position] += found.overlap.sum()
    many = counts.clamp_min(1.0)
    greedy = agrees / many
    return Acceptance(
        greedy=greedy.tolist(),
        ranks=(ranks / many[:, None]).tolist(),
        sampled=(overlap / many).tolist(),
        tau=1.0 + float(greedy.cumprod(0).sum()),
        num_places=int(counts[0]),
    )
