"""Matrix product of float8 activations and weights."""

from specdec_kernels.fp8_matmul.reference import fp8_matmul, quantize_fp8

__all__ = ["fp8_matmul", "quantize_fp8"]
