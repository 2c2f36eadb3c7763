"""How many bytes and operations each op cannot do without: from shapes alone, for a static roofline.

Bytes are what must be read and written once, however well a kernel reuses what it has read; operations are those of the
matrix products, a multiplication and an addition each. What a chip's peaks make of them is a bound from below on time.

>>> linear_cost(16, 4096, 4096).seconds(flops_per_s=989e12, bytes_per_s=3.35e12)
1.0174...e-05
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class OpCost:
    """``moved_bytes`` to and from memory; ``flops`` on matrix units, 0 where an op has none to speak of."""

    moved_bytes: float
    flops: float = 0.0

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The longer of moving and computing at these peaks."""
        return max(self.moved_bytes / bytes_per_s, self.flops / flops_per_s)

    def bound(self, flops_per_s: float, bytes_per_s: float) -> str:
        """``"memory"`` or ``"compute"``, whichever takes longer."""
        return "memory" if self.moved_bytes / bytes_per_s >= self.flops / flops_per_s else "compute"


def linear_cost(tokens: int, outputs: int, inputs: int, weight_bits: float = 16.0) -> OpCost:
    """x [tokens, inputs] times a weight [outputs, inputs] in ``weight_bits`` a number, scales included."""
    activations = tokens * (inputs + outputs) * BF16_BYTES
    return OpCost(activations + outputs * inputs * weight_bits / 8, 2.0 * tokens * outputs * inputs)


def paged_attention_cost(
    queries: Sequence[int],
    contexts: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_bytes: float = BF16_BYTES,
) -> OpCost:
    """Rows of ``queries`` new tokens each behind ``contexts`` cached ones; causal, so half of the new keys are seen.

    Every row's keys and values are read once: queries and query heads that share them are one tile.
    """
    pairs = sum(q * context + q * (q + 1) / 2 for q, context in zip(queries, contexts, strict=True))
    keys = sum(q + context for q, context in zip(queries, contexts, strict=True))
    tokens = sum(queries)
    moved = 2 * keys * num_kv_heads * head_dim * kv_bytes + 2 * tokens * num_heads * head_dim * BF16_BYTES
    return OpCost(moved, 4.0 * pairs * num_heads * head_dim)


def rms_norm_cost(tokens: int, hidden_size: int, has_residual: bool) -> OpCost:
    """Reads the input, and the residual; writes the normed tensor, and the sum."""
    return OpCost((4 if has_residual else 2) * tokens * hidden_size * BF16_BYTES)


def gated_cost(tokens: int, intermediate_size: int) -> OpCost:
    """``silu_mul`` and ``gelu_mul``: two numbers in, one out."""
    return OpCost(3 * tokens * intermediate_size * BF16_BYTES)


def rope_store_kv_cost(
    tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, kv_bytes: float = BF16_BYTES
) -> OpCost:
    """Queries, keys and values in; queries out, keys and values into the cache."""
    vectors = (2 * num_heads + 2 * num_kv_heads) * BF16_BYTES + 2 * num_kv_heads * kv_bytes
    return OpCost(tokens * head_dim * vectors)


def compact_kv_cost(moves: int, num_layers: int, num_kv_heads: int, head_dim: int) -> OpCost:
    """Keys and values of all layers, read and written."""
    return OpCost(4 * moves * num_layers * num_kv_heads * head_dim * BF16_BYTES)


def sample_cost(rows: int, vocab_size: int) -> OpCost:
    """Float32 logits, once: what top-k and top-p read again comes from the cache of a chip at best."""
    return OpCost(4 * rows * vocab_size)


def verify_cost(rows: int, num_drafts: int, vocab_size: int, has_draft_probs: bool) -> OpCost:
    """The laws of every entry of a row, and those that drafts were drawn from."""
    laws = num_drafts + 1 + (num_drafts if has_draft_probs else 0)
    return OpCost(4 * rows * laws * vocab_size)
