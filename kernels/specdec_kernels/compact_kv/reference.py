"""Moving single tokens' keys and values, so that the accepted path of a token tree becomes consecutive."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_kv(
    cache: Tensor,
    sources: Tensor,
    destinations: Tensor,
    move_start: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Copy slots within every plane of a cache, in place; all sources are read before any destination is written.

    A plane is what one layer's keys or one layer's values take. All planes are moved at once, so the caches of
    all layers should be views of one tensor, [num_layers, 2, num_blocks, block_size, H, D].

    Legend: S moves, R rows, H key-value heads, D head dimension.

    Args:
        cache: [..., num_blocks, block_size, H, D], contiguous, any dtype; leading dimensions count planes.
        sources, destinations: int64 [S], ``block * block_size + offset``. A move in which either is negative is none
            (padding). Destinations are distinct. A destination may be the source of an earlier move, never of a
            later one: an accepted path's tokens move to earlier places, in order, so this always holds for it.
        move_start: int32 [R + 1], where each row's moves begin within S; ``None`` makes them one row. Rows share no
            slot, which lets a GPU move them side by side. Moves outside ``move_start[0]`` to ``move_start[R]`` are
            not made.
        scales: float32 [..., num_blocks, block_size, H], contiguous, of a quantised cache; moved along.
    """
    if move_start is not None:
        sources, destinations = (
            slots[int(move_start[0]) : int(move_start[-1])] for slots in (sources, destinations)
        )
    keep = (sources >= 0) & (destinations >= 0)
    sources, destinations = sources[keep], destinations[keep]
    num_slots = cache.shape[-4] * cache.shape[-3]
    for tensor, slot_dims in ((cache, 2), (scales, 1)):
        if tensor is not None and tensor.numel():
            # As bytes: not every operation knows every dtype.
            slots = tensor.view(-1, num_slots, *tensor.shape[tensor.ndim - slot_dims :]).view(torch.uint8)
            slots.index_copy_(1, destinations, slots[:, sources])
