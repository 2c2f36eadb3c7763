"""A recorded vLLM run against the same run simulated from its workload.

The scheduler is ours with vLLM's settings, the seconds come from the operator profile of the same model on the same
card, and nothing is fitted to the run. Of the workload it takes arrivals, lengths and, where that is known, which
prompts begin alike. It is simulated up to three times: with the KV block count that the run had, with the count that
follows from the card's memory and the settings, and from arrivals and lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.cost_model import CostModel
from sim.curves import Curve
from sim.model_shape import PROFILED_SHAPES, ModelShape
from sim.profiles.llmservingsim import OperatorProfile, read_profile
from sim.shared_prompts import PromptSharing, known_sharing, read_workload
from sim.vllm_run import (
    STATISTICS,
    SimulatedRun,
    VllmRun,
    errors_pct,
    expected_kv_blocks,
    read_run,
    read_summary,
    shape_named,
    simulate_run,
    statistics,
)
from specdec import plots_validation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

COLUMNS = {
    "latency": "latency, ms",
    "measured": "measured",
    "simulated": "simulated",
    "error_pct": "error %",
    "other_error_pct": "other simulator %",
    "lengths_alone_error_pct": "lengths alone %",
    "expected_blocks_error_pct": "expected blocks %",
}
_RATE_NAMES = ("requests_per_s", "output_tokens_per_s")


@dataclass(frozen=True)
class Comparison:
    """A recorded run and its simulations.

    Attributes:
        lengths_alone: ``None`` where it is not known what prompts share, so that ``simulated`` is just that.
        expected: ``None`` where the card's memory is not recorded.
    """

    recorded: VllmRun
    simulated: SimulatedRun
    num_blocks: int
    sharing: PromptSharing | None
    lengths_alone: SimulatedRun | None
    expected: SimulatedRun | None
    expected_blocks: int | None


def run(config: Config, run: Run) -> tuple[dict[str, Any], str]:
    """The summary, whose ``errors_pct`` are signed, and the section of the report."""
    options = config.validate
    assert options.run is not None and options.profile is not None
    recorded = read_run(options.run)
    shape = _shape(options.model, recorded)
    profile = read_profile(options.profile, recorded.settings.tensor_parallel)
    cost_model = operator_cost_model(profile, shape)
    sharing = _sharing(options.workload, recorded)
    compared = _compare(recorded, shape, cost_model, options.num_blocks, sharing)
    rows = _rows(compared, read_summary(options.run))
    title = (
        f"{recorded.model} on {recorded.device}, vLLM {recorded.version}, {recorded.arrival_s.size} requests"
    )
    run.console.print(summary_table(rows, COLUMNS, title=title))
    run.log_table("latencies", rows)
    _draw(run, compared)
    summary = _summary(compared, profile, cost_model)
    for name, error in summary["throughput_errors_pct"].items():
        run.console.print(f"{name.replace('_', ' ')}: {error:+.2f} %")
    metrics = {f"errors_pct/{name}": value for name, value in summary["errors_pct"].items()}
    run.log_metrics(metrics | {f"errors_pct/{n}": v for n, v in summary["throughput_errors_pct"].items()})
    return summary, _page(title, rows, summary)


def operator_cost_model(profile: OperatorProfile, shape: ModelShape) -> CostModel:
    """Of the profiled model; devices that share it reduce over the link of their chip.

    Raises:
        ValueError: several devices of a chip whose link is not known.
    """
    if profile.tensor_parallel == 1:
        return profile.cost_model(shape.num_layers)
    return profile.cost_model(
        shape.num_layers,
        all_reduce=_all_reduce(profile, shape),
        reduced_bytes_per_token=2.0 * shape.hidden_size,
    )


def _all_reduce(profile: OperatorProfile, shape: ModelShape) -> Curve:
    from sim.hardware import load_hardware
    from sim.profiles.chips import chip_cost_model
    from sim.vllm_run import chip_named

    name = chip_named(profile.chip)
    if name is None:
        raise ValueError(
            f"the profile is of {profile.tensor_parallel} {profile.chip}, of which conf/hardware has no sheet: the "
            "all-reduce among them cannot be told"
        )
    model = chip_cost_model(load_hardware(name), shape, tensor_parallel=profile.tensor_parallel)
    assert model.operators.all_reduce is not None
    return model.operators.all_reduce


def _shape(name: str | None, recorded: VllmRun) -> ModelShape:
    if name is None:
        return shape_named(recorded.model)
    if name not in PROFILED_SHAPES:
        raise ValueError(f"validate.model={name} is not known: known are {', '.join(PROFILED_SHAPES)}")
    return PROFILED_SHAPES[name]


def _sharing(workload: str | None, recorded: VllmRun) -> PromptSharing | None:
    """What the run's prompts have in common: of its workload's file, or of a public workload that is known."""
    count = recorded.input_tokens.size
    if workload is None:
        known = known_sharing(recorded.dataset_hash)
        return known.first(count) if known else None
    sharing, lengths = read_workload(workload)
    of_run = zip(recorded.input_tokens.tolist(), recorded.output_tokens.tolist(), strict=True)
    if lengths[:count] != list(of_run):
        raise ValueError(f"validate.workload={workload} is not what the run was fed with: its lengths differ")
    return sharing.first(count)


def _compare(
    recorded: VllmRun,
    shape: ModelShape,
    cost_model: CostModel,
    num_blocks: int | None,
    sharing: PromptSharing | None,
) -> Comparison:
    expected = None if recorded.memory_bytes is None else expected_kv_blocks(recorded, shape)
    blocks = num_blocks or recorded.num_blocks or expected
    if blocks is None:
        raise ValueError("the run's meta.json has no kv_cache.num_gpu_blocks: give validate.num_blocks")
    simulated = simulate_run(recorded, cost_model, blocks, sharing)
    return Comparison(
        recorded=recorded,
        simulated=simulated,
        num_blocks=blocks,
        sharing=sharing,
        lengths_alone=simulate_run(recorded, cost_model, blocks) if sharing else None,
        expected=simulate_run(recorded, cost_model, expected, sharing) if expected else None,
        expected_blocks=expected,
    )


def _rows(compared: Comparison, published: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """A row per latency; where a simulator's own figures came with the run, its error beside ours."""
    real, ours = statistics(compared.recorded.latencies), statistics(compared.simulated.latencies)
    errors = errors_pct(compared.simulated.latencies, compared.recorded.latencies)
    expected, alone = (
        errors_pct(other.latencies, compared.recorded.latencies) if other else {}
        for other in (compared.expected, compared.lengths_alone)
    )
    rows: list[dict[str, Any]] = []
    for name in real:
        row = {
            "latency": name.replace("_", " "),
            "measured": 1e3 * real[name],
            "simulated": 1e3 * ours[name],
            "error_pct": errors[name],
            "other_error_pct": None,
            "lengths_alone_error_pct": alone.get(name),
            "expected_blocks_error_pct": expected.get(name),
        }
        if name in published:
            row["other_error_pct"] = 100.0 * (published[name][1] / published[name][0] - 1.0)
        rows.append(row)
    return rows


def _rates(recorded: VllmRun, duration_s: float) -> dict[str, float]:
    values = (recorded.arrival_s.size / duration_s, float(recorded.output_tokens.sum()) / duration_s)
    return dict(zip(_RATE_NAMES, values, strict=True))


def _summary(compared: Comparison, profile: OperatorProfile, cost_model: CostModel) -> dict[str, Any]:
    recorded, simulated = compared.recorded, compared.simulated
    real = _rates(recorded, recorded.duration_s)

    def rate_errors(other: SimulatedRun) -> dict[str, float]:
        ours = _rates(recorded, other.duration_s)
        return {name: 100.0 * (ours[name] / real[name] - 1.0) for name in real}

    summary: dict[str, Any] = {
        "model": recorded.model,
        "device": recorded.device,
        "vllm_version": recorded.version,
        "num_requests": int(recorded.arrival_s.size),
        "num_blocks": compared.num_blocks,
        "errors_pct": errors_pct(simulated.latencies, recorded.latencies),
        "throughput": real,
        "throughput_errors_pct": rate_errors(simulated),
        "num_preemptions": simulated.num_preemptions,
        "num_steps": simulated.num_steps,
        "utilisation": simulated.busy_s / simulated.duration_s,
        "shared_prompts": None,
        "expected_blocks": None,
        "cost_model": {
            "source": profile.source,
            "held_out": profile.held_out(),
            "extrapolated": cost_model.extrapolated,
        },
    }

    def errors(other: SimulatedRun) -> dict[str, Any]:
        return {
            "errors_pct": errors_pct(other.latencies, recorded.latencies),
            "throughput_errors_pct": rate_errors(other),
        }

    if compared.sharing is not None and compared.lengths_alone is not None:
        summary["shared_prompts"] = {
            "source": compared.sharing.source,
            "num_requests": sum(
                tokens >= recorded.settings.block_size for *_, tokens in compared.sharing.shared
            ),
            "lengths_alone": errors(compared.lengths_alone),
        }
    if compared.expected is not None:
        summary["expected_blocks"] = {"num_blocks": compared.expected_blocks, **errors(compared.expected)}
    return summary


def _draw(run: Run, compared: Comparison) -> None:
    real = compared.recorded.latencies
    run.log_figure("scatter", plots_validation.latency_scatter(real, compared.simulated.latencies))
    lines = {"measured": real, f"simulated, {compared.num_blocks} KV blocks": compared.simulated.latencies}
    if compared.expected is not None and compared.expected_blocks != compared.num_blocks:
        lines[f"simulated, {compared.expected_blocks} KV blocks expected"] = compared.expected.latencies
    run.log_figure("cdf", plots_validation.latency_cdfs(lines))


def _page(title: str, rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The section of the report."""
    num_statistics, within = len(STATISTICS), sum(abs(row["error_pct"]) <= 1.0 for row in rows)
    worst = max(rows, key=lambda row: abs(row["error_pct"]))
    expected, shared = summary["expected_blocks"], summary["shared_prompts"]
    lines = [
        f"## {title}",
        "",
        "Simulated from arrivals and lengths "
        + (
            f"and from which prompts begin alike ({shared['num_requests']} share a KV block or more with an earlier "
            f"one; {shared['source']})"
            if shared
            else "alone"
        )
        + ": this scheduler with vLLM's settings, seconds from the operator "
        f"profile ({summary['cost_model']['source']}), nothing fitted to the run. KV blocks: {summary['num_blocks']}, "
        "as the run had"
        + (f"; {expected['num_blocks']} follow from memory and settings." if expected else "."),
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
    ]
    for row in rows:
        cells = [row["latency"], f"{row['measured']:.1f}", f"{row['simulated']:.1f}"]
        for name in list(COLUMNS)[3:]:
            cells.append("–" if row[name] is None else f"{row[name]:+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    rates = summary["throughput_errors_pct"]
    lines += [
        "",
        f"Output tokens per second {rates['output_tokens_per_s']:+.2f} %. {within} of {3 * num_statistics} latencies "
        f"are within 1 %; the furthest off is {worst['latency']} ({worst['error_pct']:+.1f} %). "
        f"{summary['num_preemptions']} preemptions, utilisation {summary['utilisation']:.2f}.",
        "",
        "![predicted against measured](plots/scatter.png)",
        "",
        "![distributions](plots/cdf.png)",
        "",
        "### Where it can be wrong",
        "",
        *(
            []
            if shared
            else [
                "* Prompts that begin alike share KV blocks in the run, but lengths do not tell; here every request's "
                "tokens are its own, so more is computed and less fits. validate.workload=FILE tells.",
            ]
        ),
        "* A row's attention counts with the mean context of the rows; a few far longer contexts take more.",
        "* Kernels are added up without gaps, and the host is taken to keep up. The first steps of a real run, before "
        "it is warm, take longer.",
        "* Where memory is short, one admission more or less moves whole waves of requests, which shows in the "
        "percentiles between two waves first.",
        "",
        "Errors of the profile's curves on sizes left out (median, 90th percentile):",
        "",
    ]
    for name, error in summary["cost_model"]["held_out"].items():
        lines.append(f"* {name.replace('_', ' ')}: {100 * error['median']:.1f} %, {100 * error['p90']:.1f} %")
    return "\n".join(lines) + "\n"
