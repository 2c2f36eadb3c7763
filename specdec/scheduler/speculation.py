"""How many tokens to draft for each row: decided before drafting, from earlier steps only.

That is what keeps sampling lossless (non-anticipation): whether draft token k is verified never depends on
the value of draft token k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.names import unknown_name
from specdec.scheduler.plan import IntArray, LongArray
from specdec.scheduler.table import RequestTable
from specdec.scheduler.tree_worth import TreeWorth


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


@dataclass(frozen=True, slots=True)
class LoadThreshold:
    """The same number of drafts for every row while at most ``max_running`` requests run, none beyond."""

    max_drafts: int = 4
    max_running: int = 16
    is_constant: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_max_drafts(self.max_drafts)
        if self.max_running < 0:
            raise ValueError(f"max_running={self.max_running} must be >= 0 (0 turns speculation off)")

    def num_drafts(self, table: RequestTable, rows: LongArray, now_s: float) -> IntArray:
        return np.full(rows.size, self.max_drafts if rows.size <= self.max_running else 0, np.int32)


_SECONDS = (
    "context_token_s",
    "verify_context_token_s",
    "overhead_s",
    "overhead_row_s",
    "draft_step_s",
    "draft_token_s",
    "draft_context_token_s",
    "draft_row_s",
)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Over the whole batch, the drafts that maximise expected tokens per second.

    A row's draft is worth the chance that it is accepted. Of a chain, draft j is worth the mean of α^j over what is
    believed of the row's acceptance rate α: a Beta law of its prior, of what it has seen itself, and, at a limited
    weight, of what the other rows have seen. (The mean of α^j is more than the mean of α to the power j, which drafts
    too little while little is known.) Of a tree, the node of the n-th largest worth is the n-th draft: its path's
    product of ``rank_rates``, each times s, the row's own success in units of those rates. (The tree of n nodes with
    the most expected tokens has the n largest products: Sequoia, arXiv 2402.12374, section 3.)

    Drafts are admitted in falling order of worth, and of all so many the number is taken at which
    (rows + sum of worths) / step time is largest. Step times have plateaus, so the objective has several maxima: all
    numbers and all longest drafts are tried, which finds the best of all combinations where all rows cost the drafter
    the same for each draft.

    Args:
        max_drafts: most drafts of a row.
        step_tokens, step_s: seconds of the target's step at so many tokens, rising; linear between, and beyond
            the last with its slope. They are those of the running device, without context.
        context_token_s: seconds that reading the KV of one cached token adds to a step. Drafts do not change it, but
            the longer a step is anyway, the more they are worth.
        verify_context_token_s: seconds that each draft adds by attending to one cached token of its row; 0 where
            verification is bound by reading them.
        overhead_s, overhead_row_s: seconds of the host in every step, and for each of its rows. Drafts do not change
            them either.
        draft_step_s: seconds of one pass of the drafter: of a draft token of a chain, of a level of a tree.
        draft_token_s: seconds that each further token adds to a pass of the drafter.
        draft_context_token_s: seconds that reading one cached token of a row adds to each pass for that row.
        draft_row_s: seconds that drafting takes for each row that drafts.
        rank_rates: of drafters of trees, the chance that the child of each rank is the accepted one, given that its
            parent was; falling, of sum <= 1. Without them a tree counts as a chain of as many tokens, which drafts
            too little.
        prior_accepted, prior_rejected: pseudo-counts of a row's acceptance rate. Trees take ``rank_rates`` for the
            prior and the sum of both for its weight.
        pool_weight: drafts that those of all other rows together count as in a row's estimate, at most. Without them
            one early rejection silences a row for long, and many rows at once.
        probe_every: a row that drafts nothing although one that nothing is known of would drafts one token every so
            many steps, or its estimate could never recover.
    """

    max_drafts: int = 8
    step_tokens: tuple[float, ...] = ()
    step_s: tuple[float, ...] = ()
    context_token_s: float = 0.0
    verify_context_token_s: float = 0.0
    overhead_s: float = 0.0
    overhead_row_s: float = 0.0
    draft_step_s: float = 0.0
    draft_token_s: float = 0.0
    draft_context_token_s: float = 0.0
    draft_row_s: float = 0.0
    rank_rates: tuple[float, ...] = ()
    prior_accepted: float = 2.0
    prior_rejected: float = 1.0
    pool_weight: float = 12.0
    probe_every: int = 32
    is_constant: bool = field(default=False, init=False)
    _seconds: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _tree: TreeWorth | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_max_drafts(self.max_drafts)
        tokens, seconds = self.step_tokens, self.step_s
        if len(tokens) < 2 or len(tokens) != len(seconds):
            raise ValueError(
                f"goodput needs step times: step_tokens has {len(tokens)} entries and step_s {len(seconds)}, give at "
                "least two of each, measured or from a cost model"
            )
        if not all(np.diff(tokens) > 0) or not all(np.diff(seconds) >= 0) or tokens[0] < 1 or seconds[0] <= 0:
            raise ValueError("step_tokens must rise from >= 1, and step_s > 0 must not fall")
        for name in _SECONDS:
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite seconds >= 0")
        if not 0.0 <= self.pool_weight < float("inf"):
            raise ValueError(f"pool_weight={self.pool_weight} must be a finite number >= 0")
        for name in ("prior_accepted", "prior_rejected"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number > 0")
        if self.probe_every < 1:
            raise ValueError(f"probe_every={self.probe_every} must be >= 1")
        tree = TreeWorth(self.rank_rates, self.max_drafts) if self.rank_rates else None
        object.__setattr__(self, "_tree", tree)
        object.__setattr__(self, "_seconds", self._interpolated(1024))

    def num_drafts(self, table: RequestTable, rows: LongArray, now_s: float) -> IntArray:
        counts = np.zeros(rows.size, np.int32)
        computed = table.num_computed[rows]
        decoding = (table.num_known[rows] - computed == 1).nonzero()[0]
        num_rows, k = decoding.size, self.max_drafts
        if num_rows == 0 or k == 0:
            return counts
        worth, levels = self._worth(table, rows[decoding])
        # All first drafts, then all second ones, …: a stable sort keeps a row's drafts in order where worths tie.
        worth = worth.ravel()
        order = (-worth).argsort(kind="stable")
        most = num_rows + order.size
        if most >= self._seconds.size:
            object.__setattr__(self, "_seconds", self._interpolated(2 * most))
        fixed_s = self.context_token_s * int(np.add.reduce(computed[decoding]))
        fixed_s += self.overhead_s + self.overhead_row_s * num_rows
        target_s = self._seconds[num_rows : most + 1] + fixed_s
        best_rate, chosen = num_rows / target_s[0], order[:0]
        a_context_token_s = self.draft_context_token_s + self.verify_context_token_s
        by_token = self.draft_token_s + a_context_token_s * computed[decoding]
        # The number of passes depends on the deepest draft alone; where they take no time, longer is never worse.
        for longest in range(1 if self.draft_step_s else k, k + 1):
            allowed = order if longest == k else order[order < longest * num_rows]
            tokens = num_rows + np.add.accumulate(worth[allowed])
            seconds = target_s[1 : allowed.size + 1] + self.draft_step_s * levels[longest - 1]
            if self.draft_token_s or a_context_token_s:
                seconds = seconds + np.add.accumulate(by_token[allowed % num_rows])
            if self.draft_row_s:
                seconds = seconds + self.draft_row_s * np.add.accumulate(allowed < num_rows)
            rates = tokens / seconds
            place = int(rates.argmax())
            if rates[place] > best_rate:
                best_rate, chosen = rates[place], allowed[: place + 1]
        counts[decoding] = np.bincount(chosen % num_rows, minlength=num_rows)
        self._probe(table, rows, decoding, counts, float(best_rate), target_s)
        return counts

    def _worth(self, table: RequestTable, rows: LongArray) -> tuple[NDArray[np.float64], LongArray]:
        """Of each row's drafts float64 [k, R], falling; and the levels of so many drafts, int64 [k]."""
        accepted, rejected = self._with_others(table.num_accepted[rows], table.num_rejected[rows])
        if self._tree is not None:
            weight = self.prior_accepted + self.prior_rejected
            drafted = table.num_drafted[rows] / np.maximum(table.num_steps[rows], 1)
            return self._tree.worth(accepted, rejected, drafted, weight), self._tree.levels
        drafts = np.arange(self.max_drafts)
        likely = accepted + self.prior_accepted
        # Of Beta(a, b), the mean of α^j is the product of (a + i) / (a + b + i) over i < j.
        chances = likely + drafts[:, None]
        chances /= chances + (rejected + self.prior_rejected)
        return np.multiply.accumulate(chances, axis=0), drafts + 1

    def _with_others(self, accepted: IntArray, rejected: IntArray) -> tuple[NDArray[np.float64], ...]:
        """Each row's counts, float64 [R], and those of the others at no more than ``pool_weight``."""
        all_accepted, all_rejected = int(np.add.reduce(accepted)), int(np.add.reduce(rejected))
        others = all_accepted + all_rejected - accepted - rejected
        share = self.pool_weight / np.maximum(others, max(self.pool_weight, 1.0))
        return accepted + share * (all_accepted - accepted), rejected + share * (all_rejected - rejected)

    def _probe(
        self,
        table: RequestTable,
        rows: LongArray,
        decoding: LongArray,
        counts: IntArray,
        best_rate: float,
        target_s: NDArray[np.float64],
    ) -> None:
        """Let rows draft one token whose estimates may be out of date, in place."""
        idle = decoding[(counts[decoding] == 0) & (table.num_steps[rows[decoding]] % self.probe_every == 0)]
        if idle.size == 0:
            return
        total = int(counts.sum())
        added_s = target_s[min(total + 1, target_s.size - 1)] - target_s[total]
        added_s += self.draft_row_s + self.draft_token_s
        added_s += 0.0 if total else self.draft_step_s
        prior = self.prior_accepted / (self.prior_accepted + self.prior_rejected)
        if self._tree is not None:
            prior = self.rank_rates[0]
        if prior > best_rate * added_s:
            counts[idle] = 1

    def _interpolated(self, size: int) -> NDArray[np.float64]:
        """Seconds of the target's step at 0, 1, …, ``size`` - 1 tokens."""
        tokens, known, seconds = np.arange(size), self.step_tokens, self.step_s
        slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
        return np.interp(tokens, known, seconds) + slope * np.maximum(tokens - known[-1], 0.0)


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
    "load_threshold": LoadThreshold,
    "goodput": Goodput,
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
