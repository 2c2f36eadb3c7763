"""How likely drafts are accepted: from a recorded run, as given, or assumed; and what each of these leaves open."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from experiments.assumed_acceptance import (
    ASSUMED_STD,
    SOURCES,
    assumed_survival,
    is_of_another_task,
    kind_of,
)
from sim.closed_form import FloatArray
from specdec.metrics import acceptance_by_position, decode_rows
from specdec.names import unknown_name

_NO_DRAFTS = "nothing was drafted"
_TABLES = "*.steps.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Of one way to draft.

    Attributes:
        survival: float64 [K], P(the first j drafts are accepted).
        judged: float64 [K], verifications that position j's rate is from; ``None``: an assumption, whose rate is known
            to ``std``.
        source: in words.
        notes: what a reader should know.
        rank_rates: of the first, second, … candidate, if known.
    """

    survival: FloatArray
    judged: FloatArray | None
    source: str
    std: float = ASSUMED_STD
    notes: tuple[str, ...] = ()
    rank_rates: tuple[float, ...] | None = None

    @property
    def is_assumed(self) -> bool:
        return self.judged is None

    def tokens(self, k: int) -> float:
        """Expected tokens of a verification of ``k`` drafts."""
        return 1.0 + float(self.survival[:k].sum())

    def drawn(self, rng: np.random.Generator) -> FloatArray:
        """Another survival that what is known leaves possible.

        Measured: each position's rate from its Beta distribution with Jeffreys' prior. Assumed: the first position's
        rate off by a normal error, and all others as that changes its logarithm.
        """
        conditional = np.divide(
            self.survival,
            np.concatenate([[1.0], self.survival[:-1]]),
            where=self.survival > 0.0,
            out=np.zeros_like(self.survival),
        )
        if self.judged is not None:
            accepted = conditional * self.judged
            rates = rng.beta(accepted + 0.5, self.judged - accepted + 0.5)
            return np.asarray(np.cumprod(rates), np.float64)
        first = float(np.clip(self.survival[0], 1e-9, 1.0 - 1e-9))
        other = float(np.clip(first + self.std * rng.standard_normal(), 1e-6, 1.0 - 1e-6))
        return np.asarray(np.maximum(self.survival, 1e-300) ** (np.log(other) / np.log(first)), np.float64)


def acceptance_of(options: Any, draft: str) -> Acceptance:
    """What the options of ``advise`` say of ``draft``.

    Raises:
        ValueError: a run directory without a trace that drafted.
    """
    num, ranks = options.max_drafts, tuple(options.rank_rates) if options.rank_rates else None
    if options.acceptance_run is not None:
        return from_run(Path(options.acceptance_run), options.acceptance_name, num, ranks)
    if options.rates is not None:
        judged = None
        if options.num_judged is not None:
            reached = np.concatenate([[1.0], _survival(options.rates, num)[:-1]])
            judged = np.maximum(options.num_judged * reached, 1.0)
        source = f"given by position ({options.num_judged or 'an unknown number of'} drafts judged)"
        return Acceptance(
            survival=_survival(options.rates, num), judged=judged, source=source, std=0.05, rank_rates=ranks
        )
    if options.alpha is not None:
        return Acceptance(
            survival=options.alpha ** np.arange(1.0, num + 1.0),
            judged=None,
            source=f"α = {options.alpha:g}, given without a measurement",
            rank_rates=ranks,
        )
    return _assumed(options.tasks, draft, num, ranks)


def _assumed(tasks: Mapping[str, float], draft: str, num: int, ranks: tuple[float, ...] | None) -> Acceptance:
    others = is_of_another_task(draft, tasks)
    notes = (f"no figure for {', '.join(others)}: that of chat stands in",) if others else ()
    survival = assumed_survival(draft, tasks, num)
    return Acceptance(
        survival=survival,
        judged=None,
        source=f"α = {survival[0]:.2f} assumed from {SOURCES[kind_of(draft)]}",
        notes=notes,
        rank_rates=ranks,
    )


def from_run(
    folder: Path, name: str | None, num_positions: int, rank_rates: tuple[float, ...] | None = None
) -> Acceptance:
    """From the traces of a run directory.

    Args:
        name: of the trace; ``None`` is the only one that drafted.
        rank_rates: in place of those in the summary of a ``tree_sweep``.

    Raises:
        ValueError: no traces there, none of that name, none or several that drafted.
    """
    traces = folder / "trace"
    names = sorted({_base(path) for path in traces.glob(_TABLES)})
    if not names:
        raise ValueError(f"{folder} has no traces: give the run directory of an experiment that drafted")
    if name is not None and name not in names:
        raise unknown_name("experiment.acceptance_name", name, names)
    tables = {each: _positions(traces, each) for each in ([name] if name else names)}
    drafted = {each: table for each, table in tables.items() if table.height}
    if len(drafted) != 1:
        which = f"in {', '.join(drafted)}" if drafted else _NO_DRAFTS
        raise ValueError(
            f"experiment.acceptance_run={folder}: drafts {which}; give experiment.acceptance_name of one that drafted"
            if drafted
            else f"experiment.acceptance_run={folder}: {_NO_DRAFTS} there: give a run with a drafter"
        )
    ((trace, table),) = drafted.items()
    rates, judged = table["conditional_rate"].to_list(), table["num_reached"].to_list()
    return Acceptance(
        survival=_survival(rates, num_positions),
        judged=np.maximum(np.array(_extended(judged, num_positions), np.float64), 1.0),
        source=f"measured: {judged[0]:,} verifications of {trace} in {folder}",
        notes=_beyond(len(rates), num_positions),
        rank_rates=rank_rates or _recorded_ranks(folder),
    )


def _base(path: Path) -> str:
    """Of the traces of one drafter, which are numbered by round or replica."""
    return re.sub(r"-\d+$", "", path.name.removesuffix(_TABLES[1:]))


def _positions(folder: Path, name: str) -> pl.DataFrame:
    parts = [path for path in sorted(folder.glob(_TABLES)) if _base(path) == name]
    table = acceptance_by_position(decode_rows(pl.concat([pl.read_parquet(path) for path in parts])))
    return table.filter(pl.col("num_reached") > 0)


def _recorded_ranks(folder: Path) -> tuple[float, ...] | None:
    path = folder / "summary.json"
    ranks = json.loads(path.read_text()).get("rank_rates") if path.is_file() else None
    return tuple(ranks) if isinstance(ranks, list) and ranks else None


def _beyond(known: int, wanted: int) -> tuple[str, ...]:
    if known >= wanted:
        return ()
    return (f"no position beyond {known} was measured: the last rate goes on",)


def _survival(rates: Sequence[float], num: int) -> FloatArray:
    """Of rates by position, the last of which goes on."""
    return np.asarray(np.cumprod(_extended(rates, num)), np.float64)


def _extended(values: Sequence[float], num: int) -> list[float]:
    kept = list(values[:num])
    return kept + [kept[-1]] * (num - len(kept))
