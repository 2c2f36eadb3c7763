"""Gated activations of the MLP."""

from specdec_kernels.silu_mul.reference import gelu_mul, silu_mul

__all__ = ["gelu_mul", "silu_mul"]
