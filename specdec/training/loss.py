"""What distillation minimises, and how well a draft agrees with its target.

Legend: N places, D draft vocabulary, K likely tokens of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.heads.linear import ROWS, product_dtype


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


def distillation_loss(
    normed: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of a draft against its target, [N], differentiable in ``normed``.

    Tokens that cannot be drafted are left out of the sum, so a place counts as much as the target's mass on the draft
    vocabulary: where that is small no draft helps.

    Logits are made, used and forgotten a few rows at a time, and the gradient of ``normed`` with them. As one tensor
    they are larger than the caches, and most of a training step would go to moving them and to mapping their memory.

    Args:
        normed: [N, H], what the LM head multiplies.
        head: [D, H], its rows, which are not trained; more than the D of ``targets`` are allowed.
        offset: float32 [D], added to the logits.
        softcap: logits become softcap · tanh(logits / softcap) (before the offset).
    """
    loss: Tensor = _DistillationLoss.apply(normed, head, targets.places, targets.probs, offset, softcap)
    return loss


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normed: Tensor,
        head: Tensor,
        places: Tensor,
        probs: Tensor,
        offset: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        kind = product_dtype(head)
        head, weights = head.to(kind), probs * (places >= 0)
        losses, gradients = normed.new_empty(normed.shape[0], dtype=torch.float32), torch.empty_like(normed)
        for start in range(0, normed.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, normed.shape[0]))
            # The last rows may be few; oneDNN would compile kernels for their number.
            x = F.pad(normed[rows], (0, 0, 0, ROWS - (rows.stop - start))).to(kind)
            logits = F.linear(x, head)[: rows.stop - start].float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            capped = logits
            if offset is not None:
                logits = logits + offset
            log_sum = logits.logsumexp(-1, keepdim=True)
            chosen, weight = places[rows].clamp_min(0), weights[rows]
            losses[rows] = -(weight * (logits.gather(1, chosen) - log_sum)).sum(-1)
            # ∂/∂logits = (Σ weight) · softmax − weight at the chosen ones.
            slope = (logits - log_sum).exp_().mul_(weight.sum(-1, keepdim=True))
            slope.scatter_add_(1, chosen, -weight)
            if softcap is not None:
                slope *= 1.0 - (capped / softcap) ** 2
            slope = F.pad(slope.to(kind), (0, 0, 0, ROWS - (rows.stop - start)))
            gradients[rows] = (slope @ head)[: rows.stop - start].to(normed.dtype)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad_outputs[0][:, None], None, None, None, None, None


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
