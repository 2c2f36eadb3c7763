"""What serving costs: dollars and joules per token, the cheapest configuration that keeps an SLO.

Rent is chips × hours × price, whether the chips work or wait. Energy is an upper-bound model: a chip draws its
idle power while it waits and its full thermal design power while it works, and serving keeps it below that.
Host, network and cooling are not in it. All functions but :func:`cheapest` broadcast over numpy arrays.

>>> h100 = ChipPrice(price_per_hour_usd=2.69, tdp_w=700.0, idle_w=70.0)
>>> round(float(cost_per_million_tokens_usd(h100, num_chips(tensor_parallel=2, replicas=4), 20_000.0)), 3)
0.299
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.metrics import Slo

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_HOUR_S = 3600.0
_JOULES_PER_KWH = 3.6e6
_TIE = 1e-9  # relative; costs this close differ by rounding


@dataclass(frozen=True, slots=True)
class ChipPrice:
    """What one chip costs to keep and to run; ``None`` is unknown, and an error where it is needed.

    Args:
        price_per_hour_usd: rent, or what a bought chip loses in value.
        tdp_w: thermal design power, taken as the power of a chip at work.
        idle_w: power of a chip that waits.
        electricity_usd_per_kwh: if electricity is paid on top of the rent; ``None`` if the rent includes it.

    Raises:
        ValueError: a figure that is negative or not finite, or an idle power above the design power.
    """

    price_per_hour_usd: float | None
    tdp_w: float | None
    idle_w: float | None
    electricity_usd_per_kwh: float | None = None

    def __post_init__(self) -> None:
        for name in ("price_per_hour_usd", "tdp_w", "idle_w", "electricity_usd_per_kwh"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be finite and >= 0, or None if it is not known")
        if self.tdp_w is not None and self.idle_w is not None and self.idle_w > self.tdp_w:
            raise ValueError(f"idle_w={self.idle_w} must be at most tdp_w={self.tdp_w}")


def num_chips(tensor_parallel: int, replicas: int = 1) -> int:
    """Chips of ``replicas`` model copies, each split over ``tensor_parallel`` chips.

    Raises:
        ValueError: one of them < 1.
    """
    for name, value in (("tensor_parallel", tensor_parallel), ("replicas", replicas)):
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1: it counts chips")
    return tensor_parallel * replicas


def power_w(price: ChipPrice, utilisation: ArrayLike) -> FloatArray:
    """Average power of one chip: idle + utilisation · (TDP − idle), an upper bound.

    Args:
        utilisation: share of the time in which the chip works, in [0, 1].

    Raises:
        ValueError: a utilisation out of range, or a power that is unknown.
    """
    busy = np.asarray(utilisation, np.float64)
    if not np.all((busy >= 0.0) & (busy <= 1.0)):
        raise ValueError(f"utilisation={utilisation} must be in [0, 1]: busy time / whole time")
    tdp_w = _known(price.tdp_w, "tdp_w", "it is on the vendor's sheet")
    idle_w = _known(price.idle_w, "idle_w", "measure it, or give the chip's tdp_w as the upper bound")
    return np.asarray(idle_w + busy * (tdp_w - idle_w))


def energy_j(price: ChipPrice, chips: ArrayLike, duration_s: ArrayLike, utilisation: ArrayLike) -> FloatArray:
    """Energy of ``chips`` chips over ``duration_s`` seconds, an upper bound; see :func:`power_w`."""
    kept_s = _amount(chips, "chips") * _amount(duration_s, "duration_s")
    return np.asarray(kept_s * power_w(price, utilisation))


def energy_per_token_j(
    price: ChipPrice, chips: ArrayLike, tokens_per_s: ArrayLike, utilisation: ArrayLike
) -> FloatArray:
    """Joules per output token, an upper bound; ``inf`` at a rate of 0."""
    return _per_token(energy_j(price, chips, 1.0, utilisation), tokens_per_s)


def kwh_per_million_tokens(total_j: ArrayLike, num_tokens: ArrayLike) -> FloatArray:
    """Kilowatt-hours per million tokens of a run that took ``total_j`` joules; ``inf`` for no tokens."""
    return 1e6 / _JOULES_PER_KWH * _per_token(_amount(total_j, "total_j"), num_tokens, "num_tokens")


def cost_usd(
    price: ChipPrice, chips: ArrayLike, duration_s: ArrayLike, utilisation: ArrayLike = 1.0
) -> FloatArray:
    """Dollars for ``chips`` chips over ``duration_s`` seconds: rent, and electricity where it is extra.

    Args:
        utilisation: matters only where ``price`` has a price of electricity; 1 is the upper bound.

    Raises:
        ValueError: a value out of range, or a price or power that is needed and unknown.
    """
    remedy = "find what your provider charges per chip, or set price_per_hour_usd in the hardware's sheet"
    hourly_usd = _known(price.price_per_hour_usd, "price_per_hour_usd", remedy)
    hours = _amount(chips, "chips") * _amount(duration_s, "duration_s") / _HOUR_S
    if price.electricity_usd_per_kwh is None:
        return np.asarray(hours * hourly_usd)
    energy_kwh = energy_j(price, chips, duration_s, utilisation) / _JOULES_PER_KWH
    return np.asarray(hours * hourly_usd + energy_kwh * price.electricity_usd_per_kwh)


def cost_per_million_tokens_usd(
    price: ChipPrice, chips: ArrayLike, tokens_per_s: ArrayLike, utilisation: ArrayLike = 1.0
) -> FloatArray:
    """Dollars per million output tokens; ``inf`` at a rate of 0.

    Args:
        tokens_per_s: output tokens of the whole fleet; those of requests within an SLO give the cost at it.
        utilisation: see :func:`cost_usd`, for the errors as well.
    """
    return 1e6 * _per_token(cost_usd(price, chips, 1.0, utilisation), tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A way to serve a workload, and how it did under an SLO.

    Args:
        name: for reports.
        price: of each chip.
        slo: that ``slo_share`` and ``good_tokens_per_s`` were counted under.
        slo_share: requests within it / requests, in [0, 1].
        tokens_per_s: output tokens of all requests.
        good_tokens_per_s: output tokens of the requests within the SLO.
        tensor_parallel: chips per replica.
        replicas: model copies.
        utilisation: share of the time in which the chips work, in [0, 1].

    Raises:
        ValueError: a value out of range.
    """

    name: str
    price: ChipPrice
    slo: Slo
    slo_share: float
    tokens_per_s: float
    good_tokens_per_s: float
    tensor_parallel: int = 1
    replicas: int = 1
    utilisation: float = 1.0

    def __post_init__(self) -> None:
        num_chips(self.tensor_parallel, self.replicas)
        for name in ("slo_share", "utilisation"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} of {self.name!r} must be in [0, 1]")
        if not 0.0 <= self.good_tokens_per_s <= self.tokens_per_s < math.inf:
            raise ValueError(
                f"{self.name!r}: 0 <= good_tokens_per_s={self.good_tokens_per_s} <= "
                f"tokens_per_s={self.tokens_per_s} must hold: good tokens are some of the tokens"
            )

    @classmethod
    def from_summary(
        cls,
        name: str,
        summary: Mapping[str, Any],
        *,
        price: ChipPrice,
        slo: Slo,
        tensor_parallel: int = 1,
        replicas: int = 1,
        utilisation: float = 1.0,
    ) -> Configuration:
        """From ``sim.streaming.RunMetrics.summary()`` or the serving experiment's summary, of the whole fleet.

        Raises:
            ValueError: the run counted no goodput.
        """
        if "goodput" not in summary:
            raise ValueError(f"the summary of {name!r} has no goodput: give the run an SLO")
        return cls(
            name=name,
            price=price,
            slo=slo,
            slo_share=summary["goodput"]["share"],
            tokens_per_s=summary["throughput"]["tokens_per_s"],
            good_tokens_per_s=summary["goodput"]["tokens_per_s"],
            tensor_parallel=tensor_parallel,
            replicas=replicas,
            utilisation=utilisation,
        )

    @property
    def chips(self) -> int:
        return num_chips(self.tensor_parallel, self.replicas)

    @property
    def cost_per_million_tokens_usd(self) -> float:
        """Over all output tokens."""
        return float(cost_per_million_tokens_usd(self.price, self.chips, self.tokens_per_s, self.utilisation))

    @property
    def cost_at_slo_usd(self) -> float:
        """Per million output tokens of requests within the SLO: the others are paid for and worth nothing."""
        return float(
            cost_per_million_tokens_usd(self.price, self.chips, self.good_tokens_per_s, self.utilisation)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer of :func:`cheapest`.

    Attributes:
        best: the cheapest that meets the SLO; ``None`` if none does.
        tied: others that cost the same.
        nearest: if none meets the SLO, the one with the largest share of requests within it.
        min_share: that was asked for.
    """

    best: Configuration | None
    tied: tuple[Configuration, ...]
    nearest: Configuration | None
    min_share: float

    def __str__(self) -> str:
        if self.best is not None:
            also = f"; as cheap: {', '.join(item.name for item in self.tied)}" if self.tied else ""
            return (
                f"{self.best.name}: {self.best.slo_share:.2%} of the requests within the SLO at "
                f"${self.best.cost_at_slo_usd:.3f} per million tokens on {self.best.chips} chip(s){also}"
            )
        assert self.nearest is not None, "there is a best or a nearest"
        return (
            f"none keeps {self.min_share:.2%} of the requests within the SLO; nearest is {self.nearest.name} "
            f"with {self.nearest.slo_share:.2%}"
        )


def cheapest(configurations: Sequence[Configuration], slo: Slo, min_share: float = 0.99) -> Choice:
    """The configuration that keeps ``min_share`` of the requests within ``slo`` at the lowest cost at it.

    Of equally cheap ones, the one on fewer chips is best, then the one with the larger share, then the first.

    Raises:
        ValueError: no configurations, one measured under another SLO, an unknown price, or ``min_share``
            outside (0, 1].
    """
    if not configurations:
        raise ValueError("no configurations to choose from: give at least one")
    if not 0.0 < min_share <= 1.0:
        raise ValueError(f"min_share={min_share} must be in (0, 1]: 0.99 asks for 99 % of the requests")
    for item in configurations:
        if item.slo != slo:
            raise ValueError(f"{item.name!r} was measured under {item.slo}, not {slo}: run it under that")
    costs_usd = [item.cost_at_slo_usd for item in configurations]
    meeting = [index for index, item in enumerate(configurations) if item.slo_share >= min_share]
    if not meeting:
        order = sorted(range(len(configurations)), key=lambda i: (-configurations[i].slo_share, costs_usd[i]))
        return Choice(best=None, tied=(), nearest=configurations[order[0]], min_share=min_share)
    lowest_usd = min(costs_usd[index] for index in meeting)
    equal = [index for index in meeting if math.isclose(costs_usd[index], lowest_usd, rel_tol=_TIE)]
    ranked = sorted(
        (configurations[index] for index in equal), key=lambda item: (item.chips, -item.slo_share)
    )
    return Choice(best=ranked[0], tied=tuple(ranked[1:]), nearest=None, min_share=min_share)


def pareto_front(costs: ArrayLike, latencies_s: ArrayLike) -> IntArray:
    """Points that no other beats: none is at most as costly and as slow, and better in one of the two.

    Args:
        costs: [N], in any unit.
        latencies_s: [N].

    Returns:
        int64 [M], indices of the front by rising cost. Equal points are on it together; a point that is
        infinite in either never is.

    Raises:
        ValueError: unequal shapes, or ``nan``.
    """
    cost, latency_s = np.asarray(costs, np.float64), np.asarray(latencies_s, np.float64)
    if cost.ndim != 1 or cost.shape != latency_s.shape:
        raise ValueError(f"costs {cost.shape} and latencies_s {latency_s.shape} must be equally long lists")
    if np.isnan(cost).any() or np.isnan(latency_s).any():
        raise ValueError("costs and latencies_s must not be nan: leave such points out")
    order = np.lexsort((latency_s, cost))
    order = order[np.isfinite(cost[order]) & np.isfinite(latency_s[order])]
    # In this order a point is beaten exactly by an earlier, different one that is not slower.
    points = np.stack([cost[order], latency_s[order]], axis=1)
    distinct, place = np.unique(points, axis=0, return_inverse=True)
    fastest_before_s = np.concatenate([[math.inf], np.minimum.accumulate(distinct[:, 1])[:-1]])
    on_front = distinct[:, 1] < fastest_before_s[: distinct.shape[0]]
    return np.asarray(order[on_front[place.ravel()]], np.int64)


def _per_token(amount: FloatArray, tokens: ArrayLike, name: str = "tokens_per_s") -> FloatArray:
    """Both of a second, or both of a whole run; ``name`` is that of ``tokens``."""
    num = _amount(tokens, name)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(num > 0.0, amount / num, math.inf)


def _known(value: float | None, name: str, remedy: str) -> float:
    if value is None:
        raise ValueError(f"{name} of the chip is unknown: give ChipPrice({name}=…); {remedy}")
    return value


def _amount(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, np.float64)
    if not np.all((array >= 0.0) & np.isfinite(array)):
        raise ValueError(f"{name}={values} must be finite and >= 0")
    return array
