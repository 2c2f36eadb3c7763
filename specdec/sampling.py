"""Logits to probabilities to tokens.

Processors run in this order, the one of transformers' generation: repetition penalty, presence penalty,
temperature, top-k, top-p, min-p. Top-p measures mass after top-k, min-p compares with the most likely token.
Each filter amounts to a floor on a row's logits, so tokens that tie with the last one kept are kept as well,
whatever order a sort returns them in; the most likely token always stays.

Arithmetic is float32, cumulative sums float64. Legend: N rows of logits, V vocabulary.

>>> probs = process_logits(logits, temperature, top_k=top_k, top_p=top_p)
>>> tokens = sample_from_probs(probs, uniforms)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.verify.numerics import inverse_cdf

_TOP_P_CANDIDATES = 1024
"""Tokens tried for top-p before the whole row is sorted."""

RowValues = NDArray[Any] | Tensor


def greatest(logits: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Place int64 [N] and value float32 [N] of the greatest of each row of logits [N, V]; of a NaN if there is one.

    On a CPU by NumPy, whose search is several times as fast as torch's.
    """
    if logits.device.type == "cpu":
        array = logits.numpy()
        places = array.argmax(axis=-1)
        return places, array[np.arange(len(array)), places]
    values, places = logits.max(dim=-1)
    return places.numpy(force=True), values.numpy(force=True)


def process_logits(
    logits: Tensor,
    temperature: RowValues,
    *,
    top_k: RowValues | None = None,
    top_p: RowValues | None = None,
    min_p: RowValues | None = None,
) -> Tensor:
    """The distribution that tokens are drawn from, after temperature and filters.

    Args:
        logits: float32 [N, V], penalties applied; not modified.
        temperature: [N]; a row with 0 becomes one-hot at its argmax.
        top_k: integers [N], tokens to keep; 0 keeps all.
        top_p: [N] in (0, 1], smallest set of tokens that reaches this mass; 1 keeps all.
        min_p: [N] in [0, 1], least probability relative to the most likely token; 0 keeps all.

    Returns:
        float32 [N, V].

    Raises:
        ValueError: naming rows that cannot be sampled from, with NaN or +inf, or -inf throughout.
    """
    peak = logits.amax(-1)
    bad_rows = torch.nonzero(~torch.isfinite(peak))[:, 0].tolist()
    if bad_rows:
        raise ValueError(f"logits of rows {bad_rows} are NaN or infinite: check the model and its inputs")
    temperatures = _column(temperature, logits, torch.float32)
    greedy = temperatures == 0
    if greedy.all():
        return _one_hot_argmax(logits)
    # Subtracting the peak first keeps tiny temperatures from overflowing.
    scaled = (logits - peak[:, None]).div_(torch.where(greedy, 1.0, temperatures)[:, None])
    _apply_filters(scaled, greedy, top_k, top_p, min_p)
    probs = torch.softmax(scaled, dim=-1)
    if greedy.any():
        probs[greedy] = _one_hot_argmax(logits[greedy])
    return probs


def sample_from_probs(probs: Tensor, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw one token per row by inverse CDF; a token of probability zero is never drawn.

    Args:
        probs: float32 [N, V].
        uniforms: [N] in [0, 1).

    Returns:
        int64 [N] on the host.

    Raises:
        ValueError: naming rows that are NaN or all zero.
    """
    return inverse_cdf(probs.numpy(force=True), np.asarray(uniforms, np.float64))


class PenaltyRow(NamedTuple):
    """One logits row with the history of its own branch.

    Attributes:
        row: index into the logits.
        tokens: integers [n], prompt and generated tokens.
        num_prompt: how many of ``tokens`` are the prompt.
        drafts: integers [m], draft tokens between ``tokens`` and this row's position.
    """

    row: int
    tokens: NDArray[np.integer]
    num_prompt: int
    drafts: NDArray[np.integer]


def apply_penalties(
    logits: Tensor,
    histories: Iterable[PenaltyRow],
    repetition_penalty: NDArray[Any],
    presence_penalty: NDArray[Any],
) -> None:
    """Penalise repeated tokens, in place.

    Repetition penalty r (CTRL, arXiv 1909.05858, section 4.1, in transformers' form): the logits of tokens in the
    prompt or the output become l / r if positive, else l · r. Presence penalty (the OpenAI API's): subtracted
    once from the logits of tokens in the output. Drafts before a position count as output.

    Args:
        logits: float32 [N, V].
        histories: rows to penalise, each with its own branch's history.
        repetition_penalty: [N], 1 is off.
        presence_penalty: [N], 0 is off.
    """
    for row, tokens, num_prompt, drafts in histories:
        repetition, presence = float(repetition_penalty[row]), float(presence_penalty[row])
        row_logits = logits[row]
        # Duplicates in the index are harmless: each writes the same value.
        if repetition != 1.0:
            seen = _token_index((tokens, drafts), logits)
            values = row_logits[seen]
            row_logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
        if presence != 0.0:
            generated = _token_index((tokens[num_prompt:], drafts), logits)
            row_logits[generated] = row_logits[generated] - presence


def top_logprobs(logits: Tensor, tokens: NDArray[np.int64], num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (natural) of the chosen and of the most likely tokens.

    Args:
        logits: float32 [N, V], the model's own: before penalties, temperature and filters.
        tokens: int64 [N], the chosen tokens.
        num_top: how many of the most likely tokens to return, at most V.

    Returns:
        chosen float32 [N], top float32 [N, num_top] in falling order, and their tokens int64 [N, num_top].
    """
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
    index = torch.as_tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    chosen = (logits.gather(-1, index) - log_total)[:, 0]
    top = logits.topk(num_top, dim=-1)
    return chosen, top.values - log_total, top.indices


def _apply_filters(
    scaled: Tensor,
    greedy: Tensor,
    top_k: RowValues | None,
    top_p: RowValues | None,
    min_p: RowValues | None,
) -> None:
    """Set filtered entries of ``scaled`` [N, V] (each row's maximum is 0) to -inf; ranks no more rows than it must."""
    vocab_size = scaled.shape[-1]
    keep_k = _column(0 if top_k is None else top_k, scaled, torch.int64)
    keep_k = torch.where((keep_k == 0) | (keep_k > vocab_size), vocab_size, keep_k)
    keep_p = _column(1.0 if top_p is None else top_p, scaled, torch.float32)
    least_p = _column(0.0 if min_p is None else min_p, scaled, torch.float32)
    if greedy.any():
        keep_k, keep_p, least_p = (
            keep_k.masked_fill(greedy, vocab_size),
            keep_p.masked_fill(greedy, 1.0),
            least_p.masked_fill(greedy, 0.0),
        )
    floor = least_p.log()
    rows = torch.nonzero((keep_k < vocab_size) | (keep_p < 1))[:, 0]
    if rows.numel():
        ranked_floor = _ranked_floor(_take_rows(scaled, rows), keep_k[rows], keep_p[rows])
        floor[rows] = torch.maximum(floor[rows], ranked_floor)
    if (floor > -math.inf).any():
        scaled.masked_fill_(scaled < floor[:, None], -math.inf)


def _ranked_floor(scaled: Tensor, keep_k: Tensor, keep_p: Tensor) -> Tensor:
    """Least logit [n] kept by top-k, then top-p, over rows [n, V] whose maximum is 0."""
    vocab_size = scaled.shape[-1]
    limited, nucleus = keep_k < vocab_size, keep_p < 1
    num_candidates = int(keep_k[limited].max()) if limited.any() else 0
    if (nucleus & ~limited).any():
        num_candidates = min(vocab_size, max(num_candidates, _TOP_P_CANDIDATES))
    values = scaled.topk(num_candidates, dim=-1).values
    last = values.gather(-1, keep_k.clamp(max=num_candidates)[:, None] - 1)[:, 0]
    floor = torch.where(limited, last, -math.inf)
    rows = torch.nonzero(nucleus)[:, 0]
    if rows.numel():
        top_p_floor = _top_p_floor(_take_rows(scaled, rows), values[rows], floor[rows], keep_p[rows])
        floor[rows] = torch.maximum(floor[rows], top_p_floor)
    return floor


def _top_p_floor(scaled: Tensor, values: Tensor, floor: Tensor, keep_p: Tensor) -> Tensor:
    """Least logit [n] of the smallest set of mass ``keep_p`` among logits of at least ``floor``.

    ``values`` [n, m] holds each row's largest logits in falling order. Where they do not reach the mass, the
    row is sorted in full.
    """
    kept = scaled.masked_fill(scaled < floor[:, None], -math.inf)
    needed = keep_p.double() * kept.exp_().sum(-1, dtype=torch.float64)
    candidates = torch.where(values >= floor[:, None], values.exp(), 0.0)
    cumulative = candidates.cumsum(-1, dtype=torch.float64)
    reached = cumulative >= needed[:, None]
    # The first position that reaches the mass is the last one kept.
    last = torch.where(reached.any(-1), reached.int().argmax(-1), values.shape[-1] - 1)
    top_p_floor = values.gather(-1, last[:, None])[:, 0]
    short = torch.nonzero(~reached[:, -1])[:, 0]
    if short.numel() and values.shape[-1] < scaled.shape[-1]:
        flat_rows = _take_rows(scaled, short)
        everything = flat_rows.sort(dim=-1, descending=True).values
        top_p_floor[short] = _top_p_floor(flat_rows, everything, floor[short], keep_p[short])
    return top_p_floor


def _take_rows(scaled: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``scaled``, without a copy when that is all of them."""
    return scaled if rows.numel() == scaled.shape[0] else scaled[rows]


def _one_hot_argmax(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _column(values: RowValues | float, logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device=logits.device).expand(logits.shape[0])


def _token_index(parts: tuple[NDArray[np.integer], ...], logits: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(logits.device)
