"""Moving slots on a GPU: all layers, keys and values in one launch.

A program moves one piece of one plane for one row, ``MOVES`` tokens at a time: it reads all of them, then writes them.
Nobody else touches these bytes, so no order among programs matters.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.tuning import CompileCase, architecture, config_for

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, slots=True)
class Config:
    """``moves`` are in flight at once, of at most ``chunk`` words each."""

    moves: int = 8
    chunk: int = 256
    num_warps: int = 4


CONFIGS = {
    "default": Config(),
    "gfx942": Config(num_warps=2),  # warps of 64 threads
}


@triton.jit
def _compact(
    cache_ptr,
    scales_ptr,
    sources_ptr,
    destinations_ptr,
    start_ptr,
    num_moves,
    num_slots,
    MOVES: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    start, end = 0, num_moves
    if HAS_STARTS:
        start = tl.load(start_ptr + tl.program_id(0))
        end = tl.load(start_ptr + tl.program_id(0) + 1)
    first_slot = tl.program_id(1).to(tl.int64) * num_slots
    chunk = tl.program_id(2)
    for first in range(start, end, MOVES):
        index = first + tl.arange(0, MOVES)
        source = tl.load(sources_ptr + index, mask=index < end, other=-1)
        destination = tl.load(destinations_ptr + index, mask=index < end, other=-1)
        moved = (source >= 0) & (destination >= 0)
        source, destination = first_slot + source, first_slot + destination
        if HAS_SCALES and chunk == tl.num_programs(2) - 1:
            _move(scales_ptr, source, destination, moved, 0, NUM_HEADS, HEADS)
        else:
            _move(cache_ptr, source, destination, moved, chunk, SLOT_WORDS, CHUNK)


@triton.jit
def _move(base_ptr, source, destination, moved, chunk, SLOT_WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """Words ``chunk * CHUNK`` and on of slots of ``SLOT_WORDS`` words each."""
    word = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = moved[:, None] & (word < SLOT_WORDS)[None, :]
    values = tl.load(base_ptr + source[:, None] * SLOT_WORDS + word[None, :], mask=mask)
    tl.debug_barrier()  # threads read and write different tokens, and one's destination may be another's source
    tl.store(base_ptr + destination[:, None] * SLOT_WORDS + word[None, :], values, mask=mask)


def compact_kv(
    cache: Tensor,
    sources: Tensor,
    destinations: Tensor,
    move_start: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """As ``reference.compact_kv``, in one launch.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    if not (cache.is_contiguous() and (scales is None or scales.is_contiguous())):
        raise ValueError(
            "compact_kv needs a contiguous cache and contiguous scales: pass the tensor of all layers"
        )
    num_slots = cache.shape[-4] * cache.shape[-3]
    num_rows = 1 if move_start is None else move_start.shape[0] - 1
    if not (cache.numel() and sources.numel() and num_rows):
        return
    num_planes = cache.numel() // (num_slots * cache.shape[-2] * cache.shape[-1])
    row_bytes = cache.shape[-1] * cache.element_size()
    words = cache.view(next(word for word in _WORDS if row_bytes % word.itemsize == 0))
    slot_words = words.shape[-2] * words.shape[-1]
    config = config_for(CONFIGS, architecture(cache.device))
    chunk = _chunk(slot_words, config)
    num_chunks = triton.cdiv(slot_words, chunk) + (scales is not None)
    _compact[(num_rows, num_planes, num_chunks)](
        words,
        words if scales is None else scales.view(torch.int32),
        sources,
        destinations,
        sources if move_start is None else move_start,
        sources.shape[0],
        num_slots,
        MOVES=config.moves,
        SLOT_WORDS=slot_words,  # a constant, so that loads are wide for any that is even
        CHUNK=chunk,
        NUM_HEADS=cache.shape[-2],
        HEADS=triton.next_power_of_2(cache.shape[-2]),
        HAS_STARTS=move_start is not None,
        HAS_SCALES=scales is not None,
        num_warps=config.num_warps,
    )


def _chunk(slot_words: int, config: Config) -> int:
    return min(triton.next_power_of_2(slot_words), config.chunk)


def compile_cases(arch: str) -> list[CompileCase]:
    """What is launched on ``arch`` for 3 heads of 64 and 8 heads of 128, of 16 bits, and of 8 bits with scales."""
    config = config_for(CONFIGS, arch)
    cases: list[CompileCase] = []
    for num_heads, head_dim in ((3, 64), (8, 128)):
        for has_scales in (False, True):
            slot_words = num_heads * head_dim * (1 if has_scales else 2) // 8
            for has_starts in (False, True):
                constants = {
                    "MOVES": config.moves,
                    "SLOT_WORDS": slot_words,
                    "CHUNK": _chunk(slot_words, config),
                    "NUM_HEADS": num_heads,
                    "HEADS": triton.next_power_of_2(num_heads),
                    "HAS_STARTS": has_starts,
                    "HAS_SCALES": has_scales,
                }
                layout = "8 bits, scales" if has_scales else "16 bits"
                cases.append(
                    CompileCase(
                        op="compact_kv",
                        name=f"{layout}, {num_heads} x {head_dim}, {'rows' if has_starts else 'one row'}",
                        kernel=_compact,
                        signature={
                            "cache_ptr": "*i64",
                            "scales_ptr": "*i32" if has_scales else "*i64",
                            "sources_ptr": "*i64",
                            "destinations_ptr": "*i64",
                            "start_ptr": "*i32" if has_starts else "*i64",
                            "num_moves": "i32",
                            "num_slots": "i32",
                            **dict.fromkeys(constants, "constexpr"),
                        },
                        constants=constants,
                        aligned=(
                            *("cache_ptr", "scales_ptr", "sources_ptr", "destinations_ptr", "start_ptr"),
                            "num_slots",
                        ),
                        num_warps=config.num_warps,
                        needs_wide_loads=True,
                    )
                )
    return cases
