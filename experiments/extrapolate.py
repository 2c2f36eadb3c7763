"""What would a large fleet do? Policies × speculation on 8 to 64 replicas: goodput, p99 latencies, cost, with ranges.

All cases of a workload meet the same load: a share of what plain decoding holds within the SLO, by formulas. Each cell
is simulated with the cost model as it is, with other seeds, and with cost models within their stated errors; the ranges
span what these gave. Cells are simulated side by side, written to ``cells.jsonl`` as they come, and not simulated again
when the run directory is given anew:

    python -m specdec.run +experiment=extrapolate experiment.num_requests=1000000 experiment.fleets=[8,64]
    python -m specdec.run +experiment=extrapolate experiment.only=[chunked,chunked_eagle] hydra.run.dir=runs/my_fleet
    python -m specdec.run +experiment=extrapolate hardware=l40s experiment.load=1.0 experiment.num_perturbed=8
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from joblib import Parallel, delayed

from experiments import bill, common, simulations
from experiments.devices import make_device, mix_of
from experiments.fleets import fleet, with_other_times
from experiments.rows_file import appended, fingerprint, read_rows
from sim.mean_field import MeanField
from sim.model_shape import MODEL_SHAPES
from sim.simulation import simulate
from specdec import plots_extrapolation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

POINT, SEED, MODEL = "point", "seed", "model"
METRICS = ("share", "goodput_per_s", "ttft_p99_s", "tpot_p99_s", "cost_usd")
_WANTED = ("only", "mixes", "fleets", "num_seeds", "num_perturbed", "workers", "sweep_jobs")
COLUMNS = {
    "mix": "workload",
    "num_replicas": "replicas",
    "case": "case",
    "share": "within SLO",
    "goodput_per_s": "goodput",
    "ttft_p99_s": "TTFT p99 (s)",
    "tpot_p99_s": "TPOT p99 (s)",
    "cost": "$ per 1M tokens",
    "stable": "stable",
}


@dataclass(frozen=True)
class Cell:
    """One simulation. ``draw``: number among the other seeds, or the other cost models."""

    mix: str
    num_replicas: int
    case: str
    kind: str
    draw: int
    rate_per_s: float

    @property
    def name(self) -> str:
        return f"{self.mix}/{self.num_replicas}/{self.case}/{self.kind}/{self.draw}/{self.rate_per_s:.9g}"


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    for name, fixed in (("arrivals", "poisson"), ("lengths", None), ("draft", None)):
        if (value := getattr(options, name)) != fixed:
            raise ValueError(
                f"experiment.{name}={value} is for simulate: here mixes say what is asked and cases what drafts"
            )
    names = options.only or list(options.cases)
    for name in names:  # what is wrong with a case shows before anything runs
        fleet(config, options.cases[name], 1, f"experiment.cases.{name}")
    rates = {
        mix: options.rate_per_replica or options.load * capacity_per_s(config, mix) for mix in options.mixes
    }
    cells = list(_cells(options, names, rates))
    done = _fill(config, run, cells)
    rows = [
        row(mix, number, name, [each for each in done if _is_of(each, mix, number, name)])
        for mix in options.mixes
        for number in options.fleets
        for name in names
    ]
    title = (
        f"{options.model} on {options.tensor_parallel} × {config.hardware.name}, {options.num_requests:,} requests a "
        f"cell, SLO {options.slo_ttft_s:g} s and {1e3 * options.slo_tpot_s:g} ms; ranges span "
        f"{options.num_seeds} seeds and {options.num_perturbed} other cost models"
    )
    run.console.print(summary_table([_shown(each) for each in rows], COLUMNS, title=title))
    run.log_table("fleets", rows)
    run.log_table("cells", done)
    run.log_figure("fleets", plots_extrapolation.fleets(rows))
    draws = options.num_seeds + options.num_perturbed
    reasons = sorted({each["cost_reason"] for each in done if each["cost_reason"]})
    return {
        "timings": done[0]["timings"],
        "extrapolated": sorted({name for each in done for name in each["extrapolated"]}),
        "rate_per_replica": rates,
        "num_requests": options.num_requests,
        "fleets": rows,
        "cost_unknown": reasons,
        "ranges": f"lowest to highest of {draws} simulations, in which one more would lie with probability "
        f"{(draws - 1) / (draws + 1):.2f} if all were alike",
        "assumptions": [
            "acceptance rates are those of the cases: assumed, unless measured ones were given",
            "a cost model off in one operator is off at all its sizes by the same factor",
        ],
    }


def capacity_per_s(config: Config, mix: str) -> float:
    """Requests a second that a replica holds within the SLO when it decodes plainly: mean latencies, by formulas.

    Raises:
        ValueError: not even a light load keeps the SLO.
    """
    options = config.experiment
    device = make_device(
        simulations.hardware(config),
        MODEL_SHAPES[options.model],
        tensor_parallel=options.tensor_parallel,
        dtype=options.dtype,
        memory_utilisation=options.memory_utilisation,
    )
    sizes = mix_of(mix)
    rows = max(1.0, min(options.max_num_seqs, device.kv_tokens / sizes.context))
    found = MeanField(device.model, sizes, rows).capacity_within(options.slo_ttft_s, options.slo_tpot_s)
    if found <= 0.0:
        raise ValueError(
            f"experiment.slo_ttft_s={options.slo_ttft_s:g} and slo_tpot_s={options.slo_tpot_s:g} cannot be kept on "
            f"{device.tensor_parallel} × {device.chip.name} at any load of {mix}: loosen them, raise "
            "tensor_parallel, or give experiment.rate_per_replica"
        )
    return found


def _cells(options: Any, names: Sequence[str], rates: dict[str, float]) -> Iterator[Cell]:
    draws = [(POINT, 0), *((SEED, draw) for draw in range(1, options.num_seeds))]
    draws += [(MODEL, draw) for draw in range(options.num_perturbed)]
    for kind, draw in draws:  # all points first: a stopped run then has a whole table
        for mix in options.mixes:
            for number in options.fleets:
                for name in names:
                    yield Cell(mix, number, name, kind, draw, rates[mix] * number)


def _fill(config: Config, run: Run, cells: list[Cell]) -> list[dict[str, Any]]:
    """The results of all cells, simulating those that the file does not have."""
    path, config_hash = run.directory / "cells.jsonl", fingerprint(config, *_WANTED)
    known = {each["cell"]: each for each in read_rows(path, config_hash)}
    missing = [cell for cell in cells if cell.name not in known]
    with common.progress(run) as bar, appended(path) as add:
        task = bar.add_task("cells", total=len(cells), completed=len(cells) - len(missing))
        for result in _simulate(config, missing):
            known[result["cell"]] = result | {"config_hash": config_hash}
            add(known[result["cell"]])
            bar.advance(task)
    return [known[cell.name] for cell in cells]


def _simulate(config: Config, missing: list[Cell]) -> Iterable[dict[str, Any]]:
    workers = min(config.experiment.workers, len(missing)) or 1
    jobs = (delayed(simulate_cell)(config, cell) for cell in missing)
    return cast("Iterator[dict[str, Any]]", Parallel(n_jobs=workers, return_as="generator_unordered")(jobs))


def simulate_cell(config: Config, cell: Cell) -> dict[str, Any]:
    """One cell. Cells that differ in the case alone meet the same requests, and the same errors of the cost model."""
    seed = config.seed + (cell.draw if cell.kind == SEED else 0)
    config = replace(config, seed=seed, experiment=replace(config.experiment, lengths=cell.mix))
    options = config.experiment
    with simulations.quiet():
        cluster = fleet(config, options.cases[cell.case], cell.num_replicas, f"experiment.cases.{cell.case}")
        if cell.kind == MODEL:
            cluster = with_other_times(cluster, np.random.default_rng([seed, 1 + cell.draw]))
    source = simulations.source(config, cell.rate_per_s)
    with simulations.quiet():
        result = simulate(source, cluster, seed=seed, slo=simulations.slo(config))
    summary = result.summary
    latency, good = summary.get("latency", {}), summary.get("goodput", {})
    costs = bill.costs(config, cluster, summary)
    return {
        "cell": cell.name,
        "mix": cell.mix,
        "num_replicas": cell.num_replicas,
        "case": cell.case,
        "kind": cell.kind,
        "draw": cell.draw,
        "rate_per_s": cell.rate_per_s,
        "stable": result.stable,
        "share": good.get("share", 0.0),
        "goodput_per_s": good.get("requests_per_s", 0.0),
        "ttft_p99_s": latency.get("ttft_s", {}).get("p99"),
        "tpot_p99_s": latency.get("tpot_s", {}).get("p99"),
        "cost_usd": costs["per_million_good_tokens_usd"],
        "cost_reason": costs["reason"],
        "tau": summary.get("tau"),
        "utilisation": summary["utilisation"],
        "timings": summary["timings"],
        "extrapolated": summary["extrapolated"],
        "wall_s": result.wall_s,
    }


def _is_of(cell: dict[str, Any], mix: str, number: int, name: str) -> bool:
    return (cell["mix"], cell["num_replicas"], cell["case"]) == (mix, number, name)


def row(mix: str, number: int, name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the cost model as it is, with the range over other seeds and over other cost models.

    ``<metric>_seed`` and ``<metric>_model`` are (low, high) with the point among them; ``None`` where a figure is
    unknown in all of them.
    """
    (point,) = (cell for cell in cells if cell["kind"] == POINT)
    found: dict[str, Any] = {
        "mix": mix,
        "num_replicas": number,
        "case": name,
        "rate_per_s": point["rate_per_s"],
        "stable": point["stable"],
        "num_unstable": sum(not cell["stable"] for cell in cells),
        "tau": point["tau"],
        "utilisation": point["utilisation"],
    }
    for metric in METRICS:
        found[metric] = point[metric]
        for kind in (SEED, MODEL):
            values = [cell[metric] for cell in cells if cell["kind"] in (POINT, kind)]
            known = [value for value in values if value is not None]
            found[f"{metric}_{kind}"] = [min(known), max(known)] if known else None
    return found


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    span = found["cost_usd_model"]
    seeds = found["cost_usd_seed"]
    cost = "–"
    if found["cost_usd"] is not None:
        low, high = min(span[0], seeds[0]), max(span[1], seeds[1])
        cost = f"{found['cost_usd']:.2f} ({low:.2f} to {high:.2f})"
    return found | {"cost": cost}
