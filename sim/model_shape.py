"""The sizes of a decoder that its cost depends on, for public Llama-like models.

>>> MODEL_SHAPES["llama-3.1-8b"].num_params
8030261248
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

DTYPE_BYTES = {"bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated feed-forward network, or several, without biases.

    Attributes:
        name: for reports.
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: as in the
            model's public configuration.
        tied_embeddings: the output head is the embedding table.
        num_experts: feed-forward networks of a layer, each ``intermediate_size`` wide, of which a router chooses some
            for each token. What those cost is known from profiles only: rooflines refuse more than one.
        weight_bytes_per_param: bytes of a stored weight, scales included (bfloat16: 2).
        kv_bytes_per_element: bytes of an element of the KV cache.

    Raises:
        ValueError: a size that is not positive, or query heads that do not divide among the KV heads.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False
    num_experts: int = 1
    weight_bytes_per_param: float = 2.0
    kv_bytes_per_element: float = 2.0

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "num_experts",
            "weight_bytes_per_param",
            "kv_bytes_per_element",
        ):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} of {self.name} must be finite and > 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} of {self.name} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}"
            )

    @property
    def linear_params_per_layer(self) -> int:
        """Weights of the matrices of one decoder layer."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        router = self.hidden_size * self.num_experts if self.num_experts > 1 else 0
        return attention + 3 * self.hidden_size * self.intermediate_size * self.num_experts + router

    def check_dense(self) -> None:
        """Refuse a mixture of experts where nothing says what one costs.

        Raises:
            ValueError: more than one expert.
        """
        if self.num_experts > 1:
            raise ValueError(
                f"{self.name} is a mixture of {self.num_experts} experts, whose step times follow from no sheet and no "
                "table of matrix products here: give an operator profile of the model"
            )

    @property
    def num_params(self) -> int:
        """All weights: embeddings, layers with their two norms, final norm, output head unless tied."""
        tables = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        layers = self.num_layers * (self.linear_params_per_layer + 2 * self.hidden_size)
        return tables + layers + self.hidden_size

    @property
    def weight_bytes(self) -> float:
        return self.num_params * self.weight_bytes_per_param

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes_per_element

    def kv_heads_per_device(self, tensor_parallel: int) -> int:
        """KV heads of each device; fewer heads than devices are replicated.

        Raises:
            ValueError: the heads do not divide among the devices.
        """
        small, large = sorted((self.num_kv_heads, max(tensor_parallel, 1)))
        if tensor_parallel < 1 or self.num_heads % tensor_parallel or large % small:
            raise ValueError(
                f"tensor_parallel={tensor_parallel} must be >= 1 and divide the {self.num_heads} query heads "
                f"and the {self.num_kv_heads} KV heads of {self.name} (or be a multiple of the latter)"
            )
        return max(self.num_kv_heads // tensor_parallel, 1)

    def stored_as(self, dtype: str, kv_dtype: str | None = None) -> ModelShape:
        """The same model with weights of at most ``dtype``'s size, and its KV cache in ``kv_dtype``.

        Weights that are smaller already (int4, say) stay so.

        Raises:
            ValueError: unknown data type.
        """
        for name in (dtype, kv_dtype):
            if name is not None and name not in DTYPE_BYTES:
                raise ValueError(f"unknown data type {name!r}: known: {', '.join(DTYPE_BYTES)}")
        return replace(
            self,
            weight_bytes_per_param=min(self.weight_bytes_per_param, DTYPE_BYTES[dtype]),
            kv_bytes_per_element=DTYPE_BYTES[kv_dtype] if kv_dtype else self.kv_bytes_per_element,
        )


def _shape(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head: int,
    ffn: int,
    vocab: int,
    tied: bool,
) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        intermediate_size=ffn,
        vocab_size=vocab,
        tied_embeddings=tied,
    )


# From each model's config.json on the Hugging Face hub. Qwen3's norms of queries and keys (16,384 weights of
# 32.8e9) are left out.
MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        _shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, True),
        _shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, True),
        _shape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, False),
        _shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, False),
        _shape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, False),
        _shape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, False),
    )
}

PROFILED_SHAPES = MODEL_SHAPES | {
    "qwen3-30b-a3b": replace(
        _shape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 151936, False), num_experts=128
    ),
}
"""These, and mixtures of experts, which take an operator profile."""
