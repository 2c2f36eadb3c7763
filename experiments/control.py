"""How many drafts under load? Controllers over the batch size, measured; and two published traps, simulated.

Each round measures every controller at every batch, in an order that changes from round to round; ratios are taken
within a round, and their median counts. Counted are steps in which the whole batch decodes and nothing else. The
goal: goodput within 3 % of the best fixed length of each batch, plain decoding included, and never more than 2 %
under plain. The traps are described in ``control_traps``.

python -m specdec.run +experiment=control
python -m specdec.run +experiment=control experiment.batches=[1,8,64] drafter=layer_skip speculation.num_drafts=4
python -m specdec.run +experiment=control experiment.batches=[]    # the traps alone, without a model
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from experiments import common
from experiments.control_traps import run_traps
from experiments.options import controller_options
from experiments.rows_file import Row, appended, fingerprint, read_rows
from specdec import plots_drafts
from specdec.config import Config
from specdec.metrics import decode_rows, tokens_per_step
from specdec.report import summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run

if TYPE_CHECKING:
    from specdec import LLM

NEAR_BEST, NEAR_PLAIN = 0.97, 0.98
CELLS = {
    "batch": "batch",
    "controller": "controller",
    "tok_per_s": "tok/s",
    "speedup": "speed-up",
    "tau": "τ",
    "drafts": "drafts per row",
}
GOALS = {
    "batch": "batch",
    "best": "best fixed",
    "to_best": "goodput / best fixed",
    "to_plain": "goodput / plain",
    "drafts": "drafts per row",
    "goal": "goal",
}
Cell = tuple[int, int, str]


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    summary: dict[str, Any] = {}
    if options.batches:
        summary |= _measured(config, run)
    if options.traps:
        traps = run_traps(run)
        summary["traps"] = traps
        summary["traps_hold"] = all(all(trap["claims"].values()) for trap in traps.values())
    return summary


def controllers(config: Config) -> dict[str, dict[str, Any]]:
    """What is compared, by label, as ``LLM.configure`` takes it.

    Raises:
        ValueError: nothing drafts, or the configured speculation is not goodput.
    """
    if config.drafter.name == "none":
        raise ValueError("drafter=none drafts nothing to control: choose a drafter")
    if config.speculation.name != "goodput":
        raise ValueError(
            f"speculation={config.speculation.name} is compared anyway: leave speculation=goodput, whose options count "
            "here, and give fixed lengths as experiment.fixed"
        )
    goodput = controller_options(config.speculation)
    fixed = {f"fixed {k}": {"name": "fixed", "max_drafts": k} for k in config.experiment.fixed}
    adaptive = {"name": "adaptive", "max_drafts": goodput["max_drafts"]}
    return {"off": {"name": "off"}, **fixed, "adaptive": adaptive, "goodput": goodput}


def goals(cells: Sequence[Row]) -> list[Row]:
    """A row for each batch: the best fixed choice, goodput against it and against plain, and whether that will do.

    Args:
        cells: rows of rounds, each with ``round``, ``batch``, ``controller``, ``tok_per_s`` and ``drafts``.
    """
    return [_goal(batch, cells) for batch in dict.fromkeys(row["batch"] for row in cells)]


def _goal(batch: int, cells: Sequence[Row]) -> Row:
    mine = [row for row in cells if row["batch"] == batch]
    names = dict.fromkeys(row["controller"] for row in mine)
    speedups = {name: _ratio(mine, name, "off") for name in names}
    best = max(
        (name for name in names if name == "off" or name.startswith("fixed")), key=speedups.__getitem__
    )
    to_best, to_plain = _ratio(mine, "goodput", best), speedups["goodput"]
    is_met = to_best >= NEAR_BEST and to_plain >= NEAR_PLAIN
    return {
        "batch": batch,
        "best": best,
        "to_best": to_best,
        "to_plain": to_plain,
        "drafts": statistics.median(row["drafts"] for row in mine if row["controller"] == "goodput"),
        "goal": "met" if is_met else "missed",
    }


def _ratio(rows: Sequence[Row], over: str, under: str) -> float:
    """Median over rounds of the throughput of one controller over another's."""
    rates = {(row["round"], row["controller"]): row["tok_per_s"] for row in rows}
    rounds = dict.fromkeys(row["round"] for row in rows)
    return statistics.median(rates[number, over] / rates[number, under] for number in rounds)


def _measured(config: Config, run: Run) -> dict[str, Any]:
    bench = _Bench(config, run)
    cells = bench.fill()
    table = [_summed(batch, name, cells) for batch in config.experiment.batches for name in bench.controllers]
    verdicts = goals(cells)
    title = f"{config.model.name}, drafter {config.drafter.name}"
    run.console.print(summary_table(table, CELLS, title=title))
    run.console.print(summary_table(verdicts, GOALS, title="goal: 3 % from the best fixed, 2 % from plain"))
    run.log_table("controllers", table)
    run.log_table("goals", verdicts)
    title, label = "Speed-up by batch and controller", "speed-up over plain"
    figure = plots_drafts.controllers_by_load(
        pl.DataFrame(table), "batch", "speedup", title=title, ylabel=label
    )
    run.log_figure("controllers", figure)
    return {
        "cells": table,
        "goals": verdicts,
        "num_met": sum(row["goal"] == "met" for row in verdicts),
        "step_times": bench.step_times,
    }


def _summed(batch: int, name: str, cells: Sequence[Row]) -> Row:
    """Medians over the rounds."""
    mine = [row for row in cells if row["batch"] == batch]
    own = [row for row in mine if row["controller"] == name]
    medians = {key: statistics.median(row[key] for row in own) for key in ("tok_per_s", "tau", "drafts")}
    return {"batch": batch, "controller": name, **medians, "speedup": _ratio(mine, name, "off")}


class _Bench:
    """Measures cells, writing each as it comes; those of a stopped run of this configuration are kept.

    Attributes:
        controllers: by label.
        step_times: what goodput was told, and what measuring it took; ``None`` if nothing had to be measured.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._run = config, run
        self._path = run.directory / "rounds.jsonl"
        self._hash = fingerprint(config, "batches", "fixed", "rounds", "traps")
        self._known = {_cell(row): row for row in read_rows(self._path, self._hash)}
        self.controllers = controllers(config)
        self.step_times: dict[str, Any] | None = None

    def fill(self) -> list[Row]:
        cells = list(self._cells())
        missing = [cell for cell in cells if cell not in self._known]
        if missing:
            llm = self._engine()
            with appended(self._path) as add:
                for number, cell in enumerate(missing, 1):
                    self._known[cell] = self._measure(llm, cell, f"{number}-of-{len(missing)}")
                    add(self._known[cell])
        return [self._known[cell] for cell in sorted(cells, key=lambda cell: cell[:2])]

    def _cells(self) -> Iterator[Cell]:
        options, names = self._config.experiment, list(self.controllers)
        for number in range(options.rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            yield from ((number, batch, name) for batch in options.batches for name in turned)

    def _engine(self) -> LLM:
        """Warm, and with the step times of the largest batch, which serve all."""
        llm = common.build_llm(self._config)
        llm.generate(["warm up"], SamplingParams(max_tokens=4, ignore_eos=True))
        self._configure(llm, "goodput", max(self._config.experiment.batches))
        steps = llm.device_times.steps
        self.step_times = None if steps is None else asdict(steps)
        return llm

    def _configure(self, llm: LLM, name: str, batch: int) -> None:
        drafter, speculation = common.drafter_options(self._config), self.controllers[name]
        common.configure(llm, self._config, drafter, speculation=speculation, max_num_seqs=batch)

    def _measure(self, llm: LLM, cell: Cell, place: str) -> Row:
        number, batch, name = cell
        self._configure(llm, name, batch)
        prompts = common.prompts(self._config)
        items = [prompts[index % len(prompts)] for index in range(batch * self._config.experiment.waves)]
        label = f"{place}-batch{batch}-{name.replace(' ', '')}"
        while any(self._run.trace_directory.glob(f"{label}.*")):  # of a run that was stopped here
            label += "-again"
        served = common.generate(llm, items, common.sampling_params(self._config), self._run, label)
        steps = served.steps.filter((pl.col("num_rows") == batch) & (pl.col("num_prefill_rows") == 0))
        if steps.height == 0:
            raise ValueError(
                f"batch {batch} never decoded as a whole: raise sampling.max_tokens or engine.kv_memory_mb"
            )
        seconds = float((steps["end_s"] - steps["start_s"]).sum())
        return {
            "round": number,
            "batch": batch,
            "controller": name,
            "tok_per_s": float(steps["num_emitted"].sum()) / seconds,
            "tau": tokens_per_step(decode_rows(steps)),
            "drafts": float(steps["num_draft_tokens"].sum()) / float(steps["num_rows"].sum()),
            "num_steps": steps.height,
            "config_hash": self._hash,
        }


def _cell(row: Row) -> Cell:
    return row["round"], row["batch"], row["controller"]
