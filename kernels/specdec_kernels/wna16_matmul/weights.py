"""Weights of 4 or 8 bits in groups along K: ``scale * code + minimum``, or ``scale * (code - 2**(bits - 1))``.

The first form, with a minimum for each group, is that of GGUF's Q4_1 (group 32, 4 bits); the second, symmetric, has
Q4_0 and Q8_0 in it. Any block of the three is represented exactly by its own codes, scale and minimum.

**Order of the codes.** A row is a sequence of blocks of 32 columns, and a block a sequence of 16-bit little-endian
words. With 4 bits, word j of a block's 8 holds columns j, j + 8, j + 16 and j + 24, from the lowest bits up; with 8
bits, word j of 16 holds columns j and j + 16. So the i-th fields of consecutive words are consecutive columns: a kernel
loads 16 bytes of words and 16 bytes of activations at a time, takes one field of all words with a shift, and multiplies
without moving data between threads. Scales and minimums lie with N innermost, as a kernel reads one group of many rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 32
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight matrix [N, K]; make one with ``quantize`` or ``from_codes``.

    Attributes:
        codes: uint8 [N, K * bits / 8], in the order of the module's description.
        scales: [K / group_size, N], floating point.
        minimums: as ``scales``; None: symmetric.
        bits: 4 or 8.
        group_size: columns with the same scale and minimum: 32, 64, 128 or K.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on ``device``."""
        minimums = None if self.minimums is None else self.minimums.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), minimums=minimums)


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool = False) -> QuantizedWeight:
    """Round every group to the nearest points of its own grid of ``2**bits`` (symmetric: one fewer).

    The grid spans the group from its least to its largest element; a symmetric one is centred on 0 and reaches its
    largest magnitude. Scales and minimums are float16, rounded such that the grid still spans the group: so no weight
    moves by more than half a scale. A weight that is on such a grid, ends included, is reproduced.

    Args:
        weight: [N, K], finite.

    Raises:
        ValueError: unsuitable sizes, or numbers that float16 cannot span.
    """
    num_groups = _num_groups(weight.shape, bits, group_size)
    groups = weight.float().view(len(weight), num_groups, group_size)
    if symmetric:
        zero, levels = 2 ** (bits - 1), 2 ** (bits - 1) - 1
        minimum = torch.zeros_like(groups[..., :1]).half()
        top = groups.abs().amax(-1, keepdim=True)
    else:
        zero, levels = 0, 2**bits - 1
        minimum = _half_below(groups.amin(-1, keepdim=True))
        top = groups.amax(-1, keepdim=True)
    scale = _spanning_scale(minimum, top, levels)
    if not (scale.isfinite() & minimum.isfinite()).all():
        raise ValueError(
            "weight has numbers that are not finite or beyond float16: leave this layer unquantised"
        )
    steps = (groups - minimum.float()) / scale.float()
    codes = steps.nan_to_num(0.0).round().clamp(-levels if symmetric else 0, levels) + zero
    return from_codes(
        codes.to(torch.uint8).view(weight.shape),
        scale.squeeze(-1),
        None if symmetric else minimum.squeeze(-1),
        bits,
    )


def from_codes(codes: Tensor, scales: Tensor, minimums: Tensor | None, bits: int) -> QuantizedWeight:
    """Weights that are quantised already.

    Args:
        codes: uint8 [N, K], from 0 to ``2**bits - 1``.
        scales: [N, K / group_size].
        minimums: as ``scales``, or None for ``scale * (code - 2**(bits - 1))``.

    Raises:
        ValueError: unsuitable sizes, or codes that do not fit.
    """
    num_rows, num_columns = codes.shape
    group_size = num_columns // max(scales.shape[1], 1)
    num_groups = _num_groups(codes.shape, bits, group_size)
    expected = (num_rows, num_groups)
    if scales.shape != expected or (minimums is not None and minimums.shape != expected):
        raise ValueError(f"scales and minimums must be {expected} for codes of {tuple(codes.shape)}")
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= 2**bits):
        raise ValueError(
            f"codes must be uint8 below {2**bits} for bits={bits}: add {2 ** (bits - 1)} to signed ones"
        )
    return QuantizedWeight(
        codes=_pack(codes, bits),
        scales=scales.t().contiguous(),
        minimums=None if minimums is None else minimums.t().contiguous(),
        bits=bits,
        group_size=group_size,
    )


def dequantize(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K], each product and sum rounded once."""
    codes = _unpack(weight.codes, weight.bits).float()
    scales = _expand(weight.scales, weight)
    if weight.minimums is None:
        return (codes - 2 ** (weight.bits - 1)) * scales
    return codes * scales + _expand(weight.minimums, weight)


def _expand(values: Tensor, weight: QuantizedWeight) -> Tensor:
    return values.t().float().repeat_interleave(weight.group_size, dim=1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[N, K] in the order of columns to [N, K * bits / 8] in the order of the module's description."""
    fields = codes.view(len(codes), -1, 16 // bits, 2 * bits).transpose(-1, -2)
    if bits == 4:
        fields = fields[..., 0::2] | (fields[..., 1::2] << 4)
    return fields.reshape(len(codes), codes.shape[1] * bits // 8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    fields = packed.view(len(packed), -1, 2 * bits, 2)
    if bits == 4:
        fields = torch.stack((fields & 15, fields >> 4), dim=-1).flatten(-2)
    return fields.transpose(-1, -2).reshape(len(packed), packed.shape[1] * 8 // bits)


def _num_groups(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    num_columns = shape[1]
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: choose 4 or 8")
    if group_size not in (*GROUP_SIZES, num_columns):
        raise ValueError(
            f"group_size={group_size}: choose from {GROUP_SIZES}, or {num_columns} for one a row"
        )
    if num_columns % BLOCK or num_columns % group_size:
        raise ValueError(f"K = {num_columns} must be a multiple of {BLOCK} and of group_size={group_size}")
    return num_columns // group_size


def _spanning_scale(minimum: Tensor, top: Tensor, levels: int) -> Tensor:
    """The nearest float16 to ``(top - minimum) / levels``; the next larger if dequantising would stay below ``top``."""
    scale = ((top - minimum.float()) / levels).half()
    reached = scale.float() * levels + minimum.float()
    return torch.where(reached < top, _next_half(scale), scale)


def _half_below(values: Tensor) -> Tensor:
    """The largest float16 that is not above ``values``."""
    nearest = values.half()
    return torch.where(nearest.float() > values, -_next_half(-nearest), nearest)


def _next_half(values: Tensor) -> Tensor:
    """The float16 after each of ``values``."""
    bits = values.view(torch.int16)
    after = torch.where(values < 0, bits - 1, torch.where(values == 0, 1, bits + 1))
    return after.to(torch.int16).view(torch.float16)
