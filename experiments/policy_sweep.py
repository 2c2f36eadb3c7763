"""Which policy holds out longest? Policies over rising load: goodput, p99 latencies, and where each one breaks.

All policies meet the same loads. Cells are simulated side by side, written to ``cells.jsonl`` as they come, and not
simulated again when the run directory is given anew:

    python -m specdec.run +experiment=policy_sweep experiment.only=[static,chunked] hydra.run.dir=runs/my_sweep
    python -m specdec.run +experiment=policy_sweep experiment.loads=[0.5,1.0] experiment.capacity_per_s=25
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import polars as pl
from joblib import Parallel, delayed

from experiments import common, simulations
from experiments.rows_file import appended, read_rows
from sim.cluster_spec import ClusterSpec
from sim.simulation import simulate
from specdec import plots_load
from specdec.config import SIMULATED, Config, choose
from specdec.report import summary_table
from specdec.tracking import Run

SATURATED = "saturated"
"""The cell of a policy in which everything arrives at once, which tells its capacity."""
COLUMNS = {
    "policy": "policy",
    "capacity_per_s": "capacity",
    "served_load_per_s": "in SLO up to",
    "best_goodput_per_s": "best goodput",
    "breaks_at_per_s": "breaks at",
}


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    clusters = {name: _cluster(config, name) for name in options.only or options.policies}
    simulations.source(config, rate_per_s=1.0)  # what is wrong with the workload shows before anything runs
    store = _Cells(run.directory / "cells.jsonl", config)
    capacity = {}
    if options.capacity_per_s is None:
        cells = store.fill(run, [(name, None) for name in clusters])
        capacity = {cell["policy"]: cell["requests_per_s"] for cell in cells}
    best = options.capacity_per_s or max(capacity.values())
    rates = [load * best for load in options.loads]
    cells = store.fill(run, [(name, rate) for name in clusters for rate in rates])
    table = pl.DataFrame(cells, infer_schema_length=None)
    rows = [_verdict(name, table, capacity.get(name), options.min_share) for name in clusters]
    run.console.print(summary_table(rows, COLUMNS, title=_title(config, best)))
    run.log_table("cells", cells)
    run.log_table("policies", rows)
    breaks = {row["policy"]: row["breaks_at_per_s"] for row in rows if row["breaks_at_per_s"] is not None}
    slo = simulations.slo(config)
    limits = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
    run.log_figure("goodput_and_latency", plots_load.policy_curves(table, breaks, slo_s=limits))
    named = ("served_load_per_s", "best_goodput_per_s")
    run.log_metrics({f"{row['policy']}/{key}": row[key] for row in rows for key in named})
    return {
        "capacity_per_s": best,
        "policies": {row["policy"]: row for row in rows},
        "num_cells": len(cells),
        "extrapolated": sorted({name for cell in cells for name in cell.get("extrapolated", ())}),
    }


def _cluster(config: Config, name: str) -> ClusterSpec:
    """The replicas of one policy.

    Raises:
        ValueError: options that the policy or the speculation does not have.
    """
    parts, key = config.experiment.policies[name], f"experiment.policies.{name}"
    policy = choose("policy", parts.get("policy", asdict(config.policy)), f"{key}.policy")
    speculation = choose("speculation", parts.get("speculation", {"name": "off"}), f"{key}.speculation")
    return simulations.cluster(config, policy, speculation)


class _Cells:
    """Results by cell, in a file that grows.

    Args:
        path: of the file; cells of another configuration in it are left alone and not used.
        config: of the sweep.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self._path, self._config = path, config
        self._known = {cell["key"]: cell for cell in read_rows(path)}

    def fill(self, run: Run, cells: list[tuple[str, float | None]]) -> list[dict[str, Any]]:
        """The results of ``cells``, policy and rate each, simulating those that are not known."""
        keys = [_key(self._config, name, rate) for name, rate in cells]
        missing = [(key, *cell) for key, cell in zip(keys, cells, strict=True) if key not in self._known]
        with common.progress(run) as bar, appended(self._path) as add:
            task = bar.add_task("cells", total=len(cells), completed=len(cells) - len(missing))
            for cell in self._simulate(missing):
                self._known[cell["key"]] = cell
                add(cell)
                bar.advance(task)
        return [self._known[key] for key in keys]

    def _simulate(self, missing: list[tuple[str, str, float | None]]) -> Iterator[dict[str, Any]]:
        workers = min(self._config.experiment.workers, len(missing)) or 1
        jobs = (delayed(simulate_cell)(self._config, *cell) for cell in missing)
        parallel = Parallel(n_jobs=workers, return_as="generator_unordered")
        return cast("Iterator[dict[str, Any]]", parallel(jobs))


def _key(config: Config, name: str, rate_per_s: float | None) -> str:
    """Names a cell by all that its result depends on."""
    options = asdict(config.experiment)
    for other in ("policies", "only", "loads", "capacity_per_s", "min_share", "workers", "sweep_jobs"):
        del options[other]
    parts = [config.experiment.policies[name], rate_per_s, options, config.seed]
    parts += [asdict(config.hardware), asdict(config.acceptance), asdict(config.policy)]
    parts += [asdict(getattr(config, group)) for group in SIMULATED]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def simulate_cell(config: Config, key: str, name: str, rate_per_s: float | None) -> dict[str, Any]:
    """One policy at one rate; without a rate, everything arrives at once."""
    source = simulations.source(config, rate_per_s or 1.0)
    if rate_per_s is None:
        source = simulations.at_once(source)
    with simulations.quiet():
        result = simulate(
            source,
            _cluster(config, name),
            seed=config.seed,
            slo=simulations.slo(config),
            prediction_error=config.experiment.prediction_error,
        )
    summary = result.summary
    latency, good = summary.get("latency", {}), summary.get("goodput", {})
    return {
        "key": key,
        "policy": name,
        "rate_per_s": rate_per_s,
        "stable": result.stable,
        "reason": result.reason,
        "share": good.get("share", 0.0),
        "goodput_per_s": good.get("requests_per_s", 0.0),
        "requests_per_s": summary.get("throughput", {}).get("requests_per_s", 0.0),
        "ttft_p99_s": latency.get("ttft_s", {}).get("p99"),
        "tpot_p99_s": latency.get("tpot_s", {}).get("p99"),
        "tau": summary.get("tau"),
        "utilisation": summary["utilisation"],
        "num_preemptions": summary.get("num_preemptions", 0),
        "extrapolated": summary["extrapolated"],
        "wall_s": result.wall_s,
    }


def _verdict(name: str, table: pl.DataFrame, capacity: float | None, min_share: float) -> dict[str, Any]:
    """One policy over all loads; it breaks where a run was unstable, or above what it reaches when saturated.

    The latter is for runs too short to show that their queues grow.
    """
    mine = table.filter(pl.col("policy") == name).sort("rate_per_s")
    above = pl.col("rate_per_s") > (math.inf if capacity is None else capacity)
    broken, good = ~pl.col("stable") | above, pl.col("share") >= min_share
    served = mine.filter(~broken & good)["rate_per_s"].to_list()
    return {
        "policy": name,
        "capacity_per_s": capacity,
        "served_load_per_s": max(served, default=0.0),
        "best_goodput_per_s": float(mine["goodput_per_s"].to_numpy().max()),
        "breaks_at_per_s": min(mine.filter(broken)["rate_per_s"].to_list(), default=None),
    }


def _title(config: Config, capacity_per_s: float) -> str:
    options, slo = config.experiment, simulations.slo(config)
    return (
        f"{options.model} on {options.num_replicas} × {options.tensor_parallel} {config.hardware.name}, up to "
        f"{max(options.loads):g} × {capacity_per_s:.1f} requests/s; SLO {slo.ttft_s:g} s and {slo.tpot_s * 1e3:g} ms"
    )
