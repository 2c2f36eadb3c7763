"""Published speed-ups of speculative decoding, predicted from mean accepted lengths and the chip's curves.

Each method is predicted with the engine's host figures fitted to all the others. Then the same methods on other chips,
where the device alone decides: how their order changes with the card and the batch, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from sim.hardware import load_hardware
from sim.published import (
    Engine,
    Method,
    Predictor,
    Table,
    fit_engine,
    known_chips,
    left_out_predictions,
    orders,
    read_table,
)
from specdec import plots_validation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

CHIPS = ("a100", "h100", "rtx_4090", "rtx_3090")
BATCHES = (1, 8)
DEVIATION = 0.10
COLUMNS = {
    "method": "method",
    "tau": "τ",
    "published": "published ×",
    "predicted": "predicted ×",
    "error_pct": "error %",
    "kernels": "kernels alone ×",
}
_HOST_REASON = (
    "its lookup runs on the host, for which {host_ms:g} ms are assumed; with none it is {without:+.0f} %"
)


def run(config: Config, run: Run) -> tuple[dict[str, Any], str]:
    """The summary, and the section of the report."""
    table = read_table()
    predictor = Predictor(load_hardware(table.chip), table.target, table.context)
    engine = fit_engine(predictor, table.methods)
    predicted = left_out_predictions(predictor, table.methods)
    rows = [_row(method, predictor, predicted[method.name]) for method in table.methods]
    reasons = {
        row["method"]: _reason(predictor, table.methods, method)
        for row, method in zip(rows, table.methods, strict=True)
        if abs(row["error_pct"]) > 100.0 * DEVIATION
    }
    run.console.print(
        summary_table(rows, COLUMNS, title=f"{table.source}: speed-ups, each predicted from the others")
    )
    run.log_table("published", rows)
    predictors = [Predictor(chip, table.target, table.context) for chip in known_chips(CHIPS)]
    ranks = _ranks(predictors, table)
    run.console.print(summary_table(ranks, title="methods by speed-up where the device alone decides"))
    run.log_table("orders", ranks)
    names = [row["method"] for row in rows]
    lines = {"predicted, A100": [row["predicted"] for row in rows]}
    for chip in predictors:
        if chip.hardware.name != table.chip:
            lines[f"{chip.hardware.name}, kernels alone"] = [
                chip.speedup(method, Engine()) for method in table.methods
            ]
    figure = plots_validation.speedup_comparison(names, [row["published"] for row in rows], lines)
    run.log_figure("published", figure)
    off = [row for row in rows if row["method"] in reasons]
    summary = {
        "timings": predictor.model.metadata["origin"],
        "engine": asdict(engine),
        "errors_pct": {row["method"]: row["error_pct"] for row in rows},
        "over_10_pct": reasons,
        "verification_cost": _verification(predictors),
        "orders": ranks,
    }
    return {"published": summary}, _page(
        table, rows, off, reasons, engine, predictors, ranks, str(summary["timings"])
    )


def _row(method: Method, predictor: Predictor, predicted: float) -> dict[str, Any]:
    return {
        "method": method.name,
        "tau": method.tau,
        "published": method.speedup,
        "predicted": predicted,
        "error_pct": 100.0 * (predicted / method.speedup - 1.0),
        "kernels": predictor.speedup(method, Engine()),
    }


def _reason(predictor: Predictor, methods: Sequence[Method], one: Method) -> str:
    """Why ``one`` is far off, as far as that is known."""
    if not one.host_ms:
        return "no cause known"
    engine = fit_engine(predictor, [other for other in methods if other is not one])
    speedup = predictor.speedup(replace(one, host_ms=0.0), engine)
    return _HOST_REASON.format(host_ms=one.host_ms, without=100.0 * (speedup / one.speedup - 1.0))


def _ranks(predictors: list[Predictor], table: Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        for chip, speedups in orders(predictors, table, batch).items():
            order = " > ".join(f"{name} {value:.2f}" for name, value in speedups.items())
            rows.append({"batch": batch, "chip": chip, "order": order})
    return rows


def _verification(predictors: list[Predictor]) -> dict[str, dict[str, float]]:
    """Chip → "nodes × batch" → the target's pass over so many nodes per row, in plain passes."""
    return {
        one.hardware.name: {
            f"{nodes} nodes, batch {batch}": one.target_s(nodes, batch) / one.target_s(0, batch)
            for batch in BATCHES
            for nodes in (5, 25, 63, 120)
        }
        for one in predictors
    }


def _page(
    table: Table,
    rows: list[dict[str, Any]],
    off: list[dict[str, Any]],
    reasons: dict[str, str],
    engine: Engine,
    predictors: list[Predictor],
    ranks: list[dict[str, Any]],
    timings: str,
) -> str:
    lines = [
        f"## {table.source}",
        "",
        f"Given τ, what each method drafts, and the A100's curves ({timings}). The benchmark's engine launches every "
        "kernel from Python; its host seconds are not published, so three figures (per layer of any pass, per step "
        "with a tree, per pass that grows one) are fitted to the *other* methods when one is predicted. Fitted to all: "
        f"{1e3 * engine.layer_s:.2f} ms per layer, {1e3 * engine.tree_s:.1f} ms per tree, "
        f"{1e3 * engine.expand_s:.2f} ms per pass that grows it. Verification of several "
        "tokens is modelled, not measured.",
        "",
        "| method | τ | published | predicted | error % | kernels alone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['tau']:.2f} | {row['published']:.2f} | {row['predicted']:.2f} | "
            f"{row['error_pct']:+.0f} | {row['kernels']:.2f} |"
        )
    lines += ["", "Deviations over 10 %:", ""]
    for row in off:
        lines.append(f"* {row['method']} ({row['error_pct']:+.0f} %): {reasons[row['method']]}.")
    lines += ["" if off else "* none\n", "### Other cards, and why the order changes", ""]
    lines += [
        "Speed-ups where the device alone decides (CUDA graphs, no host). What a card can verify for the price of "
        "reading its weights is its operations per byte; beyond that, each drafted token is paid for:",
        "",
        "| chip | operations per byte | 25 nodes | 63 nodes | 120 nodes | 63 nodes, batch 8 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in predictors:
        chip = one.hardware
        costs = [
            one.target_s(nodes, batch) / one.target_s(0, batch)
            for nodes, batch in ((25, 1), (63, 1), (120, 1), (63, 8))
        ]
        ratio = chip.peak_flops_per_s("float16") / chip.memory_bytes_per_s
        lines.append(f"| {chip.name} | {ratio:.0f} | " + " | ".join(f"{cost:.2f} ×" for cost in costs) + " |")
    lines += ["", *(f"* batch {row['batch']}, {row['chip']}: {row['order']}" for row in ranks), ""]
    lines += [
        "Methods that verify many unlikely tokens (Lookahead, Medusa, Hydra, Token Recycling) lose first; short chains "
        "with a good drafter, and lookup that drafts few tokens, gain rank. At batch 1 the cards differ little up to "
        "64 nodes; from batch 8 on, or beyond 100 nodes on a card with few operations per byte, trees become losses.",
        "",
        "![speed-ups](plots/published.png)",
    ]
    return "\n".join(lines) + "\n"
