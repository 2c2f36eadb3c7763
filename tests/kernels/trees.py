"""Token trees for tests: shapes, masks and paths, built node by node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tree:
    """``parents[i]`` is the parent of token i, before it; that of the root, token 0, is -1."""

    parents: Sequence[int]

    def __len__(self) -> int:
        return len(self.parents)

    def path(self, node: int) -> list[int]:
        """From the root to ``node``, both included."""
        above = self.path(self.parents[node]) if node else []
        return [*above, node]

    @property
    def depths(self) -> list[int]:
        return [len(self.path(node)) - 1 for node in range(len(self))]

    @property
    def leaves(self) -> list[int]:
        return [node for node in range(len(self)) if node not in self.parents]

    def mask(self) -> NDArray[np.int64]:
        """int64 [tokens, 2]."""
        bits = [sum(1 << token for token in self.path(node)) for node in range(len(self))]
        words = [[word & (1 << 64) - 1, word >> 64] for word in bits]
        return np.array(words, np.uint64).view(np.int64)


def chain(num_tokens: int) -> Tree:
    return Tree(list(range(-1, num_tokens - 1)))


def random_tree(rng: np.random.Generator, num_tokens: int) -> Tree:
    """Any parent among the last few tokens, so that some trees are deep and some are wide."""
    reach = int(rng.integers(1, num_tokens + 1))
    return Tree([-1, *(int(rng.integers(max(0, i - reach), i)) for i in range(1, num_tokens))])


def rooted_trees(num_tokens: int) -> Iterator[Tree]:
    """Every shape once, by the level sequences of Beyer and Hedetniemi, SIAM J. Comput. 9 (1980)."""
    levels = list(range(num_tokens))
    while True:
        last_of_level = {}
        parents = []
        for node, level in enumerate(levels):
            parents.append(last_of_level.get(level - 1, -1))
            last_of_level[level] = node
        yield Tree(parents)
        deep = [node for node, level in enumerate(levels) if level > 1]
        if not deep:
            return
        end = deep[-1]
        start = max(node for node in range(end) if levels[node] == levels[end] - 1)
        for node in range(end, num_tokens):
            levels[node] = levels[node - (end - start)]
