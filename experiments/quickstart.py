"""Does speculation pay here? Plain decoding against a few drafters, one request at a time, outputs equal.

python -m specdec.run +experiment=quickstart
python -m specdec.run +experiment=quickstart speculation.num_drafts=8 experiment.drafters=[ngram]
"""

from __future__ import annotations

import statistics
from typing import Any

import polars as pl
from rich.table import Table

from experiments import common
from specdec import report
from specdec.config import Config
from specdec.metrics import acceptance_by_position, decode_rows, phase_times
from specdec.scheduler import SamplingParams
from specdec.tracking import Run

WARM_UP = SamplingParams(max_tokens=4, ignore_eos=True)


def run(config: Config, run: Run) -> dict[str, Any]:
    items, params = common.prompts(config), common.sampling_params(config)
    llm = common.build_llm(config)
    llm.generate([items[0].prompt], WARM_UP)
    modes: dict[str, Any] = {"plain": None}
    modes |= {name: common.drafter_options(config, name) for name in config.experiment.drafters}
    rounds: dict[str, list[common.Served]] = {name: [] for name in modes}
    for repeat in range(config.experiment.repeats):
        # Interleaved, so that a change of the machine's speed falls on every mode alike.
        for name, drafter in modes.items():
            common.configure(llm, config, drafter)
            rounds[name].append(common.generate(llm, items, params, run, f"{name}-{repeat}"))
    equal = {name: _equal(rounds["plain"], served) for name, served in rounds.items()}
    if params.is_greedy:
        lossless = llm.runner.backend == "native" or config.model.dtype == "float32"
        assert not lossless or all(count == len(items) for count in equal.values()), (
            f"outputs differ: {equal}"
        )
    rows = [_row(name, rounds, equal, len(items)) for name in modes]
    speedups = _speedups_by_task(rounds)
    _show(run, rows, config)
    run.log_table("summary", rows)
    run.log_figure("speedup_by_task", report.speedup_by_task(speedups))
    positions = {
        name: acceptance_by_position(decode_rows(served[0].steps)) for name, served in rounds.items()
    }
    drafted = {name: table for name, table in positions.items() if table.height}
    if drafted:
        run.log_figure("acceptance_by_position", report.acceptance_by_position(drafted))
    last = rounds[list(modes)[-1]][0]
    common.log_steps(run, last, name=list(modes)[-1])
    run.log_metrics({f"{row['mode']}/{key}": row[key] for row in rows for key in ("tok_s", "speedup", "tau")})
    return {"modes": {row["mode"]: row for row in rows}, "backend": llm.runner.backend}


def _equal(plain: list[common.Served], served: list[common.Served]) -> int:
    """How many prompts gave the plain output in every round."""
    expected = [out.token_ids for out in plain[0].outputs]
    found = [[out.token_ids for out in one.outputs] for one in served]
    return sum(all(tokens[i] == reference for tokens in found) for i, reference in enumerate(expected))


def _row(
    name: str, rounds: dict[str, list[common.Served]], equal: dict[str, int], num_prompts: int
) -> dict[str, Any]:
    first = rounds[name][0]
    rows = decode_rows(first.steps)
    seconds = statistics.median(one.seconds for one in rounds[name])
    plain_s = statistics.median(one.seconds for one in rounds["plain"])
    tokens = sum(len(out.token_ids) for out in first.outputs)
    plain_tokens = sum(len(out.token_ids) for out in rounds["plain"][0].outputs)
    shares = dict(phase_times(first.steps).select("phase", "share").iter_rows())
    return {
        "mode": name,
        "tau": float(rows["num_emitted"].sum() / rows.height),
        "tok_s": tokens / seconds,
        "speedup": (tokens / seconds) / (plain_tokens / plain_s),
        "drafted": sum(out.num_drafted for out in first.outputs),
        "accepted": sum(out.num_accepted for out in first.outputs),
        "draft_share": shares["draft"],
        "equal": f"{equal[name]}/{num_prompts}",
    }


def _speedups_by_task(rounds: dict[str, list[common.Served]]) -> pl.DataFrame:
    """Columns ``task``, ``drafter``, ``speedup``: plain seconds per token over the drafter's, by task."""
    per_token = {name: _seconds_per_token(served) for name, served in rounds.items()}
    return pl.DataFrame(
        [
            {"task": task, "drafter": name, "speedup": per_token["plain"][task] / seconds}
            for name, tasks in per_token.items()
            if name != "plain"
            for task, seconds in tasks.items()
        ]
    )


def _seconds_per_token(served: list[common.Served]) -> dict[str, float]:
    requests = pl.concat([one.requests for one in served])
    table = requests.group_by("task", maintain_order=True).agg(
        ((pl.col("finish_s") - pl.col("first_scheduled_s")).sum() / pl.col("num_generated").sum()).alias(
            "value"
        )
    )
    return dict(table.iter_rows())


def _show(run: Run, rows: list[dict[str, Any]], config: Config) -> None:
    table = Table(title=f"{config.model.name}, {config.model.dtype}, one request at a time")
    for column in ("decoding", "τ", "tok/s", "speed-up", "drafted", "accepted", "drafting", "equal outputs"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    for row in rows:
        table.add_row(
            row["mode"],
            f"{row['tau']:.2f}",
            f"{row['tok_s']:.1f}",
            f"{row['speedup']:.2f}×",
            str(row["drafted"]),
            str(row["accepted"]),
            f"{row['draft_share']:.0%}",
            row["equal"],
        )
    run.console.print(table)
