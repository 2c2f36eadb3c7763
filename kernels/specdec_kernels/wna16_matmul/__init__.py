"""Matrix product with weights of 4 or 8 bits and activations of 16."""

from specdec_kernels.wna16_matmul.reference import wna16_matmul
from specdec_kernels.wna16_matmul.weights import QuantizedWeight, dequantize, from_codes, quantize

__all__ = ["QuantizedWeight", "dequantize", "from_codes", "quantize", "wna16_matmul"]
