"""A draft head over a paged KV cache: what the target computed in, logits over the draft vocabulary and outputs out.

Like a model (``specdec.runner``) it runs over torch's ops or Triton's, or natively in C++.
Legend: T tokens of a pass, L captured layers, N rows of logits, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from specdec_kernels import cpu_decoder
from specdec_kernels.cpu_decoder.layers import CpuHeadInputs, CpuLayers
from specdec_kernels.ops import TORCH, Ops
from torch import Tensor

from specdec.heads.borrowed import Borrowed
from specdec.heads.eagle import EagleHead
from specdec.kv_cache import KVCache
from specdec.model.config import ModelConfig
from specdec.rows import StepInput
from specdec.scheduler.plan import BoolArray, IntArray, LongArray


class HeadRunner(Protocol):
    """A head with its KV cache, whose blocks are numbered as the target's."""

    def inputs(self, token_ids: LongArray, hidden: Tensor, known: BoolArray) -> Tensor:
        """The layer's inputs [T, H] at tokens whose features the target's states ``hidden`` [L, T, H] give.

        Where they are not ``known`` [T], the head's stand-in takes their place.
        """
        ...

    def own_inputs(self, token_ids: LongArray, outputs: Tensor) -> Tensor:
        """The same where the layer's own ``outputs`` [T, H] take the place of the target's features."""
        ...

    def top(self, logits: Tensor, k: int) -> tuple[LongArray, NDArray[np.float32]]:
        """The ``k`` most likely places of each row [N, k], best first, and their log probabilities."""
        ...

    def forward(self, x: Tensor, batch: StepInput) -> tuple[Tensor, Tensor]:
        """Compute T tokens, storing their keys and values.

        Args:
            x: the layer's inputs [T, H].
            batch: places, masks and the rows whose logits are wanted; its token ids are not used.

        Returns:
            logits float32 [N, D] of ``batch.logit_rows``, and the layer's outputs [N, H] there.
        """
        ...

    def copy_blocks(self, copies: IntArray) -> None:
        """Copy KV blocks, int32 [C, 2] pairs (source, destination)."""
        ...


class EagerHeadRunner:
    """As ``specdec.model.decoder`` computes a layer, over the same ops."""

    def __init__(
        self, head: EagleHead, borrowed: Borrowed, num_blocks: int, block_size: int, ops: Ops = TORCH
    ) -> None:
        shape, device = head.shape, head.mix.device
        self.head, self.borrowed, self.device, self.ops = head, borrowed, device, ops
        self._qkv = torch.cat([head.q, head.k, head.v])
        self._gate_up = torch.cat([head.gate, head.up])
        self._kv_cache = KVCache(
            1, num_blocks, block_size, shape.num_kv_heads, shape.head_dim, head.mix.dtype, device
        )

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @torch.inference_mode()
    def inputs(self, token_ids: LongArray, hidden: Tensor, known: BoolArray) -> Tensor:
        features = self.head.features(hidden.to(self.head.mix.dtype))
        features = torch.where(self._put(known)[:, None], features, self.head.unknown)
        return self.head.inputs(self.borrowed.embedding(self._put(token_ids)), features)

    @torch.inference_mode()
    def own_inputs(self, token_ids: LongArray, outputs: Tensor) -> Tensor:
        embedded = self.borrowed.embedding(self._put(token_ids))
        return self.head.inputs(embedded, self.head.own_features(outputs))

    def top(self, logits: Tensor, k: int) -> tuple[LongArray, NDArray[np.float32]]:
        best = logits.topk(k, dim=-1)
        log_probs = best.values - logits.logsumexp(-1, keepdim=True)
        return best.indices.numpy(force=True), log_probs.numpy(force=True)

    @torch.inference_mode()
    def forward(self, x: Tensor, batch: StepInput) -> tuple[Tensor, Tensor]:
        put, ops, head, shape = self._put, self.ops, self.head, self.head.shape
        positions, (keys, values) = put(batch.positions), (self._kv_cache.k[0], self._kv_cache.v[0])
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        normed = ops.rms_norm(x, head.attn_norm, shape.norm_eps)
        qkv = ops.linear(normed, self._qkv).unflatten(-1, (sum(heads), shape.head_dim))
        q, k, v = qkv.split(heads, dim=1)
        slots = put(batch.slot_mapping)
        q = ops.rope_store_kv(q, k, v, positions, head.inv_freq, keys, values, slots)
        attended = ops.paged_attention(
            q,
            keys,
            values,
            put(batch.query_start),
            put(batch.context_lens),
            put(batch.block_tables),
            shape.head_dim**-0.5,
            tree_mask=None if batch.tree_mask is None else put(batch.tree_mask),
            positions=positions,
        )
        wanted = put(batch.logit_rows)
        added = ops.linear(attended[wanted].flatten(1), head.o)
        normed, hidden = ops.rms_norm(x[wanted], head.mlp_norm, shape.norm_eps, residual=added)
        outputs = hidden + ops.linear(ops.silu_mul(ops.linear(normed, self._gate_up)), head.down)
        return self.borrowed.logits(outputs), outputs

    def copy_blocks(self, copies: IntArray) -> None:
        if copies.size:
            pairs = torch.from_numpy(copies).to(self.device, torch.int64)
            self._kv_cache.copy_blocks(pairs[:, 0], pairs[:, 1])


class NativeHeadRunner:
    def __init__(
        self, head: EagleHead, borrowed: Borrowed, config: ModelConfig, num_blocks: int, block_size: int
    ) -> None:
        weights = {**head.layer_weights(), "final_norm": borrowed.norm_weight, "lm_head": borrowed.lm_head}
        self._layers = CpuLayers(native_head_spec(head, borrowed, config), weights)
        self._kv_cache = self._layers.new_kv_cache(num_blocks, block_size)
        parts = "fuse mix feature_scale feature_shift unknown embed_norm feature_norm".split()
        own = {name: getattr(head, name).detach() for name in parts if hasattr(head, name)}
        self._inputs = CpuHeadInputs({**own, "embed": borrowed.embed}, head.shape.norm_eps)
        self._own_is_hidden = head.shape.variant == "eagle1"

    def inputs(self, token_ids: LongArray, hidden: Tensor, known: BoolArray) -> Tensor:
        return self._inputs.from_hidden(token_ids, hidden, known)

    def own_inputs(self, token_ids: LongArray, outputs: Tensor) -> Tensor:
        if self._own_is_hidden:
            return self._inputs.from_hidden(token_ids, outputs[None], np.ones(token_ids.size, np.bool_))
        return self._inputs.from_features(token_ids, outputs)

    def top(self, logits: Tensor, k: int) -> tuple[LongArray, NDArray[np.float32]]:
        if k > cpu_decoder.MAX_TOP:
            best = logits.topk(k, dim=-1)
            return best.indices.numpy(), (best.values - logits.logsumexp(-1, keepdim=True)).numpy()
        places, log_probs = cpu_decoder.top_log_probs(logits, k)
        return places.numpy(), log_probs.numpy()

    @torch.inference_mode()
    def forward(self, x: Tensor, batch: StepInput) -> tuple[Tensor, Tensor]:
        logits, outputs = self._layers.forward_hidden(
            x,
            batch.positions,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
            batch.slot_mapping,
            batch.logit_rows,
            self._kv_cache,
            batch.tree_mask,
        )
        return logits, outputs[torch.from_numpy(batch.logit_rows)]

    def copy_blocks(self, copies: IntArray) -> None:
        if copies.size:
            self._kv_cache.copy_blocks(copies[:, 0], copies[:, 1])


def native_head_spec(head: EagleHead, borrowed: Borrowed, config: ModelConfig) -> cpu_decoder.DecoderSpec:
    """The native backend's description of a head for a target of ``config``."""
    shape = head.shape
    return cpu_decoder.DecoderSpec(
        vocab_size=borrowed.token_ids.numel(),
        hidden_size=shape.hidden_size,
        num_layers=1,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        activation="silu",
        norm_eps=shape.norm_eps,
        norm_offset=0.0,
        post_norms=False,
        embedding_scale=1.0,
        attention_scale=shape.head_dim**-0.5,
        logit_softcap=config.logit_softcap,
        max_model_len=config.max_model_len,
        sliding_window=(None,),
        inv_freq=(head.inv_freq,),
    )


def make_head_runner(
    head: EagleHead,
    borrowed: Borrowed,
    config: ModelConfig,
    backend: str,
    num_blocks: int,
    block_size: int,
    ops: Ops = TORCH,
) -> HeadRunner:
    """A native runner if that is the ``backend`` and can run the head, else one over ``ops``."""
    if backend == "native" and cpu_decoder.supports(native_head_spec(head, borrowed, config))[0]:
        return NativeHeadRunner(head, borrowed, config, num_blocks, block_size)
    return EagerHeadRunner(head, borrowed, num_blocks, block_size, ops)
