"""One decoder for every supported family: embedding, attention and MLP blocks, head.

Written over the ops of ``specdec_kernels``, torch's or Triton's; runs in any floating dtype on any device. Weight names
are those of ``specdec.model.names``. Legend: T tokens, D head dimension, N tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from specdec_kernels.ops import TORCH, Ops
from torch import Tensor

from specdec.model.batch import Captured, ForwardBatch
from specdec.model.config import ModelConfig
from specdec.model.linear import Linear, LinearMaker


class PagedCache(Protocol):
    """Keys and values per layer, each [num_blocks, block_size, num_kv_heads, head_dim]; their scales if quantised."""

    k: list[Tensor]
    v: list[Tensor]
    k_scale: list[Tensor] | list[None]
    v_scale: list[Tensor] | list[None]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; projections that share an input are fused along their outputs."""

    attn_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_attn_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
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
        ops: what it is made of.
        quantization, group_size: of the linear layers, which are stored so; see ``specdec.model.linear``.

    Raises:
        ValueError: inputs of a linear layer that do not divide into groups.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
        ops: Ops = TORCH,
        quantization: str | None = None,
        group_size: int | None = None,
    ) -> None:
        self.config, self.dtype, self.device, self._ops = config, dtype, torch.device(device), ops
        self._activate = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_mul}[config.activation]
        embed = weights["embed"].to(self.device, dtype)
        head = weights.get("lm_head")
        self._embed = embed
        self._final_norm = weights["final_norm"].to(self.device, dtype)
        self._head = embed if head is None else head.to(self.device, dtype)
        maker = LinearMaker(
            ops=ops, dtype=dtype, device=self.device, quantization=quantization, group_size=group_size
        )
        self._layers = [self._layer(index, weights, maker) for index in range(config.num_layers)]

    def _layer(self, index: int, weights: Mapping[str, Tensor], maker: LinearMaker) -> Layer:
        prefix = f"layers.{index}."

        def norm(name: str) -> Tensor | None:
            weight = weights.get(prefix + name)
            return None if weight is None else weight.to(self.device, self.dtype)

        def linear(*names: str) -> Linear:
            biases = [weights[key] for name in names if (key := f"{prefix}{name}_bias") in weights]
            return maker.make(prefix + names[0], [weights[prefix + name] for name in names], biases)

        norms = ("attn_norm", "q_norm", "k_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")
        return Layer(
            **{name: norm(name) for name in norms},  # type: ignore[arg-type]
            qkv=linear("q", "k", "v"),
            o=linear("o"),
            gate_up=linear("gate", "up"),
            down=linear("down"),
            inv_freq=self.config.inv_freq(index).to(self.device),
            sliding_window=self.config.sliding_window[index],
        )

    @property
    def linear_bytes(self) -> int:
        """Memory of the layers' linear weights, their scales and biases included."""
        linears = [one for layer in self._layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(tensor.nbytes for linear in linears for tensor in linear.tensors)

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
        mixed: Tensor | None = None  # what the layer before adds to the residual stream
        for index in chosen:
            layer = self._layers[index]
            x, hidden = self._add_norm(hidden, mixed, layer.attn_norm)
            attended = self._attention(layer, batch, x, kv_cache, index)
            if layer.post_attn_norm is not None:
                attended = self._norm(attended, layer.post_attn_norm)
            x, hidden = self._add_norm(hidden, attended, layer.mlp_norm)
            out = layer.down(self._activate(layer.gate_up(x)))
            mixed = out if layer.post_mlp_norm is None else self._norm(out, layer.post_mlp_norm)
            if captured is not None and index in places:
                captured.hidden[places[index]] = hidden + mixed
        return hidden if mixed is None else hidden + mixed

    def _add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The normed sum, and the sum."""
        if added is None:
            return self._norm(hidden, weight), hidden
        normed, total = self._ops.rms_norm(
            hidden, weight, self.config.norm_eps, self.config.norm_offset, added
        )
        return normed, total

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._ops.rms_norm(x, weight, self.config.norm_eps, self.config.norm_offset)

    def _attention(
        self, layer: Layer, batch: ForwardBatch, x: Tensor, kv_cache: PagedCache, index: int
    ) -> Tensor:
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = layer.qkv(x).unflatten(-1, (sum(heads), config.head_dim))
        q, k, v = qkv.split(heads, dim=1)
        k_cache, v_cache = kv_cache.k[index], kv_cache.v[index]
        scales = {"k_scale": kv_cache.k_scale[index], "v_scale": kv_cache.v_scale[index]}
        q = self._ops.rope_store_kv(
            q,
            k,
            v,
            batch.positions,
            layer.inv_freq,
            k_cache,
            v_cache,
            batch.slot_mapping,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
            **scales,
        )
        out = self._ops.paged_attention(
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
            **scales,
        )
        return layer.o(out.flatten(1))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and softcap: [N, hidden_size] to float32 [N, vocab_size]."""
        logits = self._ops.linear(self._norm(hidden, self._final_norm), self._head).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
