"""Schema of the experiment that measures, chooses and tries draft trees."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.config_schemas import check_positive, require

MAX_NODES = 127
"""Of a tree, as the attention masks hold them."""


@dataclass(frozen=True)
class TreeSweepConfig:
    """branching: children by level of the wide tree that acceptance is measured with, for drafters that take a tree;
    those with trees of their own draft max_size nodes. batches: requests at once. sizes: nodes of trees that are tried
    beside the chosen one. max_size, max_depth: of the tree that is chosen. rounds: interleaved, of which the median
    counts. waves: requests of a cell, in batches, though never fewer than there are prompts."""

    name: str = "tree_sweep"
    branching: list[int] = field(default_factory=lambda: [6, 3, 2, 1])
    batches: list[int] = field(default_factory=lambda: [1, 8])
    sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    max_size: int = 32
    max_depth: int = 10
    rounds: int = 1
    waves: int = 1

    def __post_init__(self) -> None:
        for name in ("branching", "batches", "sizes"):
            values = getattr(self, name)
            require(len(values) > 0, f"experiment.{name} is empty: give at least one")
            for value in values:
                check_positive(f"experiment.{name}", value)
        for name in ("max_size", "max_depth", "rounds", "waves"):
            check_positive(f"experiment.{name}", getattr(self, name))
        widest, level = 0, 1
        for width in self.branching:
            level *= width
            widest += level
        for name, nodes in (("branching", widest), ("max_size", self.max_size), ("sizes", max(self.sizes))):
            given = getattr(self, name)
            require(
                nodes <= MAX_NODES,
                f"experiment.{name}={given} makes a tree of {nodes} nodes: give at most {MAX_NODES}",
            )
