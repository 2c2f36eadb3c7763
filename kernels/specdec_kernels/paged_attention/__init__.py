"""Storing to and attending over a paged KV cache."""

from specdec_kernels.paged_attention.reference import paged_attention, store_kv
from specdec_kernels.paged_attention.tree_mask import MAX_TREE_TOKENS, check_tree_mask

__all__ = ["MAX_TREE_TOKENS", "check_tree_mask", "paged_attention", "store_kv"]
