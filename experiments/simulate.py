"""What would it do there? One simulation of a workload on a cluster of a chip, with any policy and speculation.

python -m specdec.run +experiment=simulate hardware=l40s experiment.rate_per_s=3
python -m specdec.run +experiment=simulate experiment.arrivals=trace experiment.trace=requests.csv
python -m specdec.run +experiment=simulate cluster=disaggregated cluster.num_decode=2 failures=on
python -m specdec.run --multirun +experiment=simulate hardware=a100,h100 speculation=off,goodput
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from experiments import bill, common, simulation_tables, simulations
from experiments.simulation_trace import log_trace
from sim.cluster_spec import ClusterSpec
from sim.simulation import SimulationResult
from sim.simulation import simulate as simulate_source
from specdec.config import Config
from specdec.tracking import Run
from specdec.workload import ClosedLoop, RequestSource, SessionSource, SyntheticSource, TraceSource


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    if options.draft and not getattr(config.speculation, "num_drafts", 0):
        what = "speculation=off" if config.speculation.name == "off" else "speculation.num_drafts=0"
        raise ValueError(f"experiment.draft={options.draft} was given, but {what} never drafts: drop one")
    cluster, source = simulations.cluster(config), simulations.source(config)
    traced = _is_traced(config, source)
    result = _simulate(config, run, cluster, source, run.trace_directory if traced else None)
    steps = log_trace(config, run, cluster) if traced else None
    summary = result.summary | {
        "cost": bill.costs(config, cluster, result.summary),
        "energy": bill.energy(config, cluster, result.summary),
        "pools": simulation_tables.pool_rows(
            cluster, result.summary, steps["peak_kv_share"] if steps else {}
        ),
        "requests_per_wall_s": result.summary["num_submitted"] / result.wall_s,
    }
    if options.draft:
        summary["drafting"] = _drafting(config, steps)
    if config.cluster.name == "model_routing":
        answers = next(row["num_finished"] for row in summary["pools"] if row["pool"] == "small")
        summary["escalated_share"] = summary["num_escalated"] / answers if answers else math.nan
    simulation_tables.show(config, run, summary)
    run.log_table("pools", summary["pools"])
    if summary["num_requests"]:
        run.log_table("latency", [{"latency": name, **row} for name, row in summary["latency"].items()])
    run.log_metrics(_metrics(summary))
    return summary


def _drafting(config: Config, steps: dict[str, Any] | None) -> dict[str, Any]:
    """How long the draft model takes: ``step_s`` on average where it drafts, network included; see ``log_trace``."""
    options, reason = config.experiment, None
    if steps is None:
        reason = (
            "steps were not recorded: experiment.trace_steps=true does so for one worker and fixed replicas"
        )
    elif steps["draft_step_s"] is None:
        reason = "no step drafted"
    return {
        "model": options.draft,
        "device": options.draft_hardware or config.hardware.name,
        "round_trip_s": options.draft_round_trip_s or 0.0,
        "step_s": steps["draft_step_s"] if steps else None,
        "share": steps["draft_share"] if steps else None,
        "reason": reason,
    }


def _is_traced(config: Config, source: RequestSource | ClosedLoop) -> bool:
    options = config.experiment
    if options.trace_steps is None:
        fixed = config.autoscaling.name == config.failures.name == "off"
        return fixed and options.workers == 1 and _num_requests(source) <= simulations.SMALL_RUN
    return options.trace_steps


def _num_requests(source: RequestSource | ClosedLoop) -> int:
    """How many requests a source has; of sessions, about so many."""
    if isinstance(source, SessionSource):
        return round(source.num_sessions * simulations.mean_turns())
    if isinstance(source, TraceSource) and source.num_requests is None:
        return len(source.requests)
    assert isinstance(source, SyntheticSource | TraceSource | ClosedLoop) and source.num_requests
    return source.num_requests


def _simulate(
    config: Config, run: Run, cluster: ClusterSpec, source: RequestSource | ClosedLoop, trace: Path | None
) -> SimulationResult:
    options = config.experiment
    with common.progress(run) as bar:
        alone = options.workers == 1
        task = bar.add_task("simulating", total=_num_requests(source) if alone else None)
        return simulate_source(
            source,
            cluster,
            seed=config.seed,
            slo=simulations.slo(config),
            trace=trace,
            # Several processes cannot report to one bar.
            progress=(lambda number, _: bar.update(task, completed=number)) if alone else None,
            until_s=math.inf if options.until_s is None else options.until_s,
            prediction_error=options.prediction_error,
            workers=options.workers,
        )


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    named = ("throughput", "goodput")
    metrics = {f"{group}/{key}": value for group in named for key, value in summary.get(group, {}).items()}
    metrics |= {
        f"{name}/{key}": value
        for name, row in summary.get("latency", {}).items()
        for key, value in row.items()
    }
    return metrics | {"utilisation": summary["utilisation"], "tau": summary.get("tau", math.nan)}
