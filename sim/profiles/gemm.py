"""Matrix products: how much of its roofline a chip reaches, by (m, n, k).

[m, k] @ [k, n] takes max(bytes / bandwidth, 2·m·n·k / peak) / efficiency, with weights and activations moved once.
The logarithm of the efficiency is multilinear in log m, log n, log k between nodes. The nodes of m lie on both sides
of the sizes at which kernels take one more tile (…, 64 | 65, 128 | 129, …), where times make steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.curves import FloatArray
from sim.profiles.fitting import HeldOut, hold_out

M_NODES = (1, 8, 16, 17, 32, 33, 64, 65, 96, 128, 129, 192, 256, 257, 512, 768, 1024, 2048, 4096, 8192, 32768)
N_NODES = K_NODES = (256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
_ACTIVATION_BYTES = 2.0
_SMOOTHNESS = 0.05
"""Weight of a difference between neighbouring nodes against a point's error: it only matters where no point lies."""


@dataclass(frozen=True, slots=True)
class GemmGrid:
    """Efficiencies of one data type.

    Attributes:
        m, n, k: nodes, increasing.
        log_efficiency: float64 [len(m), len(n), len(k)].
        flops_per_s, bytes_per_s: the peaks that the efficiencies are shares of.
        weight_bytes: bytes of a weight of this data type.
    """

    m: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    log_efficiency: FloatArray
    flops_per_s: float
    bytes_per_s: float
    weight_bytes: float

    def __call__(self, m: ArrayLike, n: float, k: float, weight_bytes: float | None = None) -> FloatArray:
        """Seconds, not decreasing in ``m`` if that increases; ``weight_bytes``: of a weight, if stored smaller."""
        rows = np.asarray(m, np.float64)
        log = self._log_efficiency(rows, np.full_like(rows, n), np.full_like(rows, k))
        stored = self.weight_bytes if weight_bytes is None else weight_bytes
        return self.roofline(rows, n, k, stored) / np.exp(log)

    def roofline(
        self, m: FloatArray, n: float | FloatArray, k: float | FloatArray, weight_bytes: float
    ) -> FloatArray:
        moved = n * k * weight_bytes + (n + k) * _ACTIVATION_BYTES * m
        return np.maximum(moved / self.bytes_per_s, 2.0 * m * n * k / self.flops_per_s)

    def _log_efficiency(self, m: FloatArray, n: FloatArray, k: FloatArray) -> FloatArray:
        index, weight = corners((self.m, self.n, self.k), (m, n, k))
        return (self.log_efficiency.ravel()[index] * weight).sum(axis=-1)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, efficiencies in per mille."""
        return {
            "m": list(self.m),
            "n": list(self.n),
            "k": list(self.k),
            "flops_per_s": self.flops_per_s,
            "bytes_per_s": self.bytes_per_s,
            "weight_bytes": self.weight_bytes,
            "per_mille": np.rint(1e3 * np.exp(self.log_efficiency)).astype(int).ravel().tolist(),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> GemmGrid:
        """What :meth:`to_plain` made."""
        m, n, k = (tuple(cast("list[int]", plain[name])) for name in "mnk")
        shares = np.maximum(np.array(plain["per_mille"], np.float64), 1.0) / 1e3
        return cls(
            m,
            n,
            k,
            np.log(shares).reshape(len(m), len(n), len(k)),
            plain["flops_per_s"],
            plain["bytes_per_s"],
            plain["weight_bytes"],
        )


def corners(
    nodes: tuple[tuple[int, ...], ...], values: tuple[FloatArray, ...]
) -> tuple[NDArray[np.intp], FloatArray]:
    """Of each of P values, the 2^d nodes around it as flat indices [P, 2^d] and their weights [P, 2^d].

    Interpolation is linear in the logarithms; beyond the outer nodes the nearest holds.
    """
    size = np.broadcast(*values).size
    index, weight = np.zeros((size, 1), np.intp), np.ones((size, 1))
    for axis, value in zip(nodes, values, strict=True):
        log = np.log(np.clip(np.asarray(value, np.float64).ravel(), axis[0], axis[-1]))
        grid = np.log(np.array(axis, np.float64))
        low = np.clip(np.searchsorted(grid, log, side="right") - 1, 0, max(grid.size - 2, 0))
        high = np.minimum(low + 1, grid.size - 1)
        width = np.where(high > low, grid[high] - grid[low], 1.0)
        share = (log - grid[low]) / width
        pair_index = np.stack([low, high], axis=1)
        pair_weight = np.stack([1.0 - share, share], axis=1)
        index = (index[:, :, None] * grid.size + pair_index[:, None, :]).reshape(size, -1)
        weight = (weight[:, :, None] * pair_weight[:, None, :]).reshape(size, -1)
    return index, weight


def fit_gemm(
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    seconds: FloatArray,
    *,
    flops_per_s: float,
    bytes_per_s: float,
    weight_bytes: float,
) -> tuple[GemmGrid, HeldOut | None]:
    """The grid closest to measured products in log seconds, and its error where whole (n, k) are left out.

    Returns:
        The grid; the error is ``None`` where there are too few shapes to leave one out.

    Raises:
        ValueError: no points.
    """
    if m.size == 0:
        raise ValueError("no matrix products to fit: the table has none of this data type")
    empty = np.zeros((len(M_NODES), len(N_NODES), len(K_NODES)))
    blank = GemmGrid(M_NODES, N_NODES, K_NODES, empty, flops_per_s, bytes_per_s, weight_bytes)
    roofline = blank.roofline(m, n, k, weight_bytes)
    target = np.log(roofline / seconds)
    index, weight = corners((M_NODES, N_NODES, K_NODES), (m, n, k))

    def solve(kept: NDArray[np.bool_]) -> FloatArray:
        return _solve(index[kept], weight[kept], target[kept], empty.shape)

    def fit(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], FloatArray]:
        values = solve(kept)
        return lambda left: roofline[left] / np.exp((values[index[left]] * weight[left]).sum(axis=1))

    _, shapes = np.unique(np.stack([n, k], axis=1), axis=0, return_inverse=True)
    error = hold_out(fit, _shuffled(shapes.ravel()), seconds) if shapes.max() >= 4 else None
    grid = solve(np.ones(m.shape, np.bool_)).reshape(empty.shape)
    return GemmGrid(M_NODES, N_NODES, K_NODES, grid, flops_per_s, bytes_per_s, weight_bytes), error


def _shuffled(groups: NDArray[np.intp]) -> NDArray[np.int64]:
    """The same groups in another order, so that a fold does not hold neighbours."""
    order = np.random.default_rng(0).permutation(int(groups.max()) + 1)
    return order[groups].astype(np.int64)


def _solve(
    index: NDArray[np.intp], weight: FloatArray, target: FloatArray, shape: tuple[int, ...]
) -> FloatArray:
    """Least squares over the nodes, with small penalties on differences between neighbours."""
    # Here, because they take long to import and simulations do not fit.
    sparse: Any = import_module("scipy.sparse")
    linalg: Any = import_module("scipy.sparse.linalg")

    size = int(np.prod(shape))
    rows = np.repeat(np.arange(target.size), index.shape[1])
    coordinates = sparse.coo_matrix((weight.ravel(), (rows, index.ravel())), shape=(target.size, size))
    points: Any = sparse.csr_matrix(coordinates)
    numbers = np.arange(size).reshape(shape)
    parts: list[Any] = [points]
    for axis in range(len(shape)):
        low = np.delete(numbers, -1, axis).ravel()
        high = np.delete(numbers, 0, axis).ravel()
        ends = np.concatenate([low, high])
        signs = np.concatenate([np.full(low.size, -_SMOOTHNESS), np.full(low.size, _SMOOTHNESS)])
        places = np.tile(np.arange(low.size), 2)
        parts.append(sparse.csr_matrix(sparse.coo_matrix((signs, (places, ends)), shape=(low.size, size))))
    matrix: Any = sparse.vstack(parts)
    right = np.concatenate([target, np.zeros(matrix.shape[0] - target.size)])
    found: Any = linalg.lsqr(matrix, right, atol=1e-8, btol=1e-8, iter_lim=400)
    return np.asarray(found[0], np.float64)
