"""Verification on a GPU without a word to the host: rows in parallel, and the vocabulary where nothing depends on it.

A sampled rule takes four launches. ``prepare`` gathers, for each row, the links between entries and both laws at the
drafted tokens; ``walk`` or ``traverse`` decides, reading whole laws only where a rejection changes a later threshold;
``tile_sums``, over rows and tiles of the vocabulary, sums the law of the next token; ``pick`` draws from it. A law with
rejected children is not stored: it is computed anew from the two laws and a few numbers for each rejection.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launches take options and types that the kernels' own signatures do not show.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from specdec_kernels.tuning import CompileCase, architecture, config_for
from specdec_kernels.verify import decide, greedy, sample
from specdec_kernels.verify.reference import Outcome, check_rule, empty_outcome


@dataclass(frozen=True, slots=True)
class Config:
    """Elements of the vocabulary that a program takes at once, and its warps.

    Attributes:
        block, block_warps: of the passes in which one program reads whole laws: much at once, as few programs run.
        tile, tile_warps: of sampling, a program for each tile.
        part, part_warps: of the argmax, likewise.
        greedy_entries: rows times entries that one program of the greedy walk takes.
    """

    block: int = 4096
    block_warps: int = 16
    tile: int = 4096
    tile_warps: int = 8
    part: int = 8192
    part_warps: int = 8
    greedy_entries: int = 256


CONFIGS = {"default": Config()}


def verify(
    rule: str,
    tokens: Tensor,
    parents: Tensor | None,
    num_drafted: Tensor,
    logit_start: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    draft_start: Tensor | None,
    accept_uniforms: Tensor,
    residual_uniforms: Tensor,
) -> Outcome:
    """As ``reference.verify``, for float32 probabilities."""
    has_draft = check_rule(rule, parents, draft_probs, draft_start)
    accepted, path, next_token = empty_outcome(tokens)
    num_rows, num_columns, num_entries = tokens.shape[0], target_probs.shape[1], tokens.shape[1] + 1
    if num_rows == 0:
        return accepted, path, next_token
    config, device = config_for(CONFIGS, architecture(tokens.device)), tokens.device
    entries = triton.next_power_of_2(num_entries)
    tile, num_tiles = _pieces(num_columns, config.tile)
    links = torch.empty(num_rows, 3, num_entries, dtype=torch.int32, device=device)
    odds = torch.empty(num_rows, 2, num_entries, dtype=torch.float32, device=device)
    steps = torch.empty(num_rows, num_entries, 3, dtype=torch.float32, device=device)
    sums = torch.empty(num_rows, num_tiles, 2, dtype=torch.float32, device=device)
    usable = torch.empty(num_rows, dtype=torch.int32, device=device)
    last = torch.empty_like(usable)
    tokens, num_drafted, logit_start = tokens.contiguous(), num_drafted.contiguous(), logit_start.contiguous()
    target_probs = target_probs.contiguous()
    if draft_probs is None or draft_start is None:
        draft_probs, draft_start = target_probs, logit_start  # pointers that are not read
    draft_probs, draft_start = draft_probs.contiguous(), draft_start.contiguous()
    laws = (logit_start, draft_start, target_probs, draft_probs)
    decide.prepare[(num_rows,)](
        tokens,
        tokens if parents is None else parents.contiguous(),
        num_drafted,
        *laws,
        links,
        odds,
        usable,
        num_columns,
        num_entries,
        ENTRIES=entries,
        IS_CHAIN=parents is None,
        HAS_DRAFT=has_draft,
        num_warps=1,
    )
    decision = decide.traverse if rule in ("block", "traversal") else decide.walk
    decision[(num_rows,)](
        tokens,
        *laws,
        accept_uniforms.contiguous(),
        links,
        odds,
        usable,
        steps,
        last,
        accepted,
        path,
        num_columns,
        num_entries,
        ENTRIES=entries,
        BLOCK=_pieces(num_columns, config.block)[0],
        HAS_DRAFT=has_draft,
        num_warps=config.block_warps if has_draft else 1,
    )
    sizes = dict(TILE=tile, HAS_DRAFT=has_draft, num_warps=config.tile_warps)
    sample.tile_sums[(num_rows, num_tiles)](
        tokens, *laws, links, steps, last, sums, num_columns, num_entries, **sizes
    )
    sample.pick[(num_rows,)](
        tokens,
        *laws,
        residual_uniforms.contiguous(),
        links,
        steps,
        last,
        sums,
        next_token,
        num_columns,
        num_entries,
        num_tiles,
        TILES=triton.next_power_of_2(num_tiles),
        **sizes,
    )
    return accepted, path, next_token


def verify_greedy(
    tokens: Tensor, parents: Tensor | None, num_drafted: Tensor, logit_start: Tensor, logits: Tensor
) -> Outcome:
    """As ``reference.verify_greedy``."""
    accepted, path, next_token = empty_outcome(tokens)
    num_rows, num_entries = tokens.shape[0], tokens.shape[1] + 1
    if num_rows == 0:
        return accepted, path, next_token
    config = config_for(CONFIGS, architecture(tokens.device))
    part, num_parts = _pieces(logits.shape[1], config.part)
    values = torch.empty(logits.shape[0], num_parts, dtype=torch.float32, device=tokens.device)
    argmax = torch.empty(logits.shape[0], num_parts, dtype=torch.int32, device=tokens.device)
    if logits.shape[0]:
        greedy.argmax_parts[(logits.shape[0], num_parts)](
            logits.contiguous(), values, argmax, logits.shape[1], BLOCK=part, num_warps=config.part_warps
        )
    entries, rows = _greedy_block(num_entries, config)
    greedy.greedy_walk[(triton.cdiv(num_rows, rows),)](
        values,
        argmax,
        tokens.contiguous(),
        tokens if parents is None else parents.contiguous(),
        num_drafted.contiguous(),
        logit_start.contiguous(),
        accepted,
        path,
        next_token,
        num_rows,
        num_entries,
        ROWS=rows,
        ENTRIES=entries,
        PARTS=num_parts,
        IS_CHAIN=parents is None,
        num_warps=4,
    )
    return accepted, path, next_token


def _pieces(num_columns: int, limit: int) -> tuple[int, int]:
    """Size of a piece of the vocabulary, a power of two, and the number of pieces."""
    size = min(triton.next_power_of_2(num_columns), limit)
    return size, triton.cdiv(num_columns, size)


def _greedy_block(num_entries: int, config: Config) -> tuple[int, int]:
    """Entries, padded, and rows of a program of the greedy walk."""
    entries = triton.next_power_of_2(num_entries)
    return entries, max(config.greedy_entries // entries, 1)


def compile_cases(arch: str) -> list[CompileCase]:
    """What is launched on ``arch``: chains of 8 and 16, trees of 32 and 64, vocabularies of 49,152 and 128,256."""
    config = config_for(CONFIGS, arch)
    cases: list[CompileCase] = []
    for num_drafts, is_chain in ((8, True), (16, True), (32, False), (64, False)):
        entries = triton.next_power_of_2(num_drafts + 1)
        name = f"{'chain' if is_chain else 'tree'} of {num_drafts}"
        for has_draft in (False, True):
            flags = {"ENTRIES": entries, "HAS_DRAFT": has_draft}
            suffix = f"{name}{', draft law' if has_draft else ''}"
            cases.append(
                _case(f"prepare, {suffix}", decide.prepare, {**flags, "IS_CHAIN": is_chain}, num_warps=1)
            )
            for kernel in (decide.walk, decide.traverse):
                if has_draft or is_chain or kernel is decide.walk:
                    cases.append(
                        _case(
                            f"{kernel.__name__}, {suffix}",
                            kernel,
                            {**flags, "BLOCK": config.block},
                            num_warps=config.block_warps if has_draft else 1,
                            needs_wide_loads=has_draft,
                        )
                    )
        for vocab_size in VOCAB_SIZES:
            constants = {
                "ROWS": _greedy_block(num_drafts + 1, config)[1],
                "ENTRIES": entries,
                "PARTS": _pieces(vocab_size, config.part)[1],
                "IS_CHAIN": is_chain,
            }
            cases.append(_case(f"greedy_walk, {name}, {vocab_size}", greedy.greedy_walk, constants))
    return cases + _vocabulary_cases(config)


VOCAB_SIZES = (49152, 128256)


def _vocabulary_cases(config: Config) -> list[CompileCase]:
    cases: list[CompileCase] = []
    for has_draft in (False, True):
        flags = {"TILE": config.tile, "HAS_DRAFT": has_draft}
        suffix = ", draft law" if has_draft else ""
        options = {"num_warps": config.tile_warps, "needs_wide_loads": True}
        cases.append(_case(f"tile_sums{suffix}", sample.tile_sums, flags, **options))
        for vocab_size in VOCAB_SIZES:
            tiles = triton.next_power_of_2(_pieces(vocab_size, config.tile)[1])
            constants = {**flags, "TILES": tiles}
            cases.append(_case(f"pick, {vocab_size}{suffix}", sample.pick, constants, **options))
    for dtype in ("fp32", "bf16"):
        constants = {"BLOCK": config.part}
        options = {"num_warps": config.part_warps, "needs_wide_loads": True}
        cases.append(_case(f"argmax_parts, {dtype}", greedy.argmax_parts, constants, dtype=dtype, **options))
    return cases


_TYPES = {
    **dict.fromkeys(("tokens_ptr", "logit_start_ptr", "draft_start_ptr", "path_ptr", "next_ptr"), "*i64"),
    **dict.fromkeys(("target_ptr", "draft_ptr", "odds_ptr", "steps_ptr", "sums_ptr", "values_ptr"), "*fp32"),
    "uniforms_ptr": "*fp64",
    "num_columns": "i32",
    "num_entries": "i32",
    "num_rows": "i32",
    "num_tiles": "i32",
}
"""Of arguments by name; other pointers are int32."""


def _case(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    dtype: str = "fp32",
    num_warps: int = 4,
    **promises: bool,
) -> CompileCase:
    signature = {
        argument: "constexpr" if argument in constants else _TYPES.get(argument, "*i32")
        for argument in kernel.arg_names
    }
    if kernel is greedy.argmax_parts:
        signature |= {"logits_ptr": f"*{dtype}", "tokens_ptr": "*i32"}
    return CompileCase(
        op="verify",
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        # The number of entries is not specialised, and that of columns is round.
        aligned=tuple(a for a, kind in signature.items() if kind.startswith("*") or a == "num_columns"),
        num_warps=num_warps,
        **promises,
    )
