"""How many tokens to draft for each row: decided before drafting, from earlier steps only.

That is what keeps sampling lossless (non-anticipation): whether draft token k is verified never depends on
the value of draft token k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from specdec.names import unknown_name
from specdec.scheduler.plan import IntArray, LongArray
from specdec.scheduler.table import RequestTable


class SpeculationController(Protocol):
    @property
    def max_drafts(self) -> int:
        """The most drafts it ever asks for one row."""
        ...

    @property
    def is_constant(self) -> bool:
        """True if the answer is always ``max_drafts``."""
        ...

    def num_drafts(self, table: RequestTable, rows: LongArray, now_s: float) -> IntArray:
        """Drafts wanted for each of ``rows``, int32 [R]. Limits and budgets are applied by the loop."""
        ...


@dataclass(frozen=True, slots=True)
class Off:
    """Plain decoding."""

    max_drafts: int = field(default=0, init=False)
    is_constant: bool = field(default=True, init=False)

    def num_drafts(self, table: RequestTable, rows: LongArray, now_s: float) -> IntArray:
        return np.zeros(rows.size, np.int32)


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same number of drafts for every row in every step."""

    max_drafts: int = 4
    is_constant: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        _check_max_drafts(self.max_drafts)

    def num_drafts(self, table: RequestTable, rows: LongArray, now_s: float) -> IntArray:
        return np.full(rows.size, self.max_drafts, np.int32)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Per request, the length that maximises expected tokens per unit of time.

    With acceptance rate α of the request so far, it maximises over k in 0..max_drafts

        (1 − α^(k+1)) / ((1 − α) · (1 + cost_ratio · k))

    which is Leviathan et al., arXiv 2211.17192, theorem 3.8, with a free slope. α is the posterior mean of
    accepted / (accepted + rejected) under a Beta prior. A row whose best length is 0 still drafts one
    token every ``probe_every`` steps, or its estimate could never recover.

    Args:
        max_drafts: largest length.
        cost_ratio: what one more draft adds to a step (drafting and verifying it), in units of a plain step.
        prior_accepted, prior_rejected: pseudo-counts of the prior.
        probe_every: steps between probes.
    """

    max_drafts: int = 8
    cost_ratio: float = 0.05
    prior_accepted: float = 2.0
    prior_rejected: float = 1.0
    probe_every: int = 16
    is_constant: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_max_drafts(self.max_drafts)
        for name in ("cost_ratio", "prior_accepted", "prior_rejected"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be a finite number > 0")
        if self.probe_every < 1:
            raise ValueError(f"probe_every={self.probe_every} must be >= 1")

    def num_drafts(self, table: RequestTable, rows: LongArray, now_s: float) -> IntArray:
        accepted = table.num_accepted[rows] + self.prior_accepted
        alpha = accepted / (accepted + table.num_rejected[rows] + self.prior_rejected)
        lengths = np.arange(self.max_drafts + 1)
        expected_tokens = np.cumsum(alpha[:, None] ** lengths, axis=1)
        best = np.argmax(expected_tokens / (1.0 + self.cost_ratio * lengths), axis=1).astype(np.int32)
        probe = (best == 0) & (table.num_steps[rows] % self.probe_every == 0)
        return np.where(probe, np.int32(min(1, self.max_drafts)), best)


def fit_drafts(num_drafts: IntArray, budget: int) -> IntArray:
    """Cut drafts to a total of ``budget``, the longest first, so that all rows keep an even share."""
    total = int(num_drafts.sum())
    if total <= budget:
        return num_drafts
    cap = int(num_drafts.max())
    while int(np.minimum(num_drafts, cap).sum()) > budget:
        cap -= 1
    cut = np.minimum(num_drafts, cap)
    longer = np.flatnonzero(num_drafts > cap)
    cut[longer[: budget - int(cut.sum())]] += 1
    return cut


def _check_max_drafts(max_drafts: int) -> None:
    if max_drafts < 0:
        raise ValueError(f"num_drafts k={max_drafts} must be >= 0 (0 turns speculation off)")


CONTROLLERS: dict[str, Callable[..., SpeculationController]] = {
    "off": Off,
    "fixed": Fixed,
    "adaptive": Adaptive,
}


def make_controller(name: str, **options: Any) -> SpeculationController:
    """The controller called ``name``, e.g. ``make_controller("fixed", max_drafts=4)``.

    Raises:
        ValueError: unknown name (with the nearest ones), or an option the controller does not have.
    """
    if name not in CONTROLLERS:
        raise unknown_name("speculation controller", name, CONTROLLERS)
    try:
        return CONTROLLERS[name](**options)
    except TypeError as error:
        raise ValueError(f"speculation {name!r} does not take these options: {options} ({error})") from None
