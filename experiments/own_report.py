"""The page about predictions of our own engine: the table, the plots, and where it is wrong and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.run_errors import FIGURES, LATENCIES, NAMES, TAU, THROUGHPUT, Error

if TYPE_CHECKING:
    from experiments.validation_own import Case

_PARTS = ("pace", "acceptance", "cost", "control")
_NUM_WORST = 5
_NOTICEABLE_PCT = 1.0


def page(
    summary: Mapping[str, Any],
    cases: Sequence[Case],
    floor: Mapping[str, float] | None,
    figures: Sequence[str],
) -> str:
    """The section of the report, Markdown."""
    lines = [
        "## Our own engine on this machine",
        "",
        f"Each configuration was fitted on a saturated run and one open-loop run; {len(cases)} other runs of "
        f"{summary['num_requests']} requests were predicted from arrivals and lengths alone, and once more with all "
        "seconds in shares of what fixed passes took before and after each run, which takes out how fast the machine "
        f"was. **{summary['verdict'][0].upper()}{summary['verdict'][1:]}.**",
        "",
    ]
    if summary["not_measured"]:
        lines += [f"Not measured within the budget: {', '.join(summary['not_measured'])}.", ""]
    lines += [
        "Signed errors, per cent of the measured; pace: how much slower fixed passes were around the run than around "
        "the fitted ones; intervals by bootstrap over requests. All intervals: `tables/own_intervals.json`.",
        "",
        *_error_table(cases, "predicted"),
        "",
        "The same at the machine's pace:",
        "",
        *_error_table(cases, "paced"),
    ]
    lines += ["", *_mode_table(summary, floor), ""]
    lines += [f"![{name.replace('_', ' ')}](plots/{name}.png)\n" for name in figures[:2]]
    if len(figures) > 2:
        lines += [
            f"Distributions of the others: {', '.join(f'plots/{name}.png' for name in figures[2:])}.",
            "",
        ]
    lines += ["### Where it is wrong and why", "", *_why(summary, cases)]
    return "\n".join(lines) + "\n"


def _error_table(cases: Sequence[Case], mode: str) -> list[str]:
    figures = "/".join(FIGURES)
    headings = ["configuration", "load", *(f"{latency.upper()} {figures}" for latency in LATENCIES)]
    headings += ["E2E mean [95 %]", "tokens/s", "τ [95 %]", "pace decode/prompt"]
    lines = [
        "| " + " | ".join(headings) + " |",
        "|---|" + "---:|" * (len(headings) - 1),
    ]
    for case in cases:
        found = case.errors[mode]
        cells = [case.setup.label, f"{case.load:g}"]
        for latency in LATENCIES:
            cells.append(" / ".join(f"{found[f'{latency}_{figure}'].error_pct:+.1f}" for figure in FIGURES))
        cells += [_interval(found["e2e_mean"]), f"{found[THROUGHPUT].error_pct:+.1f}", _interval(found[TAU])]
        cells.append(" / ".join(f"{pace:+.1f}" for pace in case.pace_pct))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _interval(error: Error) -> str:
    return f"{error.error_pct:+.1f} [{error.low_pct:+.1f}, {error.high_pct:+.1f}]"


def _mode_table(summary: Mapping[str, Any], floor: Mapping[str, float] | None) -> list[str]:
    names = {
        "predicted": "predicted: arrivals and lengths alone",
        "paced": "the same at the machine's pace",
        "acceptance": "and with acceptance replayed: the cost model alone",
        "plans": "plans replayed: the control path alone",
        "positions": "predicted with acceptance by draft position, full drafts",
    }
    lines = ["| what is simulated | median error % | worst % | worst throughput % |", "|---|---:|---:|---:|"]
    rows = [(names[mode], found) for mode, found in summary["modes"].items()]
    if floor:
        rows.append((f"nothing: {summary['repeat_of']} measured again", summary["repeat"]))
    for name, found in rows:
        lines.append(f"| {name} | {found['median']:.2f} | {found['worst']:.2f} | {found['throughput']:.2f} |")
    return lines


def parts_of(case: Case, name: str) -> dict[str, float]:
    """The error of a statistic, signed per cent, taken apart: what goes at the machine's pace, what goes when
    acceptance is as recorded, what goes when the seconds are as well, and what stays."""
    predicted, paced, accepted, plans = (
        case.errors[mode][name].error_pct for mode in ("predicted", "paced", "acceptance", "plans")
    )
    return {
        "pace": predicted - paced,
        "acceptance": paced - accepted,
        "cost": accepted - plans,
        "control": plans,
    }


def _why(summary: Mapping[str, Any], cases: Sequence[Case]) -> list[str]:
    sizes = {
        part: float(np.mean([abs(parts_of(case, name)[part]) for case in cases for name in NAMES]))
        for part in _PARTS
    }
    total = sum(sizes.values()) or 1.0
    shares = ", ".join(f"{part} {sizes[part] / total:.0%} ({sizes[part]:.1f} points)" for part in _PARTS)
    lines = [f"* Where the errors come from, by mean size over all figures: {shares}."]
    for setup in dict.fromkeys(case.setup for case in cases):
        own = [case for case in cases if case.setup == setup]
        biases = ", ".join(
            f"{case.step_bias_pct:+.1f} % at {case.load:g} ({case.decode_bias_pct:+.1f} decoding, "
            f"{case.prompt_bias_pct:+.1f} with prompts)"
            for case in own
        )
        typical = float(np.median([case.step_error_pct for case in own]))
        lines.append(
            f"* {setup.label}: predicted over measured seconds of the recorded steps {biases}; "
            f"a single step is off by {typical:.1f} % (median)."
        )
    worst = sorted(
        ((case, name) for case in cases for name in NAMES),
        key=lambda pair: -abs(pair[0].errors["predicted"][pair[1]].error_pct),
    )
    lines += [_furthest(case, name) for case, name in worst[:_NUM_WORST]]
    different = summary["num_steps_different"]
    lines.append(
        f"* The scheduler, fed with the recorded outcomes, made all {summary['num_plans_equal']} recorded plans again, "
        "array for array. Fed with arrivals, recorded seconds and acceptance, the simulated engine took "
        + (f"{different} steps of another size." if different else "the same steps throughout.")
    )
    return lines


def _furthest(case: Case, name: str) -> str:
    """One of the largest errors, and which part of the prediction it is due to."""
    error, parts = case.errors["predicted"][name], parts_of(case, name)
    largest = max(_PARTS, key=lambda part: abs(parts[part]))
    listed = ", ".join(f"{part} {parts[part]:+.1f}" for part in _PARTS)
    return (
        f"* {case.setup.label} at {case.load:g}, {name.replace('_', ' ')}: {_interval(error)} % = {listed}: "
        f"{_reason(case, largest, parts[largest])}."
    )


def _reason(case: Case, part: str, points: float) -> str:
    """What lies behind the largest part of an error."""
    if part == "acceptance":
        tau = case.errors["predicted"][TAU].error_pct
        return (
            f"mostly the requests' luck with their drafts, which the fitted ones do not tell (τ {tau:+.1f} %)"
        )
    if part == "control":
        return "mostly the simulated main loop, which is timed otherwise than the engine's"
    bias = case.step_bias_pct if part == "cost" else -float(np.mean(case.pace_pct))
    direction = "faster" if bias > 0.0 else "slower"
    if part == "pace":
        return f"mostly the machine, which was {abs(bias):.1f} % {direction} than in the fitted runs"
    if abs(bias) < _NOTICEABLE_PCT:
        return "mostly the seconds of single steps, which are right on the whole but not for each size"
    if (bias > 0.0) != (points > 0.0):
        return "mostly the seconds of steps, wrong by kind: see the biases above"
    return f"mostly the steps, which were {abs(bias):.1f} % {direction} than the fixed passes tell"
