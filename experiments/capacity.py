"""Which fleet is the cheapest for a load and an SLO? Chip, tensor parallelism, replicas, policy and speculation.

Optuna (a tree-structured Parzen estimator) proposes fleets. What does not fit into memory or cannot hold the load, by
formulas, costs nothing to refuse; a short simulation refuses what is clearly overloaded or slow; the rest is simulated
in full. Among all that keep the SLO the cheapest wins, and cost against p99 latency gives the Pareto front.

    python -m specdec.run +experiment=capacity experiment.rate_per_s=40
    python -m specdec.run +experiment=capacity experiment.chips=[h100,l40s] experiment.slo_tpot_s=0.03
    python -m specdec.run +experiment=capacity experiment.model=llama-3.1-70b experiment.tensor_parallels=[2,4,8]
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import optuna

from experiments import bill, common, simulations
from experiments.devices import make_device, mix_of
from experiments.fleets import fleet
from sim.cluster_spec import ClusterSpec
from sim.economics import pareto_front
from sim.hardware import Hardware, load_hardware
from sim.mean_field import MeanField
from sim.model_shape import MODEL_SHAPES
from sim.simulation import simulate
from specdec import plots_extrapolation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

SERVED, NOT_BUILT, TOO_SMALL, TOO_DEAR, SHORT, SLOW = (
    "served",
    "does not fit",
    "too small by formulas",
    "too dear",
    "refused by a short simulation",
    "outside the SLO",
)
_HOPELESS = 0.6
"""A fleet whose capacity by formulas, speculation at its best, is below this share of the load is not simulated."""
_SHORT_SHARE = 0.5
"""Of the required share of requests within the SLO, what the short simulation must show."""
_BEST_TOKENS = 3.0
_DEAR = 3.0
"""A fleet that costs so many times as much as the cheapest that serves is not simulated."""
COLUMNS = {
    "fleet": "fleet",
    "case": "case",
    "usd_per_hour": "$ per hour",
    "cost_usd": "$ per 1M tokens",
    "share": "within SLO",
    "ttft_p99_s": "TTFT p99 (s)",
    "tpot_p99_s": "TPOT p99 (s)",
}
Row = dict[str, Any]


@dataclass
class _Search:
    """Looks at fleets, each once.

    Attributes:
        rows: by fleet.
    """

    config: Config
    chips: Mapping[str, Hardware]
    names: list[str]
    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)

    def objective(self, trial: optuna.Trial) -> float:
        """Dollars per hour of the proposed fleet.

        Raises:
            optuna.TrialPruned: it does not hold the load within the SLO; the reported value says how far it is off.
        """
        options = self.config.experiment
        key = (
            trial.suggest_categorical("chip", list(self.chips)),
            trial.suggest_categorical("tensor_parallel", options.tensor_parallels),
            options.replicas[trial.suggest_int("replicas", 0, len(options.replicas) - 1)],
            trial.suggest_categorical("case", self.names),
        )
        if key not in self.rows:
            self.rows[key] = self.look(*key)
        row = self.rows[key]
        if row["verdict"] != SERVED:
            # A price that no fleet has, the higher the farther from the SLO: the sampler learns from it.
            trial.report(1e3 * (2.0 - row["share"]), 0)
            raise optuna.TrialPruned(row["verdict"])
        return row["usd_per_hour"]

    def look(self, chip: str, tensor_parallel: int, replicas: int, case: str) -> Row:
        """The row of one fleet, by the cheapest means that decide it."""
        sheet, options = self.chips[chip], self.config.experiment
        assert sheet.price_per_hour_usd is not None
        row: Row = {
            "fleet": f"{replicas} × {tensor_parallel} {sheet.name}",
            "chip": sheet.name,
            "tensor_parallel": tensor_parallel,
            "replicas": replicas,
            "case": case,
            "usd_per_hour": sheet.price_per_hour_usd * tensor_parallel * replicas,
            "share": 0.0,
            "cost_usd": None,
            "ttft_p99_s": None,
            "tpot_p99_s": None,
            "num_simulated": 0,
        }
        try:
            config = self.configured(sheet, tensor_parallel)
            with simulations.quiet():
                cluster = fleet(config, options.cases[case], replicas, f"experiment.cases.{case}")
                most = self.most_per_s(sheet, tensor_parallel)
        except ValueError as error:
            return row | {"verdict": NOT_BUILT, "reason": str(error)}
        if most * replicas < _HOPELESS * options.rate_per_s:
            return row | {"verdict": TOO_SMALL, "reason": f"about {most * replicas:.3g} requests/s at most"}
        served = [each["usd_per_hour"] for each in self.rows.values() if each["verdict"] == SERVED]
        if row["usd_per_hour"] > _DEAR * min(served, default=math.inf):
            return row | {"verdict": TOO_DEAR, "reason": f"a fleet of ${min(served):.3g} per hour serves"}
        short, stable = self.simulated(config, cluster, options.short_requests)
        if not stable or short["share"] < _SHORT_SHARE * options.min_share:
            return row | short | {"verdict": SHORT, "reason": f"{short['share']:.0%} within the SLO"}
        full, stable = self.simulated(config, cluster, options.num_requests)
        good = stable and full["share"] >= options.min_share
        return row | full | {"verdict": SERVED if good else SLOW, "reason": None if good else "see share"}

    def configured(self, sheet: Hardware, tensor_parallel: int) -> Config:
        hardware = type(self.config.hardware)(**asdict(sheet))
        experiment = replace(self.config.experiment, tensor_parallel=tensor_parallel)
        return replace(self.config, hardware=hardware, experiment=experiment)

    def most_per_s(self, sheet: Hardware, tensor_parallel: int, *, plain: bool = False) -> float:
        """By formulas: ``plain``, what a replica holds within the SLO; else more than it can hold, with more tokens per
        step than any case gives."""
        options = self.config.experiment
        device = make_device(
            sheet,
            MODEL_SHAPES[options.model],
            tensor_parallel=tensor_parallel,
            dtype=options.dtype,
            memory_utilisation=options.memory_utilisation,
        )
        mix = mix_of(options.length_law, options.prompt_len, options.output_len)
        rows = max(1.0, min(options.max_num_seqs, device.kv_tokens / mix.context))
        if plain:
            return MeanField(device.model, mix, rows).capacity_within(options.slo_ttft_s, options.slo_tpot_s)
        return MeanField(device.model, mix, rows, tokens_per_step=_BEST_TOKENS).capacity_per_s

    def simulated(self, config: Config, cluster: ClusterSpec, num_requests: int) -> tuple[Row, bool]:
        """Figures of ``num_requests`` requests, and whether the fleet keeps up with them."""
        config = replace(config, experiment=replace(config.experiment, num_requests=num_requests))
        with simulations.quiet():
            result = simulate(
                simulations.source(config), cluster, seed=config.seed, slo=simulations.slo(config)
            )
        summary = result.summary
        latency = summary.get("latency", {})
        costs = bill.costs(config, cluster, summary)
        found = {
            "share": summary.get("goodput", {}).get("share", 0.0),
            "cost_usd": costs["per_million_good_tokens_usd"],
            "ttft_p99_s": latency.get("ttft_s", {}).get("p99"),
            "tpot_p99_s": latency.get("tpot_s", {}).get("p99"),
            "utilisation": summary["utilisation"],
            "num_simulated": num_requests,
        }
        return found, result.stable


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    if options.length_law == "trace":
        raise ValueError("experiment.lengths=trace is not for capacity: give conversation, code or fixed")
    search = _Search(config, _sheets(options), options.only or list(options.cases))
    for name in search.names:  # what is wrong with a case shows before anything runs
        _check_case(search, name)
    # Optuna's log would break the progress bar.
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=12))
        _propose(study, search)
        start_s = time.perf_counter()
        with common.progress(run) as bar:
            task = bar.add_task("fleets", total=options.num_trials)
            for _ in range(options.num_trials):
                if time.perf_counter() - start_s > options.budget_s and search.rows:
                    break
                study.optimize(search.objective, n_trials=1)
                bar.advance(task)
    finally:
        optuna.logging.set_verbosity(before)
    return _report(config, run, search, len(study.trials))


def _sheets(options: Any) -> dict[str, Hardware]:
    """By the name that was given; with a price.

    Raises:
        ValueError: no price.
    """
    sheets = {name: load_hardware(name) for name in options.chips}
    for sheet in sheets.values():
        if sheet.price_per_hour_usd is None:
            raise ValueError(
                f"price_per_hour_usd of {sheet.name} is null: give a copy of its sheet with a price in "
                "experiment.chips, or leave the chip out"
            )
    return sheets


def _check_case(search: _Search, name: str) -> None:
    """Its options, on the first fleet that the model fits on.

    Raises:
        ValueError: options of the case, or a model that fits nowhere.
    """
    options, error = search.config.experiment, None
    for sheet in search.chips.values():
        for degree in options.tensor_parallels:
            try:
                with simulations.quiet():
                    fleet(
                        search.configured(sheet, degree), options.cases[name], 1, f"experiment.cases.{name}"
                    )
                return
            except ValueError as problem:
                error = problem
    raise ValueError(f"experiment.cases.{name} can be built on none of the chips: {error}") from error


def _propose(study: optuna.Study, search: _Search) -> None:
    """First come, for each chip and degree, as many replicas as plain decoding needs by formulas; cheapest first."""
    options = search.config.experiment
    first = "chunked" if "chunked" in search.names else search.names[0]
    guesses: list[tuple[float, dict[str, Any]]] = []
    for chip, sheet in search.chips.items():
        for degree in options.tensor_parallels:
            try:
                with simulations.quiet():
                    each = search.most_per_s(sheet, degree, plain=True)
            except ValueError:
                continue
            enough = [
                index for index, number in enumerate(options.replicas) if number * each >= options.rate_per_s
            ]
            if not enough or sheet.price_per_hour_usd is None:
                continue
            usd = sheet.price_per_hour_usd * degree * options.replicas[enough[0]]
            names = {"chip": chip, "tensor_parallel": degree, "replicas": enough[0], "case": first}
            guesses.append((usd, names))
    for _, names in sorted(guesses, key=lambda guess: guess[0]):
        study.enqueue_trial(names)


def _report(config: Config, run: Run, search: _Search, num_trials: int) -> dict[str, Any]:
    options = config.experiment
    rows = sorted(search.rows.values(), key=lambda row: (row["usd_per_hour"], -row["share"]))
    served = [row for row in rows if row["verdict"] == SERVED]
    front = front_of(served)
    for row in rows:
        row["on_front"] = any(row is each for each in front)
    title = (
        f"{options.model}, {options.rate_per_s:g} requests/s, {options.min_share:.0%} within {options.slo_ttft_s:g} s "
        f"and {1e3 * options.slo_tpot_s:g} ms: what no other fleet beats in price and p99"
    )
    if front:
        run.console.print(summary_table(front, COLUMNS, title=title))
    else:
        nearest = max(rows, key=lambda row: row["share"])
        run.console.print(
            f"No fleet that was looked at holds {options.rate_per_s:g} requests/s within the SLO; nearest, with "
            f"{nearest['share']:.0%}: {nearest['replicas']} × {nearest['tensor_parallel']} {nearest['chip']}, "
            f"{nearest['case']}. Allow more replicas or chips, or loosen the SLO."
        )
    run.log_table("fleets", [{**row, "reason": str(row["reason"] or "")} for row in rows])
    verdicts = [row["verdict"] for row in rows]
    if any(row["tpot_p99_s"] is not None for row in rows):
        run.log_figure("pareto", plots_extrapolation.cost_front(rows, options.slo_tpot_s))
    return {
        "cheapest": served[0] if served else None,
        "front": front,
        "num_trials": num_trials,
        "num_fleets": len(rows),
        "verdicts": {
            name: verdicts.count(name) for name in (SERVED, SLOW, SHORT, TOO_DEAR, TOO_SMALL, NOT_BUILT)
        },
        "simulated_requests": sum(row["num_simulated"] for row in rows),
        "assumptions": [
            "acceptance rates are those of the cases: assumed, unless measured ones were given",
            "prices are those of the chips' sheets, for whole hours",
            "a search, not a proof: a cheaper fleet may be among those that were not looked at",
        ],
    }


def front_of(served: list[Row]) -> list[Row]:
    """Fleets that no other beats in dollars per hour and p99 time per output token."""
    if not served:
        return []
    costs = [row["usd_per_hour"] for row in served]
    times = [row["tpot_p99_s"] if row["tpot_p99_s"] is not None else math.inf for row in served]
    return [served[index] for index in pareto_front(costs, times)]
