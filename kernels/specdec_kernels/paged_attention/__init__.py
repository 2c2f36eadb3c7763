"""Storing to and attending over a paged KV cache."""

from specdec_kernels.paged_attention.reference import paged_attention, store_kv

__all__ = ["paged_attention", "store_kv"]
