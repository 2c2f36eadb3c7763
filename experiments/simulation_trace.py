"""The recorded steps of a simulated cluster: its plots, and what only single steps tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from experiments import simulations
from sim.cluster_spec import ClusterSpec
from specdec import plots, plots_load
from specdec.config import Config
from specdec.perfetto import write_perfetto
from specdec.trace import read_requests, read_steps
from specdec.tracking import Run

MOST_LINES = 8
"""Replicas whose latencies are drawn."""


def log_trace(config: Config, run: Run, cluster: ClusterSpec) -> dict[str, Any]:
    """Plots of a traced run, those of steps of the first replica of each pool.

    Returns:
        ``peak_kv_share``: by pool, the largest share of a replica's KV blocks in use after a step; pools without a
        step are left out, and so is one that only computes prompts, since it gives their blocks back within the step.
        ``draft_step_s``: mean seconds of drafting in the steps that drafted, network included; ``draft_share``: of
        the time of all steps; both ``None`` if nothing was drafted.
    """
    folder, names = run.trace_directory, _names(cluster)
    _log_latencies(
        config, run, {name: read_requests(folder, name) for pool in names.values() for name in pool}
    )
    steps = {pool: pl.concat([_scalars(folder, name) for name in members]) for pool, members in names.items()}
    prefill = cluster.disaggregation.prefill if cluster.disaggregation else None
    peaks: dict[str, float] = {}
    paths: list[Path] = []
    for pool, table in steps.items():
        num_blocks, first = cluster.pools[pool].replica.scheduler.num_blocks, names[pool][0]
        if table.height and pool != prefill:
            peaks[pool] = 1.0 - float(table["num_free_blocks"].to_numpy().min()) / num_blocks
        if (of_first := read_steps(folder, first)).height:
            suffix = f"_{pool}" if len(steps) > 1 else ""
            run.log_figure(f"load_over_time{suffix}", plots_load.load_over_time(of_first, num_blocks))
            run.log_figure(f"gantt{suffix}", plots.step_gantt(of_first))
            write_perfetto(of_first, perfetto := folder / f"{first}.perfetto.json")
            paths += [*sorted(folder.glob(f"{first}.*.parquet")), perfetto]
    run.log_trace(paths)
    return {"peak_kv_share": peaks, **_drafting(pl.concat(list(steps.values())))}


def _names(cluster: ClusterSpec) -> dict[str, list[str]]:
    """By pool, the names of its replicas' traces, as ``sim.simulation`` gives them."""
    names = {
        pool: [f"{pool}-{index}" for index in range(spec.num_replicas)]
        for pool, spec in cluster.pools.items()
    }
    return names if sum(map(len, names.values())) > 1 else {pool: ["run"] for pool in names}


def _scalars(folder: Path, name: str) -> pl.DataFrame:
    """Without the lists of rows, of which several replicas would take much memory."""
    columns = ["start_s", "end_s", "draft_s", "num_draft_tokens", "num_free_blocks"]
    return pl.read_parquet(folder / f"{name}.steps.parquet", columns=columns)


def _drafting(steps: pl.DataFrame) -> dict[str, float | None]:
    drafting = steps.filter(pl.col("num_draft_tokens") > 0)["draft_s"].to_numpy()
    if not drafting.size:
        return {"draft_step_s": None, "draft_share": None}
    step_s = (steps["end_s"] - steps["start_s"]).to_numpy()
    share = float(steps["draft_s"].to_numpy().sum() / step_s.sum())
    return {"draft_step_s": float(drafting.mean()), "draft_share": share}


def _log_latencies(config: Config, run: Run, requests: dict[str, pl.DataFrame]) -> None:
    """Each request where it ended: one that was handed on is in the tables of several replicas."""
    tables = [table.with_columns(replica=pl.lit(name)) for name, table in requests.items()]
    ended = pl.concat(tables).sort("finish_s").unique("request_id", keep="last", maintain_order=True)
    finished = {name: table for name in requests if (table := ended.filter(replica=name)).height}
    if finished:
        slo = simulations.slo(config)
        limits = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
        lines = dict(list(finished.items())[:MOST_LINES])
        run.log_figure("latency_cdf", plots.latency_cdf(lines, slo_s=limits))
