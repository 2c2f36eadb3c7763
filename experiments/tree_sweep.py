"""Which draft tree, and how large? Sequoia's optimal trees (arXiv 2402.12374), from measurement to measurement.

How often the child of each rank is accepted is counted on the configured prompts; step times are measured on the
running device. From both come the best tree for each batch, its tokens per step and its speed-up. Then it is tried,
beside others: a chain of its depth, a k-ary tree of about its size, best trees of fixed sizes, and the goodput
controller with the same rates. Each is compared with the plain runs right before and after it.

Drafters that take a tree (draft_model, layer_skip) draft the shapes asked for. Those with trees of their own
(recycling, merged, suffix, eagle, medusa) draft as many nodes as was chosen, in the shape that they find best.

python -m specdec.run +experiment=tree_sweep
python -m specdec.run +experiment=tree_sweep drafter=draft_model drafter.model=path/to/student
python -m specdec.run +experiment=tree_sweep drafter=merged experiment.batches=[1,16] sampling.temperature=1
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from experiments import common
from experiments.measured import PHASES, mean_of
from experiments.rows_file import Row, appended, fingerprint, read_rows
from experiments.tree_candidates import TAKE_A_TREE, BatchTimes, Candidate, candidates, spec_of, times_at
from specdec import plots, plots_trees
from specdec.config import Config
from specdec.metrics import decode_rows, tokens_per_step
from specdec.report import summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run
from specdec.tree import SequoiaChoice, best_expected_tokens
from specdec.tree.rank_rates import RankCounts, wilson

if TYPE_CHECKING:
    from specdec import LLM

CHOICES = {
    "batch": "batch",
    "size": "nodes",
    "depth": "depth",
    "tau": "expected τ",
    "step_ms": "step, ms",
    "speedup": "predicted speed-up",
}
TREES = {
    "batch": "batch",
    "tree": "tree",
    "is_chosen": "chosen",
    "nodes": "nodes",
    "tau": "τ",
    "predicted_tau": "predicted τ",
    "speedup": "speed-up",
    "predicted_speedup": "predicted",
    "draft_ms": "draft, ms",
    "verify_ms": "verify, ms",
    "rest_ms": "rest, ms",
}
Drafts = tuple[Mapping[str, Any] | None, Mapping[str, Any]]
"""Drafter and speculation."""
PLAIN: Drafts = (None, {"name": "off"})


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    _check(config)
    bench = _Bench(config, run)
    counts, max_depth = bench.counts(), options.max_depth
    if config.drafter.name not in TAKE_A_TREE:
        max_depth = min(max_depth, counts.num_depths)  # deeper than its own trees it does not draft
    rates, rank_rates = counts.rates(max_depth), positive(counts.pooled())
    times = bench.times(rates)
    measured = {key: value for key, value in times.items() if key not in ("kind", "context", "config_hash")}
    choices: list[Row] = []
    tried: dict[int, list[Candidate]] = {}
    for batch in options.batches:
        own = times_at(times, batch, times["context"], max_depth)
        drafter = common.drafter_options(config)
        choice, tried[batch] = candidates(
            drafter, rates, rank_rates, own, measured, options.max_size, options.sizes
        )
        choices.append(_choice(choice, own))
    ranks = rank_rows(counts)
    override = (
        "speculation=goodput speculation.rank_rates=[" + ",".join(f"{rate:g}" for rate in rank_rates) + "]"
    )
    run.console.print(summary_table(choices, CHOICES, title=f"best tree, drafter {config.drafter.name}"))
    run.console.print(f"rates by rank: {override}", soft_wrap=True)
    run.log_table("rank_rates", ranks)
    run.log_table("choices", choices)
    run.log_figure("acceptance_by_rank", plots_trees.acceptance_by_rank(ranks))
    rows = bench.fill(tried)
    title = f"{config.model.name}, drafter {config.drafter.name}, T={config.sampling.temperature:g}"
    run.console.print(summary_table(rows, TREES, title=title))
    run.log_table("trees", rows)
    _draw(run, rows, best_expected_tokens(rates, max(options.max_size, *options.sizes), max_depth))
    return {
        "rank_rates": rank_rates,
        "override": override,
        "rates_by_depth": rates.tolist(),
        "ranks": ranks,
        "step_times": times,
        "choices": choices,
        "trees": rows,
        "errors": {name: _errors(rows, name) for name in ("tau", "speedup")},
    }


def positive(rates: np.ndarray) -> list[float]:
    """Rates as a user gives them: rounded down, without the ranks that were never accepted.

    Raises:
        ValueError: none was.
    """
    cut = np.floor(1e4 * rates) / 1e4
    if not cut.any():
        raise ValueError("no draft was accepted, so no tree is better than another: choose another drafter")
    return cut[cut > 0].tolist()


def rank_rows(counts: RankCounts) -> list[Row]:
    """Counts by depth of the parent, and those of all depths as depth ``None``, with Wilson intervals of 95 %."""
    tables = [(None, counts.tried.sum(axis=0), counts.accepted.sum(axis=0))]
    tables += [(depth, counts.tried[depth], counts.accepted[depth]) for depth in range(counts.num_depths)]
    rows: list[Row] = []
    for depth, tried, accepted in tables:
        for rank, (count, came) in enumerate(zip(tried.tolist(), accepted.tolist(), strict=True)):
            if count:
                low, high = wilson(came, count)
                row = {"depth": depth, "rank": rank, "tried": count, "accepted": came}
                rows.append({**row, "rate": came / count, "low": low, "high": high})
    return rows


def _check(config: Config) -> None:
    name, options = config.drafter.name, config.experiment
    if name in ("none", "synthetic"):
        raise ValueError(
            f"drafter={name} has no children to rank: choose one that drafts trees, such as recycling, merged, or "
            "draft_model"
        )
    if name in TAKE_A_TREE and config.drafter.tree:
        raise ValueError(
            f"drafter.tree={config.drafter.tree} is what this experiment chooses: leave it out, and give the tree that "
            "acceptance is measured with as experiment.branching"
        )
    if (count := len(common.prompts(config))) < max(options.batches):
        raise ValueError(
            f"experiment.batches={list(options.batches)} needs {max(options.batches)} different prompts, there are "
            f"{count}: drafters that learn would profit from repeated ones; raise workload.num_prompts"
        )


def _choice(choice: SequoiaChoice, times: BatchTimes) -> Row:
    return {
        "batch": times.batch,
        "size": choice.size,
        "depth": choice.depth,
        "parents": list(choice.tree.parents),
        "tau": choice.tokens,
        "step_ms": 1e3 * choice.step_s,
        "plain_ms": 1e3 * float(times.verify_s[0]),
        "speedup": choice.tokens * float(times.verify_s[0]) / choice.step_s,
    }


def _errors(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Of prediction, relative to what was measured: median and largest magnitude."""
    errors = [
        abs(row[f"predicted_{name}"] / row[name] - 1.0)
        for row in rows
        if row[f"predicted_{name}"] is not None
    ]
    return {"median": statistics.median(errors), "max": max(errors)}


def _draw(run: Run, rows: Sequence[Row], best: np.ndarray) -> None:
    run.log_figure("tau_by_nodes", plots_trees.tau_by_nodes(rows, best))
    run.log_figure("speedup_by_tree", plots_trees.speedup_by_tree(rows))
    known = [row for row in rows if row["predicted_speedup"] is not None]
    figure = plots.predicted_against_measured(
        [row["speedup"] for row in known],
        [row["predicted_speedup"] for row in known],
        label="speed-up",
        groups=[f"batch {row['batch']}" for row in known],
    )
    run.log_figure("predicted_against_measured", figure)


class _Bench:
    """Measures, writing each row as it comes; those of a stopped run of this configuration are kept."""

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._run = config, run
        self._path = run.directory / "cells.jsonl"
        self._hash = fingerprint(config, "sizes", "rounds")
        self._known = read_rows(self._path, self._hash)
        self._llm: LLM | None = None

    def counts(self) -> RankCounts:
        """Of verifications of the wide tree, or of the drafter's own, all prompts at the largest batch."""
        row = self._find("counts")
        if row is None:
            from specdec.drafter.rank_recorder import RankRecorder

            drafter, nodes = self._wide()
            batch = max(self._config.experiment.batches)
            llm = self._configured((drafter, {"name": "fixed", "max_drafts": nodes}), batch)
            assert llm.engine.drafter is not None
            llm.engine.drafter = recorder = RankRecorder(llm.engine.drafter)
            common.generate(
                llm, common.prompts(self._config), self._params(nodes), self._run, self._label("acceptance")
            )
            tried, accepted = recorder.counts.tried.tolist(), recorder.counts.accepted.tolist()
            row = self._add({"kind": "counts", "tried": tried, "accepted": accepted})
        return RankCounts.of(row["tried"], row["accepted"])

    def times(self, rates: np.ndarray) -> Row:
        """As the goodput controller takes them, and the mean ``context`` of a request.

        Drafting is timed with the largest tree that is tried.
        """
        row = self._find("times")
        if row is None:
            from specdec import step_times

            options = self._config.experiment
            llm = self._configured(PLAIN, max(options.batches))
            limits, nodes = llm.engine.loop.config, max(options.max_size, *options.sizes)
            drafter = common.drafter_options(self._config)
            if drafter["name"] in TAKE_A_TREE:
                drafter |= {"tree": spec_of(rates, nodes, len(rates))}
            steps = step_times.measure_step_times(llm.runner, limits, nodes)
            host = step_times.measure_host_times(llm.runner, llm.tokenizer, limits)
            drafts = step_times.measure_draft_times(
                llm.runner, llm.tokenizer, drafter, limits, nodes, by_level=True
            )
            prompts = llm.encode([item.prompt for item in common.prompts(self._config)])
            context = (
                statistics.mean(len(prompt) for prompt in prompts) + self._config.sampling.max_tokens / 2
            )
            times = {**steps.options(), **host.options(), **drafts, "context": context}
            row = self._add({"kind": "times", **times})
        return row

    def fill(self, tried: Mapping[int, Sequence[Candidate]]) -> list[Row]:
        """Medians over the rounds, batch by batch."""
        rounds = range(self._config.experiment.rounds)
        for number in rounds:
            for batch, every in tried.items():
                self._round(number, batch, every)
        return [
            _summed(candidate, batch, self._cells(batch, candidate.label, rounds))
            for batch, every in tried.items()
            for candidate in every
        ]

    def _round(self, number: int, batch: int, every: Sequence[Candidate]) -> None:
        before: dict[str, float] | None = None
        for candidate in every:
            if self._cells(batch, candidate.label, [number]):
                before = None
                continue
            if before is None:
                before = self._measure("plain", PLAIN, batch)
            cell = self._measure(candidate.label, (candidate.drafter, candidate.speculation), batch)
            after = self._measure("plain", PLAIN, batch)
            plain, before = mean_of([before, after]), after
            key = {"kind": "cell", "round": number, "batch": batch, "tree": candidate.label}
            self._add(
                {**key, **cell, "speedup": plain["token_s"] / cell["token_s"], "plain_s": plain["token_s"]}
            )

    def _cells(self, batch: int, label: str, rounds: Sequence[int]) -> list[Row]:
        cells = [row for row in self._known if row["kind"] == "cell" and row["round"] in rounds]
        return [row for row in cells if row["batch"] == batch and row["tree"] == label]

    def _find(self, kind: str) -> Row | None:
        return next((row for row in self._known if row["kind"] == kind), None)

    def _add(self, row: Row) -> Row:
        row = {**row, "config_hash": self._hash}
        with appended(self._path) as add:
            add(row)
        self._known.append(row)
        return row

    def _wide(self) -> tuple[dict[str, Any], int]:
        """The drafter that acceptance is measured with, and how many nodes it drafts."""
        options, drafter = self._config.experiment, common.drafter_options(self._config)
        if drafter["name"] not in TAKE_A_TREE:
            return drafter, max(options.max_size, *options.sizes)
        nodes = sum(np.cumprod(options.branching).tolist())
        return {**drafter, "tree": {"name": "k_ary", "branching": list(options.branching)}}, nodes

    def _configured(self, drafts: Drafts, batch: int) -> LLM:
        if self._llm is None:
            self._llm = common.build_llm(self._config)
            self._llm.generate(["warm up"], SamplingParams(max_tokens=4, ignore_eos=True))
        drafter, speculation = drafts
        nodes = speculation.get("max_drafts", 0)
        budget = max(self._config.engine.max_num_batched_tokens or 1024, batch * (1 + nodes))
        return common.configure(
            self._llm,
            self._config,
            drafter,
            nodes,
            speculation=speculation,
            max_num_seqs=batch,
            max_num_batched_tokens=budget,
        )

    def _label(self, name: str) -> str:
        label, number = name.translate(str.maketrans(" ,·", "--x")), 1
        while any(self._run.trace_directory.glob(f"{label}-{number}.*")):
            number += 1
        return f"{label}-{number}"

    def _params(self, nodes: int) -> SamplingParams:
        params = common.sampling_params(self._config)
        return replace(params, max_tokens=params.max_tokens + nodes)

    def _measure(self, name: str, drafts: Drafts, batch: int) -> dict[str, float]:
        """Of the steps in which the whole batch decodes, all trees whole, and nothing else.

        A request may not draft more nodes than tokens are left to it, whatever the depth of its tree: so it gets that
        many more of them, which do not count.
        """
        options, prompts = self._config.experiment, common.prompts(self._config)
        llm = self._configured(drafts, batch)
        items = [prompts[index % len(prompts)] for index in range(max(len(prompts), batch * options.waves))]
        params = self._params(drafts[1].get("max_drafts", 0))
        served = common.generate(llm, items, params, self._run, self._label(f"batch{batch} {name}"))
        is_early = early(served.steps, self._config.sampling.max_tokens)
        steps = served.steps.filter(
            is_early & (pl.col("num_rows") == batch) & (pl.col("num_prefill_rows") == 0)
        )
        if steps.height == 0:
            raise ValueError(
                f"batch {batch} never decoded as a whole: raise sampling.max_tokens or engine.kv_memory_mb"
            )
        num_tokens, num_rows = float(steps["num_emitted"].sum()), float(steps["num_rows"].sum())
        seconds = float((steps["end_s"] - steps["start_s"]).sum())
        return {
            "token_s": seconds / num_tokens,
            "tau": tokens_per_step(decode_rows(steps)),
            "drafts": float(steps["num_draft_tokens"].sum()) / num_rows,
            "num_steps": steps.height,
            **{f"{phase[:-2]}_ms": 1e3 * float(steps[phase].to_numpy().mean()) for phase in PHASES},
        }


def early(steps: pl.DataFrame, num_tokens: int) -> pl.Series:
    """Which steps no request enters with ``num_tokens`` emitted or more."""
    emitted: Counter[int] = Counter()
    is_early: list[bool] = []
    for ids, counts in steps.select("request_ids", "row_emitted").iter_rows():
        is_early.append(all(emitted[number] < num_tokens for number in ids))
        for number, count in zip(ids, counts, strict=True):
            emitted[number] += count
    return pl.Series(is_early, dtype=pl.Boolean)


def _summed(candidate: Candidate, batch: int, cells: Sequence[Row]) -> Row:
    names = ("tau", "speedup", "drafts", "draft_ms", "verify_ms", "sample_ms", "overhead_ms")
    medians = {name: statistics.median(cell[name] for cell in cells) for name in names}
    return {
        "batch": batch,
        "tree": candidate.label,
        "kind": candidate.kind,
        "is_chosen": candidate.is_chosen,
        "nodes": candidate.nodes,
        "depth": candidate.depth,
        "predicted_tau": candidate.tau,
        "predicted_speedup": candidate.speedup,
        **medians,
        "rest_ms": medians["sample_ms"] + medians["overhead_ms"],
    }
