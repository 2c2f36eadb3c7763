"""Write a safetensors file tensor by tensor, so that a model need never be whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
HEADER_ALIGNMENT_BYTES = 64


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write ``tensors``, which come one at a time in the order of ``shapes`` and all have ``dtype``.

    Format: 8 bytes of header length, a JSON header with shapes and byte ranges, the data.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (expected, shape), (name, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype)
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
