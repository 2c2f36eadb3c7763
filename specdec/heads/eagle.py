"""A feature-level draft head of one decoder layer: EAGLE and EAGLE-3.

After the target computed position t, its hidden state f_t has predicted token t + 1, which is then known. The head
pairs that feature with *that* token and predicts the one after it:

    x_p = W · [norm(embedding(token p)); norm(feature p)],  feature p = f_(p−1)
    g_p = decoder layer(x_p),  LM head(final norm(g_p)) → token p + 1

Its entry p belongs to token p, in the position, the KV slot and the block of that token, and depends on tokens up to p
alone, so a prefix cache serves both models. Where the target has not been, feature p is the head's own g_(p−1).

* ``eagle1`` (Li et al., arXiv 2401.15077, figure 6): f is the output of the last layer.
* ``eagle3`` (Li et al., arXiv 2503.01840, section 3.1): f is a linear mix of a low, a middle and a high layer.

Everything is normalised where it enters. In a residual stream a few dimensions hold half of the energy, with norms that
are hundreds of times those of embeddings, and the first token's are thousands; see :meth:`EagleHead.calibrate`.

Legend: T tokens of several sequences one after another, L captured layers, H hidden size, A anchors, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from specdec_kernels.rope import rope
from torch import Tensor, nn

from specdec.heads.linear import linear
from specdec.model.config import ModelConfig
from specdec.names import unknown_name

VARIANTS = ("eagle1", "eagle3")


@dataclass(frozen=True, kw_only=True)
class EagleShape:
    """Shape of a head.

    Attributes:
        layers: the target's layers whose outputs it reads: the last for eagle1, low, middle and high for eagle3.
        intermediate_size: of its MLP.
    """

    variant: str
    layers: tuple[int, ...]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        variant: str = "eagle3",
        layers: Sequence[int] | None = None,
        intermediate_size: int | None = None,
    ) -> EagleShape:
        """A head for a target of ``config``, with the target's own sizes unless others are given.

        Raises:
            ValueError: unknown variant, or layers that do not fit the variant or the target.
        """
        if variant not in VARIANTS:
            raise unknown_name("EAGLE variant", variant, VARIANTS)
        last = config.num_layers - 1
        if layers is None:
            three = (min(2, config.num_layers // 4), config.num_layers // 2, last)
            layers = (last,) if variant == "eagle1" else tuple(dict.fromkeys(three))
        if (variant == "eagle1" and tuple(layers) != (last,)) or not layers:
            raise ValueError(
                f"layers={list(layers)}: eagle1 reads the last layer, {last}; use eagle3 for others"
            )
        if len(set(layers)) < len(layers) or not all(0 <= layer <= last for layer in layers):
            raise ValueError(
                f"layers={list(layers)} must be distinct and lie in 0..{last}, the target's layers"
            )
        return cls(
            variant=variant,
            layers=tuple(layers),
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=intermediate_size or config.intermediate_size,
            norm_eps=config.norm_eps,
        )


class EagleHead(nn.Module):
    """The trained part of a head; embedding, final norm and LM head are ``borrowed``.

    Args:
        shape: its sizes.
        inv_freq: float32 [D / 2], rotary inverse frequencies, the target's.
    """

    inv_freq: Tensor
    feature_scale: Tensor
    feature_shift: Tensor
    unknown: Tensor
    fuse: Tensor
    embed_norm: Tensor
    feature_norm: Tensor
    mix: Tensor
    attn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, shape: EagleShape, inv_freq: Tensor) -> None:
        super().__init__()
        self.shape = shape
        hidden, num_layers, dim = shape.hidden_size, len(shape.layers), shape.head_dim
        sizes: dict[str, tuple[int, ...]] = {
            "feature_scale": (num_layers, hidden),
            "feature_shift": (num_layers, hidden),
            "unknown": (hidden,),
            "embed_norm": (hidden,),
            "feature_norm": (hidden,),
            "mix": (hidden, 2 * hidden),
            "attn_norm": (hidden,),
            "q": (shape.num_heads * dim, hidden),
            "k": (shape.num_kv_heads * dim, hidden),
            "v": (shape.num_kv_heads * dim, hidden),
            "o": (hidden, shape.num_heads * dim),
            "mlp_norm": (hidden,),
            "gate": (shape.intermediate_size, hidden),
            "up": (shape.intermediate_size, hidden),
            "down": (hidden, shape.intermediate_size),
        }
        if shape.variant == "eagle3":
            sizes["fuse"] = (hidden, num_layers * hidden)
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))
        self.register_buffer("inv_freq", inv_freq.float().clone(), persistent=False)

    def reset(self, seed: int) -> None:
        """Random weights: normal, scaled by the inputs of each; norms at 1."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("norm") or name == "feature_scale":
                    weight.fill_(1.0)
                elif weight.ndim == 2 and name != "feature_shift":
                    weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
                else:
                    weight.zero_()

    def calibrate(self, hidden: Tensor) -> None:
        """Start from features whose every dimension has mean 0 and variance 1 on ``hidden`` float32 [L, T, H]."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], eps=self.shape.norm_eps)
        std, mean = torch.std_mean(normed, dim=1)
        with torch.no_grad():
            self.feature_scale.copy_(1.0 / std.clamp_min(1e-3))
            self.feature_shift.copy_(-mean / std.clamp_min(1e-3))

    def features(self, hidden: Tensor) -> Tensor:
        """What the head makes of the target's hidden states [L, T, H]: features [T, H]."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], eps=self.shape.norm_eps)
        scaled = normed * self.feature_scale[:, None] + self.feature_shift[:, None]
        if self.shape.variant == "eagle1":
            return scaled[0]
        return linear(scaled.transpose(0, 1).flatten(1), self.fuse)

    def own_features(self, output: Tensor) -> Tensor:
        """The same of the head's own outputs g [N, H], which take the place of the target's."""
        return self.features(output[None]) if self.shape.variant == "eagle1" else output

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """x from token embeddings and features, [N, H] each."""
        parts = self._norm(embedded, self.embed_norm), self._norm(features, self.feature_norm)
        return linear(torch.cat(parts, dim=-1), self.mix)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, heads, D], rotated keys and values [N, kv_heads, D]."""
        normed = self._norm(x, self.attn_norm)
        dim = self.shape.head_dim
        q, k, v = (linear(normed, weight).unflatten(-1, (-1, dim)) for weight in (self.q, self.k, self.v))
        return *rope(q, k, positions, self.inv_freq), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output g [N, H] from its input and what attention gave, [N, heads, D]."""
        x = x + linear(attended.flatten(1), self.o)
        normed = self._norm(x, self.mlp_norm)
        return x + linear(F.silu(linear(normed, self.gate)) * linear(normed, self.up), self.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.shape.norm_eps)

    def layer_weights(self) -> dict[str, Tensor]:
        """The decoder layer alone, by the names of ``specdec.model.names``."""
        names = "attn_norm q k v o mlp_norm gate up down".split()
        return {f"layers.0.{name}": getattr(self, name).detach() for name in names}
