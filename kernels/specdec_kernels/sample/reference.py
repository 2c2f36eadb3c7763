"""Logits to probabilities to tokens, with counter-based noise.

Filters run in the order temperature, top-k, top-p, min-p. Each amounts to a least logit of the row, so tokens that tie
with the last one kept are kept as well; the most likely token always stays. Nothing here raises on the device's
account: a row that cannot be sampled from, with NaN, +inf or nothing but -inf, gets the token -1 and probabilities NaN.

Legend: N rows, V vocabulary. Arguments are alike in all functions:

* logits: float32 [N, V], penalties applied.
* temperature: float32 [N]; 0 takes the most likely token, of several the lowest.
* top_k: integers [N], tokens to keep, 0 keeps all; ``None`` for no row at all.
* top_p: float32 [N] in (0, 1], the smallest set of tokens that reaches this mass among those that top-k keeps.
* min_p: float32 [N] in [0, 1], least probability relative to the most likely token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The largest float32 below 1."""


def filtered_probs(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The distribution that tokens are drawn from, float32 [N, V] (or float64 as ``logits``)."""
    probs = _scaled(logits, temperature, top_k, top_p, min_p).softmax(-1)
    best = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.where(temperature[:, None] == 0, best, probs)
    return torch.where(_is_usable(logits)[:, None], probs, torch.nan)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniforms: Tensor,
) -> Tensor:
    """Draw by inverse CDF, int64 [N]: the first token whose cumulative probability exceeds ``uniforms``.

    Args:
        uniforms: float64 or float32 [N] in [0, 1).
    """
    probs = filtered_probs(logits, temperature, top_k, top_p, min_p).double().nan_to_num()
    cumulative = probs.cumsum(-1)
    target = torch.minimum(
        uniforms.double() * cumulative[:, -1],
        cumulative[:, -1].nextafter(torch.zeros_like(cumulative[:, -1])),
    )
    tokens = ((cumulative > target[:, None]) & (probs > 0)).int().argmax(-1)
    return torch.where(_is_usable(logits), tokens, -1)


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
    """Draw by the largest sum of logit and Gumbel noise, int64 [N] (Maddison et al., arXiv 1411.0030, section 2).

    Token i's noise is ``-log(-log(1 - u))`` of the i-th of :func:`uniforms`. A draw takes V of them, so each needs a
    counter or a stream of its own.

    Args:
        seeds, counters, stream: see :func:`uniforms`.
    """
    noise = uniforms(seeds, counters, stream, logits.shape[-1]).clamp(min=2.0**-54)
    scores = _scaled(logits, temperature, top_k, top_p, min_p).double() - (-torch.log1p(-noise)).log()
    tokens = torch.where(temperature == 0, logits.argmax(-1), scores.argmax(-1))
    return torch.where(_is_usable(logits), tokens, -1)


def uniforms(seeds: Tensor, counters: Tensor, stream: int, width: int) -> Tensor:
    """Uniforms in [0, 1) that depend only on seed, counter, stream and index, float64 [N, width].

    Philox-4x32-10 (Salmon et al., SC 2011, section 3.3), keyed by the seed; the counter's words are index // 2, the
    stream, and the low and high half of ``counters``. Values are multiples of 2**-53; those above 1 - 2**-24 are
    rounded down to it.

    Args:
        seeds, counters: int64 or uint64 [N]; negative ones stand for their two's complement.
        stream: below 2**32.
    """
    seeds, counters = (x.view(torch.int64)[:, None] for x in (seeds, counters))
    blocks = torch.arange(-(-width // 2), device=seeds.device).expand(seeds.shape[0], -1)
    words = _philox(
        [blocks, torch.full_like(blocks, stream), counters & _MASK_32, (counters >> 32) & _MASK_32],
        [seeds & _MASK_32, (seeds >> 32) & _MASK_32],
    )
    pairs = torch.stack([(high >> 5 << 26) | (low >> 6) for high, low in (words[:2], words[2:])], dim=-1)
    return (pairs.flatten(1)[:, :width].double() * 2.0**-53).clamp(max=LARGEST_UNIFORM)


def _philox(words: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds over four words, each of 32 bits in an int64."""
    for step in range(10):
        products = [word * multiplier for word, multiplier in zip(words[::2], _MULTIPLIERS, strict=True)]
        low, high = [x & _MASK_32 for x in products], [(x >> 32) & _MASK_32 for x in products]
        keys = [(x + step * y) & _MASK_32 for x, y in zip(key, _KEY_STEPS, strict=True)]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
    return words


def _is_usable(logits: Tensor) -> Tensor:
    return logits.amax(-1).isfinite()


def _scaled(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Logits relative to the largest, over the temperature (1 for 0), with -inf where filters drop a token."""
    vocab_size = logits.shape[-1]
    positive = torch.where(temperature == 0, 1.0, temperature)[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / positive
    ranked = scaled.sort(dim=-1, descending=True).values
    floor = torch.full_like(ranked[:, :1], -torch.inf)
    if top_k is not None:
        is_on = (top_k > 0) & (top_k < vocab_size)
        last = torch.where(is_on, top_k, vocab_size).long()[:, None] - 1
        floor = torch.where(is_on[:, None], ranked.gather(-1, last), floor)
    if top_p is not None:
        mass = torch.where(ranked >= floor, ranked.exp(), 0.0).double()
        cumulative = mass.cumsum(-1)
        reached = cumulative >= top_p.double()[:, None] * mass.sum(-1, keepdim=True)
        last = torch.where(reached.any(-1), reached.int().argmax(-1), vocab_size - 1)[:, None]
        floor = torch.where(top_p[:, None] < 1, torch.maximum(floor, ranked.gather(-1, last)), floor)
    if min_p is not None:
        floor = torch.maximum(floor, min_p.to(floor.dtype).log()[:, None])
    return scaled.masked_fill(scaled < floor, -torch.inf)
