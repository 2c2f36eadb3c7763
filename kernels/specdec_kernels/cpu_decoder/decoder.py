"""The Python side of the C++ decoder: packing weights, the KV cache, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec_kernels.cpu_decoder.build import library
from specdec_kernels.paged_attention import check_tree_mask

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
HUGE_PAGE = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Shape of a decoder; fields as in a model's configuration.

    Attributes:
        activation: "silu" or "gelu_tanh".
        norm_offset: added to every norm weight (1.0 for Gemma).
        sliding_window: per layer; a window counts the token itself, ``None`` is full attention.
        inv_freq: per layer, float32 [head_dim / 2], rotary inverse frequencies (rotate-half convention).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    norm_eps: float
    norm_offset: float
    post_norms: bool
    embedding_scale: float
    attention_scale: float
    logit_softcap: float | None
    max_model_len: int
    sliding_window: Sequence[int | None]
    inv_freq: Sequence[Tensor]


def supports(spec: DecoderSpec) -> tuple[bool, str]:
    """Whether the decoder has this shape, and if not, why."""
    multiples = {
        "hidden_size": spec.hidden_size,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
    }
    for name, value in multiples.items():
        if value % 32:
            return False, f"{name}={value} is not a multiple of 32"
    if spec.num_heads // spec.num_kv_heads > 16:
        return False, f"{spec.num_heads} query heads share {spec.num_kv_heads} KV heads: more than 16 each"
    if spec.activation not in ACTIVATIONS:
        return False, f"activation {spec.activation!r} is not supported"
    return True, ""


def bytes_per_block(spec: DecoderSpec, block_size: int) -> int:
    """Memory of one KV block over all layers, bytes."""
    return 2 * 2 * spec.num_layers * block_size * spec.num_kv_heads * spec.head_dim


class _LayerWeights(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in "attn_norm q_norm k_norm post_attn_norm mlp_norm post_mlp_norm qkv_bias o_bias "
        "qkv o gate_up down cos sin".split()
    ] + [("window", ctypes.c_int32), ("unused", ctypes.c_int32)]


class _Model(ctypes.Structure):
    _fields_ = (
        [("layers", ctypes.POINTER(_LayerWeights))]
        + [(name, ctypes.c_void_p) for name in ("head", "embed", "final_norm")]
        + [
            (name, ctypes.c_int32)
            for name in "vocab hidden heads kv_heads head_dim intermediate activation unused".split()
        ]
        + [
            (name, ctypes.c_float)
            for name in "norm_eps embedding_scale attention_scale logit_softcap".split()
        ]
    )


class _Step(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in "token_ids positions slots logit_rows query_start context_lens block_tables layers capture "
        "tree_mask keys values logits captured".split()
    ] + [
        (name, ctypes.c_int32)
        for name in "num_tokens num_rows num_logits max_blocks block_size num_layers num_capture num_threads".split()
    ]


class _Moves(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "keys values sources destinations".split()] + [
        (name, ctypes.c_int32) for name in "num_slots num_layers block_size kv_heads head_dim".split()
    ]


class CpuKVCache:
    """Paged keys and values in the tile layout of ``cache.hpp``, zero-initialised.

    What a slot held before a request wrote it, a NaN too, never reaches that request: see ``copy_values`` there.

    Attributes:
        k, v: per layer bfloat16 [num_blocks, num_kv_heads · block_size · head_dim].
    """

    def __init__(self, spec: DecoderSpec, num_blocks: int, block_size: int) -> None:
        if block_size % 16:
            raise ValueError(f"block_size={block_size} must be a multiple of 16 for the native backend")
        shape = (num_blocks, spec.num_kv_heads * block_size * spec.head_dim)
        self.block_size, self.num_blocks = block_size, num_blocks
        self.num_kv_heads, self.head_dim = spec.num_kv_heads, spec.head_dim
        self.k = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(spec.num_layers)]
        self.v = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(spec.num_layers)]
        self.k_pointers = (ctypes.c_void_p * spec.num_layers)(*(t.data_ptr() for t in self.k))
        self.v_pointers = (ctypes.c_void_p * spec.num_layers)(*(t.data_ptr() for t in self.v))

    def copy_blocks(self, sources: NDArray[Any], destinations: NDArray[Any]) -> None:
        """Copy whole blocks; all sources are read before any destination is written."""
        source, destination = (torch.from_numpy(np.asarray(a, np.int64)) for a in (sources, destinations))
        for cache in (*self.k, *self.v):
            cache[destination] = cache[source]

    def move_slots(self, sources: NDArray[np.int64], destinations: NDArray[np.int64]) -> None:
        """Move single tokens' keys and values between slots, int64 [S] each, in all layers.

        All sources are read before any destination is written; destinations are distinct.
        """
        if sources.size == 0:
            return
        slots = [np.ascontiguousarray(a, np.int64) for a in (sources, destinations)]
        assert slots[0].shape == slots[1].shape == (sources.size,)
        assert min(a.min() for a in slots) >= 0
        assert max(a.max() for a in slots) < self.num_blocks * self.block_size, "slot outside the cache"
        moves = _Moves(
            ctypes.addressof(self.k_pointers),
            ctypes.addressof(self.v_pointers),
            *(a.ctypes.data for a in slots),
            sources.size,
            len(self.k),
            self.block_size,
            self.num_kv_heads,
            self.head_dim,
        )
        library().specdec_move_slots(ctypes.byref(moves))


MAX_TOP = 64


def top(values: Tensor, k: int, flavour: str | None = None) -> Tensor:
    """Where the ``k`` <= ``MAX_TOP`` largest of each row of float32 ``values`` [N, V] are, int64 [N, k], largest first;
    of equal values the first. Where a row has fewer numbers above minus infinity, -1.
    """
    return _top(values, k, None, flavour)


def top_log_probs(logits: Tensor, k: int, flavour: str | None = None) -> tuple[Tensor, Tensor]:
    """The places of :func:`top`, and float32 [N, k] their logarithms after a softmax of each row."""
    log_probs = torch.empty(logits.shape[0], k)
    return _top(logits, k, log_probs, flavour), log_probs


def _top(values: Tensor, k: int, log_probs: Tensor | None, flavour: str | None) -> Tensor:
    num_rows, size = values.shape
    assert values.dtype == torch.float32 and values.is_contiguous() and 0 < k <= MAX_TOP
    places = torch.empty(num_rows, k, dtype=torch.int64)
    threads = min(torch.get_num_threads(), max(num_rows, 1))
    out = None if log_probs is None else log_probs.data_ptr()
    library(flavour).specdec_top(values.data_ptr(), places.data_ptr(), out, num_rows, size, k, threads)
    return places


class Packer:
    """Lays matrices out one after another in a single huge-page buffer, in the order they are used."""

    def __init__(self, num_bytes: int) -> None:
        self._raw = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
        self._used = -self._raw.data_ptr() % HUGE_PAGE
        library().specdec_advise_huge_pages(self._raw.data_ptr() + self._used, num_bytes)

    def add(self, matrix: Tensor) -> int:
        """Pack [N, K] as [N/32][K/32][2][16 pairs][16][2]; the address of the copy."""
        padded_outputs = -(-matrix.shape[0] // 32) * 32
        count = padded_outputs * matrix.shape[1] * 2
        target = self._raw[self._used : self._used + count].view(torch.bfloat16)
        self._used += count
        groups, steps = padded_outputs // 32, matrix.shape[1] // 32
        view = target.view(groups, steps, 2, 16, 16, 2)
        full = matrix.shape[0] // 32
        body = matrix[: full * 32].to(torch.bfloat16).view(full, 2, 16, steps, 16, 2)
        view[:full].copy_(body.permute(0, 3, 1, 4, 2, 5))
        if full < groups:
            tail = torch.zeros(32, matrix.shape[1], dtype=torch.bfloat16)
            tail[: matrix.shape[0] - full * 32] = matrix[full * 32 :]
            view[full].copy_(tail.view(2, 16, steps, 16, 2).permute(2, 0, 3, 1, 4))
        return target.data_ptr()


class CpuDecoder:
    """A decoder with packed weights.

    Args:
        spec: its shape; see :func:`supports`.
        weights: ``embed``, ``final_norm``, ``lm_head`` (absent when tied) and ``layers.{i}.`` with ``attn_norm q k v
            o mlp_norm gate up down``, optionally ``q_bias k_bias v_bias o_bias q_norm k_norm post_attn_norm
            post_mlp_norm``; matrices [outputs, inputs]. They are copied and may be freed.
        flavour: how matrices are multiplied, one of ``build.FLAVOURS``; default the best of this CPU.
    """

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Tensor], flavour: str | None = None) -> None:
        supported, reason = supports(spec)
        if not supported:
            raise ValueError(f"the native decoder cannot run this model: {reason}")
        self.spec = spec
        self._lib = library(flavour)
        self._kept: list[Tensor] = []
        matrices = sum(
            w.numel() + 32 * w.shape[1] for n, w in weights.items() if w.ndim == 2 and n != "embed"
        )
        head = weights.get("lm_head", weights["embed"])
        tied = 0 if "lm_head" in weights else head.numel() + 32 * head.shape[1]
        self._packer = Packer(2 * (matrices + tied))
        self._tables: dict[bytes, tuple[int, int]] = {}
        self._layers = (_LayerWeights * spec.num_layers)(
            *(self._layer(i, weights) for i in range(spec.num_layers))
        )
        self._model = _Model(
            layers=self._layers,
            head=self._packer.add(head),
            embed=self._keep(weights["embed"].to(torch.bfloat16)) if "lm_head" in weights else None,
            final_norm=self._norm(weights["final_norm"]),
            vocab=spec.vocab_size,
            hidden=spec.hidden_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate_size,
            activation=ACTIVATIONS[spec.activation],
            norm_eps=spec.norm_eps,
            embedding_scale=spec.embedding_scale,
            attention_scale=spec.attention_scale,
            logit_softcap=spec.logit_softcap or 0.0,
        )
        self._workspace = self._lib.specdec_new_workspace()
        self._all_layers = np.arange(spec.num_layers, dtype=np.int32)

    def __del__(self) -> None:
        if getattr(self, "_workspace", None):
            self._lib.specdec_free_workspace(self._workspace)

    def _keep(self, tensor: Tensor) -> int:
        # A copy: a tensor of the right dtype would otherwise still be the caller's.
        self._kept.append(tensor.clone(memory_format=torch.contiguous_format))
        return self._kept[-1].data_ptr()

    def _norm(self, weight: Tensor) -> int:
        return self._keep(weight.float() + self.spec.norm_offset)

    def _layer(self, index: int, weights: Mapping[str, Tensor]) -> _LayerWeights:
        own = {
            name.rpartition(".")[2]: value
            for name, value in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        norms = {name: self._norm(own[name]) for name in own if name.endswith("_norm")}
        biases = {}
        if "q_bias" in own:
            biases["qkv_bias"] = self._keep(torch.cat([own[f"{part}_bias"] for part in "qkv"]).float())
        if "o_bias" in own:
            biases["o_bias"] = self._keep(own["o_bias"].float())
        # Gate and up alternate in panels of 16, so that one group of outputs holds both sides of a product.
        gate_up = torch.stack([own[part].view(-1, 16, own[part].shape[1]) for part in ("gate", "up")], dim=1)
        cos, sin = self._rotary(index)
        return _LayerWeights(
            **norms,
            **biases,
            qkv=self._packer.add(torch.cat([own[part] for part in "qkv"])),
            o=self._packer.add(own["o"]),
            gate_up=self._packer.add(gate_up.flatten(0, 2)),
            down=self._packer.add(own["down"]),
            cos=cos,
            sin=sin,
            window=self.spec.sliding_window[index] or 0,
        )

    def _rotary(self, index: int) -> tuple[int, int]:
        """Addresses of the cosine and sine tables, shared by layers of equal frequencies."""
        inv_freq = self.spec.inv_freq[index].float()
        key = inv_freq.numpy().tobytes()
        if key not in self._tables:
            angles = torch.arange(self.spec.max_model_len).float()[:, None] * inv_freq
            self._tables[key] = self._keep(angles.cos()), self._keep(angles.sin())
        return self._tables[key]

    def new_kv_cache(self, num_blocks: int, block_size: int) -> CpuKVCache:
        return CpuKVCache(self.spec, num_blocks, block_size)

    def forward(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slot_mapping: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
        kv_cache: CpuKVCache,
        layers: Sequence[int] | None = None,
        capture: Sequence[int] = (),
        captured: Tensor | None = None,
        tree_mask: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Compute T tokens of R rows, storing their keys and values.

        Args:
            token_ids, positions, slot_mapping: [T].
            query_start: [R + 1], where each row's tokens begin within T.
            context_lens: [R], tokens before this step's.
            block_tables: [R, max_blocks].
            logit_rows: [N], indices into T.
            layers: run only these layers.
            capture: layers, among those run, whose output (the float32 residual stream) is wanted.
            captured: float32 [len(capture), T, hidden_size], filled with it.
            tree_mask: [T, 2], which tokens of its row in this step a token sees, see ``paged_attention/tree_mask.py``;
                ``None``: all are causal. A node gets the logits, to the bit, of its path decoded token by token.

        Returns:
            logits float32 [N, vocab_size].
        """
        spec = self.spec
        logits = torch.empty(logit_rows.size, spec.vocab_size)
        chosen = self._all_layers if layers is None else np.ascontiguousarray(layers, np.int32)
        wanted = np.ascontiguousarray(capture, np.int32)
        longs = [np.ascontiguousarray(a, np.int64) for a in (token_ids, positions, slot_mapping, logit_rows)]
        ints = [np.ascontiguousarray(a, np.int32) for a in (query_start, context_lens, block_tables)]
        if token_ids.size == 0:
            return logits
        self._check(longs, ints, kv_cache)
        if tree_mask is not None:
            check_tree_mask(tree_mask, ints[0])
            tree_mask = np.ascontiguousarray(tree_mask)
        if wanted.size:
            assert captured is not None and captured.is_contiguous() and captured.dtype == torch.float32
            assert captured.shape == (wanted.size, token_ids.size, spec.hidden_size)
            assert set(wanted.tolist()) <= set(chosen.tolist()), (
                f"layers {wanted} are not all among those run"
            )
        step = _Step(
            *(a.ctypes.data for a in (*longs, *ints, chosen, wanted)),
            tree_mask.ctypes.data if tree_mask is not None else None,
            ctypes.addressof(kv_cache.k_pointers),
            ctypes.addressof(kv_cache.v_pointers),
            logits.data_ptr(),
            captured.data_ptr() if captured is not None else None,
            token_ids.size,
            context_lens.size,
            logit_rows.size,
            ints[2].shape[1],
            kv_cache.block_size,
            chosen.size,
            wanted.size,
            torch.get_num_threads(),
        )
        self._lib.specdec_forward(ctypes.byref(self._model), ctypes.byref(step), self._workspace)
        return logits

    def _check(
        self, longs: list[NDArray[np.int64]], ints: list[NDArray[np.int32]], kv_cache: CpuKVCache
    ) -> None:
        """Addresses that C++ would follow blindly."""
        token_ids, positions, slots, logit_rows = longs
        query_start, context_lens, block_tables = ints
        assert token_ids.min() >= 0 and token_ids.max() < self.spec.vocab_size, (
            "token id outside the vocabulary"
        )
        assert positions.min() >= 0 and positions.max() < self.spec.max_model_len, (
            "position beyond max_model_len"
        )
        assert slots.min() >= 0 and slots.max() < kv_cache.num_blocks * kv_cache.block_size, (
            "slot outside the cache"
        )
        assert block_tables.min() >= 0 and block_tables.max() < kv_cache.num_blocks, "block outside the cache"
        assert query_start[0] == 0 and query_start[-1] == token_ids.size == positions.size == slots.size
        longest = int((context_lens + np.diff(query_start)).max())
        assert longest <= block_tables.shape[1] * kv_cache.block_size, (
            "the block table is too short for the context"
        )
        assert logit_rows.size == 0 or (logit_rows.min() >= 0 and logit_rows.max() < token_ids.size)
