"""Draft trees: their shape, and who decides it.

``static`` and ``sequoia`` trees are fixed before decoding and come from a spec; ``dynamic`` ones follow the draft's
confidence in each step.

>>> make_tree({"name": "k_ary", "branching": [4, 2, 1]}).depths.tolist()
[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from specdec.names import unknown_name
from specdec.tree.dynamic import DynamicTrees, Level, grow, rerank
from specdec.tree.sequoia import (
    SequoiaChoice,
    best_expected_tokens,
    choose_tree,
    expected_tokens,
    sequoia_tree,
)
from specdec.tree.static import k_ary, static_tree
from specdec.tree.topology import MAX_PACKED_NODES, ROOT, Tree, pack_trees

TREES: dict[str, Callable[..., Tree]] = {
    "chain": Tree.chain,
    "k_ary": k_ary,
    "sequoia": sequoia_tree,
    "static": static_tree,
}

__all__ = [
    "MAX_PACKED_NODES",
    "ROOT",
    "TREES",
    "DynamicTrees",
    "Level",
    "SequoiaChoice",
    "Tree",
    "best_expected_tokens",
    "choose_tree",
    "expected_tokens",
    "grow",
    "k_ary",
    "make_tree",
    "pack_trees",
    "rerank",
    "sequoia_tree",
    "static_tree",
]


def make_tree(spec: str | Mapping[str, Any]) -> Tree:
    """The tree that ``spec`` describes, such as ``{"name": "static", "paths": [[0], [1], [0, 0]]}``.

    Names and options: chain (length), k_ary (branching), static (paths), sequoia (rates, size, max_depth).

    Raises:
        ValueError: unknown name (with the nearest ones), missing or unknown options, or a value out of range.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in TREES:
        raise unknown_name("tree", name, TREES)
    try:
        return TREES[name](**options)
    except TypeError as error:
        raise ValueError(f"tree {name!r} does not take these options: {options} ({error})") from None
