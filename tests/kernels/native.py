"""Random models of the native decoder, and sequences side by side in its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from specdec_kernels.cpu_decoder import CpuDecoder, DecoderSpec, build
from specdec_kernels.cpu_decoder.reference import reference_forward
from torch import Tensor

from tests.kernels.trees import Tree

FLAVOURS = (*build.native_flavours(), build.EMULATED)  # the first is the one that is used
ACTIVATION_DTYPE: dict[str, torch.dtype] = dict.fromkeys(("avx2", "avx512"), torch.float32)
ACTIVATION_DTYPE |= dict.fromkeys(("amx", "emulated"), torch.bfloat16)
MAX_LEN = 700


def make_spec(**changes) -> DecoderSpec:
    """A Llama of two layers; ``changes`` override fields."""
    shape = dict(vocab_size=200, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    style = dict(intermediate_size=96, activation="silu", norm_eps=1e-5, norm_offset=0.0, post_norms=False)
    scales = dict(embedding_scale=1.0, logit_softcap=None, max_model_len=MAX_LEN)
    fields = shape | style | scales | changes
    layers, head_dim = fields["num_layers"], fields["head_dim"]
    fields.setdefault("attention_scale", head_dim**-0.5)
    fields.setdefault("sliding_window", (None,) * layers)
    inv_freq = 100.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    fields.setdefault("inv_freq", tuple(inv_freq / (1 + layer) for layer in range(layers)))
    return DecoderSpec(**fields)


# Name: changes to the spec, and which optional weights the model has.
CASES: dict[str, tuple[dict, set[str]]] = {
    "llama": ({}, set()),
    "ratio_1_biases": (dict(num_heads=2, num_kv_heads=2, head_dim=64), {"qkv_bias", "o_bias"}),
    "ratio_3_odd_vocabulary": (dict(num_heads=3, num_kv_heads=1, head_dim=64, vocab_size=123), set()),
    "qk_norm_untied": (dict(head_dim=128, vocab_size=65), {"qk_norm", "lm_head"}),
    "windows": (dict(sliding_window=(37, None), num_heads=6), set()),
    "gemma": (
        dict(
            head_dim=256, num_heads=4, num_kv_heads=1, activation="gelu_tanh", norm_offset=1.0, post_norms=True,
            embedding_scale=8.0, attention_scale=0.05, sliding_window=(20, None), logit_softcap=3.0, vocab_size=500,
        ),
        {"qk_norm"},
    ),
}  # fmt: skip


def make_weights(spec: DecoderSpec, options: set[str], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=generator) * (scale or 1.5 * shape[-1] ** -0.5)

    def norm(size: int) -> Tensor:
        return noise(size, scale=0.2) + 1.0 - spec.norm_offset

    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    weights = {
        "embed": noise(spec.vocab_size, hidden, scale=1 / spec.embedding_scale),
        "final_norm": norm(hidden),
    }
    if "lm_head" in options:
        weights["lm_head"] = noise(spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        own = {"attn_norm": norm(hidden), "mlp_norm": norm(hidden), "q": noise(q_size, hidden)}
        own |= {"k": noise(kv_size, hidden), "v": noise(kv_size, hidden), "o": noise(hidden, q_size)}
        own |= {"gate": noise(inner, hidden), "up": noise(inner, hidden), "down": noise(hidden, inner)}
        if "qkv_bias" in options:
            own |= {f"{part}_bias": noise(own[part].shape[0], scale=0.5) for part in "qkv"}
        if "o_bias" in options:
            own["o_bias"] = noise(hidden, scale=0.5)
        if "qk_norm" in options:
            own |= {"q_norm": norm(spec.head_dim), "k_norm": norm(spec.head_dim)}
        if spec.post_norms:
            own |= {"post_attn_norm": norm(hidden), "post_mlp_norm": norm(hidden)}
        weights |= {f"layers.{layer}.{name}": w for name, w in own.items()}
    return weights


class Session:
    """Sequences side by side in one paged cache with shuffled blocks."""

    def __init__(
        self,
        decoder: CpuDecoder,
        num_rows: int = 1,
        max_len: int = MAX_LEN,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        per_row = -(-max_len // block_size)
        self.decoder, self.block_size = decoder, block_size
        self.cache = decoder.new_kv_cache(num_rows * per_row + 3, block_size)
        order = np.random.default_rng(seed).permutation(self.cache.num_blocks)
        self.block_tables = order[: num_rows * per_row].reshape(num_rows, per_row).astype(np.int32)
        self.lengths = [0] * num_rows

    def step(
        self, new: Mapping[int, Sequence[int]], trees: Mapping[int, Tree] | None = None, **options
    ) -> list[Tensor]:
        """Feed tokens to some rows, in the order given; the logits [number of tokens, V] of each.

        Rows in ``trees`` keep their lengths, see :meth:`accept`.
        """
        trees = trees or {}
        rows, counts = list(new), [len(tokens) for tokens in new.values()]
        positions, slots, masks = [], [], []
        for row, count in zip(rows, counts, strict=True):
            start, tree = self.lengths[row], trees.get(row)
            positions.append(start + np.array(tree.depths if tree else range(count), np.int64))
            slots.append(self.slots(row, start + np.arange(count)))
            masks.append(tree.mask() if tree else np.zeros((count, 2), np.int64))
        if trees:
            options = {"tree_mask": np.concatenate(masks), **options}
        logits = self.decoder.forward(
            token_ids=np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in new.values()]),
            positions=np.concatenate(positions),
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            context_lens=np.array([self.lengths[row] for row in rows], np.int32),
            block_tables=self.block_tables[rows],
            slot_mapping=np.concatenate(slots),
            logit_rows=np.arange(sum(counts)),
            kv_cache=self.cache,
            **options,
        )
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += 0 if row in trees else count
        return list(logits.split(counts))

    def slots(self, row: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the keys and values of tokens at these places of a row are."""
        blocks = self.block_tables[row, places // self.block_size].astype(np.int64)
        return blocks * self.block_size + places % self.block_size

    def accept(self, row: int, path: Sequence[int]) -> None:
        """Keep these tokens of the row's last tree."""
        start, length = self.lengths[row], len(path)
        sources = self.slots(row, start + np.array(path, np.int64))
        self.cache.move_slots(sources, self.slots(row, start + np.arange(length)))
        self.lengths[row] += length

    def poison(self) -> None:
        for cache in (*self.cache.k, *self.cache.v):
            cache.fill_(torch.nan)


def random_tokens(spec: DecoderSpec, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(spec.vocab_size, size=length).tolist()


class Model:
    def __init__(self, case: str, flavour: str) -> None:
        changes, options = CASES[case]
        self.spec, self.flavour = make_spec(**changes), flavour
        self.weights = make_weights(self.spec, options)
        self.decoder = CpuDecoder(self.spec, self.weights, flavour)
        self.dtype = ACTIVATION_DTYPE[flavour]

    def reference(
        self, tokens: Sequence[int], layers: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        return reference_forward(self.spec, self.weights, torch.tensor(tokens), layers, self.dtype)

    def alone(self, tokens: Sequence[int]) -> Tensor:
        """Logits of a whole sequence in one step of its own."""
        return Session(self.decoder).step({0: tokens})[0]
