"""Which drafter, and how much of it? Acceptance, cost and speed-up of each, beside the formula's prediction.

Every cell is compared with the plain runs right before and after it. The formula is E·T_plain / T_step, with E from
the acceptance by position and the step's time from its phases: where it and the clock differ by more than a tenth,
something was spent outside the steps, or positions do not tell the whole story.

python -m specdec.run +experiment=draft_sweep
python -m specdec.run +experiment=draft_sweep experiment.only=[suffix,recycling] experiment.num_drafts=[8,32]
python -m specdec.run +experiment=draft_sweep 'experiment.only=[student,int4]' \\
    'experiment.drafters.student={name: draft_model, model: path/to/student}'
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from experiments import common
from experiments.measured import PHASES, mean_of, phases, seconds_per_token
from experiments.rows_file import appended, fingerprint, read_rows
from specdec import plots, plots_drafts
from specdec.config import Config
from specdec.metrics import acceptance_by_position, acceptance_rate, decode_rows, tokens_per_step
from specdec.report import summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run
from specdec.workload import PromptItem

if TYPE_CHECKING:
    from specdec import LLM

COLUMNS = {
    "drafter": "drafter",
    "num_drafts": "drafts",
    "temperature": "T",
    "tau": "τ",
    "alpha": "α",
    "draft_ratio": "draft / plain",
    "verify_ratio": "verify / plain",
    "speedup": "speed-up",
    "predicted_speedup": "formula",
}
Cell = tuple[str, int, float]


def run(config: Config, run: Run) -> dict[str, Any]:
    from specdec.drafter import make_drafter

    options = config.experiment
    names = list(options.only or options.drafters)
    for name in names:
        make_drafter(options.drafters[name])  # a wrong one fails before anything runs
    cells = [(name, k, t) for t in options.temperatures for k in options.num_drafts for name in names]
    sweep = _Sweep(config, run)
    rows = sweep.fill(cells)
    run.console.print(summary_table(rows, COLUMNS, title=f"{config.model.name}, {options.batch} at a time"))
    run.log_table(
        "cells", [{k: v for k, v in row.items() if k not in ("survival", "config_hash")} for row in rows]
    )
    table = pl.DataFrame(
        [{key: row[key] for key in COLUMNS} | {"step_ratio": row["step_ratio"]} for row in rows]
    )
    run.log_figure("tau_against_cost", plots_drafts.tau_against_cost(table))
    run.log_figure(
        "survival", plots_drafts.survival([(row["drafter"], _label(row), row["survival"]) for row in rows])
    )
    measured, predicted = table["speedup"].to_numpy(), table["predicted_speedup"].to_numpy()
    figure = plots.predicted_against_measured(
        measured, predicted, label="speed-up", groups=table["drafter"].to_list()
    )
    run.log_figure("predicted_against_measured", figure)
    errors = np.abs(predicted / measured - 1.0)
    best = max(rows, key=lambda row: row["speedup"])
    return {
        "best": {key: best[key] for key in COLUMNS},
        "max_abs_error": float(errors.max()),
        "median_abs_error": float(np.median(errors)),
        "cells": rows,
    }


def _label(row: dict[str, Any]) -> str:
    return f"{row['drafter']} {row['num_drafts']}, T={row['temperature']:g}"


class _Sweep:
    """Measures cells, writing each as it comes; those of a stopped run of this configuration are kept."""

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._run = config, run
        self._path = run.directory / "cells.jsonl"
        self._hash = fingerprint(config, "only", "num_drafts", "temperatures")
        self._known = {_cell(row): row for row in read_rows(self._path, self._hash)}
        self._llm: LLM | None = None
        self._number = 0

    def fill(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        missing = [cell for cell in cells if cell not in self._known]
        items, params = common.prompts(self._config), common.sampling_params(self._config)
        before: tuple[float, dict[str, float]] | None = None
        with appended(self._path) as add:
            for name, k, temperature in missing:
                drawn = replace(params, temperature=temperature)
                if before is None or before[0] != temperature:
                    before = temperature, self._plain(items, drawn)
                cell = self._measure(name, k, items, drawn)
                after = self._plain(items, drawn)
                row = _row((name, k, temperature), cell, mean_of([before[1], after]))
                row["config_hash"] = self._hash
                before = temperature, after
                self._known[name, k, temperature] = row
                add(row)
        return [self._known[cell] for cell in cells]

    def _engine(self, drafter: Any, k: int) -> LLM:
        if self._llm is None:
            self._llm = common.build_llm(self._config)
            self._llm.generate(["warm up"], SamplingParams(max_tokens=4, ignore_eos=True))
        batch = self._config.experiment.batch
        speculation = {"name": "fixed", "max_drafts": k}
        return common.configure(
            self._llm, self._config, drafter, k, speculation=speculation, max_num_seqs=batch
        )

    def _served(self, name: str, items: list[PromptItem], params: SamplingParams, llm: LLM) -> common.Served:
        self._number += 1
        folder = self._run.trace_directory
        while any(folder.glob(f"{name}-{self._number}.*")):  # of a run that was stopped here
            self._number += 1
        return common.generate(llm, items, params, self._run, f"{name}-{self._number}")

    def _plain(self, items: list[PromptItem], params: SamplingParams) -> dict[str, float]:
        served = self._served("plain", items, params, self._engine(None, 0))
        return {"token_s": seconds_per_token(served), **phases(served)}

    def _measure(self, name: str, k: int, items: list[PromptItem], params: SamplingParams) -> dict[str, Any]:
        options = self._config.experiment
        llm = self._engine(options.drafters[name], k)
        served = [self._served(f"{name}-k{k}", items, params, llm) for _ in range(options.repeats)]
        rows = decode_rows(pl.concat([one.steps for one in served]))
        table = acceptance_by_position(rows)
        return {
            "token_s": statistics.median(map(seconds_per_token, served)),
            **mean_of([phases(one) for one in served]),
            "tau": tokens_per_step(rows),
            "alpha": acceptance_rate(rows),
            # Of a step, drafted or not: of drafts that end early, few reach the later positions.
            "survival": [count / rows.height for count in table["num_accepted"].to_list()],
        }


def _cell(row: dict[str, Any]) -> Cell:
    return row["drafter"], row["num_drafts"], row["temperature"]


def _row(cell: Cell, measured: dict[str, Any], plain: dict[str, float]) -> dict[str, Any]:
    name, k, temperature = cell
    plain_s, step_s = (sum(times[phase] for phase in PHASES) for times in (plain, measured))
    expected = 1.0 + sum(measured["survival"])
    return {
        "drafter": name,
        "num_drafts": k,
        "temperature": temperature,
        "tau": measured["tau"],
        "alpha": measured["alpha"],
        "survival": measured["survival"],
        "draft_ratio": measured["draft_s"] / plain_s,
        "verify_ratio": measured["verify_s"] / plain_s,
        "step_ratio": step_s / plain_s,
        "speedup": plain["token_s"] / measured["token_s"],
        "predicted_speedup": expected * plain_s / step_s,
        **{f"{phase[:-2]}_ms": 1e3 * measured[phase] for phase in PHASES},
    }
