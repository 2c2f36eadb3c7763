"""Draft trees that follow the draft's confidence, and the packed masks of any trees."""

from specdec_kernels.tree_build.reference import DynamicTrees, Level, grow, pack_trees, rerank

__all__ = ["DynamicTrees", "Level", "grow", "pack_trees", "rerank"]
