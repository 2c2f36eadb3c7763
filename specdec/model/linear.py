"""A decoder's linear layers: dense, with integer weights (int4, int8) or in float8.

Integer weights are stored as codes with scales and minimums and become weights again inside the product; activations
stay as they are. In float8 both operands are rounded: weights once, by output channel; activations in every step, by
token, so that a token's result does not depend on the others. Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from specdec_kernels.fp8_matmul import quantize_fp8
from specdec_kernels.ops import Ops
from specdec_kernels.wna16_matmul import QuantizedWeight
from torch import Tensor

from specdec.model.quantize import BITS, quantize_weight


class Linear(Protocol):
    """``x`` [T, K] to [T, N], in the dtype of ``x``."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that is stored of it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    weight: Tensor
    bias: Tensor | None
    linear: Callable[..., Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return _present(self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class IntegerLinear:
    weight: QuantizedWeight
    bias: Tensor | None
    wna16_matmul: Callable[..., Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.wna16_matmul(x, self.weight, self.bias)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return _present(self.weight.codes, self.weight.scales, self.weight.minimums, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Linear:
    """weight: float8_e4m3fn [N, K]. weight_scale: float32 [N]."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    quantize_fp8: Callable[..., Any]
    fp8_matmul: Callable[..., Any]

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self.quantize_fp8(x)
        return self.fp8_matmul(codes, scale, self.weight, self.weight_scale, self.bias, x.dtype)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return _present(self.weight, self.weight_scale, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMaker:
    """Makes linear layers of what is stored in ``dtype`` or quantised, on ``device``, over ``ops``.

    Attributes:
        quantization: "int4", "int8", "fp8" or ``None``; with ``group_size`` as ``specdec.model.quantize`` checks them.
    """

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    quantization: str | None = None
    group_size: int | None = None

    def make(self, name: str, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Linear:
        """Layers that share an input, as one whose outputs are theirs one after another.

        Weights are rounded where they lie and as they are, so that on all devices the codes are the same.

        Args:
            name: for messages.
            weights: [N, K] each.
            biases: [N] each, or none at all.

        Raises:
            ValueError: inputs that do not divide into groups.
        """
        ops, device = self.ops, self.device
        weight = _stacked(weights)
        bias = _stacked(biases).to(device, self.dtype) if biases else None
        if self.quantization is None:
            return DenseLinear(weight.to(device, self.dtype), bias, ops.linear)
        if self.quantization == "fp8":
            codes, scale = quantize_fp8(weight)
            return Fp8Linear(codes.to(device), scale.to(device), bias, ops.quantize_fp8, ops.fp8_matmul)
        packed = quantize_weight(name, weight, BITS[self.quantization], self.group_size)
        return IntegerLinear(packed.to(device), bias, ops.wna16_matmul)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One alone may be a view of a mapped file, and remains one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _present(*tensors: Tensor | None) -> Sequence[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
