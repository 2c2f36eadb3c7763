"""What distillation minimises, and how well a draft agrees with its target.

Legend: N places, D draft vocabulary, K likely tokens of the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """The target's likely tokens at N places.

    Attributes:
        places: int64 [N, K], places in the draft vocabulary, best first; −1 for tokens outside it.
        probs: float32 [N, K], their probabilities.
    """

    places: Tensor
    probs: Tensor

    def __getitem__(self, index: Tensor) -> Targets:
        return Targets(self.places[index], self.probs[index])

    def sharpened(self, temperature: float) -> Targets:
        """The probabilities at another temperature, among the likely tokens."""
        if temperature == 1.0:
            return self
        powers = self.probs ** (1.0 / temperature)
        return Targets(self.places, powers / powers.sum(-1, keepdim=True))


def distillation_loss(logits: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy of a draft against its target, [N].

    Tokens that cannot be drafted are left out of the sum, so a place counts as much as the target's mass on the draft
    vocabulary: where that is small no draft helps.

    Args:
        logits: float32 [N, D].
    """
    log_probs = logits.gather(1, targets.places.clamp_min(0)) - logits.logsumexp(-1, keepdim=True)
    return -(targets.probs * (targets.places >= 0) * log_probs).sum(-1)


def agreement(logits: Tensor, targets: Targets) -> Tensor:
    """Whether the draft's most likely token is the target's, bool [N]: greedy acceptance."""
    return logits.argmax(-1) == targets.places[:, 0]


def rank_hits(logits: Tensor, targets: Targets, num_ranks: int) -> Tensor:
    """Whether the draft's candidate of each rank is the target's most likely token, bool [N, num_ranks]."""
    return logits.topk(num_ranks, dim=-1).indices == targets.places[:, :1]


def acceptance_overlap(logits: Tensor, targets: Targets) -> Tensor:
    """Σ min(target_probs, draft_probs) over the likely tokens, [N]: acceptance when sampling at temperature 1."""
    draft_probs = logits.softmax(-1).gather(1, targets.places.clamp_min(0))
    return torch.minimum(draft_probs, targets.probs).mul(targets.places >= 0).sum(-1)
