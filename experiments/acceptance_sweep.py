"""What would a better drafter bring? Measured speed-up over acceptance rate and length, beside the formula's.

The synthetic drafter proposes the target's own continuation and corrupts it at a set rate, so verification and
scheduling are real while acceptance is dialled. Its drafts cost next to nothing: this is the ceiling for a drafter
of that acceptance. The formula is Leviathan et al.'s, with step times measured in the same run.

    python -m specdec.run +experiment=acceptance_sweep experiment.alphas=[0.5,0.9] experiment.num_drafts=[4]
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import polars as pl

from experiments import common
from experiments.measured import PHASES, mean_of, phases, seconds_per_token
from sim.closed_form import expected_tokens, speedup
from specdec import plots
from specdec.config import Config
from specdec.llm import LLM
from specdec.metrics import acceptance_rate, decode_rows, tokens_per_step
from specdec.report import summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run

COLUMNS = {
    "alpha": "α",
    "k": "k",
    "measured_alpha": "measured α",
    "tau": "τ",
    "predicted_tau": "formula τ",
    "verify_ratio": "verify / plain",
    "speedup": "speed-up",
    "predicted_speedup": "formula",
}


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    items, params = common.prompts(config), common.sampling_params(config)
    llm = common.build_llm(config)
    llm.generate([items[0].prompt], SamplingParams(max_tokens=4, ignore_eos=True))
    cells = [(alpha, k) for k in options.num_drafts for alpha in options.alphas]
    rows: list[dict[str, Any]] = []
    # Rows are written as they come; a cell is compared with the plain runs right before and after it.
    with (run.directory / "cells.jsonl").open("w") as results:
        before = _plain(llm, config, items, params, run, 0)
        for index, (alpha, k) in enumerate(cells):
            cell = _cell(llm, config, items, params, run, alpha, k)
            after = _plain(llm, config, items, params, run, index + 1)
            rows.append(_row(alpha, k, cell, mean_of([before, after])))
            results.write(json.dumps(rows[-1]) + "\n")
            results.flush()
            before = after
    run.console.print(summary_table(rows, COLUMNS, title="synthetic drafts: measured against the formula"))
    run.log_table("cells", rows)
    table = pl.DataFrame(rows)
    formula = table.select("k", "alpha", speedup="predicted_speedup")
    run.log_figure("speedup_by_acceptance", plots.speedup_by_acceptance(table, formula))
    measured, predicted = table["speedup"].to_numpy(), table["predicted_speedup"].to_numpy()
    groups = [f"k = {k}" for k in table["k"]]
    figure = plots.predicted_against_measured(measured, predicted, label="speed-up", groups=groups)
    run.log_figure("predicted_against_measured", figure)
    errors = np.abs(predicted / measured - 1.0)
    return {"median_abs_error": float(np.median(errors)), "max_abs_error": float(errors.max()), "cells": rows}


def _plain(
    llm: LLM, config: Config, items: Any, params: SamplingParams, run: Run, index: int
) -> dict[str, float]:
    common.configure(llm, config, None, max_num_seqs=config.experiment.batch)
    served = common.generate(llm, items, params, run, f"plain-{index}")
    return {"token_s": seconds_per_token(served), **phases(served)}


def _cell(
    llm: LLM, config: Config, items: Any, params: SamplingParams, run: Run, alpha: float, k: int
) -> dict[str, float]:
    drafter = {"name": "synthetic", "alpha": alpha, "seed": config.seed}
    common.configure(
        llm,
        config,
        drafter,
        num_drafts=k,
        speculation={"name": "fixed", "max_drafts": k},
        max_num_seqs=config.experiment.batch,
    )
    served = [
        common.generate(llm, items, params, run, f"alpha{alpha}-k{k}-{repeat}")
        for repeat in range(config.experiment.repeats)
    ]
    rows = decode_rows(served[0].steps)
    return {
        "token_s": statistics.median(map(seconds_per_token, served)),
        **{phase: statistics.median(phases(one)[phase] for one in served) for phase in PHASES},
        "tau": tokens_per_step(rows),
        "alpha": acceptance_rate(rows),
    }


def _row(alpha: float, k: int, cell: dict[str, float], plain: dict[str, float]) -> dict[str, Any]:
    """One cell. The formula's times are the cell's own phases; only its acceptance is theory."""
    predicted_tau = float(expected_tokens(alpha, k))
    predicted = speedup(
        predicted_tau,
        t_ar_s=sum(plain[phase] for phase in PHASES),
        t_draft_s=cell["draft_s"] / k,
        t_verify_s=cell["verify_s"],
        t_overhead_s=cell["sample_s"] + cell["overhead_s"],
        k=k,
    )
    return {
        "alpha": alpha,
        "k": k,
        "measured_alpha": cell["alpha"],
        "tau": cell["tau"],
        "predicted_tau": predicted_tau,
        "verify_ratio": cell["verify_s"] / plain["verify_s"],
        "speedup": plain["token_s"] / cell["token_s"],
        "predicted_speedup": float(predicted),
    }
