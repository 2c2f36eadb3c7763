"""The tree sweep: exact counts, rates as trees need them, the choice against brute force, and real runs of seconds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments import tree_sweep
from experiments.tree_candidates import BatchTimes, candidates, choose, near_k_ary, times_at
from experiments.tree_sweep import early, positive, rank_rows
from specdec.drafter.base import Draft
from specdec.drafter.rank_recorder import RankRecorder
from specdec.scheduler.tree_worth import TreeWorth
from specdec.tree import Tree, expected_tokens, make_tree
from specdec.tree.rank_rates import RankCounts, monotone, wilson
from tests.drafter.steps import Rig
from tests.experiments.tiny import run_tiny
from tests.test_configs import build

SMALL = (
    "sampling.max_tokens=20",
    "experiment.batches=[1,2]",
    "experiment.sizes=[2,4]",
    "experiment.max_size=5",
    "experiment.max_depth=3",
)


class Scripted:
    """Drafts the same tree of tokens for each row that may draft so much."""

    name = "scripted"
    captures: Sequence[int] = (3,)

    def __init__(self, parents: Sequence[int] | None, tokens: Sequence[int]) -> None:
        self.parents, self.tokens = parents, tokens
        self.num_observed = 0

    def bind(self, host: Any) -> None:
        self.host = host

    def propose(self, plan: Any) -> Draft:
        size, count = plan.rows.size, len(self.tokens)
        parents = None if self.parents is None else np.tile(np.array(self.parents, np.int32), (size, 1))
        drafted = np.where(plan.num_drafts >= count, count, 0).astype(np.int32)
        return Draft(np.tile(np.array(self.tokens, np.int64), (size, 1)), drafted, parents=parents)

    def observe(self, plan: Any, outcome: Any, verified: Any) -> None:
        self.num_observed += 1


def following(chain: Sequence[int]):
    """A target that continues any prefix with ``chain`` from its start, by the length of the prefix."""

    def logits_of(prefix: list[int]) -> np.ndarray:
        logits = np.zeros(8)
        logits[chain[(len(prefix) - 1) % len(chain)]] = 1.0
        return logits

    return logits_of


def test_the_recorder_counts_what_verification_reached():
    #        root: 1, 2, 3;  below 1: 4, 5;  below 2: 6;  below 5: 7
    parents, tokens = [-1, -1, -1, 0, 0, 1, 4], [1, 2, 3, 4, 5, 6, 7]
    drafter = Scripted(parents, tokens)
    recorder = RankRecorder(drafter)
    rig = Rig(recorder, following([1, 5, 0]))
    assert (recorder.name, recorder.captures) == ("scripted", (3,)) and drafter.host is not None
    rig.load(0, 0, [0])
    assert rig.step([0], [7])[1] == [2], "1, then 5, then neither 7 nor anything else"
    assert recorder.counts.tried.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert recorder.counts.accepted.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    rig.load(1, 1, [0, 0, 0])  # whose next token is 0: nothing is accepted
    rig.load(2, 2, [0, 0, 0, 0, 0])  # 5 is next: nothing, neither
    rig.step([1, 2], [7, 6])
    assert recorder.counts.tried.tolist() == [[2, 2, 2], [1, 1, 0], [1, 0, 0]], (
        "the third row drafted nothing"
    )
    assert recorder.counts.accepted.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert drafter.num_observed == 2


def test_a_path_through_the_second_child_and_chains():
    counts = RankCounts()
    counts.add([-1, -1, 1], [1, 2])
    assert counts.tried.tolist() == [[1, 1], [1, 0]] and counts.accepted.tolist() == [[0, 1], [1, 0]]
    recorder = RankRecorder(Scripted(None, [1, 5, 0, 2]))
    rig = Rig(recorder, following([1, 5, 0]))
    rig.load(0, 0, [0])
    rig.step([0], [4])
    assert recorder.counts.tried.tolist() == [[1]] * 4
    assert recorder.counts.accepted.tolist() == [[1], [1], [1], [0]]


def test_rates_fall_and_sum_to_at_most_one():
    assert monotone(np.array([6, 1, 3]), np.array([10, 10, 10])).tolist() == [0.6, 0.2, 0.2]
    assert monotone(np.array([6, 3]), np.array([8, 4])).tolist() == [0.5, 0.5], "0.75 + 0.75 scaled"
    assert monotone(np.array([1, 0]), np.array([4, 0])).tolist() == [0.25, 0.0]
    # The weights count: 1 of 10 and 3 of 5 make 4 of 15.
    assert monotone(np.array([1, 3]), np.array([10, 5])).tolist() == pytest.approx([4 / 15] * 2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        tried = np.sort(rng.integers(1, 40, (3, 4)), axis=1)[:, ::-1]
        counts = RankCounts.of(tried.tolist(), rng.integers(0, tried + 1).tolist())
        table = counts.rates(5)
        assert table.shape == (5, 4) and (table[3:] == counts.pooled()).all()
        assert (np.diff(table, axis=1) <= 1e-12).all() and (table.sum(axis=1) <= 1 + 1e-9).all()
    with pytest.raises(ValueError, match="no draft was verified"):
        RankCounts().pooled()


def test_much_data_outweighs_the_pooled_rates():
    counts = RankCounts.of([[10_000], [10_000]], [[8000], [2000]])
    assert counts.pooled().tolist() == [0.5]
    assert counts.rates(3)[:, 0].tolist() == pytest.approx([0.8, 0.2, 0.5], abs=2e-3)


def test_intervals_are_wilsons():
    """Against the textbook's 8 of 10: (0.490, 0.943)."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    rows = rank_rows(RankCounts.of([[10, 10], [8, 0]], [[8, 1], [2, 0]]))
    assert [(row["depth"], row["rank"], row["accepted"], row["tried"]) for row in rows] == [
        (None, 0, 10, 18),
        (None, 1, 1, 10),
        (0, 0, 8, 10),
        (0, 1, 1, 10),
        (1, 0, 2, 8),
    ]
    assert all(row["low"] <= row["rate"] <= row["high"] for row in rows)


def test_pasted_rates_are_such_as_the_controller_takes():
    rates = positive(np.array([0.500049, 0.3, 0.1999, 0.00004]))
    assert rates == [0.5, 0.3, 0.1999]
    TreeWorth(rates, 8)
    with pytest.raises(ValueError, match="no draft was accepted"):
        positive(np.zeros(3))


def every_tree(most: int):
    for size in range(most + 1):
        yield from map(Tree, itertools.product(*(range(-1, node) for node in range(size))))


def test_the_choice_is_the_best_of_all_trees():
    rng = np.random.default_rng(1)
    chosen = set()
    for _ in range(60):
        depth = int(rng.integers(1, 5))
        rates = -np.sort(-rng.dirichlet(np.ones(4), depth)[:, :3], axis=1)
        verify_s = 1.0 + np.cumsum(rng.exponential(rng.choice([0.02, 0.2]), 128) * rng.integers(0, 2, 128))
        draft_s = np.cumsum(np.append(0.0, rng.exponential(0.1, depth)))
        times = BatchTimes(1, verify_s, draft_s)
        choice = choose(rates, times, 5)
        best = min(
            (verify_s[len(tree)] + draft_s[tree.max_depth]) / expected_tokens(tree, rates)
            for tree in every_tree(5)
            if tree.max_depth <= depth
        )
        assert choice.step_s / choice.tokens == pytest.approx(best)
        chosen.add(choice.size)
    assert len(chosen) > 3


def test_steps_count_until_a_request_has_its_tokens():
    ids, emitted = [[1, 2], [1, 2], [2], [3]], [[1, 3], [1, 1], [1], [1]]
    steps = pl.DataFrame({"request_ids": ids, "row_emitted": emitted})
    assert early(steps, 3).to_list() == [True, False, False, True]
    assert early(steps, 4).to_list() == [True, True, False, True]


TIMES = {
    "step_tokens": [1, 2, 4],
    "step_s": [1.0, 1.0, 2.0],
    "context_token_s": 0.01,
    "verify_context_token_s": 0.05,
    "overhead_s": 0.1,
    "overhead_row_s": 0.2,
    "draft_step_s": 0.5,
    "draft_token_s": 0.125,
    "draft_row_s": 0.25,
}


def test_times_of_a_batch():
    times = times_at(TIMES, 2, 10.0, 2)
    fixed = 0.1 + 2 * 0.2 + 2 * 10 * 0.01
    # Two rows of 1, 2, 3 and 11 tokens; beyond four the last slope, half a second a token, goes on.
    assert times.verify_s[[0, 1, 2, 10]].tolist() == pytest.approx(
        [1 + fixed, 3.25 + fixed, 5.5 + fixed, 23.5 + fixed]
    )
    assert times.draft_s.tolist() == pytest.approx([0.0, 1.0, 1.5])
    assert times.verify_s.size == 128


def test_candidates_of_a_drafter_that_takes_a_tree():
    rates = np.tile([0.5, 0.2, 0.1], (4, 1))
    times = BatchTimes(1, 1.0 + 0.001 * np.arange(128), 1e-4 * np.arange(5))
    drafter = {"name": "layer_skip", "num_skip": 1}
    choice, tried = candidates(drafter, rates, [0.5, 0.2, 0.1], times, TIMES, 12, [2, 12])
    assert choice.size == 12 and choice.depth == 4
    assert [one.label for one in tried] == [
        "sequoia 12, depth 4",
        "sequoia 2, depth 2",
        "chain 4",
        "k-ary 3·3",
        "goodput",
    ]
    assert [one.is_chosen for one in tried] == [True, False, False, False, False]
    assert tried[0].speedup == pytest.approx(max(one.speedup or 0.0 for one in tried))
    for one in tried:
        assert one.drafter["num_skip"] == 1
        if one.tau is None:
            assert one.speculation["rank_rates"] == [0.5, 0.2, 0.1] and one.speculation["draft_step_s"] == 0.5
        else:
            tree = make_tree(one.drafter.get("tree", {"name": "chain", "length": one.nodes}))
            assert (
                (len(tree), tree.max_depth)
                == (one.nodes, one.depth)
                == (one.speculation["max_drafts"], one.depth)
            )
            assert one.tau == pytest.approx(expected_tokens(tree, rates))
            assert one.speedup == pytest.approx(one.tau / (1.0 + 0.001 * one.nodes + 1e-4 * one.depth))


def test_candidates_where_drafting_does_not_pay():
    times = BatchTimes(8, 1.0 + np.arange(128.0), np.zeros(4))
    choice, tried = candidates({"name": "recycling"}, np.full((3, 1), 0.2), [0.2], times, TIMES, 8, [2, 4])
    assert (choice.size, choice.tokens) == (0, 1.0)
    assert not any(one.is_chosen for one in tried)
    assert [one.label for one in tried] == ["own 2", "own 3", "goodput"], (
        "with one rank, 4 nodes of 3 levels are 3"
    )
    assert tried[-1].speculation["max_drafts"] == 4


def test_a_k_ary_tree_of_about_the_size():
    assert near_k_ary(14, 8) == [2, 2, 2] and near_k_ary(12, 8) == [3, 3] and near_k_ary(4, 8) == [4]
    assert sum(np.cumprod(near_k_ary(127, 8))) <= 127


@pytest.mark.parametrize(
    "drafter",
    [
        ["drafter=recycling"],
        [
            "drafter=layer_skip",
            "drafter.num_skip=1",
            "experiment.branching=[3,2]",
            "sampling.temperature=1.0",
        ],
    ],
)
def test_a_run_measures_chooses_and_tries(drafter, tiny_llama_dir, tmp_path):
    summary = run_tiny("tree_sweep", tiny_llama_dir, tmp_path / "run", *SMALL, *drafter)
    assert [row["batch"] for row in summary["choices"]] == [1, 2]
    rows = summary["trees"]
    assert [row["kind"] for row in rows].count("goodput") == 2
    if drafter[0] == "drafter=layer_skip":
        assert {"sequoia", "k-ary"} <= {row["kind"] for row in rows}
    for row in rows:
        assert row["speedup"] > 0.0 and row["tau"] >= 1.0
        assert (row["predicted_tau"] is None) == (row["kind"] == "goodput")
    for choice in summary["choices"]:
        chosen = [row for row in rows if row["batch"] == choice["batch"] and row["is_chosen"]]
        assert len(chosen) == (choice["size"] > 0)
    assert build(f"drafter={drafter[0].removeprefix('drafter=')}", *summary["override"].split()).speculation
    assert sum(summary["rank_rates"]) <= 1.0 and summary["errors"]["tau"]["max"] >= 0.0
    plots = {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert plots == {"acceptance_by_rank", "tau_by_nodes", "speedup_by_tree", "predicted_against_measured"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["override"] == summary["override"]


def test_acceptance_of_a_draft_equal_to_the_target(tiny_llama_dir, tmp_path):
    """Its first child is always right, so the rates say a chain, and the prediction is exact."""
    draft = ["drafter=draft_model", f"drafter.model={tiny_llama_dir}", "experiment.branching=[2,1,1]"]
    small = [*SMALL, "experiment.batches=[1]", "sampling.max_tokens=41"]
    summary = run_tiny("tree_sweep", tiny_llama_dir, tmp_path / "run", *small, *draft)
    assert summary["rank_rates"] == [1.0]
    ranks = {(row["depth"], row["rank"]): row["rate"] for row in summary["ranks"]}
    assert ranks == {(None, 0): 1.0, (None, 1): 0.0, (0, 0): 1.0, (0, 1): 0.0, (1, 0): 1.0, (2, 0): 1.0}
    chain = next(row for row in summary["trees"] if row["nodes"] == 3)
    assert chain["predicted_tau"] == chain["tau"] == 4.0


def test_a_stopped_sweep_measures_only_what_is_missing(tiny_llama_dir, tmp_path, monkeypatch):
    first = run_tiny("tree_sweep", tiny_llama_dir, tmp_path / "run", *SMALL, "drafter=recycling")
    path = tmp_path / "run" / "cells.jsonl"
    lines = path.read_text().splitlines()
    lost = json.loads(lines[-1])
    path.write_text("\n".join(lines[:-1]) + '\n{"kind": "ce')
    (tmp_path / "run" / "summary.json").unlink()
    measured: list[str] = []
    original = tree_sweep._Bench._measure

    def counting(self, name, drafts, batch):
        measured.append(name)
        return original(self, name, drafts, batch)

    monkeypatch.setattr(tree_sweep._Bench, "_measure", counting)
    second = run_tiny("tree_sweep", tiny_llama_dir, tmp_path / "run", *SMALL, "drafter=recycling")
    assert measured == ["plain", lost["tree"], "plain"]
    assert (second["rank_rates"], second["choices"]) == (first["rank_rates"], first["choices"])
    assert second["trees"][:-1] == first["trees"][:-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["drafter=none"], "drafter=none has no children to rank"),
        (["drafter=layer_skip", "drafter.tree={name: k_ary, branching: [2]}"], "leave it out"),
        (["experiment.batches=[64]"], "raise workload.num_prompts"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(overrides, message, tmp_path):
    config = build(*overrides, experiment="tree_sweep")
    with pytest.raises(ValueError, match=message):
        tree_sweep.run(config, SimpleNamespace(directory=tmp_path))  # pyright: ignore[reportArgumentType]


def test_trees_must_fit_the_masks():
    with pytest.raises(ValueError, match=r"experiment.branching=\[8, 4, 4\] makes a tree of 168 nodes"):
        build("experiment.branching=[8,4,4]", experiment="tree_sweep")
    with pytest.raises(ValueError, match=r"experiment\.sizes is empty"):
        build("experiment.sizes=[]", experiment="tree_sweep")
