"""Runs of this engine on this machine, predicted from arrivals and lengths alone.

Of each configuration, some runs are fitted on (the seconds of a step and the law of acceptance), and the others, with
other requests at other loads, are simulated. Each is simulated four times, so that an error has its place:

* predicted: seconds from the fitted cost model, acceptance from the fitted law;
* at the machine's pace: all seconds, fitted and predicted, in shares of what fixed passes took around each run, so what
  goes is that the machine was faster or slower than in the fitted runs;
* acceptance replayed: what each request accepted is as it was recorded too, so what is left is the cost model's;
* plans replayed: the seconds of each step are as recorded too, so what is left is the control path's. The scheduler
  alone, fed with the recorded outcomes, must also make the recorded plans, array for array.

Speculating runs are simulated once more with acceptance by draft position, as simulations without a trace have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import common, own_runs
from experiments.own_report import page
from experiments.own_runs import Measured, Setup
from experiments.run_errors import LATENCIES, LATENCY_NAMES, NAMES, Error, errors, statistics, summarised
from sim.acceptance import EmpiricalAcceptance
from sim.cost_model import CostModel
from sim.curves import FloatArray
from sim.recorded_run import (
    AS_IT_WAS,
    Pace,
    RecordedRun,
    RecordedSeconds,
    RunTimes,
    lent_verifications,
    simulate_run,
)
from sim.replay import replay
from sim.replica import StepTimes
from sim.step_fit import AtPace, LaggedDrafting, fit_steps, step_table
from specdec import plots_validation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

PREDICTED, PACED, ACCEPTANCE, PLANS, POSITIONS = "predicted", "paced", "acceptance", "plans", "positions"
MODES = {
    PREDICTED: "predicted",
    PACED: "predicted at the machine's pace",
    ACCEPTANCE: "acceptance replayed",
    PLANS: "plans replayed",
    POSITIONS: "predicted, acceptance by position",
}
GOALS = {"median": 4.0, "worst": 10.0, "throughput": 3.0}
"""Per cent: the median absolute error, that of every figure, and that of every throughput."""
COLUMNS = {
    "setup": "configuration",
    "load": "load",
    "ttft_mean": "TTFT mean %",
    "ttft_p99": "TTFT p99 %",
    "tpot_mean": "TPOT mean %",
    "tpot_p99": "TPOT p99 %",
    "e2e_mean": "E2E mean %",
    "e2e_p99": "E2E p99 %",
    "tokens_per_s": "tokens/s %",
    "tau": "τ %",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A predicted run.

    Attributes:
        times: what its requests saw in each mode; several simulations of those that draw.
        errors: by mode and statistic.
        num_plans: plans that the scheduler, fed with the recorded outcomes, made as they were.
        num_different: steps that had another size in the simulation with recorded seconds.
        pace_pct: how much slower fixed passes were around this run than around those fitted: decoding, and prompts.
        step_bias_pct: predicted over measured seconds of the recorded steps themselves, at the machine's pace;
            decode_bias_pct and prompt_bias_pct of those without and with prompt tokens.
        step_error_pct: median absolute error of those.
    """

    setup: Setup
    load: float
    run: RecordedRun
    times: dict[str, list[RunTimes]]
    errors: dict[str, dict[str, Error]]
    num_plans: int
    num_different: int
    pace_pct: tuple[float, float]
    step_bias_pct: float
    decode_bias_pct: float
    prompt_bias_pct: float
    step_error_pct: float


def run(config: Config, run: Run) -> tuple[dict[str, Any], str]:
    """The summary, below ``own``, and the section of the report."""
    measured = own_runs.measure(config, run)
    cases = _cases(config, run, measured)
    floor = _noise_floor(measured)
    summary = _summary(config, measured, cases, floor)
    rows = [_row(case, mode) for case in cases for mode in case.errors]
    shown = [row for row in rows if row["mode"] == MODES[PREDICTED]]
    run.console.print(summary_table(shown, COLUMNS, title="errors of predicted runs of this engine"))
    run.console.print(summary["verdict"], highlight=False)
    run.log_table("own_errors", rows)
    run.log_table("own_intervals", [row for case in cases for row in _interval_rows(case, floor)])
    run.log_metrics(
        {
            f"own/{mode}/{name}": value
            for mode, found in summary["modes"].items()
            for name, value in found.items()
        }
    )
    figures = _draw(run, cases)
    return {"own": summary}, page(summary, cases, floor, figures)


def _cases(config: Config, run: Run, measured: list[Measured]) -> list[Case]:
    rng = np.random.default_rng(config.seed)
    cases: list[Case] = []
    with common.progress(run) as bar:
        task = bar.add_task("predicting", total=sum(len(one.predicted) for one in measured))
        for one in measured:
            fits = _fit(one, paced=False), _fit(one, paced=True)
            fits[0].save(run.directory / "cost_models" / one.setup.slug)
            for load, recorded in one.predicted.items():
                cases.append(_case(one, load, recorded, fits, config.validate.num_simulations, rng))
                bar.advance(task)
    return cases


def _fit(one: Measured, *, paced: bool) -> CostModel:
    """On the fitted runs as they were, or as if the machine had been as fast around each."""
    return fit_steps(
        [step_table(fitted, _pace(one, fitted) if paced else AS_IT_WAS) for fitted in one.fitted],
        has_draft_model=one.setup.has_draft_model,
        source=f"{sum(fitted.steps.height for fitted in one.fitted)} steps of {one.setup.label}",
    )


def _pace(one: Measured, recorded: RecordedRun) -> Pace:
    """What fixed passes took around this run, in shares of what they took around the fitted ones."""
    return recorded.pace.over(Pace.mean([fitted.pace for fitted in one.fitted]))


def _case(
    one: Measured,
    load: float,
    recorded: RecordedRun,
    fits: tuple[CostModel, CostModel],
    num_simulations: int,
    rng: np.random.Generator,
) -> Case:
    """One run in every mode. ``fits``: cost models fitted on seconds as they were, and at the machine's pace."""
    num_plans = replay(recorded.steps, recorded.requests, recorded.loop())
    as_recorded = RecordedSeconds(recorded)
    draws = num_simulations if recorded.max_drafts else 1
    lent = [lent_verifications(one.fitted, recorded, rng) for _ in range(draws)]
    cost_model, at_pace = fits
    pace = _pace(one, recorded)

    def paced() -> StepTimes:
        return AtPace(LaggedDrafting(at_pace), pace)

    times = {
        PREDICTED: [simulate_run(recorded, LaggedDrafting(cost_model), luck) for luck in lent],
        PACED: [simulate_run(recorded, paced(), luck) for luck in lent],
        ACCEPTANCE: [simulate_run(recorded, paced(), recorded.verifications)],
        PLANS: [simulate_run(recorded, as_recorded, recorded.verifications, seen_s=recorded.seen_s)],
    }
    if recorded.max_drafts:
        fitted = one.fitted[-1]
        times[POSITIONS] = [
            simulate_run(
                recorded, cost_model, EmpiricalAcceptance.from_trace(fitted.steps, fitted.requests), seed=n
            )
            for n in range(draws)
        ]
    found = {mode: errors(recorded.times, simulated, rng) for mode, simulated in times.items()}
    step_model = paced()
    predicted_s = np.array([step_model.predict_scalar(step).total_s for step in recorded.features])
    seconds = recorded.seconds
    with_prompts = np.array([step.prefill_tokens > 0 for step in recorded.features])
    return Case(
        setup=one.setup,
        load=load,
        run=recorded,
        times=times,
        errors=found,
        num_plans=num_plans,
        num_different=as_recorded.num_different,
        pace_pct=(100.0 * (pace.decode - 1.0), 100.0 * (pace.prompt - 1.0)),
        step_bias_pct=_bias_pct(predicted_s, seconds),
        decode_bias_pct=_bias_pct(predicted_s[~with_prompts], seconds[~with_prompts]),
        prompt_bias_pct=_bias_pct(predicted_s[with_prompts], seconds[with_prompts]),
        step_error_pct=100.0 * float(np.median(np.abs(predicted_s / seconds - 1.0))),
    )


def _bias_pct(predicted_s: FloatArray, measured_s: FloatArray) -> float:
    """Of a sum, signed per cent; NaN of nothing."""
    return 100.0 * float(predicted_s.sum() / measured_s.sum() - 1.0) if measured_s.size else math.nan


def _noise_floor(measured: list[Measured]) -> dict[str, float] | None:
    """How far the same requests at the same times differ from one run to the next, signed per cent by statistic."""
    for one in measured:
        if one.repeat is not None and one.repeated_load is not None:
            first = statistics([one.predicted[one.repeated_load].times])
            second = statistics([one.repeat.times])
            return {name: 100.0 * (second[name] / first[name] - 1.0) for name in NAMES}
    return None


def _row(case: Case, mode: str) -> dict[str, Any]:
    about = {"setup": case.setup.label, "load": case.load, "mode": MODES[mode]}
    return about | {name: error.error_pct for name, error in case.errors[mode].items()}


def _interval_rows(case: Case, floor: dict[str, float] | None) -> list[dict[str, Any]]:
    """A row per statistic, with both values and the interval, and what replaying leaves of the error."""
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        error = case.errors[PREDICTED][name]
        rows.append(
            {
                "setup": case.setup.label,
                "load": case.load,
                "statistic": name,
                "measured": error.measured,
                "predicted": error.simulated,
                "error_pct": error.error_pct,
                "low_pct": error.low_pct,
                "high_pct": error.high_pct,
                "paced_pct": case.errors[PACED][name].error_pct,
                "acceptance_replayed_pct": case.errors[ACCEPTANCE][name].error_pct,
                "plans_replayed_pct": case.errors[PLANS][name].error_pct,
                "repeat_pct": floor[name] if floor else None,
            }
        )
    return rows


def _summary(
    config: Config, measured: list[Measured], cases: list[Case], floor: dict[str, float] | None
) -> dict[str, Any]:
    modes = {
        mode: summarised(
            (name, error.error_pct)
            for case in cases
            if mode in case.errors
            for name, error in case.errors[mode].items()
        )
        for mode in MODES
        if any(mode in case.errors for case in cases)
    }
    reached = {
        mode: {name: modes[mode][name] <= goal for name, goal in GOALS.items()} for mode in (PREDICTED, PACED)
    }
    return {
        **{
            key: {
                f"{case.setup.slug}_load{case.load:g}": {
                    name: error.error_pct for name, error in case.errors[mode].items()
                }
                for case in cases
            }
            for key, mode in (("errors_pct", PREDICTED), ("paced_errors_pct", PACED))
        },
        "paces_pct": {f"{case.setup.slug}_load{case.load:g}": case.pace_pct for case in cases},
        "modes": modes,
        "goals_pct": GOALS,
        "reached": reached,
        "verdict": "; ".join(
            f"{words}: {_verdict(modes[mode], reached[mode])}"
            for mode, words in ((PREDICTED, "arrivals and lengths alone"), (PACED, "at the machine's pace"))
        ),
        "repeat_pct": floor,
        "repeat": summarised(floor.items()) if floor else None,
        "repeat_of": f"{measured[0].setup.label} at {measured[0].repeated_load:g}" if floor else None,
        "capacity_per_s": {one.setup.slug: one.capacity_per_s for one in measured},
        "not_measured": [setup.label for setup in own_runs.setups(config)[len(measured) :]],
        "num_requests": config.validate.num_requests,
        "num_plans_equal": sum(case.num_plans for case in cases),
        "num_steps_different": sum(case.num_different for case in cases),
    }


def _verdict(found: dict[str, float], reached: dict[str, bool]) -> str:
    said = {
        "median": f"median error {found['median']:.1f} % (goal {GOALS['median']:g} %)",
        "worst": f"worst figure {found['worst']:.1f} % (goal {GOALS['worst']:g} %)",
        "throughput": f"worst throughput {found['throughput']:.1f} % (goal {GOALS['throughput']:g} %)",
    }
    return ", ".join(f"{text} {'reached' if reached[name] else 'MISSED'}" for name, text in said.items())


def _draw(run: Run, cases: list[Case]) -> list[str]:
    """The scatter of all statistics, and a configuration's distributions at the load nearest to its capacity."""
    panels = {
        latency.upper(): {
            setup.label: _points([case for case in cases if case.setup == setup], latency)
            for setup in dict.fromkeys(case.setup for case in cases)
        }
        for latency in LATENCIES
    }
    run.log_figure("own_scatter", plots_validation.row_scatter(panels))
    names = ["own_scatter"]
    for setup in dict.fromkeys(case.setup for case in cases):
        case = min((case for case in cases if case.setup == setup), key=lambda case: abs(case.load - 1.0))
        lines = {"measured": case.run.times.latencies}
        for mode in (PREDICTED, PACED, ACCEPTANCE):
            if mode != ACCEPTANCE or case.run.max_drafts:
                lines[MODES[mode]] = {
                    latency: np.concatenate([times.latencies[latency] for times in case.times[mode]])
                    for latency in LATENCIES
                }
        names.append(f"own_cdf_{setup.slug}")
        run.log_figure(names[-1], plots_validation.latency_cdfs(lines))
    return names


def _points(cases: list[Case], latency: str) -> tuple[FloatArray, FloatArray]:
    """Measured and predicted milliseconds of the statistics of one latency, all loads together."""
    found = [
        case.errors[PREDICTED][name] for case in cases for name in LATENCY_NAMES if name.startswith(latency)
    ]
    return (
        1e3 * np.array([error.measured for error in found]),
        1e3 * np.array([error.simulated for error in found]),
    )
