"""Chi-square of the tokens that draft trees emit, through ``verify_trees`` with the engine's uniforms."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.random import Stream, uniforms
from specdec.tree import Tree
from specdec.verify import TREE_RULES, verify_trees
from specdec.verify.numerics import inverse_cdf
from specdec.verify.recursive import RULE as RECURSIVE
from specdec.verify.tree_base import NodeLaws, TreeRule, draft_ratios
from specdec.verify.walk import walk
from tests.verify.chi_square import (
    NUM_DRAFTS,
    NUM_TRIALS,
    SEED,
    Model,
    excess,
    fill_up,
    make_model,
    marginals,
    worst_excess,
)

TREE = Tree([-1, -1, -1, 0, 0, 1, 3, 3, 4])
LARGE_TREE = Tree([-1, -1, 0, 0, 2])
LARGE_TRIALS = 20_000
CONTROL_TRIALS = 100_000
SMALL = make_model(16, 16)
LARGE = make_model(4096, 1)
SAMPLED = [rule for rule in TREE_RULES if TREE_RULES[rule].needs_draft_probs]


def draw_tree(model: Model, tree: Tree, noise: np.ndarray, deterministic: bool):
    """Tokens [n, nodes], and the contexts [n, nodes + 1] after the root and each node."""
    num_rows = len(noise)
    tokens = np.zeros((num_rows, len(tree)), np.int64)
    contexts = np.zeros((num_rows, len(tree) + 1), np.int64)
    depths = np.append(tree.depths, 0)  # the last is the root's
    for node, parent in enumerate(tree.parents):
        law = model.draft[depths[parent]][contexts[:, parent + 1]]
        for sibling in tree.children_of(parent)[: tree.ranks[node]]:
            law[np.arange(num_rows), tokens[:, sibling]] = 0
        tokens[:, node] = law.argmax(axis=1) if deterministic else inverse_cdf(law, noise[:, node])
        contexts[:, node + 1] = tokens[:, node] % model.num_contexts
    return tokens, contexts


def after_each_node(laws: np.ndarray, tree: Tree, contexts: np.ndarray) -> np.ndarray:
    """Laws [positions, contexts, V] of the model to [n, nodes + 1, V]."""
    depths = np.concatenate([[0], tree.depths])
    return (
        laws[depths, contexts]
        if laws.shape[1] > 1
        else np.broadcast_to(laws[depths, 0], (*contexts.shape, laws.shape[2]))
    )


def speculate(
    model: Model, rule: str, tree: Tree, trials: np.ndarray, accept_stream: Stream, deterministic: bool
):
    """One step per trial: emitted tokens [n, NUM_DRAFTS + 1], filled up from the target, and accepted counts."""
    seeds = np.full(trials.size, SEED)
    noise = uniforms(seeds, trials, Stream.DRAFT, len(tree))
    tokens, contexts = draw_tree(model, tree, noise, deterministic)
    accept = uniforms(seeds, trials, accept_stream, len(tree))
    last, next_token = verify_trees(
        rule,
        tree,
        tokens,
        after_each_node(model.target, tree, contexts),
        after_each_node(model.draft, tree, contexts),
        np.concatenate([accept, uniforms(seeds, trials, Stream.RESIDUAL, 1)], axis=1),
    )
    paths = np.zeros((len(tree) + 1, NUM_DRAFTS), np.int64)  # the last is the root's
    for node in range(len(tree)):
        paths[node, : tree.depths[node]] = tree.path(node)
    path_tokens = np.take_along_axis(tokens, paths[last], axis=1)
    num_accepted = np.append(tree.depths, 0)[last]
    return fill_up(model, path_tokens, num_accepted, next_token, trials), num_accepted


def run(
    rule: str,
    model: Model = SMALL,
    tree: Tree = TREE,
    num_trials: int = NUM_TRIALS,
    accept_stream: Stream = Stream.ACCEPT,
    deterministic: bool | None = None,
):
    if deterministic is None:
        deterministic = rule not in SAMPLED
    chunk = max(1, 2**21 // (model.vocab_size * len(tree)))
    parts = []
    for start in range(0, num_trials, chunk):
        trials = np.arange(start, min(start + chunk, num_trials), dtype=np.uint64)
        parts.append(speculate(model, rule, tree, trials, accept_stream, deterministic))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize("rule", TREE_RULES)
def test_small_vocabulary(rule):
    emitted, _ = run(rule)
    assert worst_excess(SMALL, emitted) < 10
    pairs = marginals(SMALL)[0][:, None] * SMALL.target[1].astype(np.float64)
    assert excess(emitted[:, 0] * 16 + emitted[:, 1], pairs.ravel()) < 10


@pytest.mark.parametrize("rule", TREE_RULES)
def test_large_vocabulary(rule):
    emitted, num_accepted = run(rule, LARGE, LARGE_TREE, LARGE_TRIALS)
    assert worst_excess(LARGE, emitted) < 10
    assert 0.1 < num_accepted.mean() < NUM_DRAFTS or rule == "one_hot"


def test_traversal_accepts_more_than_recursive():
    means = {rule: run(rule, num_trials=CONTROL_TRIALS)[1].mean() for rule in SAMPLED}
    # The standard error of a mean is below 0.005 here.
    assert means["traversal"] > means["recursive"] + 0.03


class Unzeroed(NodeLaws):
    """Forgets to take a rejected token out of the draft's distribution."""

    def reject(self, child, stay, scale=1):
        mass = super().reject(child, stay, scale)
        self._draft = self._drafts.draft_probs[self.rows, self._node + 1]
        return mass


def accept_unzeroed(drafts, noise):
    ratios = draft_ratios(drafts)
    return walk(drafts, noise, lambda node, rows: Unzeroed(drafts, ratios, node, rows))


def test_control_draft_not_zeroed(monkeypatch):
    monkeypatch.setitem(TREE_RULES, "recursive", TreeRule(True, RECURSIVE.thresholds, accept_unzeroed))
    assert worst_excess(SMALL, run("recursive", num_trials=CONTROL_TRIALS)[0]) > 10


@pytest.mark.parametrize("rule", SAMPLED)
def test_control_deterministic_children_taken_for_sampled_ones(rule):
    assert worst_excess(SMALL, run(rule, num_trials=CONTROL_TRIALS, deterministic=True)[0]) > 10


@pytest.mark.parametrize("rule", SAMPLED)
@pytest.mark.parametrize("shared", [Stream.DRAFT, Stream.RESIDUAL])
def test_control_shared_noise(rule, shared):
    """Accept noise equal to the draft's or to the residual's biases a small vocabulary."""
    assert worst_excess(SMALL, run(rule, num_trials=CONTROL_TRIALS, accept_stream=shared)[0]) > 10


def test_sampled_children_are_no_trouble_for_one_hot():
    assert worst_excess(SMALL, run("one_hot", num_trials=CONTROL_TRIALS, deterministic=False)[0]) < 10
