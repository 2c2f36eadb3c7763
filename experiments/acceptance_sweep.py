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
from rich.table import Table

from experiments import common
from sim.closed_form import expected_tokens, speedup
from specdec import report
from specdec.config import Config
from specdec.llm import LLM
from specdec.metrics import acceptance_rate, decode_rows, tokens_per_step
from specdec.scheduler import SamplingParams
from specdec.tracking import Run


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
            plain = {key: (before[key] + after[key]) / 2 for key in before}
            rows.append(_row(alpha, k, cell, plain))
            results.write(json.dumps(rows[-1]) + "\n")
            results.flush()
            before = after
    table = pl.DataFrame(rows)
    _show(run, rows)
    run.log_table("cells", rows)
    run.log_figure("speedup_by_alpha", report.speedup_by_alpha(table))
    run.log_figure("predicted_against_measured", report.predicted_against_measured(table))
    errors = np.abs(table["predicted_speedup"].to_numpy() / table["speedup"].to_numpy() - 1.0)
    return {"median_abs_error": float(np.median(errors)), "max_abs_error": float(errors.max()), "cells": rows}


def _plain(
    llm: LLM, config: Config, items: Any, params: SamplingParams, run: Run, index: int
) -> dict[str, float]:
    common.configure(llm, config, None, max_num_seqs=config.experiment.batch)
    served = common.generate(llm, items, params, run, f"plain-{index}")
    return {"token_s": _seconds_per_token(served), "step_s": _step_s(served)}


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
        "token_s": statistics.median(map(_seconds_per_token, served)),
        "step_s": statistics.median(map(_step_s, served)),
        "tau": tokens_per_step(rows),
        "alpha": acceptance_rate(rows),
    }


def _row(alpha: float, k: int, cell: dict[str, float], plain: dict[str, float]) -> dict[str, Any]:
    predicted_tau = float(expected_tokens(alpha, k))
    return {
        "alpha": alpha,
        "num_drafts": k,
        "measured_alpha": cell["alpha"],
        "tau": cell["tau"],
        "predicted_tau": predicted_tau,
        "step_ratio": cell["step_s"] / plain["step_s"],
        "speedup": plain["token_s"] / cell["token_s"],
        "predicted_speedup": float(speedup(predicted_tau, plain["step_s"], cell["step_s"])),
    }


def _seconds_per_token(served: common.Served) -> float:
    """Decoding seconds per token after the first."""
    requests = served.requests
    decode_s = float((requests["finish_s"] - requests["first_token_s"]).sum())
    return decode_s / float((requests["num_generated"] - 1).sum())


def _step_s(served: common.Served) -> float:
    """Mean seconds of a step without prefill."""
    decoding = served.steps.filter(pl.col("num_prefill_rows") == 0)
    return float((decoding["end_s"] - decoding["start_s"]).mean())  # type: ignore[arg-type]


def _show(run: Run, rows: list[dict[str, Any]]) -> None:
    table = Table(title="synthetic drafts: measured against the formula")
    for column in ("α", "k", "measured α", "τ", "formula τ", "step / plain step", "speed-up", "formula"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['alpha']:.2f}",
            str(row["num_drafts"]),
            f"{row['measured_alpha']:.2f}",
            f"{row['tau']:.2f}",
            f"{row['predicted_tau']:.2f}",
            f"{row['step_ratio']:.2f}",
            f"{row['speedup']:.2f}×",
            f"{row['predicted_speedup']:.2f}×",
        )
    run.console.print(table)
