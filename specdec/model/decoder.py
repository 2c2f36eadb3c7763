"""One decoder for every supported family: embedding, attention and MLP blocks, head.

Plain torch over the ops of ``specdec_kernels``; runs in any floating dtype on any device. Weight names are
those of ``specdec.model.names``. Legend: T tokens, D head dimension, N tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from specdec_kernels.paged_attention import paged_attention, store_kv
from specdec_kernels.rms_norm import rms_norm
from specdec_kernels.rope import rope
from specdec_kernels.silu_mul import gelu_mul, silu_mul
from torch import Tensor

from specdec.model.batch import Captured, ForwardBatch
from specdec.model.config import ModelConfig


class PagedCache(Protocol):
    """Keys and values per layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: list[Tensor]
    v: list[Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; projections that share an input are fused along their outputs."""

    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attn_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    post_mlp_norm: Tensor | None
    inv_freq: Tensor
    sliding_window: int | None


class Decoder:
    """A causal decoder over a paged KV cache.

    Args:
        config: the architecture.
        weights: tensors by the names of ``specdec.model.names.expected_shapes``; fused ones are copied.
        dtype: of weights and activations. Norms, rotations, softmax and logits are computed in float32.
        device: where it runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self._activate = {"silu": silu_mul, "gelu_tanh": gelu_mul}[config.activation]

        def get(name: str) -> Tensor | None:
            return weights[name].to(self.device, dtype) if name in weights else None

        embed, final_norm = get("embed"), get("final_norm")
        assert embed is not None
        assert final_norm is not None
        head = get("lm_head")
        self._embed, self._final_norm = embed, final_norm
        self._head = embed if head is None else head
        self._layers = [self._layer(index, get) for index in range(config.num_layers)]

    def _layer(self, index: int, get: Callable[[str], Tensor | None]) -> Layer:
        def one(name: str) -> Tensor | None:
            return get(f"layers.{index}.{name}")

        def fuse(*names: str) -> Tensor | None:
            parts = [one(name) for name in names]
            return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]

        kept = [
            "attn_norm",
            "q_norm",
            "k_norm",
            "o",
            "o_bias",
            "post_attn_norm",
            "mlp_norm",
            "down",
            "post_mlp_norm",
        ]
        return Layer(
            **{name: one(name) for name in kept},  # type: ignore[arg-type]
            qkv=fuse("q", "k", "v"),  # type: ignore[arg-type]
            qkv_bias=fuse("q_bias", "k_bias", "v_bias"),
            gate_up=fuse("gate", "up"),  # type: ignore[arg-type]
            inv_freq=self.config.inv_freq(index).to(self.device),
            sliding_window=self.config.sliding_window[index],
        )

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: PagedCache,
        layers: Sequence[int] | None = None,
        captured: Captured | None = None,
    ) -> Tensor:
        """Compute the batch's tokens and store their keys and values.

        Args:
            layers: run only these layers, in this order (self-speculation by layer skipping).
            captured: filled with the outputs of its layers.

        Returns:
            hidden states before the final norm, [T, hidden_size].
        """
        config = self.config
        hidden = F.embedding(batch.token_ids, self._embed)
        if config.embedding_scale != 1.0:
            hidden = hidden * torch.tensor(config.embedding_scale, dtype=self.dtype, device=self.device)
        chosen = range(config.num_layers) if layers is None else layers
        places = {} if captured is None else {layer: place for place, layer in enumerate(captured.layers)}
        assert places.keys() <= set(chosen), (
            f"layers {list(places)} are not all among those run, {list(chosen)}"
        )
        for index in chosen:
            layer = self._layers[index]
            attended = self._attention(layer, batch, self._norm(hidden, layer.attn_norm), kv_cache, index)
            if layer.post_attn_norm is not None:
                attended = self._norm(attended, layer.post_attn_norm)
            hidden = hidden + attended
            gate_up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up)
            mixed = F.linear(self._activate(gate_up), layer.down)
            if layer.post_mlp_norm is not None:
                mixed = self._norm(mixed, layer.post_mlp_norm)
            hidden = hidden + mixed
            if captured is not None and index in places:
                captured.hidden[places[index]] = hidden
        return hidden

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        normed = rms_norm(x, weight, self.config.norm_eps, self.config.norm_offset)
        assert isinstance(normed, Tensor)
        return normed

    def _attention(
        self, layer: Layer, batch: ForwardBatch, x: Tensor, kv_cache: PagedCache, index: int
    ) -> Tensor:
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(-1, (sum(heads), config.head_dim))
        q, k, v = qkv.split(heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        q, k = rope(q, k, batch.positions, layer.inv_freq)
        k_cache, v_cache = kv_cache.k[index], kv_cache.v[index]
        store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        out = paged_attention(
            q,
            k_cache,
            v_cache,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
            config.attention_scale,
            layer.sliding_window,
            tree_mask=batch.tree_mask,
            positions=batch.positions,
        )
        return F.linear(out.flatten(1), layer.o, layer.o_bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and softcap: [N, hidden_size] to float32 [N, vocab_size]."""
        logits = F.linear(self._norm(hidden, self._final_norm), self._head).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
