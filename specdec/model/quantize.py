"""Weight-only quantisation of a model in memory: each linear weight is moved to the nearest point of its group's grid.

The values stay in the model's dtype ("fake quantisation"), each grid point rounded to it. So a copy has the acceptance
and the quality of a model with 4- or 8-bit weights; it has neither its size nor its speed.

>>> copy = quantize_model(load_model("smollm2-135m"), bits=4, group_size=32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from specdec_kernels.wna16_matmul.weights import dequantize, quantize
from torch import Tensor

from specdec.model.weights import LoadedModel
from specdec.names import unknown_name

LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
"""Weights of a layer's matrix products."""
HEAD = frozenset({"embed", "lm_head"})
BITS = {"int4": 4, "int8": 8}
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 32


def quantize_model(
    model: LoadedModel, bits: int = 4, group_size: int = GROUP_SIZE, *, head: bool = False
) -> LoadedModel:
    """A copy of ``model`` with quantised linear layers; ``model`` stays as it is, and other weights are shared.

    Args:
        bits: 4 or 8.
        group_size: neighbouring inputs of a row that share a scale and a minimum, one of ``GROUP_SIZES``.
        head: also the embedding and the LM head, which are one where they are tied.

    Raises:
        ValueError: other bits or group sizes, a matrix whose inputs do not divide into groups, or a model whose weights
            were released.
    """
    if bits not in BITS.values():
        raise ValueError(f"quantisation to {bits} bits: only {sorted(BITS.values())} are supported")
    _check_group_size(group_size)

    def quantise(name: str, weight: Tensor) -> Tensor:
        if weight.shape[1] % group_size:
            fitting = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
            remedy = f"use group_size={fitting[0]}" if fitting else "this model cannot be quantised in groups"
            raise ValueError(
                f"{name} has {weight.shape[1]} inputs, which do not divide into groups of group_size={group_size}: "
                f"{remedy}"
            )
        return on_grid(weight, bits, group_size)

    return map_linear(model, quantise, head=head)


def on_grid(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """``weight`` [outputs, inputs] at the nearest points of its groups' grids, in its own dtype.

    A group's grid has 2^bits points at equal distances, from its smallest weight to its largest, with a float16 scale
    and minimum, as ``specdec_kernels.wna16_matmul`` stores it.
    """
    return dequantize(quantize(weight.contiguous(), bits, group_size)).to(weight.dtype)


def map_linear(
    model: LoadedModel, change: Callable[[str, Tensor], Tensor], *, head: bool = False
) -> LoadedModel:
    """A copy of ``model`` with ``change(name, weight)`` in place of each linear layer's weight [outputs, inputs].

    Args:
        head: also of the embedding and the LM head.

    Raises:
        ValueError: the weights were released.
    """
    if not model.weights:
        raise ValueError(f"the weights of {model.source!r} were released: load the model again")
    weights = {
        name: change(name, weight) if _is_linear(name) or (head and name in HEAD) else weight
        for name, weight in model.weights.items()
    }
    return replace(model, weights=weights)


def check_quantization(quantization: str | None, group_size: int | None) -> None:
    """Check options as users give them: ``"int4"``, ``"int8"`` or ``None``, and a group size or ``None``.

    Raises:
        ValueError: an unknown name or group size, or a group size without quantisation.
    """
    if quantization is None:
        if group_size is not None:
            raise ValueError(
                f"group_size={group_size} is for quantisation only: add quantization=int4 or int8, or leave it out"
            )
        return
    if quantization not in BITS:
        raise unknown_name("quantization", quantization, BITS)
    if group_size is not None:
        _check_group_size(group_size)


def quantized(model: LoadedModel, quantization: str | None, group_size: int | None = None) -> LoadedModel:
    """``model`` quantised as users ask for it, or itself where they do not.

    Raises:
        ValueError: see :func:`check_quantization` and :func:`quantize_model`.
    """
    check_quantization(quantization, group_size)
    if quantization is None:
        return model
    return quantize_model(model, BITS[quantization], GROUP_SIZE if group_size is None else group_size)


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} must be one of {', '.join(map(str, GROUP_SIZES))}")


def _is_linear(name: str) -> bool:
    return name.startswith("layers.") and name.rpartition(".")[2] in LINEAR
