"""Speculative decoding on the back of an envelope: expected tokens, speed-up, best draft length.

The formulas assume that each drafted token is accepted independently of the others, with rate α, or with
rates that depend on its position alone; a request may draw its α from a Beta distribution, and a tree has a
rate per child rank. They follow Leviathan et al., arXiv 2211.17192, with times that are measured instead of a
cost coefficient. The chain's functions broadcast over numpy arrays; the engine's measured speed-ups are
plotted beside them.

>>> float(expected_tokens(0.8, 4))
3.3616
>>> k, gain = best_k(0.8, t_ar_s=0.02, t_draft_s=0.001, t_verify_s=[0.02, 0.021, 0.021, 0.022, 0.03])
>>> int(k), float(gain)
(3, 2.3616)
"""

from __future__ import annotations

from collections.abc import Sequence

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


def beta_survival(mean: ArrayLike, concentration: ArrayLike, num_positions: int) -> FloatArray:
    """E[α^j] for j = 1 … num_positions, α ~ Beta(a, b) with a = mean · concentration, a + b = concentration.

    The j-th moment of the Beta distribution, Π_{i<j} (a + i) / (a + b + i): the chance that the first j drafts
    of a request of unknown α are accepted. Its ratios rise with j: a draft that got far is probably of an easy
    request.

    Args:
        mean: E[α], in [0, 1].
        concentration: a + b > 0; the larger, the more alike the requests.
        num_positions: >= 0.

    Returns:
        float64 [..., num_positions], with the broadcast shape of ``mean`` and ``concentration`` in front.

    Raises:
        ValueError: a value out of range.
    """
    spread = np.asarray(concentration, np.float64)
    if not np.all((spread > 0.0) & np.isfinite(spread)):
        raise ValueError(f"concentration={concentration} must be finite and > 0")
    accepted, total = np.broadcast_arrays(_rates(mean, "mean") * spread, spread)
    seen = np.arange(int(_lengths(num_positions)))
    conditional = (accepted[..., None] + seen) / (total[..., None] + seen)
    return np.asarray(np.cumprod(conditional, axis=-1), np.float64)


def expected_tokens_beta(mean: ArrayLike, concentration: ArrayLike, k: ArrayLike) -> FloatArray:
    """Expected tokens per verification of k drafts if each request's α is Beta distributed: Σ_{j≤k} E[α^j].

    Every request counts alike, however many steps it takes. At least :func:`expected_tokens` of the mean
    (Jensen's inequality).

    Args:
        mean, concentration: see :func:`beta_survival`, and for the errors too.
        k: drafted tokens, an integer >= 0.

    Returns:
        float64, of the broadcast shape.
    """
    average, spread, length = np.broadcast_arrays(
        np.asarray(mean, np.float64), np.asarray(concentration, np.float64), _lengths(k)
    )
    longest = int(length.max(initial=0))
    terms = np.where(np.arange(longest) < length[..., None], beta_survival(average, spread, longest), 0.0)
    return 1.0 + terms.sum(axis=-1)


def tree_survival(parents: Sequence[int], ranks: Sequence[int], rank_rates: ArrayLike) -> FloatArray:
    """P(a verification accepts d or more tokens of a draft tree), for d = 1 … its depth.

    A node is accepted with the product of the rank rates on its path from the root. At most one node is accepted
    at each depth, so P is the sum over the nodes there. The rates of Sequoia, arXiv 2402.12374: they depend on a
    child's rank alone.

    Args:
        parents: of each of the N nodes, an earlier node, or -1 for a child of the root (the last known token).
        ranks: of each node among its siblings, counting from 0.
        rank_rates: float [B], p_b = P(the child of rank b is the accepted one | its parent is accepted).

    Returns:
        float64 [depth].

    Raises:
        ValueError: rates out of range or of a sum above 1, a parent that is not an earlier node, a rank without
            a rate, or two siblings of one rank.
    """
    rates = np.atleast_1d(_rates(rank_rates, "rank_rates"))
    if rates.ndim != 1 or rates.sum() > 1.0 + 1e-9:
        raise ValueError(f"rank_rates={rank_rates} must be a list of sum <= 1: one child at most is accepted")
    if len(parents) != len(ranks):
        raise ValueError(f"{len(parents)} parents and {len(ranks)} ranks: give one of each per node")
    reached, depths, seen = [1.0], [0], set[tuple[int, int]]()  # the root first
    for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} has parent {parent}: it must be -1 (the root) or an earlier node")
        if not 0 <= rank < rates.size:
            raise ValueError(f"node {node} has rank {rank}, but rank_rates has {rates.size} entries")
        if (parent, rank) in seen:
            raise ValueError(f"node {node} has the rank {rank} of another child of node {parent}")
        seen.add((parent, rank))
        reached.append(reached[parent + 1] * float(rates[rank]))
        depths.append(depths[parent + 1] + 1)
    # Rates whose sum rounds to more than 1 must not make a level likelier than the one above it.
    return np.minimum.accumulate(np.bincount(depths, reached))[1:]


def expected_tokens_of_tree(parents: Sequence[int], ranks: Sequence[int], rank_rates: ArrayLike) -> float:
    """Expected tokens per verification of a tree, bonus included: 1 + Σ_nodes Π of the rates on the path.

    Sequoia, arXiv 2402.12374, whose tree counts the root too. See :func:`tree_survival` for the arguments.
    """
    return 1.0 + float(tree_survival(parents, ranks, rank_rates).sum())


def k_ary_tree(arity: int, depth: int) -> tuple[list[int], list[int]]:
    """Parents and ranks of the tree in which every node above ``depth`` has ``arity`` children, by level.

    Raises:
        ValueError: ``arity`` or ``depth`` below 1, or more than 65,536 nodes.
    """
    if arity < 1 or depth < 1:
        raise ValueError(f"arity={arity} and depth={depth} must be >= 1")
    parents, ranks, level = list[int](), list[int](), [-1]
    for _ in range(depth):
        if len(parents) + len(level) * arity > 2**16:
            raise ValueError(f"arity={arity}, depth={depth} give more than {2**16} nodes: lower one")
        parents += [node for node in level for _ in range(arity)]
        ranks += [*range(arity)] * len(level)
        level = range(len(parents) - len(level) * arity, len(parents))
    return parents, ranks


def tree_from_paths(paths: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Parents and ranks of the tree of a list of rank paths (Medusa style), e.g. ``[[0], [1], [0, 0]]``.

    Raises:
        ValueError: an empty path, or one whose parent is not in the list.
    """
    ordered = sorted(map(tuple, paths), key=lambda path: (len(path), path))
    node_of: dict[tuple[int, ...], int] = {(): -1} | {path: node for node, path in enumerate(ordered)}
    for path in ordered:
        if not path or path[:-1] not in node_of:
            raise ValueError(f"path {list(path)} must not be empty and needs its parent {list(path[:-1])}")
    return [node_of[path[:-1]] for path in ordered], [path[-1] for path in ordered]


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
