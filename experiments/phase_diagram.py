"""Where does speculation pay? Speed-up of decoding over batch × acceptance, for chips, models and contexts.

A step of plain decoding and one that verifies k drafts are taken from the cost model, the expected tokens from the
acceptance rate α, and the speed-up is their quotient. The best k ≥ 1 is coloured; lines show where it breaks even, with
the fixed length, and with the other drafts. Blank: the batch does not fit into the memory.

    python -m specdec.run +experiment=phase_diagram
    python -m specdec.run +experiment=phase_diagram experiment.chips=[h100,l40s] experiment.models=[llama-3.1-8b]
    python -m specdec.run +experiment=phase_diagram experiment.drafts=[llama-3.2-1b,lookup] experiment.num_drafts=3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import common
from experiments.devices import Device, describe_draft, device_of
from sim.closed_form import FloatArray, expected_tokens
from sim.speculative_step import Drafts, step_seconds
from specdec import plots_extrapolation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

_FINE = np.linspace(0.0, 1.0, 1001)
_AT_BATCHES = (1, 8, 32, 128)
_AT_ALPHAS = (0.6, 0.8)
COLUMNS = {
    "chip": "chip",
    "model": "model",
    "context": "context",
    "draft": "draft",
    "max_batch": "batch that fits",
    **{f"alpha_at_{batch}": f"α at {batch}" for batch in _AT_BATCHES},
}


@dataclass(frozen=True)
class Panel:
    """One chip, model, context and draft.

    Attributes:
        max_batch: that fits into the memory.
        step_s: float64 [K + 1, B], of verifying 0, 1, … K drafts at each batch; NaN where it does not fit.
    """

    device: Device
    context: int
    batches: FloatArray
    max_batch: int
    step_s: FloatArray

    def speedups(self, alphas: FloatArray) -> FloatArray:
        """float64 [K, A, B], of k = 1, 2, … K."""
        lengths = np.arange(1, len(self.step_s))
        tokens = expected_tokens(alphas[None, :], lengths[:, None])
        return tokens[:, :, None] * self.step_s[0] / self.step_s[1:, None, :]

    def best(self, alphas: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Speed-up and length of the best k >= 1, float64 [A, B]; NaN where the batch does not fit."""
        every = self.speedups(alphas)
        filled = np.where(np.isnan(every), -np.inf, every)
        fits = ~np.isnan(self.step_s[0])
        return np.where(fits, filled.max(axis=0), np.nan), np.where(fits, filled.argmax(axis=0) + 1.0, np.nan)

    def break_even(self, k: int | None = None) -> FloatArray:
        """The acceptance rate from which speculation pays, by batch: of ``k`` drafts or of the best number.

        NaN where it never does, or where the batch does not fit.
        """
        gains = self.best(_FINE)[0] if k is None else self.speedups(_FINE)[k - 1]
        pays = np.nan_to_num(gains, nan=0.0) >= 1.0
        return np.where(pays.any(axis=0), _FINE[pays.argmax(axis=0)], np.nan)

    def last_batch(self, alpha: float) -> float:
        """The largest batch up to which the best k pays at ``alpha``; ``inf`` if it pays as far as it fits."""
        gains = self.best(np.array([alpha]))[0][0]
        loses = gains < 1.0
        if not loses.any():
            return float("inf")
        first = int(loses.argmax())
        return float(self.batches[first - 1]) if first else 0.0


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    wanted = [
        (chip, model, context)
        for chip in options.chips
        for model in options.models
        for context in options.contexts
    ]
    panels: list[Panel] = []
    with common.progress(run) as bar:
        task = bar.add_task("panels", total=len(wanted))
        for place in wanted:
            panels += make_panels(options, *place)
            bar.advance(task)
    rows = [_row(panel) for panel in panels]
    title = "acceptance rate from which speculation pays, by batch (best k)"
    run.console.print(summary_table(rows, COLUMNS, title=title))
    run.log_table("break_even", rows)
    alphas = np.array(options.alphas, np.float64)
    run.log_table("speedups", _cells(panels, alphas, options.num_drafts))
    columns = [f"{model}, context {context}" for model in options.models for context in options.contexts]
    figure = plots_extrapolation.phase_diagram(
        [_drawn(panel, alphas) for panel in panels if panel.device.draft == options.drafts[0]],
        _lines(panels, options.drafts[0], options.num_drafts),
        columns=columns,
        title=f"Where speculation pays: {describe_draft(options.drafts[0], options.draft_cost_ratio)}",
    )
    run.log_figure("phase_diagram", figure)
    return {
        "timings": sorted({panel.device.origin for panel in panels}),
        "assumptions": [
            "all requests of a batch have the same context; prompts are computed elsewhere",
            "drafts are accepted independently of each other with rate α",
            "attention of several query tokens over a long context is modelled, not measured",
        ],
        "num_drafts": options.num_drafts,
        "panels": rows,
    }


def make_panels(options: Any, chip: str, model: str, context: int) -> list[Panel]:
    """One for each draft, on as many chips as the first one needs."""
    first = make_panel(options, chip, model, context, options.drafts[0])
    degree = first.device.tensor_parallel
    others = [make_panel(options, chip, model, context, draft, degree) for draft in options.drafts[1:]]
    return [first, *others]


def make_panel(
    options: Any, chip: str, model: str, context: int, draft: str, tensor_parallel: int | None = None
) -> Panel:
    """Step times over the grid."""
    longest = max(options.max_drafts, options.num_drafts)
    # One tensor-parallel degree for all contexts, so that the columns of a model can be compared.
    wanted = options.min_batch * (max(options.contexts) + longest + 1)
    degree = tensor_parallel or options.tensor_parallel
    device = device_of(options, chip, model, draft, tensor_parallel=degree, min_tokens=wanted)
    batches = np.array(options.batches, np.float64)
    most = device.kv_tokens // (context + longest + 1)
    fits = batches <= most
    step_s = np.full((longest + 1, batches.size), np.nan)
    for k in range(longest + 1):
        if fits.any():
            step_s[k, fits] = step_seconds(
                device.model,
                batches[fits],
                context,
                Drafts.chain(k),
                draft_cost_ratio=device.draft_cost_ratio,
            )
    return Panel(device, context, batches, most, step_s)


def _row(panel: Panel) -> dict[str, Any]:
    needed = panel.break_even()
    at = {int(batch): round(float(alpha), 2) for batch, alpha in zip(panel.batches, needed, strict=True)}
    device = panel.device
    row: dict[str, Any] = {
        "chip": device.chip.name
        if device.tensor_parallel == 1
        else f"{device.tensor_parallel} × {device.chip.name}",
        "model": device.target.name,
        "context": panel.context,
        "draft": device.draft,
        "max_batch": panel.max_batch,
    }
    row |= {f"alpha_at_{batch}": at.get(batch, float("nan")) for batch in _AT_BATCHES}
    row |= {f"batch_at_{alpha:g}": panel.last_batch(alpha) for alpha in _AT_ALPHAS}
    best = panel.best(np.array([0.8]))[0]
    return row | {"best_speedup": float(np.nanmax(best)) if np.isfinite(best).any() else float("nan")}


def _cells(panels: list[Panel], alphas: FloatArray, num_drafts: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for panel in panels:
        gains, lengths = panel.best(alphas)
        fixed = panel.speedups(alphas)[num_drafts - 1]
        for i, alpha in enumerate(alphas):
            for j, batch in enumerate(panel.batches):
                if np.isfinite(gains[i, j]):
                    rows.append(
                        {
                            "chip": panel.device.chip.name,
                            "tensor_parallel": panel.device.tensor_parallel,
                            "model": panel.device.target.name,
                            "context": panel.context,
                            "draft": panel.device.draft,
                            "batch": int(batch),
                            "alpha": float(alpha),
                            "speedup": round(float(gains[i, j]), 4),
                            "best_k": int(lengths[i, j]),
                            "speedup_fixed": round(float(fixed[i, j]), 4),
                        }
                    )
    return rows


def _place(panel: Panel) -> tuple[str, str]:
    device = panel.device
    count = f"{device.tensor_parallel} × " if device.tensor_parallel > 1 else ""
    return device.chip.name, f"{count}{device.chip.name}"


def _drawn(panel: Panel, alphas: FloatArray) -> plots_extrapolation.PhasePanel:
    name, label = _place(panel)
    return plots_extrapolation.PhasePanel(
        row=name,
        column=f"{panel.device.target.name}, context {panel.context}",
        label=label,
        batches=panel.batches,
        alphas=alphas,
        speedups=panel.best(alphas)[0],
    )


def _lines(panels: list[Panel], first: str, num_drafts: int) -> dict[tuple[str, str], dict[str, FloatArray]]:
    lines: dict[tuple[str, str], dict[str, FloatArray]] = {}
    for panel in panels:
        key = panel.device.chip.name, f"{panel.device.target.name}, context {panel.context}"
        drawn = lines.setdefault(key, {})
        if panel.device.draft == first:
            drawn["break-even, best k"] = panel.break_even()
            drawn[f"break-even, k = {num_drafts}"] = panel.break_even(num_drafts)
        else:
            drawn[f"break-even, {panel.device.draft}, best k"] = panel.break_even()
    return lines
