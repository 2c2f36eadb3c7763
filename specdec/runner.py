"""Tensors in, logits out: one model with its KV cache, on one of the backends.

``eager`` is plain torch and runs every family, dtype and device. ``native`` runs a whole decoder step in one
call of our C++ kernels (bfloat16, x86-64 CPUs with AVX2 or better) and is batch-invariant: a token's logits do not
depend, to the bit, on what else is in the step. ``triton`` is the decoder of eager over our GPU kernels, with CUDA
graphs, linear layers that multiply quantised weights as they are stored and, if asked, batch-invariant. ``auto`` takes
triton on a GPU, native on a CPU that supports it, or eager.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from specdec_kernels import cpu_decoder
from specdec_kernels.ops import TORCH, Ops, load_ops, triton_reason
from specdec_kernels.paged_attention import check_tree_mask
from torch import Tensor

from specdec.graphs import GRAPH_MODES, CudaRecorder, NoRecorder, StepGraphs
from specdec.kv_cache import KV_DTYPES, KVCache
from specdec.model.batch import Captured, ForwardBatch
from specdec.model.config import ModelConfig
from specdec.model.decoder import Decoder
from specdec.model.quantize import check_quantization, quantized
from specdec.model.weights import LoadedModel
from specdec.names import unknown_name
from specdec.rows import StepInput
from specdec.scheduler.plan import IntArray, LongArray

log = logging.getLogger(__name__)
BACKENDS = ("auto", "eager", "native", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a model runs.

    Attributes:
        backend: one of ``BACKENDS``.
        kv_dtype: of the KV cache, "int8" or "fp8"; ``None`` is the model's own. Not for native.
        batch_invariant: results do not depend on the batch; native always is, eager never.
        graphs: one of ``GRAPH_MODES``; only triton's steps are recorded.
        quantization, group_size: of the linear layers, as ``specdec.model.quantize.check_quantization`` takes them.
        max_rows, max_model_len: most rows of a step and tokens of a request, which recorded steps are made for.
    """

    backend: str = "auto"
    kv_dtype: str | None = None
    batch_invariant: bool = False
    graphs: str = "auto"
    quantization: str | None = None
    group_size: int | None = None
    max_rows: int = 256
    max_model_len: int = 4096

    def __post_init__(self) -> None:
        for name, known in (("backend", BACKENDS), ("graphs", GRAPH_MODES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise unknown_name("kv_dtype", self.kv_dtype, KV_DTYPES)
        check_quantization(self.quantization, self.group_size)

    @property
    def stores_codes(self) -> bool:
        """Quantised weights stay codes; otherwise numbers of the model's dtype take their place."""
        return self.quantization == "fp8" or (self.quantization is not None and self.backend == "triton")

    def storage(self, dtype: torch.dtype) -> torch.dtype:
        """What the KV cache of a model in ``dtype`` stores."""
        return dtype if self.kv_dtype is None else KV_DTYPES[self.kv_dtype]


class Runner(Protocol):
    """A model and its paged KV cache.

    Attributes:
        options: with the backend that was chosen.
        ops: what the model is made of; torch's for native.
        model: what was loaded; its weights may have been released.
    """

    options: RunnerOptions
    ops: Ops
    model: LoadedModel
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelConfig: ...

    @property
    def backend(self) -> str:
        """ "eager", "native" or "triton"."""
        ...

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
    """The decoder of ``specdec.model.decoder``, over torch's ops or Triton's."""

    def __init__(
        self,
        model: LoadedModel,
        dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        options: RunnerOptions | None = None,
    ) -> None:
        options = options or RunnerOptions(backend="eager")
        config, self.options = model.config, options
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        is_triton = options.backend == "triton"
        self.ops = load_ops("triton", batch_invariant=options.batch_invariant) if is_triton else TORCH
        stored = (options.quantization, options.group_size) if options.stores_codes else (None, None)
        self.decoder = Decoder(config, model.weights, dtype, device, self.ops, *stored)
        self.kv_cache = KVCache(
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
            options.storage(dtype),
            device,
            self.ops.compact_kv,
        )
        self.graphs: StepGraphs | None = None
        if is_triton and (options.graphs == "padded" or (options.graphs == "auto" and device.type == "cuda")):
            max_blocks = -(-options.max_model_len // block_size) + 1  # drafts may go beyond the last token
            recorder = NoRecorder() if options.graphs == "padded" else CudaRecorder()
            self.graphs = StepGraphs(
                self._logits, options.max_rows, max_blocks, config.hidden_size, device, recorder
            )

    @property
    def backend(self) -> str:
        return self.options.backend

    @torch.inference_mode()
    def forward(
        self, batch: StepInput, layers: Sequence[int] | None = None, captured: Captured | None = None
    ) -> Tensor:
        if batch.tree_mask is not None:
            check_tree_mask(batch.tree_mask, batch.query_start)
        logits = self.graphs.run(batch, layers, captured) if self.graphs else None
        return self._logits(self._put(batch), layers, captured) if logits is None else logits

    def _put(self, batch: StepInput) -> ForwardBatch:
        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        return ForwardBatch(
            token_ids=put(batch.token_ids),
            positions=put(batch.positions),
            query_start=put(batch.query_start),
            context_lens=put(batch.context_lens),
            block_tables=put(batch.block_tables),
            slot_mapping=put(batch.slot_mapping),
            logit_rows=put(batch.logit_rows),
            tree_mask=None if batch.tree_mask is None else put(batch.tree_mask),
        )

    def _logits(self, batch: ForwardBatch, layers: Sequence[int] | None, captured: Captured | None) -> Tensor:
        hidden = self.decoder.forward(batch, self.kv_cache, layers=layers, captured=captured)
        return self.decoder.logits(hidden[batch.logit_rows])

    def copy_blocks(self, copies: IntArray) -> None:
        if copies.size:
            pairs = torch.from_numpy(copies).to(self.device, torch.int64)
            self.kv_cache.copy_blocks(pairs[:, 0], pairs[:, 1])

    def move_slots(self, sources: LongArray, destinations: LongArray) -> None:
        if sources.size:
            moved = (torch.from_numpy(slots).to(self.device) for slots in (sources, destinations))
            self.kv_cache.move_slots(*moved)

    def read_blocks(self, blocks: LongArray) -> list[Tensor]:
        return _read_blocks(self.kv_cache.planes, blocks)

    def write_blocks(self, blocks: LongArray, content: list[Tensor]) -> None:
        _write_blocks(self.kv_cache.planes, blocks, content)


class NativeRunner:
    backend = "native"
    options = RunnerOptions(backend="native")
    ops = TORCH

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
        return _read_blocks([*self.kv_cache.k, *self.kv_cache.v], blocks)

    def write_blocks(self, blocks: LongArray, content: list[Tensor]) -> None:
        _write_blocks([*self.kv_cache.k, *self.kv_cache.v], blocks, content)


def _read_blocks(planes: Sequence[Tensor], blocks: LongArray) -> list[Tensor]:
    chosen = torch.from_numpy(blocks)
    return [plane[chosen.to(plane.device)].cpu() for plane in planes]


def _write_blocks(planes: Sequence[Tensor], blocks: LongArray, content: list[Tensor]) -> None:
    chosen = torch.from_numpy(blocks)
    for plane, values in zip(planes, content, strict=True):
        plane[chosen.to(plane.device)] = values.to(plane.device)


def native_spec(config: ModelConfig) -> cpu_decoder.DecoderSpec:
    """The native backend's description of ``config``."""
    shared = {f.name for f in fields(cpu_decoder.DecoderSpec)} - {"inv_freq"}
    return cpu_decoder.DecoderSpec(
        **{name: getattr(config, name) for name in shared},
        inv_freq=tuple(config.inv_freq(layer) for layer in range(config.num_layers)),
    )


def choose_backend(
    options: RunnerOptions, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> RunnerOptions:
    """``options`` with "auto" resolved, after a check that the backend asked for can run.

    Raises:
        ValueError: a backend that cannot run here (with the reason), or cannot do what the options ask for.
    """
    backend, reasons = options.backend, {"triton": "", "native": ""}
    if backend in ("auto", "triton"):
        reasons["triton"] = triton_reason()
        if backend == "auto" and device.type != "cuda":
            reasons["triton"] = "the device is no GPU"
    if backend in ("auto", "native"):
        reasons["native"] = _native_reason(options, config, dtype, device)
    if reasons.get(backend):
        raise ValueError(f"backend {backend!r} cannot run here: {reasons[backend]}; use backend='eager'")
    if backend == "auto":
        backend = next((name for name, reason in reasons.items() if not reason), "eager")
        if backend == "eager":
            log.info("eager backend: %s; %s", reasons["triton"], reasons["native"])
    if options.batch_invariant and backend == "eager":
        raise ValueError(
            "batch_invariant=True needs backend 'native' (bfloat16 on a CPU) or 'triton': torch's matrix products "
            "depend on the batch"
        )
    return replace(options, backend=backend)


def _native_reason(
    options: RunnerOptions, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> str:
    """Why the native backend cannot run; empty if it can."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return f"the native backend runs bfloat16 on the CPU, not {dtype} on {device}"
    if options.kv_dtype is not None:
        return f"the native backend has no KV cache in {options.kv_dtype}"
    if options.quantization == "fp8":
        return "the native backend has no products in fp8"
    for supported, reason in (cpu_decoder.is_available(), cpu_decoder.supports(native_spec(config))):
        if not supported:
            return reason
    return ""


def make_runner(
    model: LoadedModel,
    options: RunnerOptions,
    dtype: torch.dtype,
    num_blocks: int,
    block_size: int,
    device: torch.device,
) -> Runner:
    """A runner for ``model``, quantised as the options say.

    Raises:
        ValueError: see :func:`choose_backend`; weights that cannot be quantised so.
    """
    options = choose_backend(options, model.config, dtype, device)
    if not options.stores_codes:
        model = quantized(model, options.quantization, options.group_size)
    if options.backend == "native":
        return NativeRunner(model, num_blocks, block_size)
    return EagerRunner(model, dtype, num_blocks, block_size, device, options)


def kv_bytes_per_block(
    options: RunnerOptions, config: ModelConfig, dtype: torch.dtype, block_size: int
) -> int:
    """Memory of one KV block over all layers, bytes; the backend has been chosen."""
    if options.backend == "native":
        return cpu_decoder.bytes_per_block(native_spec(config), block_size)
    return KVCache.bytes_per_block(
        config.num_layers, block_size, config.num_kv_heads, config.head_dim, options.storage(dtype)
    )
