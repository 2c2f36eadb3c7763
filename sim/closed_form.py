"""Speculative decoding on the back of an envelope: expected tokens, speed-up, best draft length.

The formulas assume that each drafted token is accepted independently of the others, with rate α, or with
rates that depend on its position alone. They follow Leviathan et al., arXiv 2211.17192, with times that are
measured instead of a cost coefficient. All functions broadcast over numpy arrays; the engine's measured
speed-ups are plotted beside them.

>>> float(expected_tokens(0.8, 4))
3.3616
>>> k, gain = best_k(0.8, t_ar_s=0.02, t_draft_s=0.001, t_verify_s=[0.02, 0.021, 0.021, 0.022, 0.03])
>>> int(k), float(gain)
(3, 2.3616)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def expected_tokens(alpha: ArrayLike, k: ArrayLike) -> FloatArray:
    """Expected tokens per verification of k drafts, bonus included: (1 − α^(k+1)) / (1 − α), or k + 1 for α =
    1.

    Equation 1 of arXiv 2211.17192.

    Args:
        alpha: acceptance rate in [0, 1].
        k: drafted tokens, an integer >= 0.

    Returns:
        float64, of the broadcast shape.

    Raises:
        ValueError: a value out of range.
    """
    rate, length = np.broadcast_arrays(_rates(alpha, "alpha"), _lengths(k))
    # Summing the series, 1 + α + … + α^k, keeps full precision where 1 − α vanishes.
    powers = np.arange(int(length.max(initial=0)) + 1)
    terms = np.where(powers <= length[..., None], rate[..., None] ** powers, 0.0)
    return terms.sum(axis=-1)


def expected_tokens_from_rates(conditional_rates: ArrayLike) -> FloatArray:
    """Expected tokens per verification from rates by position: 1 + Σ_j Π_{i≤j} c_i.

    Args:
        conditional_rates: float [..., k], c_j = P(draft token j is accepted | all before it were).

    Returns:
        float64 [...]; with no positions (k = 0), 1.

    Raises:
        ValueError: a rate outside [0, 1].
    """
    rates = np.atleast_1d(_rates(conditional_rates, "conditional_rates"))
    return 1.0 + np.cumprod(rates, axis=-1).sum(axis=-1)


def speedup(
    expected_tokens: ArrayLike,
    t_ar_s: ArrayLike,
    t_draft_s: ArrayLike,
    t_verify_s: ArrayLike,
    t_overhead_s: ArrayLike,
    k: ArrayLike,
) -> FloatArray:
    """Speed-up over plain decoding: E · T_ar / (k · T_draft + T_verify + T_overhead).

    Theorem 3.8 of arXiv 2211.17192, which is the case T_verify = T_ar, T_overhead = 0, T_draft = c · T_ar.
    All times must be those of one batch size.

    Args:
        expected_tokens: per verification.
        t_ar_s: seconds of a step of plain decoding.
        t_draft_s: seconds to draft one token.
        t_verify_s: seconds of the target's pass over k + 1 tokens.
        t_overhead_s: further seconds of a speculative step that a plain one does not have.
        k: drafted tokens.

    Returns:
        float64, of the broadcast shape.

    Raises:
        ValueError: E < 1, a negative time, or a target step that takes no time.
    """
    tokens = np.asarray(expected_tokens, np.float64)
    if not np.all(tokens >= 1.0):
        raise ValueError(
            f"expected_tokens={expected_tokens} must be >= 1: a verification emits at least one token"
        )
    plain_s, verify_s = _times(t_ar_s, "t_ar_s"), _times(t_verify_s, "t_verify_s")
    if np.any(plain_s == 0.0) or np.any(verify_s == 0.0):
        raise ValueError(
            f"t_ar_s={t_ar_s} and t_verify_s={t_verify_s} must be > 0 seconds: give measured times"
        )
    drafting_s = _lengths(k) * _times(t_draft_s, "t_draft_s")
    return np.asarray(tokens * plain_s / (drafting_s + verify_s + _times(t_overhead_s, "t_overhead_s")))


def best_k(
    alpha: ArrayLike,
    *,
    t_ar_s: float,
    t_draft_s: float,
    t_verify_s: ArrayLike,
    t_overhead_s: float = 0.0,
) -> tuple[IntArray, FloatArray]:
    """The draft length with the highest speed-up; 0, with speed-up 1, where drafting does not pay.

    Measured step times have plateaus and cliffs, so the speed-up has several maxima over k: all are searched.

    Args:
        alpha: acceptance rate in [0, 1].
        t_ar_s, t_draft_s, t_overhead_s: see :func:`speedup`.
        t_verify_s: float [K + 1], entry k is the seconds to verify k drafts; entry 0 is not used, as no
            speculation means plain decoding.

    Returns:
        k int64 and speed-up float64, each of ``alpha``'s shape. The shorter draft wins a tie.

    Raises:
        ValueError: a value out of range, or ``t_verify_s`` not one-dimensional or empty.
    """
    verify_s = _times(t_verify_s, "t_verify_s")
    if verify_s.ndim != 1 or verify_s.size == 0:
        raise ValueError(f"t_verify_s has shape {verify_s.shape}: give the seconds for k = 0, 1, …, K")
    rate = _rates(alpha, "alpha")
    lengths = np.arange(verify_s.size)
    ratios = speedup(
        expected_tokens(rate[..., None], lengths), t_ar_s, t_draft_s, verify_s, t_overhead_s, lengths
    )
    ratios[..., 0] = 1.0
    chosen = np.argmax(ratios, axis=-1)
    return np.asarray(chosen, np.int64), np.max(ratios, axis=-1)


def _rates(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, np.float64)
    if not np.all((array >= 0.0) & (array <= 1.0)):
        raise ValueError(f"{name}={values} must be in [0, 1]: it is a probability")
    return array


def _lengths(k: ArrayLike) -> FloatArray:
    array = np.asarray(k, np.float64)
    if not np.all((array >= 0.0) & (array == np.floor(array)) & np.isfinite(array)):
        raise ValueError(f"k={k} must be an integer >= 0: it counts draft tokens")
    return array


def _times(seconds: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(seconds, np.float64)
    if not np.all((array >= 0.0) & np.isfinite(array)):
        raise ValueError(f"{name}={seconds} must be finite seconds >= 0")
    return array
