"""Random context-dependent laws in fractions, the law of draft trees, and the law of what one step emits.

The uniforms are integrated out exactly: a decision changes only where a uniform crosses its threshold, so each
takes two values, one on either side, weighted by their measure.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from specdec.tree import Tree
from specdec.verify.tree_base import TreeDrafts, TreeRule

Prefix = tuple[int, ...]
ONE = Fraction(1)


@dataclass(frozen=True)
class Instance:
    """Prefix to [V] fractions, for the target and for the draft."""

    target: dict[Prefix, np.ndarray]
    draft: dict[Prefix, np.ndarray]


def random_law(rng: np.random.Generator, vocab_size: int, support: int = 1) -> np.ndarray:
    """Fractions that are often zero, with at least ``support`` positive ones."""
    weights = rng.integers(0, 4, vocab_size)
    weights[rng.permutation(vocab_size)[:support]] += 1
    return np.array([Fraction(int(w), int(weights.sum())) for w in weights], object)


def random_instance(seed: int, tree: Tree, vocab_size: int) -> Instance:
    rng = np.random.default_rng(seed)
    support = max(1, *map(len, tree.children))
    prefixes = [p for n in range(tree.max_depth + 1) for p in itertools.product(range(vocab_size), repeat=n)]
    return Instance(
        {p: random_law(rng, vocab_size) for p in prefixes},
        {p: random_law(rng, vocab_size, support) for p in prefixes},
    )


def all_shapes(max_nodes: int, max_children: int) -> Iterator[Tree]:
    """Every tree up to a renumbering that keeps the order of siblings; one random numbering of each."""
    rng = np.random.default_rng(0)
    for size in range(max_nodes + 1):
        shapes: dict[str, list[Tree]] = {}
        for parents in itertools.product(*(range(-1, i) for i in range(size))):
            tree = Tree(parents)
            if max(map(len, tree.children)) <= max_children:
                shapes.setdefault(_shape(tree, -1), []).append(tree)
        yield from (numberings[rng.integers(len(numberings))] for numberings in shapes.values())


def _shape(tree: Tree, node: int) -> str:
    return "(" + "".join(_shape(tree, child) for child in tree.children_of(node)) + ")"


SHAPES = list(all_shapes(5, 3))
"""All that siblings without replacement can fill with a vocabulary of three."""


def vocabulary(tree: Tree) -> int:
    """3, or 2 for trees of five nodes where no node has three children: half a minute instead of several."""
    return 3 if len(tree) < 5 or max(map(len, tree.children)) == 3 else 2


def post_order(tree: Tree, node: int = -1) -> list[int]:
    below = [n for child in tree.children_of(node) for n in post_order(tree, child)]
    return below if node < 0 else [*below, node]


def prefix_of(tree: Tree, tokens: tuple[int, ...], node: int) -> Prefix:
    return tuple(tokens[i] for i in tree.path(node))


def draft_law(tree: Tree, instance: Instance) -> dict[tuple[int, ...], Fraction]:
    """Tokens of all nodes to their probability; siblings are drawn without replacement."""
    law = {(): ONE}
    for node, parent in enumerate(tree.parents):
        earlier = [s for s in tree.children_of(parent) if s < node]
        longer = {}
        for tokens, weight in law.items():
            probs = instance.draft[prefix_of(tree, tokens, parent)].copy()
            probs[[tokens[s] for s in earlier]] = 0
            longer |= {(*tokens, x): weight * p / probs.sum() for x, p in enumerate(probs) if p}
        law = longer
    return law


def top_children(tree: Tree, instance: Instance) -> tuple[int, ...]:
    """Deterministic tokens: the draft's likeliest after each prefix, in falling order."""
    tokens: tuple[int, ...] = ()
    for node, parent in enumerate(tree.parents):
        order = np.argsort(-instance.draft[prefix_of(tree, tokens, parent)], kind="stable")
        tokens = (*tokens, int(order[tree.ranks[node]]))
    return tokens


def build(tree: Tree, instance: Instance, rows: list[tuple[int, ...]]) -> TreeDrafts:
    """The engine's arguments for drafts ``rows``, with ``draft_probs`` of leaves that must not be read."""
    prefixes = [[prefix_of(tree, tokens, node) for node in range(-1, len(tree))] for tokens in rows]
    target = np.array([[instance.target[p] for p in row] for row in prefixes], object)
    draft = np.array([[instance.draft[p] for p in row] for row in prefixes], object)
    draft[:, [leaf + 1 for leaf in tree.leaves]] = None
    return TreeDrafts.build(tree, np.array(rows, np.int64).reshape(len(rows), len(tree)), target, draft)


@dataclass(frozen=True)
class StepLaw:
    """Law of the first ``max_depth`` + 1 tokens, one step and then the target alone; expected accepted drafts."""

    emitted: Counter
    num_accepted: Fraction


def step_law(rule: TreeRule, tree: Tree, instance: Instance, law: dict[tuple[int, ...], Fraction]) -> StepLaw:
    """``law``: drafts to their probability."""
    drafts = build(tree, instance, list(law))
    rows, uniforms, measures = cells(rule.thresholds(drafts), list(law.values()))
    drafts = TreeDrafts(tree, drafts.tokens[rows], drafts.target_probs[rows], drafts.draft_probs[rows])
    prefixes: Counter = Counter()
    num_accepted, stopped = Fraction(0), 0
    for stop in rule.accept(drafts, uniforms):
        stopped += stop.rows.size
        for row, weights in zip(stop.rows, stop.weights, strict=True):
            path = tree.path(stop.node)
            num_accepted += len(path) * measures[row]
            share = measures[row] / weights.sum()
            for token, mass in enumerate(weights):
                if mass:
                    prefixes[(*drafts.tokens[row, path].tolist(), token)] += share * mass
    assert stopped == rows.size
    return StepLaw(continued(prefixes, instance, tree.max_depth + 1), num_accepted)


def cells(thresholds: np.ndarray, weights: list[Fraction]):
    """Uniforms on either side of each threshold: rows of the drafts, uniforms [n, nodes], measures times weights."""
    rows, uniforms, measures = [], [], []
    for row, values in enumerate(thresholds):
        sides = [[(h * 0, h), (h, 1 - h)] for h in values]
        for sample in itertools.product(*([s for s in pair if s[1]] for pair in sides)):
            rows.append(row)
            uniforms.append([u for u, _ in sample])
            measures.append(np.prod([weights[row], *(measure for _, measure in sample)]))
    return np.array(rows), np.array(uniforms, object).reshape(len(rows), thresholds.shape[1]), measures


def continued(prefixes: Counter, instance: Instance, length: int) -> Counter:
    """Law of ``length`` tokens, of which the first were emitted and the target draws the others."""
    law: Counter = Counter()
    for size in range(1, length + 1):
        for prefix in [p for p in prefixes if len(p) == size]:
            weight = prefixes.pop(prefix)
            if size == length:
                law[prefix] += weight
                continue
            for token, mass in enumerate(instance.target[prefix]):
                if mass:
                    prefixes[(*prefix, token)] += weight * mass
    return law


def target_law(instance: Instance, length: int) -> Counter:
    first = Counter({(x,): mass for x, mass in enumerate(instance.target[()]) if mass})
    return continued(first, instance, length)
