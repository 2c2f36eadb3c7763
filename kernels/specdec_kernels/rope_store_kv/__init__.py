"""What lies between the projections and attention: query-key norms, rotary embedding, and the write to the KV cache."""

from specdec_kernels.rope_store_kv.reference import rope_store_kv

__all__ = ["rope_store_kv"]
