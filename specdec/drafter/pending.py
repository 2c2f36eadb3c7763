"""Hidden states of the target that a head has not read yet, by row and position."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.scheduler.plan import LongArray


class PendingHidden:
    """A small table of hidden states. Legend: L layers, M states, H hidden size.

    Args:
        num_layers, hidden_size: L and H.
        stride: more than any position.
        device: where the states are.
    """

    def __init__(self, num_layers: int, hidden_size: int, stride: int, device: torch.device) -> None:
        self._stride = stride
        self._keys = np.zeros(0, np.int64)
        self._hidden = torch.zeros(num_layers, 0, hidden_size, device=device)

    def add(self, rows: LongArray, positions: LongArray, hidden: Tensor) -> None:
        """Put in the states [L, n, H] of n tokens; each token comes once."""
        self._keys = np.concatenate([self._keys, rows * self._stride + positions])
        self._hidden = torch.cat([self._hidden, hidden], dim=1) if self._hidden.shape[1] else hidden

    def find(self, rows: LongArray, positions: LongArray) -> tuple[Tensor, NDArray[np.bool_]]:
        """States [L, n, H] of n tokens and which of them are known, bool [n]; the others are arbitrary."""
        wanted = rows * self._stride + positions
        if self._keys.size == 0:
            num_layers, _, hidden_size = self._hidden.shape
            return self._hidden.new_zeros(num_layers, wanted.size, hidden_size), np.zeros(
                wanted.size, np.bool_
            )
        order = np.argsort(self._keys)
        places = order[np.minimum(np.searchsorted(self._keys, wanted, sorter=order), order.size - 1)]
        return self._hidden[:, torch.from_numpy(places).to(self._hidden.device)], self._keys[places] == wanted

    def drop(self, rows: LongArray) -> None:
        """Forget the states of ``rows``."""
        if rows.size == 0 or self._keys.size == 0:
            return
        kept = np.flatnonzero((self._keys[:, None] // self._stride != rows).all(axis=1))
        if kept.size < self._keys.size:
            self._keys = self._keys[kept]
            self._hidden = self._hidden[:, torch.from_numpy(kept).to(self._hidden.device)]
