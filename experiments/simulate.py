"""What would it do there? One simulation of a workload on replicas of a chip, with any policy and speculation.

python -m specdec.run +experiment=simulate hardware=l40s experiment.rate_per_s=3
python -m specdec.run +experiment=simulate experiment.arrivals=trace experiment.trace=requests.csv
python -m specdec.run --multirun +experiment=simulate hardware=a100,h100 speculation=off,goodput
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from experiments import common, simulations
from sim.simulation import SimulationResult
from sim.simulation import simulate as simulate_source
from specdec import plots, plots_load
from specdec.config import Config
from specdec.report import format_value, latency_rows, summary_table
from specdec.trace import read_requests, read_steps
from specdec.tracking import Run
from specdec.workload import ClosedLoop, RequestSource, SessionSource, SyntheticSource, TraceSource

LATENCY_COLUMNS = {key: key for key in ("latency (ms)", "mean", "p50", "p90", "p99")}


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    if options.draft and config.speculation.name == "off":
        raise ValueError(
            f"experiment.draft={options.draft} was given, but speculation=off never drafts: drop one"
        )
    cluster, source = simulations.cluster(config), simulations.source(config)
    traced = _is_traced(config, source)
    limits = cluster.pools["main"].replica.scheduler
    result = _simulate(config, run, cluster, source, run.trace_directory if traced else None)
    summary = result.summary | {
        "cost": simulations.costs(config, result.summary),
        "num_blocks": limits.num_blocks,
        "requests_per_wall_s": result.summary["num_submitted"] / result.wall_s,
    }
    if traced:
        summary["peak_kv_share"] = _log_trace(config, run, limits.num_blocks)
    _show(config, run, summary)
    if summary["num_requests"]:
        run.log_table("latency", [{"latency": name, **row} for name, row in summary["latency"].items()])
    run.log_metrics(_metrics(summary))
    return summary


def _is_traced(config: Config, source: RequestSource | ClosedLoop) -> bool:
    options = config.experiment
    if options.trace_steps is None:
        return _num_requests(source) <= simulations.SMALL_RUN and options.workers == 1
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
    config: Config, run: Run, cluster: Any, source: RequestSource | ClosedLoop, trace: Path | None
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


def _log_trace(config: Config, run: Run, num_blocks: int) -> float | None:
    """Plots of a traced run, those of steps of its first replica; the largest share of that one's KV in use."""
    folder, options = run.trace_directory, config.experiment
    names = ["run"] if options.num_replicas == 1 else [f"main-{i}" for i in range(options.num_replicas)]
    requests = {name: read_requests(folder, name) for name in names}
    finished = {name: table for name, table in requests.items() if table.height}
    if finished:
        slo = simulations.slo(config)
        limits = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
        run.log_figure("latency_cdf", plots.latency_cdf(dict(list(finished.items())[:8]), slo_s=limits))
    steps = read_steps(folder, names[0])
    if not steps.height:
        return None
    run.log_figure("load_over_time", plots_load.load_over_time(steps, num_blocks))
    served = common.Served([], steps, requests[names[0]], 0.0, sorted(folder.glob(f"{names[0]}*.parquet")))
    common.log_steps(run, served, name=names[0])
    return 1.0 - float(steps["num_free_blocks"].to_numpy().min()) / num_blocks


def _show(config: Config, run: Run, summary: dict[str, Any]) -> None:
    options = config.experiment
    chips = f"{options.num_replicas} × {options.tensor_parallel} {config.hardware.name}"
    title = f"{options.model} on {chips}, {config.policy.name}, speculation {config.speculation.name}"
    if summary["num_requests"]:
        run.console.print(summary_table(latency_rows(summary["latency"]), LATENCY_COLUMNS, title=title))
    rows = [{"figure": name, "value": value} for name, value in _figures(config, summary).items()]
    run.console.print(summary_table(rows, {"figure": "figure", "value": "value"}))


def _figures(config: Config, summary: dict[str, Any]) -> dict[str, str]:
    """What the second table says, each line with its unit."""
    cost, kv = summary["cost"], f"{summary['num_blocks']:,} blocks of {config.experiment.block_size} tokens"
    if summary.get("peak_kv_share") is not None:
        kv += f", at most {summary['peak_kv_share']:.0%} in use"
    figures = {"stable": "yes" if summary["stable"] else f"no: {summary['reason']}"}
    if summary["num_requests"]:
        rate, good = summary["throughput"], summary["goodput"]
        figures |= {
            "throughput": f"{rate['requests_per_s']:,.2f} requests/s, {rate['tokens_per_s']:,.0f} tokens/s",
            "within the SLO": f"{good['share']:.1%}, {good['requests_per_s']:,.2f} requests/s",
            "tokens per verification τ": format_value(summary["tau"]),
        }
    figures |= {
        "utilisation": f"{summary['utilisation']:.1%}",
        "in the system": f"{format_value(summary['mean_in_system'])} requests on average",
        "KV": f"{kv}; {summary.get('num_preemptions', 0):,} preemptions",
        "million tokens": _dollars(cost["per_million_tokens_usd"], cost["reason"]),
        "million tokens within the SLO": _dollars(cost["per_million_good_tokens_usd"], cost["reason"]),
        "simulated": f"{summary['simulated_s']:,.1f} s, {summary['num_steps']:,} steps, "
        f"{summary['requests_per_wall_s']:,.0f} requests per second of wall time",
    }
    unfinished = {name: summary[f"num_{name}"] for name in ("in_flight", "rejected", "failed")}
    if any(unfinished.values()):
        figures["not finished"] = ", ".join(
            f"{name} {count:,}" for name, count in unfinished.items() if count
        )
    if summary["extrapolated"]:
        figures["extrapolated"] = f"{', '.join(summary['extrapolated'])}: far outside the fitted range"
    return figures


def _dollars(amount: float | None, reason: str | None) -> str:
    if amount is None:
        return f"– ({reason})"
    return f"${amount:,.3f}" if math.isfinite(amount) else "– (none)"


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    named = ("throughput", "goodput")
    metrics = {f"{group}/{key}": value for group in named for key, value in summary.get(group, {}).items()}
    metrics |= {
        f"{name}/{key}": value
        for name, row in summary.get("latency", {}).items()
        for key, value in row.items()
    }
    return metrics | {"utilisation": summary["utilisation"], "tau": summary.get("tau", math.nan)}
