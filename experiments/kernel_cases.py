"""What kernel_bench times: each op on shapes of Llama-3.1-8B, ours and others' ways of doing the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from specdec_kernels import costs
from specdec_kernels.costs import OpCost
from specdec_kernels.ops import Ops
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCABULARY = 32, 8, 128, 4096, 14336, 128_256
BLOCK_SIZE = 16
LINEAR = ((6144, 4096), (4096, 4096))
LINEAR_TOKENS = (1, 16, 64, 256, 2048)
# Rows, queries of each, context of each. The shapes without verification are those of the published timings.
ATTENTION = (
    (1, 1, 1023),
    (16, 1, 1023),
    (64, 1, 1023),
    (1, 1, 8191),
    (16, 1, 8191),
    (64, 1, 8191),
    (1, 512, 0),
    (1, 4096, 0),
    (1, 16384, 0),
    (16, 8, 1023),
    (16, 32, 1023),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """One measurement: its op, a name as in the published table, and what it cannot do without."""

    op: str
    name: str
    cost: OpCost


@dataclass(frozen=True, slots=True)
class Case:
    """A shape and ways to compute it on real tensors, by name: ours is called ``ours``."""

    shape: Shape
    ways: dict[str, Callable[[], object]] = field(default_factory=dict)


def shapes(scale: int = 1) -> list[Shape]:
    """All of them; a ``scale`` above 1 divides rows and lengths, for machines that have no time."""
    found = [
        Shape("linear", f"{tokens}x{outputs}x{inputs}", costs.linear_cost(tokens, outputs, inputs))
        for outputs, inputs in LINEAR
        for tokens in _scaled(LINEAR_TOKENS, scale)
    ]
    for rows, queries, context in dict.fromkeys(_scaled_attention(scale)):
        cost = costs.paged_attention_cost([queries] * rows, [context] * rows, HEADS, KV_HEADS, HEAD_DIM)
        found.append(Shape("paged_attention", f"{rows}x{queries}+{context}", cost))
    for tokens in _scaled((1, 64, 2048), scale):
        found += [
            Shape("rms_norm", f"{tokens}x{HIDDEN}", costs.rms_norm_cost(tokens, HIDDEN, True)),
            Shape("silu_mul", f"{tokens}x{MLP}", costs.gated_cost(tokens, MLP)),
            Shape("rope_store_kv", f"{tokens}", costs.rope_store_kv_cost(tokens, HEADS, KV_HEADS, HEAD_DIM)),
        ]
    for rows in _scaled((1, 64), scale):
        found.append(Shape("filtered_probs", f"{rows}x{VOCABULARY}", costs.sample_cost(rows, VOCABULARY)))
    return found


def _scaled(values: tuple[int, ...], scale: int) -> list[int]:
    return sorted({max(1, value // scale) for value in values})


def _scaled_attention(scale: int) -> Iterator[tuple[int, int, int]]:
    for rows, queries, context in ATTENTION:
        yield max(1, rows // scale), max(1, queries // scale), context // scale


class CaseMaker:
    """Turns shapes into cases on a device.

    Args:
        ops: ours.
        dtype: of activations and weights.
    """

    def __init__(self, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
        self._ops, self._device, self._dtype = ops, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def case(self, shape: Shape) -> Case:
        make = getattr(self, f"_{shape.op}")
        return Case(shape, make(shape.name))

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self._device, dtype=torch.float32).to(
            self._dtype
        )

    def _linear(self, name: str) -> dict[str, Callable[[], object]]:
        tokens, outputs, inputs = map(int, name.split("x"))
        x, weight = self._random(tokens, inputs), self._random(outputs, inputs)
        ways: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, weight)}
        if self._ops.name == "triton":
            from specdec_kernels.linear.triton import linear
            from specdec_kernels.wna16_matmul import quantize
            from specdec_kernels.wna16_matmul.triton import wna16_matmul

            int4 = quantize(weight, 4, 128)
            return {"ours": lambda: linear(x, weight), "ours int4": lambda: wna16_matmul(x, int4), **ways}
        return {"ours": lambda: self._ops.linear(x, weight), **ways}

    def _paged_attention(self, name: str) -> dict[str, Callable[[], object]]:
        new, _, context_text = name.partition("+")
        (rows, queries), context = map(int, new.split("x")), int(context_text)
        total, int32 = queries + context, torch.int32
        num_blocks = -(-total // BLOCK_SIZE)
        k_cache, v_cache = (self._random(rows * num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
        order = torch.randperm(rows * num_blocks, generator=self._generator, device=self._device)
        tables = order.view(rows, num_blocks).to(int32)
        q = self._random(rows * queries, HEADS, HEAD_DIM)
        starts = torch.arange(rows + 1, device=self._device, dtype=int32) * queries
        contexts = torch.full((rows,), context, device=self._device, dtype=int32)
        scale = HEAD_DIM**-0.5

        def ours() -> object:
            return self._ops.paged_attention(q, k_cache, v_cache, starts, contexts, tables, scale)

        # Others get contiguous keys and values, which flatters them.
        keys, values = (
            cache[tables.long()].flatten(1, 2)[:, :total].transpose(1, 2) for cache in (k_cache, v_cache)
        )
        dense_q = q.view(rows, queries, HEADS, HEAD_DIM).transpose(1, 2)
        is_prefill = context == 0
        mask = None
        if not is_prefill and queries > 1:
            place = torch.arange(total, device=self._device)
            mask = place <= (context + torch.arange(queries, device=self._device))[:, None]

        def sdpa() -> object:
            return F.scaled_dot_product_attention(
                dense_q,
                keys,
                values,
                attn_mask=mask,
                is_causal=is_prefill and queries > 1,
                scale=scale,
                enable_gqa=True,
            )

        ways: dict[str, Callable[[], object]] = {"ours": ours, "torch SDPA": sdpa}
        if self._device.type == "cuda":
            ways |= _other_attentions(dense_q, keys, values, context)
        return ways

    def _rms_norm(self, name: str) -> dict[str, Callable[[], object]]:
        tokens, size = map(int, name.split("x"))
        x, residual, weight = self._random(tokens, size), self._random(tokens, size), self._random(size)
        return {
            "ours": lambda: self._ops.rms_norm(x, weight, 1e-5, 0.0, residual),
            "torch": lambda: F.rms_norm(x + residual, (size,), weight, 1e-5),
        }

    def _silu_mul(self, name: str) -> dict[str, Callable[[], object]]:
        tokens, size = map(int, name.split("x"))
        gate_up = self._random(tokens, 2 * size)
        gate, up = gate_up.chunk(2, dim=-1)
        return {"ours": lambda: self._ops.silu_mul(gate_up), "torch": lambda: F.silu(gate) * up}

    def _rope_store_kv(self, name: str) -> dict[str, Callable[[], object]]:
        tokens = int(name)
        qkv = self._random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        num_blocks = -(-tokens // BLOCK_SIZE)
        caches = [self._random(num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2)]
        places = torch.arange(tokens, device=self._device)
        inv_freq = 1e4 ** -(torch.arange(0, HEAD_DIM, 2, device=self._device) / HEAD_DIM)
        return {"ours": lambda: self._ops.rope_store_kv(q, k, v, places, inv_freq, *caches, places)}

    def _filtered_probs(self, name: str) -> dict[str, Callable[[], object]]:
        rows, size = map(int, name.split("x"))
        logits = torch.randn(rows, size, generator=self._generator, device=self._device)
        temperature = torch.full((rows,), 0.8, device=self._device)
        top_k = torch.full((rows,), 50, dtype=torch.int32, device=self._device)
        top_p = torch.full((rows,), 0.95, device=self._device)
        filtered = self._ops.filtered_probs
        if filtered is None:
            from specdec_kernels.sample import reference

            filtered = reference.filtered_probs

        def sorted_rows() -> object:
            values, _ = (logits / temperature[:, None]).sort(descending=True)
            return values.softmax(-1).cumsum(-1)

        return {
            "ours": lambda: filtered(logits, temperature, top_k, top_p, torch.zeros_like(top_p)),
            "torch sort": sorted_rows,
        }


def _other_attentions(
    q: Tensor, keys: Tensor, values: Tensor, context: int
) -> dict[str, Callable[[], object]]:
    """FlexAttention, and flash-attn and flashinfer where they are installed; q, keys, values [R, H, N, D]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, total = q.shape[2], keys.shape[2]
    block_mask = create_block_mask(
        lambda _b, _h, query, key: key <= query + context, None, None, queries, total, device=str(q.device)
    )
    compiled = torch.compile(flex_attention)
    ways: dict[str, Callable[[], object]] = {
        "FlexAttention": lambda: compiled(q, keys, values, block_mask=block_mask, enable_gqa=True)
    }
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        by_token = [x.transpose(1, 2).contiguous() for x in (q, keys, values)]
        ways["flash-attn"] = lambda: flash_attn_func(*by_token, causal=True)
    if importlib.util.find_spec("flashinfer") and q.shape[0] == 1:
        import flashinfer  # pyright: ignore[reportMissingImports]

        one = [x[0].transpose(0, 1).contiguous() for x in (q, keys, values)]
        ways["flashinfer"] = lambda: flashinfer.single_prefill_with_kv_cache(*one, causal=True)
    return ways
