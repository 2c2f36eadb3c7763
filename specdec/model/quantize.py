"""Quantisation of a model's linear layers: int4 and int8 round weights to their group's grid; fp8 activations as well.

Triton's backend stores the codes and multiplies with them (``specdec.model.linear``). The others run int4 and int8 on a
copy of the model that :func:`quantize_model` makes: each weight is moved to the nearest point of its group's grid, and
the values stay in the model's dtype ("fake quantisation"), each grid point rounded to it. So a copy has the acceptance
and the quality of a model with 4- or 8-bit weights; it has neither its size nor its speed.

>>> copy = quantize_model(load_model("smollm2-135m"), bits=4, group_size=32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from specdec_kernels.wna16_matmul import QuantizedWeight, dequantize, quantize
from torch import Tensor

from specdec.model.weights import LoadedModel
from specdec.names import unknown_name

LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
"""Weights of a layer's matrix products."""
HEAD = frozenset({"embed", "lm_head"})
BITS = {"int4": 4, "int8": 8}
QUANTIZATIONS = (*BITS, "fp8")
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
        return dequantize(quantize_weight(name, weight, bits, group_size)).to(weight.dtype)

    return map_linear(model, quantise, head=head)


def quantize_weight(name: str, weight: Tensor, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """The codes of ``weight`` [outputs, inputs]: the nearest points of its groups' grids.

    A group's grid has 2^bits points at equal distances, from its smallest weight to its largest, with a float16 scale
    and minimum.

    Args:
        name: for messages.
        group_size: default ``GROUP_SIZE``.

    Raises:
        ValueError: inputs that do not divide into groups.
    """
    size = GROUP_SIZE if group_size is None else group_size
    if weight.shape[1] % size:
        fitting = [other for other in GROUP_SIZES if weight.shape[1] % other == 0]
        remedy = f"use group_size={fitting[0]}" if fitting else "this model cannot be quantised in groups"
        raise ValueError(
            f"{name} has {weight.shape[1]} inputs, which do not divide into groups of group_size={size}: {remedy}"
        )
    return quantize(weight.contiguous(), bits, size)


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
    """Check options as users give them: one of ``QUANTIZATIONS`` or ``None``, and a group size or ``None``.

    Raises:
        ValueError: an unknown name or group size, or a group size where there are no groups.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise unknown_name("quantization", quantization, QUANTIZATIONS)
    if group_size is None:
        return
    if quantization is None:
        raise ValueError(
            f"group_size={group_size} is for quantisation only: add quantization=int4 or int8, or leave it out"
        )
    if quantization == "fp8":
        raise ValueError(
            f"group_size={group_size}: fp8 has one scale for each output channel; use int4 or int8, or leave it out"
        )
    _check_group_size(group_size)


def quantized(model: LoadedModel, quantization: str | None, group_size: int | None = None) -> LoadedModel:
    """A copy of ``model`` quantised to int4 or int8, or itself where ``quantization`` is ``None``.

    Raises:
        ValueError: see :func:`check_quantization` and :func:`quantize_model`.
    """
    check_quantization(quantization, group_size)
    if quantization is None:
        return model
    assert quantization in BITS, "fp8 rounds activations too, which a copy does not"
    return quantize_model(model, BITS[quantization], GROUP_SIZE if group_size is None else group_size)


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} must be one of {', '.join(map(str, GROUP_SIZES))}")


def _is_linear(name: str) -> bool:
    return name.startswith("layers.") and name.rpartition(".")[2] in LINEAR
