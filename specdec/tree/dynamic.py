"""Trees that follow the draft's confidence: EAGLE-2, arXiv 2406.16858 (expansion and reranking).

A node's score is the log-probability that the draft gives to the path down to it. At each level the best k
candidates of a row are expanded, whoever their parents are; at the end the best m of all candidates stay. Scores
only fall along a path and ties go to the smaller depth, so the ancestors of what stays stay too. Which nodes stay
depends on the candidates' odds, so the rules for sampled siblings do not fit: verify with "one_hot".

>>> levels = [grow(None, top_tokens, top_logprobs, width=8)]        # [R, 1, 8], after the root
>>> levels += [grow(levels[-1], top_tokens, top_logprobs, width=8)] # [R, 8, 8], after levels[-1].beam_tokens
>>> trees = rerank(levels, size=48)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.tree.topology import ROOT

_ROUNDING = 1e-3
"""How far above 0 a log-probability may lie by rounding in half precision."""


@dataclass(frozen=True, slots=True)
class Level:
    """Candidates of one level. Legend: R rows, C candidates, W expanded ones.

    Attributes:
        tokens: int64 [R, C].
        scores: float64 [R, C], cumulative log-probability; −inf where there is no candidate.
        parents: int64 [R, C], the parent's place among the previous level's candidates, −1 the root.
        beam: int64 [R, W], places of the candidates to expand, best first. Those of score −inf lead nowhere.
    """

    tokens: NDArray[np.int64]
    scores: NDArray[np.float64]
    parents: NDArray[np.int64]
    beam: NDArray[np.int64]

    @property
    def beam_tokens(self) -> NDArray[np.int64]:
        """Tokens [R, W] that the draft model reads next."""
        return np.take_along_axis(self.tokens, self.beam, axis=1)


@dataclass(frozen=True, slots=True)
class DynamicTrees:
    """One tree per row, in the layout of :func:`specdec.tree.pack_trees`; entries past ``counts`` are −1 and 0.

    Attributes:
        parents: int32 [R, size], level by level; siblings in the order of the candidates.
        tokens: int64 [R, size].
        counts: int32 [R], less than ``size`` where a row had fewer candidates.
        level: int64 [R, size], index of the node's level.
        place: int64 [R, size], the node's place among that level's candidates.
    """

    parents: NDArray[np.int32]
    tokens: NDArray[np.int64]
    counts: NDArray[np.int32]
    level: NDArray[np.int64]
    place: NDArray[np.int64]


def grow(previous: Level | None, tokens: NDArray[np.integer], logprobs: NDArray[Any], width: int) -> Level:
    """Candidates below the beam of ``previous``, and the best ``width`` of them to expand.

    Args:
        previous: None below the root.
        tokens: integers [R, W, k], children of each beam entry (W = 1 below the root), best first.
        logprobs: [R, W, k], the draft's log q of each child given its parent; −inf for no child.
        width: how many to expand.

    Raises:
        ValueError: shapes that do not fit, a width below 1, or log-probabilities that are NaN or positive.
    """
    num_rows, num_parents, _ = tokens.shape
    expected = (num_rows, 1) if previous is None else previous.beam.shape
    if logprobs.shape != tokens.shape or (num_rows, num_parents) != expected:
        raise ValueError(
            f"tokens {tokens.shape} and logprobs {logprobs.shape} must both be {expected} plus the children"
        )
    if width < 1:
        raise ValueError(f"width={width} must be >= 1")
    if not (logprobs <= _ROUNDING).all():
        raise ValueError("logprobs are NaN or above 0: pass the log-probabilities of a softmax")
    places = np.full((num_rows, 1), ROOT) if previous is None else previous.beam
    scores = np.minimum(logprobs, 0).astype(np.float64)
    if previous is not None:
        scores += np.take_along_axis(previous.scores, previous.beam, axis=1)[:, :, None]
    scores = scores.reshape(num_rows, -1)
    return Level(
        tokens.reshape(num_rows, -1).astype(np.int64),
        scores,
        np.broadcast_to(places[:, :, None], tokens.shape).reshape(num_rows, -1),
        _best(scores, width),
    )


def rerank(levels: Sequence[Level], size: int) -> DynamicTrees:
    """The best ``size`` candidates of all ``levels``, as trees.

    Raises:
        ValueError: no levels, or a size below 0.
    """
    if not levels or size < 0:
        raise ValueError(f"{len(levels)} levels and size={size}: give at least one level and a size >= 0")
    scores = np.concatenate([level.scores for level in levels], axis=1)
    tokens = np.concatenate([level.tokens for level in levels], axis=1)
    widths = [level.scores.shape[1] for level in levels]
    starts = np.cumsum([0, *widths])
    # Parents as places in the concatenation, in which parents come first: then it only needs compressing.
    parents = np.concatenate(
        [
            levels[0].parents,
            *(level.parents + start for level, start in zip(levels[1:], starts, strict=False)),
        ],
        axis=1,
    )
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, _best(scores, size), True, axis=1)
    chosen &= scores > -np.inf
    level_of = np.repeat(np.arange(len(levels)), widths)
    return _compress(chosen, parents, tokens, level_of, starts, size)


def _compress(
    chosen: NDArray[np.bool_],
    parents: NDArray[np.int64],
    tokens: NDArray[np.int64],
    level_of: NDArray[np.int64],
    starts: NDArray[np.int64],
    size: int,
) -> DynamicTrees:
    """The ``chosen`` [R, C] candidates moved to the left and renumbered."""
    rows, places = np.nonzero(chosen)
    numbers = np.cumsum(chosen, axis=1) - 1
    nodes = numbers[rows, places]
    above = parents[rows, places]
    shape = (chosen.shape[0], size)
    trees = DynamicTrees(
        np.full(shape, ROOT, np.int32),
        np.zeros(shape, np.int64),
        chosen.sum(axis=1).astype(np.int32),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
    )
    trees.parents[rows, nodes] = np.where(above == ROOT, ROOT, numbers[rows, above])
    trees.tokens[rows, nodes] = tokens[rows, places]
    trees.level[rows, nodes] = level_of[places]
    trees.place[rows, nodes] = places - starts[level_of[places]]
    return trees


def _best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Places [R, min(count, C)] of the largest scores, best first; ties go to the left, the smaller depth."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]
