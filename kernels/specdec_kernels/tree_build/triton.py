"""Dynamic trees on a GPU: candidates are ranked by counting those that are better, so ties need no sort to be stable.

Scores are float64 sums of float32 numbers, exactly the host's, so every choice is the host's bit for bit.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from specdec_kernels.tree_build import kernels
from specdec_kernels.tree_build.reference import (
    DynamicTrees,
    Level,
    check_children,
    check_levels,
    check_width,
    empty_trees,
    next_start,
)
from specdec_kernels.tuning import CompileCase, architecture, config_for


@dataclass(frozen=True, slots=True)
class Config:
    """What a program takes.

    Attributes:
        block: candidates that it ranks. others: candidates that it compares them with at once.
        compress: candidates of a row at once where they are renumbered.
        entries: rows times entries where masks are packed.
    """

    block: int = 64
    others: int = 32
    compress: int = 1024
    entries: int = 1024


CONFIGS = {"default": Config()}


def grow(previous: Level | None, tokens: Tensor, logprobs: Tensor, width: int) -> Level:
    """As ``reference.grow``."""
    check_children(previous, tokens, logprobs, width)
    num_rows, num_beam, num_children = tokens.shape
    num_candidates = num_beam * num_children
    width = min(width, num_candidates)
    scores = torch.empty(num_rows, num_candidates, dtype=torch.float64, device=tokens.device)
    parents = torch.empty(num_rows, num_candidates, dtype=torch.int64, device=tokens.device)
    beam = torch.empty(num_rows, width, dtype=torch.int64, device=tokens.device)
    config = config_for(CONFIGS, architecture(tokens.device))
    if scores.numel():
        kernels.grow[(num_rows, triton.cdiv(num_candidates, config.block))](
            logprobs.contiguous(),
            scores if previous is None else previous.scores,
            beam if previous is None else previous.beam,
            scores,
            parents,
            beam,
            0 if previous is None else previous.start,
            0 if previous is None else previous.scores.shape[1],
            num_beam,
            num_candidates,
            num_children,
            width,
            BLOCK=config.block,
            OTHERS=config.others,
            HAS_PREVIOUS=previous is not None,
            num_warps=4,
        )
    return Level(tokens.flatten(1), scores, parents, beam, next_start(previous))


def rerank(levels: Sequence[Level], size: int, sizes: Tensor | None = None) -> DynamicTrees:
    """As ``reference.rerank``."""
    check_levels(levels, size)
    scores = torch.cat([level.scores for level in levels], dim=1)
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    above = torch.cat([level.parents for level in levels], dim=1)
    trees = empty_trees(scores, size)
    num_rows, num_candidates = scores.shape
    if num_rows == 0:
        return trees
    config = config_for(CONFIGS, architecture(scores.device))
    chosen, numbers = (torch.empty_like(scores, dtype=torch.int32) for _ in range(2))
    kernels.choose[(num_rows, triton.cdiv(num_candidates, config.block))](
        scores,
        scores if sizes is None else sizes.contiguous(),
        chosen,
        num_candidates,
        size,
        BLOCK=config.block,
        OTHERS=config.others,
        HAS_SIZES=sizes is not None,
        num_warps=4,
    )
    kernels.compress[(num_rows,)](
        chosen,
        scores,
        tokens,
        above,
        numbers,
        trees.parents,
        trees.tokens,
        trees.counts,
        trees.candidates,
        trees.scores,
        num_candidates,
        size,
        BLOCK=min(triton.next_power_of_2(num_candidates), config.compress),
        SIZE=triton.next_power_of_2(max(size, 1)),
        num_warps=4,
    )
    return trees


def pack_trees(parents: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.pack_trees``."""
    check_width(parents)
    num_rows, num_entries = parents.shape[0], parents.shape[1] + 1
    depths = torch.empty(num_rows, num_entries - 1, dtype=torch.int32, device=parents.device)
    masks = torch.empty(num_rows, num_entries, 2, dtype=torch.int64, device=parents.device)
    entries, rows = _pack_block(num_entries, config_for(CONFIGS, architecture(parents.device)))
    if num_rows:
        kernels.pack[(triton.cdiv(num_rows, rows),)](
            parents.contiguous(),
            counts.contiguous(),
            depths,
            masks,
            num_rows,
            num_entries,
            ROWS=rows,
            ENTRIES=entries,
            num_warps=4,
        )
    return depths, masks


def _pack_block(num_entries: int, config: Config) -> tuple[int, int]:
    """Entries, padded, and rows of a program."""
    entries = triton.next_power_of_2(num_entries)
    return entries, max(config.entries // entries, 1)


def compile_cases(arch: str) -> list[CompileCase]:
    """What EAGLE-2 launches on ``arch``: ten candidates of ten children each, six levels, trees of up to 127 nodes."""
    config = config_for(CONFIGS, arch)
    ranking = {"BLOCK": config.block, "OTHERS": config.others}
    cases = [
        _case(
            f"grow, {dtype}{', below a level' if below else ''}",
            kernels.grow,
            {**ranking, "HAS_PREVIOUS": below},
            dtype,
        )
        for dtype in ("fp32", "bf16")
        for below in (False, True)
    ]
    cases += [
        _case(f"choose{', sizes' if sizes else ''}", kernels.choose, {**ranking, "HAS_SIZES": sizes})
        for sizes in (False, True)
    ]
    cases += [_case(f"compress, {size}", kernels.compress, {"BLOCK": 512, "SIZE": size}) for size in (32, 64)]
    for num_nodes in (8, 32, 127):
        entries, rows = _pack_block(num_nodes + 1, config)
        cases.append(_case(f"pack, {num_nodes} nodes", kernels.pack, {"ROWS": rows, "ENTRIES": entries}))
    return cases


_INT64 = (
    "beam_ptr",
    "previous_beam_ptr",
    "tokens_ptr",
    "above_ptr",
    "tokens_out_ptr",
    "candidates_out_ptr",
    "masks_ptr",
)
_FLOAT64 = ("scores_ptr", "previous_scores_ptr", "scores_out_ptr")


def _case(name: str, kernel: Any, constants: dict[str, Any], logprobs: str = "fp32") -> CompileCase:
    pointers = {
        **dict.fromkeys(_INT64, "*i64"),
        **dict.fromkeys(_FLOAT64, "*fp64"),
        "logprobs_ptr": f"*{logprobs}",
    }
    if kernel is kernels.grow:
        pointers["parents_ptr"] = "*i64"
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    return CompileCase(
        op="tree_build",
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
    )
