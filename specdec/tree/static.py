"""Trees that are fixed before decoding: child-rank paths, and k-ary trees."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.tree.topology import ROOT, Tree


def static_tree(paths: Sequence[Sequence[int]]) -> Tree:
    """The tree of all ``paths`` of child ranks, as in Medusa, arXiv 2401.10774 (tree attention).

    [0, 2] is the third child of the root's first child. Nodes are numbered level by level.

    Raises:
        ValueError: an empty or repeated path, a negative rank, or a path whose parent or earlier sibling is missing.
    """
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    numbers: dict[tuple[int, ...], int] = {(): ROOT}
    parents = []
    for node, path in enumerate(ordered):
        if path in numbers:
            raise ValueError(
                f"path {list(path)} is {'repeated' if path else 'empty'}: give each node's path once"
            )
        if path[-1] < 0:
            raise ValueError(f"path {list(path)} has a negative rank: ranks count from 0")
        earlier = (*path[:-1], path[-1] - 1)
        for needed in (path[:-1], earlier if path[-1] else ()):
            if needed not in numbers:
                raise ValueError(f"path {list(path)} needs path {list(needed)}, which is missing: add it")
        numbers[path] = node
        parents.append(numbers[path[:-1]])
    return Tree(parents)


def k_ary(branching: Sequence[int]) -> Tree:
    """Each node of depth i has ``branching[i]`` children, the root having depth 0. Numbered level by level.

    Raises:
        ValueError: a branching below 1.
    """
    parents: list[int] = []
    level = [ROOT]
    for width in branching:
        if width < 1:
            raise ValueError(
                f"branching={list(branching)} must be >= 1 on each level: leave out the last levels"
            )
        start = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(start, len(parents)))
    return Tree(parents)
