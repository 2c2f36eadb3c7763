"""Moving single tokens' keys and values within a paged cache."""

from specdec_kernels.compact_kv.reference import compact_kv

__all__ = ["compact_kv"]
