"""Rotary position embedding of queries and keys."""

from specdec_kernels.rope.reference import rope

__all__ = ["rope"]
