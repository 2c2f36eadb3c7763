"""Should I speculate? With what, how many drafts, up to which load, and which command checks it: a page in seconds.

Formulas over the chip's cost model say what a load does to a batch and to the time per token, with and without drafts
(``sim.mean_field``); cost models within their stated errors and acceptance rates within theirs give the intervals; a
short simulation of the real scheduler stands beside it.

    python -m specdec.run +experiment=advise hardware=l40s experiment.rate_per_s=3
    python -m specdec.run +experiment=advise experiment.tasks='{code: 0.7, chat: 0.3}' experiment.drafts=[eagle,lookup]
    python -m specdec.run +experiment=advise experiment.drafts=[lookup] experiment.acceptance_run=runs/quickstart/RUN
    python -m specdec.run +experiment=advise experiment.drafts=[lookup] experiment.profile=FOLDER_OF_CALIBRATE
    python -m specdec.run +experiment=advise experiment.drafts=[eagle] experiment.rates=[0.8,0.75,0.7] hardware=h100
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markdown import Markdown

from experiments import common, simulations
from experiments.advice_page import command, page
from experiments.devices import Device, device_of, mix_of
from experiments.measured_acceptance import Acceptance, acceptance_of
from sim.closed_form import FloatArray
from sim.cluster_spec import ClusterSpec, ReplicaSpec
from sim.cost_model import CostModel
from sim.hardware import Hardware, load_hardware
from sim.mean_field import MeanField, Mix, break_even_rate
from sim.simulation import simulate
from sim.speculative_step import EAGLE, LOOKUP, Drafts, draft_shape, step_seconds
from specdec import plots_extrapolation
from specdec.config import Config
from specdec.report import summary_table
from specdec.scheduler import SchedulerConfig
from specdec.tracking import Run
from specdec.tree import choose_tree
from specdec.workload import FixedLengths, Poisson, SyntheticSource, azure_like

LEVEL = (5.0, 95.0)
_SIMULATED = 400
_BLOCK, _MAX_MODEL_LEN = 16, 32_768
COLUMNS = {
    "draft": "draft",
    "tokens": "draft tokens",
    "gain": "gain ×",
    "gain_low": "from",
    "gain_high": "to",
    "break_even_per_s": "loss from (req/s)",
    "capacity_gain": "load within SLO ×",
    "verdict": "speculate",
}


@dataclass(frozen=True)
class Option:
    """One way to draft at the load that was asked about.

    Attributes:
        drafts, tokens: what each row drafts, expected tokens of a step.
        gain: time per token of plain decoding / with speculation, at this load; ``inf`` if only speculation serves it,
            NaN if neither does.
    """

    device: Device
    acceptance: Acceptance
    drafts: Drafts
    tokens: float
    plain: MeanField
    fast: MeanField
    gain: float

    @property
    def is_tree(self) -> bool:
        return self.drafts.nodes > self.drafts.depth


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    chip = _chip(config)
    rate = options.rate_per_s / options.num_replicas
    mix = mix_of(options.lengths, options.prompt_len, options.output_len)
    plain_device = _device(options, chip, LOOKUP, None)
    degree = plain_device.tensor_parallel
    accepted = {draft: acceptance_of(options, draft) for draft in options.drafts}
    found = [
        best_option(options, plain_device, _device(options, chip, draft, degree), accepted[draft], mix, rate)
        for draft in options.drafts
    ]
    rows: list[dict[str, Any]] = []
    with common.progress(run) as bar:
        task = bar.add_task("intervals", total=len(found) * options.num_draws)
        for option in found:
            draws = _draws(
                option, plain_device, rate, options.num_draws, config.seed, lambda: bar.advance(task)
            )
            rows.append(describe(option, draws, rate, options))
    order = sorted(range(len(rows)), key=lambda index: -_rank(rows[index]["gain"]))
    best, row = found[order[0]], rows[order[0]]
    row["simulated"] = simulated(options, best, plain_device, rate, config.seed)
    summary: dict[str, Any] = {
        "speculate": row["verdict"],
        "chip": chip.name,
        "tensor_parallel": degree,
        "model": options.model,
        "timings": plain_device.origin,
        "rate_per_s": options.rate_per_s,
        "rate_per_replica": rate,
        "best": row,
        "options": [rows[index] for index in order],
        "plain": _point(best.plain, rate),
        "speculative": _point(best.fast, rate),
        "assumptions": assumptions(options, best, plain_device),
        "command": command(options, best.device.draft, best.drafts.nodes, best.plain.at(rate).batch),
    }
    text = page(summary, options)
    (run.directory / "advice.md").write_text(text)
    run.console.print(Markdown(text))
    run.console.print(summary_table([rows[index] for index in order], COLUMNS))
    run.log_table(
        "options", [{key: value for key, value in each.items() if key != "simulated"} for each in rows]
    )
    run.log_figure("load", _figure(best, rate, row))
    return summary


def _chip(config: Config) -> Hardware:
    """The sheet that ``calibrate`` wrote beside a profile, or the configured chip's."""
    profile = config.experiment.profile
    sheet = Path(profile) / "hardware.yaml" if profile is not None else None
    return load_hardware(sheet) if sheet is not None and sheet.is_file() else simulations.hardware(config)


def _device(options: Any, chip: Any, draft: str, degree: int | None) -> Device:
    """The chip's, or that of the profile."""
    model = None
    if options.profile is not None:
        model = CostModel.load(options.profile)
        made_for = model.metadata.get("model")
        if made_for not in (None, options.model):
            raise ValueError(
                f"experiment.profile={options.profile} is of {made_for}, not of experiment.model={options.model}: "
                f"give experiment.model={made_for}, or another profile"
            )
        drafts = draft != LOOKUP and (draft != EAGLE or options.draft_cost_ratio is None)
        if drafts and model.operators.draft_step is None:
            raise ValueError(
                f"experiment.profile={options.profile} has no times of a drafter, which draft {draft} needs: give "
                "experiment.draft_cost_ratio with experiment.drafts=[eagle], or experiment.drafts=[lookup]"
            )
    others: dict[str, Any] = {"cost_model": model}
    if degree is not None:
        others["tensor_parallel"] = degree
    return device_of(options, chip, options.model, draft, **others)


def best_option(
    options: Any, plain_device: Device, device: Device, acceptance: Acceptance, mix: Mix, rate: float
) -> Option:
    """The draft length, or the tree, with the shortest time per token at ``rate`` requests a second on a replica."""
    plain = _field(options, plain_device, mix)
    candidates = [
        (Drafts.chain(k), acceptance.tokens(k))
        for k in range(1, min(options.max_drafts, acceptance.survival.size) + 1)
    ]
    if acceptance.rank_rates:
        candidates += _tree(options, device, acceptance.rank_rates, mix, plain.at(rate).batch)
    fields = [_field(options, device, mix, drafts, tokens) for drafts, tokens in candidates]
    times = [field.at(rate).tpot_s for field in fields]
    if not any(map(math.isfinite, times)):  # none serves the load: the one that serves the most
        times = [-field.capacity_per_s for field in fields]
    chosen = int(np.argmin(times))
    drafts, tokens = candidates[chosen]
    return Option(
        device, acceptance, drafts, tokens, plain, fields[chosen], _gain(plain, fields[chosen], rate)
    )


def _field(
    options: Any, device: Device, mix: Mix, drafts: Drafts | None = None, tokens: float = 1.0
) -> MeanField:
    drafts = drafts or Drafts()
    rows = min(options.max_num_seqs, device.kv_tokens / (mix.context + 1 + drafts.nodes))
    return MeanField(
        device.model, mix, max(rows, 1.0), drafts, tokens, draft_cost_ratio=device.draft_cost_ratio
    )


def _gain(plain: MeanField, fast: MeanField, rate: float) -> float:
    before, after = plain.at(rate).tpot_s, fast.at(rate).tpot_s
    return math.nan if math.isinf(before) and math.isinf(after) else before / after


def _tree(
    options: Any, device: Device, rank_rates: Sequence[float], mix: Mix, batch: float
) -> list[tuple[Drafts, float]]:
    """The tree with the least time per token at the batch that plain decoding has, if it has any nodes."""
    rows = max(1.0, round(min(batch, options.max_num_seqs)))
    depth = options.max_drafts
    ratio = device.draft_cost_ratio
    verify_s = [
        float(
            step_seconds(device.model, rows, mix.context, Drafts(min(1, nodes), nodes), draft_cost_ratio=0.0)
        )
        for nodes in range(options.max_nodes + 1)
    ]
    pass_s = float(
        step_seconds(device.model, rows, mix.context, Drafts.chain(1), draft_cost_ratio=ratio)
        - step_seconds(device.model, rows, mix.context, Drafts.chain(1), draft_cost_ratio=0.0)
    )
    rates = np.tile(np.array(rank_rates, np.float64), (depth, 1))
    choice = choose_tree(rates, max(pass_s, 0.0), np.array(verify_s), options.max_nodes, depth)
    return [(Drafts(choice.tree.max_depth, choice.size), choice.tokens)] if choice.size else []


def _draws(
    option: Option, plain_device: Device, rate: float, num: int, seed: int, advance: Any
) -> list[tuple[float, float, float]]:
    """(gain, load at which it turns into a loss, gain in capacity) under cost models and rates that may be true."""
    found: list[tuple[float, float, float]] = []
    for draw in range(num):
        # The same errors for both: the same kernels run.
        plain_rng, fast_rng = (np.random.default_rng([seed, draw]) for _ in range(2))
        plain_model, fast_model = plain_device.drawn(plain_rng).model, option.device.drawn(fast_rng).model
        survival = option.acceptance.drawn(np.random.default_rng([seed, draw, 1]))
        tokens = 1.0 + float(survival[: option.drafts.depth].sum())
        if option.is_tree:  # what chance does to the chain, it does to the tree
            tokens = 1.0 + (option.tokens - 1.0) * (tokens - 1.0) / (
                option.acceptance.tokens(option.drafts.depth) - 1.0
            )
        plain = option.plain.with_model(plain_model)
        fast = option.fast.with_model(fast_model, tokens)
        found.append(
            (
                _gain(plain, fast, rate),
                break_even_rate(plain, fast),
                fast.capacity_per_s / plain.capacity_per_s,
            )
        )
        advance()
    return found


def describe(
    option: Option, draws: Sequence[tuple[float, float, float]], rate: float, options: Any
) -> dict[str, Any]:
    """The row of one option."""
    gains = np.array([draw[0] for draw in draws])
    low, high = interval(gains[~np.isnan(gains)], option.gain)
    even = break_even_rate(option.plain, option.fast)
    even_low, even_high = interval(np.array([draw[1] for draw in draws]), even)
    slo = {"ttft_s": options.slo_ttft_s, "tpot_s": options.slo_tpot_s}
    before, after = option.plain.capacity_within(**slo), option.fast.capacity_within(**slo)
    return {
        "draft": option.device.draft,
        "with": option.device.describe_draft(),
        "tokens": f"tree of {option.drafts.nodes}" if option.is_tree else str(option.drafts.nodes),
        "num_drafts": option.drafts.nodes,
        "depth": option.drafts.depth,
        "tau": option.tokens,
        "gain": option.gain,
        "gain_low": low,
        "gain_high": high,
        "break_even_per_s": even,
        "break_even_low_per_s": even_low,
        "break_even_high_per_s": even_high,
        "plain_capacity_per_s": option.plain.capacity_per_s,
        "slo_capacity_plain_per_s": before,
        "slo_capacity_per_s": after,
        "capacity_gain": after / before if before else math.inf,
        "acceptance": option.acceptance.source,
        "is_assumed": option.acceptance.is_assumed,
        "verdict": verdict(option.gain, low, high),
    }


def interval(values: FloatArray, point: float) -> tuple[float, float]:
    """From the 5 % to the 95 % quantile of ``values``, widened to ``point``."""
    known = np.sort(values[~np.isnan(values)])
    if known.size == 0 or math.isnan(point):
        return point, point
    # Quantiles that are values themselves: between a number and infinity there is none.
    low, high = (float(known[round(share / 100.0 * (known.size - 1))]) for share in LEVEL)
    return min(low, point), max(high, point)


def verdict(gain: float, low: float, high: float) -> str:
    """yes, no, or what to do if the interval has 1 in it."""
    if math.isnan(gain):
        return "overloaded"
    if low > 1.0:
        return "yes"
    if gain <= 1.0:
        return "no"
    return "measure first"


def _rank(gain: float) -> float:
    return -math.inf if math.isnan(gain) else gain


def _point(field: MeanField, rate: float) -> dict[str, float]:
    point = field.at(rate)
    return {"batch": point.batch, "tpot_s": point.tpot_s, "ttft_s": point.ttft_s}


def simulated(options: Any, option: Option, plain_device: Device, rate: float, seed: int) -> dict[str, Any]:
    """Plain decoding and the option in the simulator, 400 requests on one replica each."""
    if option.is_tree or option.device.draft_cost_ratio is not None:
        return {"reason": "the simulator drafts chains, with times of a drafter's own"}
    survival = option.acceptance.survival[: option.drafts.depth]
    rates = survival / np.concatenate([[1.0], survival[:-1]])
    speculation = {"name": "fixed", "max_drafts": option.drafts.depth}
    kinds = {"plain": (plain_device, "off"), "speculative": (option.device, speculation)}
    lengths = (
        FixedLengths(options.prompt_len, options.output_len)
        if options.lengths == "fixed"
        else azure_like(options.lengths)
    )
    source = SyntheticSource(Poisson(rate), lengths, _SIMULATED, seed)
    found: dict[str, Any] = {"num_requests": _SIMULATED}
    for name, (device, controller) in kinds.items():
        scheduler = SchedulerConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=simulations.DEFAULT_BATCHED_TOKENS,
            num_blocks=device.kv_tokens // _BLOCK,
            block_size=_BLOCK,
            max_model_len=_MAX_MODEL_LEN,
        )
        replica = ReplicaSpec(
            scheduler,
            device.model,
            speculation=controller,
            acceptance={"name": "positional", "rates": np.nan_to_num(rates).tolist()},
            tensor_parallel=device.tensor_parallel,
        )
        result = simulate(source, ClusterSpec.of(replica), seed=seed)
        latency = result.summary.get("latency", {})
        found[name] = {
            "stable": result.stable,
            "tpot_mean_s": latency.get("tpot_s", {}).get("mean"),
            "tpot_p99_s": latency.get("tpot_s", {}).get("p99"),
            "ttft_p99_s": latency.get("ttft_s", {}).get("p99"),
        }
    before, after = (found[name]["tpot_mean_s"] for name in kinds)
    return found | {"gain": before / after if before and after else None}


def assumptions(options: Any, option: Option, plain_device: Device) -> list[str]:
    """What the answer rests on that was not measured."""
    listed: list[str] = []
    if option.acceptance.is_assumed:
        listed.append(f"acceptance is not measured: {option.acceptance.source} (± {option.acceptance.std:g})")
    listed += option.acceptance.notes
    if plain_device.origin == "roofline":
        listed.append(
            f"no timings of {plain_device.chip.name} were measured: its sheet and a roofline stand in"
        )
    if option.device.draft_cost_ratio is not None:
        listed.append(f"a pass of the drafter takes {option.device.draft_cost_ratio:g} plain steps, as given")
    elif option.device.draft == LOOKUP:
        listed.append("lookup costs no device time, and the host hides it")
    elif draft_shape(option.device.draft, option.device.target) is not None:
        listed.append("the drafter's times are composed from the chip's, not measured as a whole")
    if options.profile is not None:
        listed.append(f"the memory is that of {plain_device.chip.name}'s sheet, the times are the profile's")
    listed += [
        "attention of several query tokens over a long context is modelled, not measured",
        "arrivals are Poisson, the batch is its mean; drafts of a step are accepted independently of other steps",
    ]
    return listed


def _figure(option: Option, rate: float, row: dict[str, Any]) -> Any:
    top = max(option.plain.capacity_per_s, option.fast.capacity_per_s)
    loads = np.linspace(0.01, 0.995, 120) * top
    curves = {
        "plain": [option.plain.at(float(load)).tpot_s for load in loads],
        f"{option.device.draft}, {row['tokens']}": [option.fast.at(float(load)).tpot_s for load in loads],
    }
    return plots_extrapolation.time_over_load(
        loads, {name: np.array(values) for name, values in curves.items()}, rate, row["break_even_per_s"]
    )
