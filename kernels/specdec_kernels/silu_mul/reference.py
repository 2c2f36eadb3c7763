"""Gated activations, Shazeer, arXiv 2002.05202: SwiGLU and GEGLU without their projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` computed in float32; [..., 2 I] (gate, then up) to [..., I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the tanh approximation, in float32; [..., 2 I] (gate, then up) to [..., I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
