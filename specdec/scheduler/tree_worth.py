"""What the nodes of a draft tree are worth, by rank rates that a row's own record scales."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from specdec.scheduler.plan import LongArray

_LEAST_RATE = 1e-6


class TreeWorth:
    """The ``size`` likeliest nodes of the tree in which every node has a child of every rank.

    Args:
        rank_rates: the chance that the child of each rank is the accepted one, given that its parent was.
        size: nodes to look at, >= 0.

    Attributes:
        products: float64 [size], the chance that a node is accepted, falling.
        depths: int64 [size], of each node, 1 for children of the root.
        levels: int64 [size], of the tree of so many nodes.

    Raises:
        ValueError: rates that are not falling, or no probabilities of exclusive events.
    """

    def __init__(self, rank_rates: Sequence[float], size: int) -> None:
        rates = np.asarray(rank_rates, np.float64)
        is_law = rates.ndim == 1 and rates.size and (rates > 0).all() and rates.sum() <= 1.0 + 1e-9
        if not is_law or (np.diff(rates) > 0).any():
            raise ValueError(
                f"rank_rates={list(rank_rates)} must be > 0, not rising, and sum to at most 1: rank b has the "
                "probability that this child is the accepted one"
            )
        # Largest product first; the shallower of equal ones.
        waiting = [(-float(rates[0]), 1, 0)]
        products: list[float] = []
        depths: list[int] = []
        while len(products) < size:
            product, depth, rank = heappop(waiting)
            products.append(-product)
            depths.append(depth)
            heappush(waiting, (product * float(rates[0]), depth + 1, 0))
            if rank + 1 < rates.size:
                heappush(waiting, (product * float(rates[rank + 1] / rates[rank]), depth, rank + 1))
        self.products, self.depths = np.array(products), np.array(depths, np.int64)
        self.levels: LongArray = np.maximum.accumulate(self.depths)
        self._rates = self._acceptance_rates()
        self._most = 1.0 / max(float(rates.sum()), _LEAST_RATE)

    def _acceptance_rates(self) -> NDArray[np.float64]:
        """Of the tree of each size, float64 [size]: levels accepted over levels tried, as the table counts them."""
        reached = np.zeros(int(self.levels.max(initial=0)) + 1)
        rates = np.empty(self.products.size)
        for node, (product, depth) in enumerate(zip(self.products, self.depths, strict=True)):
            reached[depth] += product
            accepted = reached.sum()
            rates[node] = accepted / (accepted + 1.0 - reached[self.levels[node]])
        return rates

    def worth(
        self,
        accepted: NDArray[np.float64],
        rejected: NDArray[np.float64],
        drafted: NDArray[np.float64],
        prior_weight: float,
    ) -> NDArray[np.float64]:
        """The chance that each node is accepted, float64 [size, R], falling along ``size``.

        A row's rates are the rank rates times s, so chosen that a tree as large as the row's were so far accepts what
        was accepted of them.

        Args:
            accepted, rejected: [R], levels so far.
            drafted: [R], mean nodes of the row's trees so far.
            prior_weight: levels that the belief in s = 1 counts as.
        """
        place = np.clip(np.rint(drafted).astype(np.int64) - 1, 0, self._rates.size - 1)
        expected = self._rates[place]
        seen = (accepted + prior_weight * expected) / (accepted + rejected + prior_weight)
        scale = np.clip(seen / np.maximum(expected, _LEAST_RATE), _LEAST_RATE, self._most)
        return -np.sort(-(self.products[:, None] * scale ** self.depths[:, None]), axis=0)
