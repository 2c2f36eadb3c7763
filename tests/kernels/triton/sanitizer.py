"""Every address that an interpreted kernel reads or writes lies within a tensor that it was given.

The interpreter computes real addresses, so a read beyond a tensor would pass unnoticed, or crash. (triton-viz has such
a sanitizer too; its version 3.0 does not import beside Triton 3.9.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


class Ranges:
    """Bytes that the launch under way may touch: what its tensors span, strides included."""

    def __init__(self, arguments: list[Any]) -> None:
        spans = sorted(_span(one) for one in arguments if isinstance(one, torch.Tensor) and one.numel())
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self._starts = np.array([start for start, _ in merged], np.uint64)
        self._ends = np.array([end for _, end in merged], np.uint64)

    def check(self, kind: str, pointers: Any, mask: Any) -> None:
        """Raise if any active one of ``pointers`` is outside."""
        active = np.asarray(pointers.data)[np.asarray(mask.data, bool)].astype(np.uint64)
        if active.size == 0:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if self._starts.size == 0:
            raise IndexError(f"{kind} of {active.size} elements, but the kernel was given no tensor")
        place = np.searchsorted(self._starts, active, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (active + size <= self._ends[np.maximum(place, 0)])
        if not inside.all():
            raise IndexError(f"{kind} outside every tensor of the launch: {int((~inside).sum())} elements")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (extent + 1) * tensor.element_size()


@contextmanager
def checked() -> Iterator[None]:
    """Kernels that run meanwhile are checked."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, init = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    ranges: list[Ranges] = []

    def init_args(self: Any, arguments: Any, named: Any) -> Any:
        found = init(self, arguments, named)
        ranges[:] = [Ranges([*found[0], *found[1].values()])]
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        ranges[0].check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        ranges[0].check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    try:
        builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
        executor._init_args_hst = init_args
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor._init_args_hst = init
