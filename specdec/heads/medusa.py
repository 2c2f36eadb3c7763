"""Medusa heads: one residual block per draft position over the target's last hidden state.

Cai et al., "Medusa", arXiv 2401.10774, section 2.1.1: head j turns the hidden state f_t, which gave token t + 1, into a
guess of token t + 1 + j. All guesses come from one small pass and know nothing of each other, so they form a tree of
candidates. The paper's heads end in LM heads of their own; these share the target's, on a draft vocabulary.

Legend: N places, K heads, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.linear import linear


class MedusaHeads(nn.Module):
    """K blocks h + SiLU(W h + b), of the hidden state after the target's final norm.

    They start as the identity, that is as the target's own next-token guess.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_heads: int, hidden_size: int) -> None:
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads} must be >= 1")
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_heads, hidden_size))

    def forward(self, normed: Tensor) -> Tensor:
        """Normed hidden states [N, H] to those of every head, [K, N, H]."""
        inner = torch.stack([linear(normed, w, b) for w, b in zip(self.weight, self.bias, strict=True)])
        return normed + F.silu(inner)
