"""Does speculation pay here? Plain decoding against a few drafters, one request at a time, outputs equal.

python -m specdec.run +experiment=quickstart
python -m specdec.run +experiment=quickstart speculation.num_drafts=8 experiment.drafters=[ngram]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import polars as pl

from experiments import common
from specdec import plots
from specdec.config import Config
from specdec.heads.files import shipped
from specdec.metrics import acceptance_by_position, decode_rows, phase_times
from specdec.report import summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run

COLUMNS = {
    "mode": "decoding",
    "tau": "τ",
    "tok_s": "tok/s",
    "speedup": "speed-up",
    "drafted": "drafted",
    "accepted": "accepted",
    "draft_share": "drafting",
    "equal": "equal",
}
WARM_UP = SamplingParams(max_tokens=4, ignore_eos=True)


def _drafters(config: Config) -> dict[str, dict[str, Any]]:
    """Options of those asked for; else what needs no training, and the head that comes for this model, if one does."""
    head = shipped(f"experiments/artifacts/{config.model.name}-eagle3")
    names = config.experiment.drafters
    if names is None:
        names = ["ngram", "merged", "layer_skip", *(["eagle"] if head else [])]
    options = {name: common.drafter_options(config, name) for name in names}
    if head and "eagle" in options:
        options["eagle"].setdefault("path", str(head))
    return options


def run(config: Config, run: Run) -> dict[str, Any]:
    items, params = common.prompts(config), common.sampling_params(config)
    llm = common.build_llm(config)
    llm.generate([items[0].prompt], WARM_UP)
    modes: dict[str, Any] = {"plain": None}
    modes |= _drafters(config)
    rounds: dict[str, list[common.Served]] = {name: [] for name in modes}
    start_s = time.perf_counter()
    for repeat in range(config.experiment.repeats):
        spent_s = time.perf_counter() - start_s
        if repeat and spent_s * (repeat + 1) / repeat > config.experiment.budget_s:
            break
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
    title = f"{config.model.name}, {config.model.dtype}, {config.engine.max_num_seqs} at a time"
    run.console.print(summary_table(rows, COLUMNS, title=title))
    run.log_table("summary", rows)
    run.log_figure("speedup_by_task", plots.speedup_by_task(speedups))
    positions = {
        name: acceptance_by_position(decode_rows(served[0].steps)) for name, served in rounds.items()
    }
    drafted = {name: table for name, table in positions.items() if table.height}
    if drafted:
        run.log_figure("acceptance_by_position", plots.acceptance_by_position(drafted))
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


def _speedups_by_task(rounds: dict[str, list[common.Served]]) -> dict[str, dict[str, float]]:
    """Drafter to task to plain seconds per token over the drafter's."""
    per_token = {name: _seconds_per_token(served) for name, served in rounds.items()}
    return {
        name: {task: per_token["plain"][task] / seconds for task, seconds in tasks.items()}
        for name, tasks in per_token.items()
        if name != "plain"
    }


def _seconds_per_token(served: list[common.Served]) -> dict[str, float]:
    requests = pl.concat([one.requests for one in served])
    table = requests.group_by("task", maintain_order=True).agg(
        ((pl.col("finish_s") - pl.col("first_scheduled_s")).sum() / pl.col("num_generated").sum()).alias(
            "value"
        )
    )
    return dict(table.iter_rows())
