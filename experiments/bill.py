"""What a simulated run costs: dollars and energy per million output tokens, or the reason why nobody can say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments import simulations
from sim.cluster_spec import ClusterSpec
from sim.economics import ChipPrice, cost_usd, energy_j, kwh_per_million_tokens
from sim.hardware import Hardware
from specdec.config import Config


class _Kept(NamedTuple):
    """Chips of one replica: ``num`` of them for ``paid_s`` seconds, at work for a share of these."""

    chip: Hardware
    num: int
    paid_s: float
    utilisation: float

    @property
    def price(self) -> ChipPrice:
        return ChipPrice(self.chip.price_per_hour_usd, self.chip.tdp_w, self.chip.idle_w)


def costs(config: Config, cluster: ClusterSpec, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rent in dollars.

    Args:
        summary: of ``sim.simulation.simulate``.

    Returns:
        ``per_million_tokens_usd`` and ``per_million_good_tokens_usd`` (of the requests within the SLO; ``inf`` if
        there is none), both ``None`` where ``reason`` says why.
    """
    names = "per_million_tokens_usd", "per_million_good_tokens_usd"
    kept = list(_kept(config, cluster, summary))
    reason = _unknown(config, kept, "price_per_hour_usd")
    if reason or not summary["num_requests"]:
        return dict.fromkeys(names) | {"reason": reason or "no request finished"}
    total_usd = math.fsum(float(cost_usd(each.price, each.num, each.paid_s)) for each in kept)
    tokens = _tokens(summary)
    return {
        name: 1e6 * total_usd / num if num else math.inf for name, num in zip(names, tokens, strict=True)
    } | {"reason": None}


def energy(config: Config, cluster: ClusterSpec, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Energy of the chips, an upper bound: see ``sim.economics``. A draft's chip counts as at work with its target.

    Args:
        summary: as for :func:`costs`.

    Returns:
        ``total_j``, ``per_token_j``, and, of all tokens and of those within the SLO, ``per_million_tokens_kwh`` and
        ``per_million_good_tokens_kwh``; all ``None`` where ``reason`` says why.
    """
    names = "total_j", "per_token_j", "per_million_tokens_kwh", "per_million_good_tokens_kwh"
    kept = list(_kept(config, cluster, summary))
    reason = _unknown(config, kept, "tdp_w", "idle_w")
    if reason or not summary["num_requests"]:
        return dict.fromkeys(names) | {"reason": reason or "no request finished"}
    total_j = math.fsum(float(energy_j(each.price, each.num, each.paid_s, each.utilisation)) for each in kept)
    tokens, good_tokens = _tokens(summary)
    kwh = (float(kwh_per_million_tokens(total_j, num)) for num in (tokens, good_tokens))
    return dict(zip(names, (total_j, total_j / tokens, *kwh), strict=True)) | {"reason": None}


def _kept(config: Config, cluster: ClusterSpec, summary: Mapping[str, Any]) -> Iterator[_Kept]:
    chip, draft_chip = simulations.hardware(config), simulations.draft_hardware(config)
    for row in summary["replicas"]:
        if not row["paid_s"]:
            continue
        replica = cluster.pools[row["name"].rpartition("-")[0]].replica
        utilisation = min(1.0, row["utilisation"])  # a quotient of two sums of the same seconds
        yield _Kept(chip, replica.tensor_parallel, row["paid_s"], utilisation)
        if replica.draft_cost_model is not None:
            assert draft_chip is not None
            num = replica.num_chips - replica.tensor_parallel
            yield _Kept(draft_chip, num, row["paid_s"], utilisation)


def _tokens(summary: Mapping[str, Any]) -> tuple[float, float]:
    """Output tokens of all finished requests, and of those within the SLO."""
    good = summary["goodput"]["tokens_per_s"] * summary["throughput"]["duration_s"]
    return summary["num_generated"], good if math.isfinite(good) else 0.0


def _unknown(config: Config, kept: Iterable[_Kept], *names: str) -> str | None:
    """Which of the figures ``names`` a sheet lacks, and what to do about it."""
    for chip in (each.chip for each in kept):
        for name in names:
            if getattr(chip, name) is not None:
                continue
            is_target = chip.name == config.hardware.name
            key, where = (
                (f"hardware.{name}", "") if is_target else (name, f" in conf/hardware/{chip.name}.yaml")
            )
            bound = f", or {chip.tdp_w:g} (its tdp_w) as a bound" if name == "idle_w" else ""
            return f"{key} of {chip.name} is null: give it{where}{bound}"
    return None
