"""Tensors in, logits out: one model with its KV cache, on one of the backends.

``eager`` is plain torch and runs every family, dtype and device. ``native`` runs a whole decoder step in one
call of our C++ kernels (bfloat16, x86-64 CPUs with AVX2 or better) and is batch-invariant: a token's logits do not
depend, to the bit, on what else is in the step. ``auto`` takes native where it is supported and eager elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from specdec_kernels import cpu_decoder
from specdec_kernels.paged_attention import check_tree_mask
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.model.batch import Captured, ForwardBatch
from specdec.model.config import ModelConfig
from specdec.model.decoder import Decoder
from specdec.model.weights import LoadedModel
from specdec.names import unknown_name
from specdec.rows import StepInput
from specdec.scheduler.plan import IntArray, LongArray

log = logging.getLogger(__name__)
BACKENDS = ("auto", "eager", "native")


class Runner(Protocol):
    """A model and its paged KV cache.

    Attributes:
        backend: "eager" or "native".
        model: what was loaded; its weights may have been released.
    """

    backend: str
    model: LoadedModel
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelConfig: ...

    def forward(
        self, batch: StepInput, layers: Sequence[int] | None = None, captured: Captured | None = None
    ) -> Tensor:
        """Compute the batch's tokens, storing their keys and values.

        Args:
            batch: legend in ``StepInput``.
            layers: run only these decoder layers (self-speculation).
            captured: filled with the residual stream behind its layers.

        Returns:
            logits float32 [N, V] of ``batch.logit_rows``.
        """
        ...

    def copy_blocks(self, copies: IntArray) -> None:
        """Copy KV blocks, int32 [C, 2] pairs (source, destination)."""
        ...

    def move_slots(self, sources: LongArray, destinations: LongArray) -> None:
        """Move single tokens' keys and values between slots, int64 [S] each, in all layers.

        All sources are read before any destination is written; destinations are distinct.
        """
        ...

    def read_blocks(self, blocks: LongArray) -> list[Tensor]:
        """A copy in host memory of KV blocks, int64 [n]; give it to :meth:`write_blocks` as it is."""
        ...

    def write_blocks(self, blocks: LongArray, content: list[Tensor]) -> None:
        """Put what :meth:`read_blocks` returned into other blocks, int64 [n]."""
        ...


class EagerRunner:
    backend = "eager"

    def __init__(
        self, model: LoadedModel, dtype: torch.dtype, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        config = model.config
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        self.decoder = Decoder(config, model.weights, dtype, device)
        self.kv_cache = KVCache(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim, dtype, device
        )

    @torch.inference_mode()
    def forward(
        self, batch: StepInput, layers: Sequence[int] | None = None, captured: Captured | None = None
    ) -> Tensor:
        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        if batch.tree_mask is not None:
            check_tree_mask(batch.tree_mask, batch.query_start)
        hidden = self.decoder.forward(
            ForwardBatch(
                token_ids=put(batch.token_ids),
                positions=put(batch.positions),
                query_start=put(batch.query_start),
                context_lens=put(batch.context_lens),
                block_tables=put(batch.block_tables),
                slot_mapping=put(batch.slot_mapping),
                logit_rows=put(batch.logit_rows),
                tree_mask=None if batch.tree_mask is None else put(batch.tree_mask),
            ),
            self.kv_cache,
            layers=layers,
            captured=captured,
        )
        return self.decoder.logits(hidden[put(batch.logit_rows)])

    def copy_blocks(self, copies: IntArray) -> None:
        if copies.size:
            pairs = torch.from_numpy(copies).to(self.device, torch.int64)
            self.kv_cache.copy_blocks(pairs[:, 0], pairs[:, 1])

    def move_slots(self, sources: LongArray, destinations: LongArray) -> None:
        if sources.size:
            moved = (torch.from_numpy(slots).to(self.device) for slots in (sources, destinations))
            self.kv_cache.move_slots(*moved)

    def read_blocks(self, blocks: LongArray) -> list[Tensor]:
        return _read_blocks(self.kv_cache, blocks)

    def write_blocks(self, blocks: LongArray, content: list[Tensor]) -> None:
        _write_blocks(self.kv_cache, blocks, content)


class NativeRunner:
    backend = "native"

    def __init__(self, model: LoadedModel, num_blocks: int, block_size: int) -> None:
        self.model, self.config = model, model.config
        self.dtype, self.device = torch.bfloat16, torch.device("cpu")
        self.decoder = cpu_decoder.CpuDecoder(native_spec(model.config), model.weights)
        self.kv_cache = self.decoder.new_kv_cache(num_blocks, block_size)

    def forward(
        self, batch: StepInput, layers: Sequence[int] | None = None, captured: Captured | None = None
    ) -> Tensor:
        return self.decoder.forward(
            batch.token_ids,
            batch.positions,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
            batch.slot_mapping,
            batch.logit_rows,
            self.kv_cache,
            layers=layers,
            capture=captured.layers if captured else (),
            captured=captured.hidden if captured else None,
            tree_mask=batch.tree_mask,
        )

    def copy_blocks(self, copies: IntArray) -> None:
        if copies.size:
            self.kv_cache.copy_blocks(copies[:, 0], copies[:, 1])

    def move_slots(self, sources: LongArray, destinations: LongArray) -> None:
        if sources.size:
            self.kv_cache.move_slots(sources, destinations)

    def read_blocks(self, blocks: LongArray) -> list[Tensor]:
        return _read_blocks(self.kv_cache, blocks)

    def write_blocks(self, blocks: LongArray, content: list[Tensor]) -> None:
        _write_blocks(self.kv_cache, blocks, content)


class _PagedCache(Protocol):
    k: list[Tensor]
    v: list[Tensor]


def _read_blocks(cache: _PagedCache, blocks: LongArray) -> list[Tensor]:
    chosen = torch.from_numpy(blocks)
    return [part[chosen.to(part.device)].cpu() for part in (*cache.k, *cache.v)]


def _write_blocks(cache: _PagedCache, blocks: LongArray, content: list[Tensor]) -> None:
    chosen = torch.from_numpy(blocks)
    for part, values in zip((*cache.k, *cache.v), content, strict=True):
        part[chosen.to(part.device)] = values.to(part.device)


def native_spec(config: ModelConfig) -> cpu_decoder.DecoderSpec:
    """The native backend's description of ``config``."""
    shared = {f.name for f in fields(cpu_decoder.DecoderSpec)} - {"inv_freq"}
    return cpu_decoder.DecoderSpec(
        **{name: getattr(config, name) for name in shared},
        inv_freq=tuple(config.inv_freq(layer) for layer in range(config.num_layers)),
    )


def choose_backend(backend: str, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Resolve "auto", or check that the backend asked for can run.

    Raises:
        ValueError: unknown backend, or native asked for where it cannot run (with the reason).
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if backend == "eager":
        return backend
    supported, reason = False, f"the native backend runs bfloat16 on the CPU, not {dtype} on {device}"
    if dtype == torch.bfloat16 and device.type == "cpu":
        supported, reason = cpu_decoder.is_available()
        if supported:
            supported, reason = cpu_decoder.supports(native_spec(config))
    if supported:
        return "native"
    if backend == "native":
        raise ValueError(f"backend 'native' cannot run here: {reason}; use backend='eager'")
    log.info("eager backend: %s", reason)
    return "eager"


def make_runner(
    model: LoadedModel,
    backend: str,
    dtype: torch.dtype,
    num_blocks: int,
    block_size: int,
    device: torch.device,
) -> Runner:
    """A runner for ``model``; see :func:`choose_backend` for the errors."""
    if choose_backend(backend, model.config, dtype, device) == "native":
        return NativeRunner(model, num_blocks, block_size)
    return EagerRunner(model, dtype, num_blocks, block_size, device)


def kv_bytes_per_block(backend: str, config: ModelConfig, dtype: torch.dtype, block_size: int) -> int:
    """Memory of one KV block over all layers, bytes."""
    if backend == "native":
        return cpu_decoder.bytes_per_block(native_spec(config), block_size)
    return KVCache.bytes_per_block(config.num_layers, block_size, config.num_kv_heads, config.head_dim, dtype)
