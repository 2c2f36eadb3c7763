"""Sampling on a GPU: one program a row, which passes over the vocabulary in tiles and never sorts it.

A row without filters takes three passes by inverse CDF and one with Gumbel noise. Top-k and top-p add about 16 each,
during which a row stays in the L2 cache. A filter that is ``None`` leaves no code in the kernel.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.sample import filters, philox
from specdec_kernels.tuning import CompileCase, architecture, config_for

_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest float32, as an initial peak: differences from it are numbers."""


@dataclass(frozen=True, slots=True)
class Config:
    """``block`` tokens a tile at most: eight a thread, which keeps two loads of 128 bits in flight.

    ``noise_block`` with Gumbel noise, whose random words need registers: with eight, sm_100 spills.
    """

    block: int = 4096
    noise_block: int = 2048
    num_warps: int = 16


CONFIGS = {
    "default": Config(),
    "gfx942": Config(num_warps=8),  # warps of 64 threads
}


@triton.jit
def _filtered_probs(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    out_ptr,
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    peak, token = filters.find_peak(logits_ptr, vocab_size, BLOCK)
    limit = filters.find_limit(
        logits_ptr, peak, temperature, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, BLOCK
    )
    is_greedy, is_usable = temperature == 0, tl.abs(peak) < float("inf")
    positive = tl.where(is_greedy, 1.0, temperature)
    mass = filters.kept_mass(logits_ptr, peak, positive, limit, vocab_size, BLOCK)
    total = mass.to(tl.float32) * 5.684341886080802e-14  # 2**-44
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = filters.load_logits(logits_ptr, first, vocab_size, BLOCK)
        d = filters.distance(x, peak, positive)
        probs = tl.where(d <= limit, tl.exp(-d) / total, 0.0)
        probs = tl.where(is_greedy, (column == token).to(tl.float32), probs)
        probs = tl.where(is_usable, probs, float("nan"))
        tl.store(out_ptr + row * vocab_size + column, probs, mask=column < vocab_size)


@triton.jit
def _sample(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniforms_ptr,
    out_ptr,
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    peak, token = filters.find_peak(logits_ptr, vocab_size, BLOCK)
    if temperature > 0:
        limit = filters.find_limit(
            logits_ptr, peak, temperature, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, BLOCK
        )
        mass = filters.kept_mass(logits_ptr, peak, temperature, limit, vocab_size, BLOCK)
        target = (tl.load(uniforms_ptr + row).to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
        rest = tl.minimum(target, mass - 1)
        tile = tl.full((), -1, tl.int32)
        for first in range(0, vocab_size, BLOCK):
            x = filters.load_logits(logits_ptr, first, vocab_size, BLOCK)
            in_tile = tl.sum(filters.kept_weights(x, peak, temperature, limit), axis=0)
            tile = tl.where((tile < 0) & (rest < in_tile), first, tile)
            rest = tl.where(tile < 0, rest - in_tile, rest)
        x = filters.load_logits(logits_ptr, tile, vocab_size, BLOCK)
        cumulative = tl.cumsum(filters.kept_weights(x, peak, temperature, limit), axis=0)
        token = tile + tl.sum((cumulative <= rest).to(tl.int32), axis=0)
    tl.store(out_ptr + row, tl.where(tl.abs(peak) < float("inf"), token, -1))


@triton.jit
def _sample_gumbel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    counters_ptr,
    out_ptr,
    stream,
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    seed, counter = tl.load(seeds_ptr + row), tl.load(counters_ptr + row)
    peak, limit = tl.full((), 0.0, tl.float32), tl.full((), float("inf"), tl.float32)
    is_filtered = filters.is_filtered(temperature, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
    if is_filtered:
        peak, _ = filters.find_peak(logits_ptr, vocab_size, BLOCK)
        limit = filters.find_limit(
            logits_ptr, peak, temperature, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, BLOCK
        )
    rate = tl.where(temperature > 0, tl.minimum(1.0 / temperature, 1e38), 1.0)
    # Each lane keeps the best of its tokens, the least gap * rate + noise, where gaps are to the lane's own peak.
    lane_peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    token = tl.full((BLOCK,), 0, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        x = filters.load_logits(logits_ptr, first, vocab_size, BLOCK)
        higher = tl.maximum(lane_peak, x)
        score = (higher - x) * rate
        if temperature > 0:
            score += philox.log_exponentials(seed, counter, stream, first, BLOCK)
        if is_filtered:
            score = tl.where(filters.distance(x, peak, temperature) <= limit, score, float("inf"))
        best += (higher - lane_peak) * rate
        token = tl.where(score < best, first + tl.arange(0, BLOCK), token)
        best, lane_peak = tl.minimum(best, score), higher
    peak = tl.max(lane_peak, axis=0)
    best += (peak - lane_peak) * rate
    least = tl.min(best, axis=0)
    token = tl.min(tl.where(best == least, token, vocab_size), axis=0)
    tl.store(out_ptr + row, tl.where((peak < float("inf")) & (least < float("inf")), token, -1))


@triton.jit
def _uniforms(seeds_ptr, counters_ptr, out_ptr, stream, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = philox.words(tl.load(seeds_ptr + row), tl.load(counters_ptr + row), stream, block)
    out_ptr += row * width + 2 * block
    tl.store(out_ptr, philox.uniform(a, b), mask=2 * block < width)
    tl.store(out_ptr + 1, philox.uniform(c, d), mask=2 * block + 1 < width)


def filtered_probs(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """As ``reference.filtered_probs``, in float32."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if out.numel():
        _filtered_probs[(logits.shape[0],)](
            *(logits, temperature, top_k, top_p, min_p, out),
            logits.stride(0),
            logits.shape[1],
            **_options(logits, has_noise=False),
        )
    return out


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniforms: Tensor,
) -> Tensor:
    """As ``reference.sample``."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if out.numel():
        _sample[(logits.shape[0],)](
            *(logits, temperature, top_k, top_p, min_p, uniforms, out),
            logits.stride(0),
            logits.shape[1],
            **_options(logits, has_noise=False),
        )
    return out


def sample_gumbel(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    counters: Tensor,
    stream: int,
) -> Tensor:
    """As ``reference.sample_gumbel``."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if out.numel():
        _sample_gumbel[(logits.shape[0],)](
            *(logits, temperature, top_k, top_p, min_p, seeds, counters, out),
            stream,
            logits.stride(0),
            logits.shape[1],
            **_options(logits, has_noise=True),
        )
    return out


def uniforms(seeds: Tensor, counters: Tensor, stream: int, width: int) -> Tensor:
    """As ``reference.uniforms``."""
    out = torch.empty((seeds.shape[0], width), dtype=torch.float64, device=seeds.device)
    if out.numel():
        block = min(max(triton.next_power_of_2(width) // 2, 1), 128)
        grid = (seeds.shape[0], triton.cdiv(width, 2 * block))
        _uniforms[grid](seeds, counters, out, stream, width, BLOCK=block, num_warps=1)
    return out


def _options(logits: Tensor, *, has_noise: bool) -> dict[str, int]:
    assert logits.stride(-1) == 1, "a row's logits are consecutive in memory"
    return _launch(logits.shape[1], has_noise, config_for(CONFIGS, architecture(logits.device)))


def _launch(vocab_size: int, has_noise: bool, config: Config) -> dict[str, int]:
    """As many threads a token for a small vocabulary as for a large one."""
    largest = config.noise_block if has_noise else config.block
    block = min(max(triton.next_power_of_2(vocab_size), 2), largest)
    return {"BLOCK": block, "num_warps": max(config.num_warps * block // largest, 1)}


def compile_cases(arch: str) -> list[CompileCase]:
    """What is launched on ``arch`` for vocabularies of 49152 and 128256, with all filters and with none."""
    config = config_for(CONFIGS, arch)
    after = {
        _filtered_probs: {"out_ptr": "*fp32"},
        _sample: {"uniforms_ptr": "*fp64", "out_ptr": "*i64"},
        _sample_gumbel: {"seeds_ptr": "*i64", "counters_ptr": "*i64", "out_ptr": "*i64", "stream": "i32"},
    }
    filter_types = {"top_k_ptr": "*i64", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}
    cases = []
    for kernel, arguments in after.items():
        for vocab_size in (49152, 128256):
            for has_filters in (False, True):
                options = _launch(vocab_size, kernel is _sample_gumbel, config)
                types = filter_types if has_filters else dict.fromkeys(filter_types, "constexpr")
                signature = {"logits_ptr": "*fp32", "temperature_ptr": "*fp32", **types, **arguments}
                signature |= {"logits_stride": "i32", "vocab_size": "i32"}
                constants = {
                    "BLOCK": options["BLOCK"],
                    **({} if has_filters else dict.fromkeys(filter_types)),
                }
                name = f"{kernel.__name__[1:]}, {vocab_size}, {'filters' if has_filters else 'no filters'}"
                cases.append(_case(name, kernel, signature, constants, options["num_warps"]))
    signature = {
        "seeds_ptr": "*i64",
        "counters_ptr": "*i64",
        "out_ptr": "*fp64",
        "stream": "i32",
        "width": "i32",
    }
    cases.append(_case("uniforms", _uniforms, signature, {"BLOCK": 8}, 1))
    return cases


def _case(
    name: str, kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], num_warps: int
) -> CompileCase:
    return CompileCase(
        op="sample",
        name=name,
        kernel=kernel,
        signature={**signature, "BLOCK": "constexpr"},
        constants=constants,
        aligned=(
            *(name for name, kind in signature.items() if kind.startswith("*")),
            *(name for name in ("logits_stride", "vocab_size") if name in signature),
        ),
        num_warps=num_warps,
        needs_wide_loads=kernel is not _uniforms,
    )
