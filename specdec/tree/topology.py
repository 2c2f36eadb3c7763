"""Shape of a draft tree: parents, depths, children, and the ancestor masks of tree attention.

The root is the last committed token. It is no node: nodes are the drafts, numbered from 0 so that parents come
before their children, and −1 stands for the root. Siblings are in the order in which they were drawn.

>>> tree = Tree([-1, -1, 0, 0])         # two children of the root; the first has two children
>>> tree.depths, tree.children_of(0), tree.path(3)
(array([1, 1, 2, 2], dtype=int32), (2, 3), [0, 3])

Packed masks (``packed_masks``, ``pack_trees``) are what attention kernels read. They cover the root and the
nodes, so that one step's K + 1 queries have K + 1 masks: entry 0 is the root, entry i + 1 is node i. Entry a sees
entry b if bit b of mask a is set: bit b % 64 of word b // 64. Every mask holds its own bit and bit 0; the root's
holds bit 0 alone. Two words give room for 128 entries. Words are int64, as torch has no full uint64: bit 63 is
the sign, so a kernel tests ``(word >> bit) & 1``, never ``word > 0``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = -1
MAX_PACKED_NODES = 127
"""Nodes that fit a packed mask beside the root."""


@dataclass(frozen=True, init=False)
class Tree:
    """A validated tree of n draft nodes; n = 0 is plain decoding. Equal and hashed by ``parents``.

    Args:
        parents: n integers; ``parents[i]`` < i is the parent of node i, −1 the root.

    Raises:
        ValueError: not integers, or the first node whose parent is not an earlier node.
    """

    parents: tuple[int, ...]

    def __init__(self, parents: Iterable[int]) -> None:
        try:
            values = tuple(operator.index(parent) for parent in parents)
        except TypeError as error:
            raise ValueError(f"parents={parents!r} must be integers ({error})") from None
        for node, parent in enumerate(values):
            if not ROOT <= parent < node:
                raise ValueError(
                    f"parent {parent} of node {node} must lie in [-1, {node - 1}]: number the nodes so that "
                    "parents come before their children, and use -1 for children of the root"
                )
        object.__setattr__(self, "parents", values)

    @classmethod
    def chain(cls, length: int) -> Tree:
        """``length`` drafts one after another."""
        if length < 0:
            raise ValueError(f"length={length} must be >= 0 (0 drafts nothing)")
        return cls(range(-1, length - 1))

    def __len__(self) -> int:
        """Number of nodes, the root not counted."""
        return len(self.parents)

    @cached_property
    def depths(self) -> NDArray[np.int32]:
        """int32 [n]; 1 for children of the root. A node's position is the root's plus its depth."""
        depths = [0] * (len(self) + 1)  # the last entry is the root's, which index −1 finds
        for node, parent in enumerate(self.parents):
            depths[node] = depths[parent] + 1
        return _frozen(np.array(depths[:-1], np.int32))

    @cached_property
    def max_depth(self) -> int:
        """Most drafts that one step can accept."""
        return int(self.depths.max(initial=0))

    @cached_property
    def is_chain(self) -> bool:
        """True if no node has a sibling."""
        return self.max_depth == len(self)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """n + 1 tuples in draw order: entry 0 the root's children, entry i + 1 those of node i."""
        lists: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            lists[parent + 1].append(node)
        return tuple(map(tuple, lists))

    def children_of(self, node: int) -> tuple[int, ...]:
        """Children of ``node`` in draw order; −1 asks for the root's."""
        return self.children[node + 1]

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """int32 [n]; a node's place among its siblings, 0 for the first drawn."""
        ranks = np.zeros(len(self), np.int32)
        for siblings in self.children:
            ranks[list(siblings)] = range(len(siblings))
        return _frozen(ranks)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without children, in order."""
        return tuple(node for node in range(len(self)) if not self.children_of(node))

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the root down to ``node``; empty for the root."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    @cached_property
    def ancestor_mask(self) -> NDArray[np.bool_]:
        """bool [n, n]; row i is True at node i and its ancestors. The root, which all see, has no column."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                mask[node] |= mask[parent]
        return _frozen(mask)

    @cached_property
    def packed_masks(self) -> NDArray[np.int64]:
        """int64 [n + 1, 2], root included, in the layout that the module describes.

        Raises:
            ValueError: more than 127 nodes.
        """
        parents = np.array(self.parents, np.int32).reshape(1, len(self))
        return _frozen(pack_trees(parents, np.array([len(self)], np.int32))[1][0])


def pack_trees(
    parents: NDArray[np.integer], counts: NDArray[np.integer]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Depths and packed ancestor masks of many trees at once, for kernels.

    Pointer doubling: after t rounds every entry knows its nearest 2^t ancestors, so a tree of depth d takes
    log₂ d rounds over all rows and nodes together.

    Args:
        parents: integers [R, K], K ≤ 127, row r being the parents of tree r as in :class:`Tree`; entries past
            ``counts`` are not read.
        counts: integers [R] in [0, K], nodes of each tree.

    Returns:
        depths int32 [R, K] and masks int64 [R, K + 1, 2] in the layout that the module describes. Depths and
        masks of entries past ``counts`` are 0.

    Raises:
        ValueError: K > 127, a count outside [0, K], or the first node whose parent is not an earlier node.
    """
    num_rows, width = parents.shape
    if width > MAX_PACKED_NODES:
        raise ValueError(f"{width} nodes do not fit a packed mask: use at most {MAX_PACKED_NODES} per tree")
    counts = np.asarray(counts)
    if num_rows and not (counts.min() >= 0 and counts.max() <= width):
        raise ValueError(f"counts={counts.tolist()} must lie in [0, {width}]")
    used = np.arange(width) < counts[:, None]
    _check_parents(parents, used)
    jump = np.zeros((num_rows, width + 1), np.intp)  # entries, the root being 0; the root jumps to itself
    jump[:, 1:] = np.where(used, parents + 1, 0)
    depths = np.zeros((num_rows, width + 1), np.int32)
    depths[:, 1:] = used
    masks = np.repeat(_own_bits(width + 1)[None], num_rows, axis=0)
    while jump.any():
        masks |= np.take_along_axis(masks, jump[:, :, None], axis=1)
        depths += np.take_along_axis(depths, jump, axis=1)
        jump = np.take_along_axis(jump, jump, axis=1)
    masks[:, 1:][~used] = 0
    return depths[:, 1:], masks.view(np.int64)


def _own_bits(num_entries: int) -> NDArray[np.uint64]:
    """uint64 [num_entries, 2]: the own bit of each entry and the root's."""
    entries = np.arange(num_entries)
    bits = np.zeros((num_entries, 2), np.uint64)
    bits[entries, entries // 64] = np.uint64(1) << (entries % 64).astype(np.uint64)
    bits[:, 0] |= np.uint64(1)
    return bits


def _check_parents(parents: NDArray[np.integer], used: NDArray[np.bool_]) -> None:
    bad = used & ((parents < ROOT) | (parents >= np.arange(parents.shape[1])))
    if bad.any():
        row, node = np.argwhere(bad)[0].tolist()
        raise ValueError(
            f"parent {int(parents[row, node])} of node {node} in row {row} must lie in [-1, {node - 1}]: number "
            "the nodes so that parents come before their children, and use -1 for children of the root"
        )


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    """``values`` made read-only: a tree's arrays are shared by all who hold it."""
    values.flags.writeable = False
    return values
