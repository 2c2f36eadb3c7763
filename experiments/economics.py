"""What does twice as good a technique do to the cost of a token? Speculation, quantisation, batching, routing, by chip.

For each chip the highest load within the SLO (mean latencies, by formulas) gives the cost per million output tokens:
rent of the chips over tokens. Then one technique at a time gets better by ``experiment.gain`` (2):

* speculation: that many tokens per verification, with the draft length that suits the chip best;
* weights: that many times smaller, computed as before;
* KV cache: that many times smaller;
* batching: a policy that holds that many times as many requests at once as ``max_rows``;
* routing: the large model answers that much less, a small one on the same kind of chip the rest.

The ranges are over cost models within their stated errors.

    python -m specdec.run +experiment=economics
    python -m specdec.run +experiment=economics experiment.chips=[h100,l40s] experiment.slo_tpot_s=0.02
    python -m specdec.run +experiment=economics experiment.model=llama-3.1-70b experiment.small_model=llama-3.1-8b
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments import common
from experiments.advise import interval
from experiments.assumed_acceptance import rate_of
from experiments.devices import Device, make_device, mix_of
from sim.economics import ChipPrice, cost_per_million_tokens_usd
from sim.hardware import Hardware, load_hardware
from sim.mean_field import MeanField, Mix
from sim.model_shape import MODEL_SHAPES, ModelShape
from sim.perturbation import perturbed
from sim.speculative_step import LOOKUP, Drafts
from specdec import plots_extrapolation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

BASE = "as it is"
SPECULATION, WEIGHTS, KV, BATCHING, ROUTING = "speculation", "weights", "KV cache", "batching", "routing"
TECHNIQUES = (SPECULATION, WEIGHTS, KV, BATCHING, ROUTING)
_LENGTHS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Serving:
    """A way to serve on one chip: what the load is held against, in shares of the tokens.

    Attributes:
        fields: replicas with the share of the output tokens that each answers.
        chips: of a replica.
    """

    chip: Hardware
    fields: tuple[tuple[float, MeanField], ...]
    chips: int

    def cost_usd(self, slo: dict[str, float]) -> float:
        """Per million output tokens that count; ``inf`` where the SLO cannot be kept."""
        price = ChipPrice(self.chip.price_per_hour_usd, self.chip.tdp_w, None)
        total = 0.0
        for share, field in self.fields:
            tokens = field.capacity_within(**slo) * field.mix.output
            total += share * float(cost_per_million_tokens_usd(price, self.chips, tokens))
        return total

    def drawn(self, seed: int, draw: int) -> Serving:
        """With other cost models; the same errors for every technique."""
        fields = tuple(
            (share, field.with_model(perturbed(field.model, np.random.default_rng([seed, draw]))))
            for share, field in self.fields
        )
        return replace(self, fields=fields)


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    chips = [load_hardware(name) for name in options.chips]
    for chip in chips:
        if chip.price_per_hour_usd is None:
            raise ValueError(
                f"price_per_hour_usd of {chip.name} is null: give a copy of its sheet with a price in "
                "experiment.chips, or leave the chip out"
            )
    slo = {"ttft_s": options.slo_ttft_s, "tpot_s": options.slo_tpot_s}
    mix = mix_of(options.lengths)
    rows: list[dict[str, Any]] = []
    with common.progress(run) as bar:
        task = bar.add_task("chips", total=len(chips))
        for chip in chips:
            rows += chip_rows(options, chip, mix, slo, config.seed)
            bar.advance(task)
    shown = [_by_chip(rows, chip.name) for chip in chips]
    columns = {"chip": "chip", "chips": "×", "base": "$ per 1M tokens", **{name: name for name in TECHNIQUES}}
    title = (
        f"{options.model}, {options.lengths}, SLO {options.slo_ttft_s:g} s and {1e3 * options.slo_tpot_s:g} ms: "
        f"times cheaper with each technique {options.gain:g} × as good"
    )
    run.console.print(summary_table(shown, columns, title=title))
    run.log_table("economics", rows)
    run.log_figure("economics", plots_extrapolation.technique_gains(rows, TECHNIQUES, options.gain))
    return {
        "gain": options.gain,
        "chips": {row["chip"]: row for row in shown},
        "rows": rows,
        "assumptions": [
            "the fleet is as large as the load needs: cost at the highest load within the SLO (mean latencies)",
            f"a policy that batches badly holds {options.max_rows} requests, the better one {options.gain:g} × as many",
            f"a small model answers as well as the large one but for {options.escalation:.0%}, which is asked again",
            "smaller weights and KV entries lose no quality and are computed in the old data type",
        ],
    }


def chip_rows(
    options: Any, chip: Hardware, mix: Mix, slo: dict[str, float], seed: int
) -> list[dict[str, Any]]:
    """A row for each technique on one chip: cost, how many times cheaper that is, and the interval of it."""
    ways = servings(options, chip, mix, slo)
    base = ways[BASE].cost_usd(slo)
    costs = {name: way.cost_usd(slo) for name, way in ways.items()}
    drawn: dict[str, list[float]] = {name: [] for name in TECHNIQUES}
    for draw in range(options.num_draws):
        other_base = ways[BASE].drawn(seed, draw).cost_usd(slo)
        for name in TECHNIQUES:
            drawn[name].append(_cheaper(other_base, ways[name].drawn(seed, draw).cost_usd(slo)))
    rows: list[dict[str, Any]] = []
    for name in TECHNIQUES:
        cheaper = _cheaper(base, costs[name])
        low, high = interval(np.array(drawn[name]), cheaper)
        rows.append(
            {
                "chip": chip.name,
                "chips": ways[BASE].chips,
                "technique": name,
                "base_usd": base,
                "cost_usd": costs[name],
                "cheaper": cheaper,
                "cheaper_low": low,
                "cheaper_high": high,
                "price_per_hour_usd": chip.price_per_hour_usd,
                "price_date": chip.price_date,
            }
        )
    return rows


def _cheaper(base: float, cost: float) -> float:
    """Times; NaN where the SLO cannot be kept either way."""
    if math.isinf(base):
        return math.nan if math.isinf(cost) else math.inf
    return base / cost


def servings(options: Any, chip: Hardware, mix: Mix, slo: dict[str, float]) -> dict[str, Serving]:
    """The base and each technique, on as many chips per replica as the base needs.

    Raises:
        ValueError: the model does not fit on the chip.
    """
    target, gain = MODEL_SHAPES[options.model].stored_as(options.dtype), options.gain
    base = _device(options, chip, target, LOOKUP, options.tensor_parallel)
    degree, rows = base.tensor_parallel, options.max_rows
    plain = _field(base, mix, rows)

    def alone(field: MeanField) -> Serving:
        return Serving(chip, ((1.0, field),), degree)

    light = replace(target, weight_bytes_per_param=target.weight_bytes_per_param / gain)
    slim = replace(target, kv_bytes_per_element=target.kv_bytes_per_element / gain)
    small_shape = MODEL_SHAPES[options.small_model].stored_as(options.dtype)
    small = _field(_device(options, chip, small_shape, LOOKUP, degree), mix, rows)
    fast = _fastest(options, _device(options, chip, target, options.draft, degree), mix, slo)
    # Of the requests, 1 / gain go to the large model, and those that the small one fails at go there too.
    sent = 1.0 - 1.0 / gain
    large_share = 1.0 / gain + sent * options.escalation
    return {
        BASE: alone(plain),
        SPECULATION: alone(fast),
        WEIGHTS: alone(_field(_device(options, chip, light, LOOKUP, degree), mix, rows)),
        KV: alone(_field(_device(options, chip, slim, LOOKUP, degree), mix, rows)),
        BATCHING: alone(_field(base, mix, rows * gain)),
        ROUTING: Serving(chip, ((large_share, plain), (sent, small)), degree),
    }


def _device(
    options: Any, chip: Hardware, target: ModelShape, draft: str, tensor_parallel: int | None
) -> Device:
    return make_device(
        chip,
        target,
        draft,
        tensor_parallel=tensor_parallel,
        dtype=options.dtype,
        memory_utilisation=options.memory_utilisation,
        draft_cost_ratio=options.draft_cost_ratio,
        keep_stored=True,
    )


def _field(
    device: Device, mix: Mix, max_rows: float, drafts: Drafts | None = None, tokens: float = 1.0
) -> MeanField:
    drafts = drafts or Drafts()
    fitting = device.kv_tokens / (mix.context + 1 + drafts.nodes)
    rows = max(1.0, min(max_rows, fitting))
    return MeanField(device.model, mix, rows, drafts, tokens, draft_cost_ratio=device.draft_cost_ratio)


def _fastest(options: Any, device: Device, mix: Mix, slo: dict[str, float]) -> MeanField:
    """``gain`` tokens per verification by the draft length that holds most; the acceptance follows from both."""
    fields = [
        _field(device, mix, options.max_rows, Drafts.chain(k), options.gain) for k in _reachable(options.gain)
    ]
    return max(fields, key=lambda field: field.capacity_within(**slo))


def _reachable(gain: float) -> Iterable[int]:
    """Draft lengths that give so many tokens with an acceptance rate of at most 0.95."""
    return [k for k in _LENGTHS if k + 1 > gain and rate_of(gain, k) <= 0.95]


def _by_chip(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    mine = [row for row in rows if row["chip"] == name]
    found: dict[str, Any] = {"chip": name, "chips": mine[0]["chips"], "base": mine[0]["base_usd"]}
    return found | {row["technique"]: row["cheaper"] for row in mine}
