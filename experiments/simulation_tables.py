"""What a simulated run says on the console, and the rows of its pools."""

from __future__ import annotations

import math
from typing import Any, cast

from sim.cluster_spec import ClusterSpec
from specdec.config import Config
from specdec.report import format_value, latency_rows, summary_table
from specdec.tracking import Run

LATENCY_COLUMNS = {key: key for key in ("latency (ms)", "mean", "p50", "p90", "p99")}


def pool_rows(cluster: ClusterSpec, summary: dict[str, Any], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """What each pool did.

    Args:
        summary: of ``sim.simulation.simulate``.
        peaks: largest share of the KV blocks in use, of the pools of which it is known.

    Returns:
        A row for each pool. ``chips``: of a replica, that of a draft included. ``num_launched``: replicas that there
        ever were; ``mean_replicas``: on average over time; ``replica_s``: seconds of them to pay for.
        ``utilisation``: of these, the share in steps. ``num_finished``: requests that replicas were done with, handed
        on or not. ``num_failures``: of replicas. ``num_blocks``, ``peak_kv_share``: of KV, of a replica.
    """
    rows: list[dict[str, Any]] = []
    for name, pool in cluster.pools.items():
        members = [row for row in summary["replicas"] if row["name"].rpartition("-")[0] == name]
        paid_s = math.fsum(row["paid_s"] for row in members)
        busy_s = math.fsum(row["utilisation"] * row["paid_s"] for row in members if row["paid_s"])
        span_s = summary["simulated_s"]
        rows.append(
            {
                "pool": name,
                "model": cast(Any, pool.replica.cost_model).metadata["model"],
                "chips": pool.replica.num_chips,
                "num_launched": len(members),
                "mean_replicas": paid_s / span_s if span_s else math.nan,
                "replica_s": paid_s,
                "utilisation": busy_s / paid_s if paid_s else math.nan,
                "num_finished": sum(row["num_finished"] for row in members),
                "num_failures": sum(row["num_failures"] for row in members),
                "num_blocks": pool.replica.scheduler.num_blocks,
                "peak_kv_share": peaks.get(name),
            }
        )
    return rows


def show(config: Config, run: Run, summary: dict[str, Any]) -> None:
    """Latencies, pools unless there is but one that stays as it is, and figures."""
    if summary["num_requests"]:
        rows = latency_rows(summary["latency"])
        run.console.print(summary_table(rows, LATENCY_COLUMNS, title=_title(config, summary)))
    if _is_one_pool(config):
        kv = f"{summary['pools'][0]['num_blocks']:,} blocks of {config.experiment.block_size} tokens"
        if (peak := summary["pools"][0]["peak_kv_share"]) is not None:
            kv += f", at most {peak:.0%} in use"
    else:
        run.console.print(summary_table([_pool_line(row) for row in summary["pools"]]))
        kv = f"blocks of {config.experiment.block_size} tokens"
    rows = [{"figure": name, "value": value} for name, value in _figures(summary, kv).items()]
    run.console.print(summary_table(rows, {"figure": "figure", "value": "value"}))


def _pool_line(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a pool in as little width as it takes."""
    return {
        "pool": row["pool"],
        "model": row["model"],
        "replicas": f"{round(row['mean_replicas'], 2):g} × {row['chips']} chip{'s' * (row['chips'] > 1)}",
        "launched": row["num_launched"],
        "failures": row["num_failures"],
        "paid (s)": row["replica_s"],
        "busy (%)": 100.0 * row["utilisation"],
        "done": row["num_finished"],
        "KV blocks": row["num_blocks"],
        "at most (%)": None if row["peak_kv_share"] is None else 100.0 * row["peak_kv_share"],
    }


def _is_one_pool(config: Config) -> bool:
    return [config.cluster.name, config.autoscaling.name, config.failures.name] == ["plain", "off", "off"]


def _title(config: Config, summary: dict[str, Any]) -> str:
    options, chip = config.experiment, config.hardware.name
    if _is_one_pool(config):
        where = f"on {options.num_replicas} × {options.tensor_parallel} {chip}"
    else:
        names = [
            config.cluster.name,
            *(key for key in ("autoscaling", "failures") if getattr(config, key).name == "on"),
        ]
        where = f"on {chip}, {', '.join(names)}"
    return f"{options.model} {where}, {config.policy.name}, speculation {config.speculation.name}"


def _figures(summary: dict[str, Any], kv: str) -> dict[str, str]:
    """What the last table says, each line with its unit."""
    cost, figures = summary["cost"], {"stable": "yes" if summary["stable"] else f"no: {summary['reason']}"}
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
        **_cluster_figures(summary),
        "million tokens": _dollars(cost["per_million_tokens_usd"], cost["reason"]),
        "million tokens within the SLO": _dollars(cost["per_million_good_tokens_usd"], cost["reason"]),
        "energy": _energy(summary["energy"]),
        "simulated": f"{summary['simulated_s']:,.1f} s, {summary['num_steps']:,} steps, "
        f"{summary['requests_per_wall_s']:,.0f} requests per second of wall time",
    }
    unfinished = {name: summary[f"num_{name}"] for name in ("in_flight", "rejected", "failed")}
    if any(unfinished.values()):
        shares = {
            name: f"{count:,} ({count / summary['num_submitted']:.1%})" for name, count in unfinished.items()
        }
        figures["not finished"] = ", ".join(f"{name} {shares[name]}" for name in shares if unfinished[name])
    if summary["extrapolated"]:
        figures["extrapolated"] = f"{', '.join(summary['extrapolated'])}: far outside the fitted range"
    return figures


def _cluster_figures(summary: dict[str, Any]) -> dict[str, str]:
    """Lines about what only some clusters do."""
    figures: dict[str, str] = {}
    if (moved := summary.get("kv_transfers")) is not None:
        took = (
            f", {1e3 * moved['mean_s']:,.2f} ms each, {moved['bytes'] / 1e9:,.1f} GB" if moved["num"] else ""
        )
        figures["KV transfers"] = f"{moved['num']:,}{took}"
    if num_failures := sum(row["num_failures"] for row in summary["pools"]):
        figures["failures"] = (
            f"{num_failures:,} of replicas; {summary['num_retried']:,} times a request began anew"
        )
    if (share := summary.get("escalated_share")) is not None:
        figures["escalated"] = (
            f"{share:.1%} of the small model's answers; {summary['discarded_tokens']:,} tokens for nothing"
        )
    if (drafting := summary.get("drafting")) is not None:
        figures["drafting"] = f"{drafting['model']} on {drafting['device']}: {_draft_time(drafting)}"
    return figures


def _draft_time(drafting: dict[str, Any]) -> str:
    if drafting["reason"]:
        return f"– ({drafting['reason']})"
    trip = f" with {1e3 * drafting['round_trip_s']:g} ms of network" if drafting["round_trip_s"] else ""
    return f"{1e3 * drafting['step_s']:,.2f} ms a step{trip}, {drafting['share']:.0%} of the time"


def _dollars(amount: float | None, reason: str | None) -> str:
    if amount is None:
        return f"– ({reason})"
    return f"${amount:,.3f}" if math.isfinite(amount) else "– (none)"


def _energy(energy: dict[str, Any]) -> str:
    if energy["reason"]:
        return f"– ({energy['reason']})"
    kwh, token_j = energy["per_million_tokens_kwh"], energy["per_token_j"]
    return f"at most {format_value(kwh)} kWh per million tokens, {format_value(token_j)} J each"
