"""What the C++ decoder computes, in float32 torch: one sequence at a time, dense attention, no cache.

Numbers are rounded where the decoder stores them in fewer bits: matrices, keys and values to bfloat16, and what enters
a matrix product to ``activation_dtype``. What is left between the two is the order of sums, and a number that falls on
the other side of a rounding because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec_kernels.cpu_decoder.decoder import DecoderSpec
from specdec_kernels.rms_norm import rms_norm
from specdec_kernels.rope import rope
from specdec_kernels.silu_mul import gelu_mul, silu_mul

Rounding = Callable[[Tensor], Tensor]


def reference_forward(
    spec: DecoderSpec,
    weights: Mapping[str, Tensor],
    token_ids: Tensor,
    layers: Sequence[int] | None = None,
    activation_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run a whole sequence from position 0.

    Args:
        weights: named as for :class:`CpuDecoder`.
        token_ids: int64 [T].
        layers: run only these.
        activation_dtype: bfloat16 for AMX tiles, float32 for AVX-512 and AVX2.

    Returns:
        Logits float32 [T, vocab_size], and the residual stream [T, hidden_size] after each layer.
    """
    rounded = {name: w.bfloat16().float() if w.ndim == 2 else w.float() for name, w in weights.items()}
    x = rounded["embed"][token_ids] * spec.embedding_scale
    residuals = {}

    def narrow(values: Tensor) -> Tensor:
        return values.to(activation_dtype).float()

    for index in range(spec.num_layers) if layers is None else layers:
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): w for name, w in rounded.items() if name.startswith(prefix)}
        x = x + _post_norm(spec, own, "post_attn_norm", _attention(spec, own, index, x, narrow))
        x = x + _post_norm(spec, own, "post_mlp_norm", _mlp(spec, own, x, narrow))
        residuals[index] = x
    logits = narrow(_norm(spec, x, rounded["final_norm"])) @ rounded.get("lm_head", rounded["embed"]).T
    if spec.logit_softcap:
        logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
    return logits, residuals


def _norm(spec: DecoderSpec, x: Tensor, weight: Tensor) -> Tensor:
    normed = rms_norm(x, weight, spec.norm_eps, spec.norm_offset)
    assert isinstance(normed, Tensor)
    return normed


def _post_norm(spec: DecoderSpec, own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _norm(spec, x, own[name]) if spec.post_norms else x


def _attention(
    spec: DecoderSpec, own: Mapping[str, Tensor], index: int, x: Tensor, narrow: Rounding
) -> Tensor:
    x, length = narrow(_norm(spec, x, own["attn_norm"])), x.shape[0]
    q, k, v = (
        F.linear(x, own[part], own.get(f"{part}_bias")).view(length, -1, spec.head_dim) for part in "qkv"
    )
    if "q_norm" in own:
        q, k = _norm(spec, q, own["q_norm"]), _norm(spec, k, own["k_norm"])
    positions = torch.arange(length)
    q, k = rope(q, k, positions, spec.inv_freq[index])
    q, k, v = narrow(q * spec.attention_scale), k.bfloat16().float(), v.bfloat16().float()
    share = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    age = positions[:, None] - positions
    hidden = (age < 0) | (age >= (spec.sliding_window[index] or length))
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(hidden, -torch.inf)
    # The softmax is divided by its sum last: it is the numerators that are rounded.
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = torch.einsum("hqk,khd->qhd", narrow(numerators), v) / numerators.sum(-1).T[:, :, None]
    return F.linear(narrow(mixed).flatten(1), own["o"], own.get("o_bias"))


def _mlp(spec: DecoderSpec, own: Mapping[str, Tensor], x: Tensor, narrow: Rounding) -> Tensor:
    x = narrow(_norm(spec, x, own["mlp_norm"]))
    activation = silu_mul if spec.activation == "silu" else gelu_mul
    return narrow(activation(torch.cat((x @ own["gate"].T, x @ own["up"].T), dim=-1))) @ own["down"].T
