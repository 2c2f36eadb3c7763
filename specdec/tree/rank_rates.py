"""How often the child of each rank is the accepted one: counts, intervals, and the rates that trees are built from.

A verification of a draft tree reaches the root and every accepted node. At each of them the child of rank b, if there
is one, was tried, and it was either the one that verification went on to or not. Ranks count from 0, the first drawn;
depths are those of the parent, the root's being 0. Sequoia's p_b (arXiv 2402.12374, section 3) is accepted over tried.

>>> counts = RankCounts()
>>> counts.add([-1, -1, 0], [0])  # two children of the root; the first was accepted, its only child was not
>>> counts.tried.tolist(), counts.accepted.tolist()
([[1, 1], [1, 0]], [[1, 0], [0, 0]])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PRIOR_TRIED = 20.0
"""Trials that the rates of all depths together count as, for the rate of one depth."""


class RankCounts:
    """Counts by depth of the parent and rank of the child.

    Attributes:
        tried, accepted: int64 [D, B]; they grow as deeper parents and higher ranks are seen.
    """

    def __init__(self) -> None:
        self.tried = np.zeros((0, 0), np.int64)
        self.accepted = np.zeros((0, 0), np.int64)

    @classmethod
    def of(cls, tried: Sequence[Sequence[int]], accepted: Sequence[Sequence[int]]) -> RankCounts:
        """Counts that were written down."""
        counts = cls()
        counts.tried, counts.accepted = np.array(tried, np.int64), np.array(accepted, np.int64)
        return counts

    def add(self, parents: Sequence[int], path: Sequence[int]) -> None:
        """Count one verification.

        Args:
            parents: of each node, of a lower number than its own, or −1 for the root; siblings in the order in which
                they were drawn.
            path: accepted nodes, from a child of the root down.
        """
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            children.setdefault(parent, []).append(node)
        for depth, parent in enumerate([-1, *path]):
            siblings = children.get(parent, [])
            if not siblings:
                continue
            self._reserve(depth + 1, len(siblings))
            self.tried[depth, : len(siblings)] += 1
            if depth < len(path):
                self.accepted[depth, siblings.index(path[depth])] += 1

    def _reserve(self, num_depths: int, num_ranks: int) -> None:
        depths, ranks = self.tried.shape
        if num_depths > depths or num_ranks > ranks:
            more = (0, max(0, num_depths - depths)), (0, max(0, num_ranks - ranks))
            self.tried, self.accepted = np.pad(self.tried, more), np.pad(self.accepted, more)

    @property
    def num_depths(self) -> int:
        """Depths of parents that were reached and had children."""
        return len(self.tried)

    def pooled(self) -> NDArray[np.float64]:
        """Rates over all depths, float64 [B]: not rising, of sum at most 1.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.tried.any():
            raise ValueError(
                "no draft was verified, so no rank has a rate: draft more, or generate more tokens"
            )
        return monotone(self.accepted.sum(axis=0), self.tried.sum(axis=0))

    def rates(self, max_depth: int) -> NDArray[np.float64]:
        """Rates by depth, float64 [max_depth, B], each row not rising and of sum at most 1.

        A depth's own counts are joined by ``PRIOR_TRIED`` trials at the pooled rates, which stand alone where nothing
        was tried.
        """
        pooled = self.pooled()
        table = np.tile(pooled, (max_depth, 1))
        for depth in range(min(max_depth, self.num_depths)):
            tried = self.tried[depth] + PRIOR_TRIED
            table[depth] = monotone(self.accepted[depth] + PRIOR_TRIED * pooled, tried)
        return table


def monotone(accepted: NDArray[np.number], tried: NDArray[np.number]) -> NDArray[np.float64]:
    """Accepted over tried, [B] each, as the nearest rates that do not rise, scaled down to a sum of at most 1.

    Neighbours that would rise share their counts (pool adjacent violators), which is the weighted least-squares fit.
    Ranks are tried in different numbers, so the raw shares may sum to more than 1 although the events exclude each
    other. Ranks that were never tried have the rate 0.
    """
    pools: list[list[float]] = []  # accepted, tried, ranks
    for came, count in zip(accepted.tolist(), tried.tolist(), strict=True):
        pools.append([float(came), float(count), 1.0])
        while len(pools) > 1 and _share(pools[-1]) > _share(pools[-2]):
            last = pools.pop()
            pools[-1] = [one + other for one, other in zip(pools[-1], last, strict=True)]
    rates = np.concatenate([np.full(int(pool[2]), _share(pool)) for pool in pools])
    return rates / max(1.0, float(rates.sum()))


def _share(pool: Sequence[float]) -> float:
    return pool[0] / pool[1] if pool[1] else 0.0


def wilson(accepted: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); from 0 to 1 where nothing was tried.

    Args:
        z: standard deviations on each side, 1.96 for 95 %.
    """
    if tried == 0:
        return 0.0, 1.0
    share, weight = accepted / tried, z * z / tried
    centre = (share + weight / 2) / (1 + weight)
    reach = z * math.sqrt(share * (1 - share) / tried + weight / (4 * tried)) / (1 + weight)
    return max(0.0, centre - reach), min(1.0, centre + reach)
