"""Exact enumeration with rationals: the joint law of the emitted tokens equals the target's.

The uniforms are integrated out exactly. A decision changes only where a uniform crosses its threshold, so each
uniform takes two values, one on either side, weighted by their measure. The functions that decide are those
of the engine, on object arrays of ``Fraction``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from specdec.verify import CHAIN_RULES, verify_chains
from specdec.verify.base import ChainRule, Chains, residual
from specdec.verify.block import path_ratios
from specdec.verify.numerics import inverse_cdf
from specdec.verify.token import accept as accept_by_token

VOCAB = 3
ONE = Fraction(1)


@dataclass(frozen=True)
class Instance:
    """Context-dependent distributions: prefix to [VOCAB] fractions. ``draft`` None: drafts are ``lookup[prefix]``."""

    num_drafts: int
    target: dict[tuple[int, ...], np.ndarray]
    draft: dict[tuple[int, ...], np.ndarray] | None
    lookup: dict[tuple[int, ...], int]

    def draft_law(self, prefix: tuple[int, ...]) -> np.ndarray:
        if self.draft is not None:
            return self.draft[prefix]
        return np.array([Fraction(int(x == self.lookup[prefix])) for x in range(VOCAB)], object)


def random_law(rng: np.random.Generator) -> np.ndarray:
    """Fractions that often hold zeros and ones."""
    weights = rng.integers(0, 5, VOCAB)
    weights[rng.integers(VOCAB)] += 1
    return np.array([Fraction(int(w), int(weights.sum())) for w in weights], object)


def random_instance(seed: int, num_drafts: int, deterministic: bool = False) -> Instance:
    rng = np.random.default_rng(seed)
    prefixes = [p for n in range(num_drafts + 1) for p in itertools.product(range(VOCAB), repeat=n)]
    target = {p: random_law(rng) for p in prefixes}
    draft = {p: random_law(rng) for p in prefixes}
    lookup = {p: int(rng.integers(VOCAB)) for p in prefixes}
    return Instance(num_drafts, target, None if deterministic else draft, lookup)


def weight_of(law, path: tuple[int, ...]) -> Fraction:
    return np.prod([law(path[:i])[x] for i, x in enumerate(path)] + [ONE])


def target_law(instance: Instance) -> Counter:
    paths = itertools.product(range(VOCAB), repeat=instance.num_drafts + 1)
    law = Counter({p: weight_of(instance.target.__getitem__, p) for p in paths})
    return Counter({p: w for p, w in law.items() if w})


def build_chains(instance: Instance, padding: int = 0, one_hot: bool = False):
    """All draft paths of positive weight as rows, with ``padding`` unread columns of nonsense; and the weights."""
    paths = itertools.product(range(VOCAB), repeat=instance.num_drafts)
    paths = [p for p in paths if weight_of(instance.draft_law, p)]
    nonsense = [np.array([Fraction(-7)] * VOCAB, object)] * padding
    target = [[instance.target[p[:i]] for i in range(len(p) + 1)] + nonsense for p in paths]
    tokens = np.array([p + (99,) * padding for p in paths]).reshape(len(paths), -1)
    num_drafts = np.full(len(paths), instance.num_drafts)
    draft = None
    if instance.draft is not None or one_hot:
        draft = np.array(
            [[instance.draft_law(p[:i]) for i in range(len(p))] + nonsense for p in paths], object
        )
        draft = draft.reshape(len(paths), tokens.shape[1], VOCAB)
    weights = [weight_of(instance.draft_law, p) for p in paths]
    return (np.array(target, object), draft, tokens, num_drafts), weights


def accept_cells(thresholds: np.ndarray):
    """Uniforms on either side of each threshold: rows of the chains, uniforms [n, K], measures."""
    rows, uniforms, measures = [], [], []
    for row, values in enumerate(thresholds):
        for below in itertools.product((True, False), repeat=values.size):
            measure = np.prod([h if b else 1 - h for h, b in zip(values, below, strict=True)] + [ONE])
            if measure:
                rows.append(row)
                uniforms.append([h * 0 if b else h for h, b in zip(values, below, strict=True)])
                measures.append(measure)
    return np.array(rows), np.array(uniforms, object).reshape(len(rows), -1), measures


def take(arrays, rows: np.ndarray):
    return tuple(None if a is None else a[rows] for a in arrays)


@dataclass(frozen=True)
class StepLaw:
    emitted: Counter
    num_accepted: Fraction


def step_law(rule: ChainRule, instance: Instance, padding=0, one_hot=False, residual_of=residual) -> StepLaw:
    """Law of the first num_drafts + 1 tokens: one speculative step, then the target alone."""
    arrays, path_weights = build_chains(instance, padding, one_hot)
    rows, uniforms, measures = accept_cells(rule.thresholds(Chains.build(*arrays)))
    chains = Chains.build(*take(arrays, rows))
    num_accepted, scale = rule.accept(chains, uniforms)
    next_weights = residual_of(chains, num_accepted, scale)
    emitted: Counter = Counter()
    expected = Fraction(0)
    for i, row in enumerate(rows):
        weight = path_weights[row] * measures[i]
        expected += weight * int(num_accepted[i])
        prefix = tuple(int(x) for x in arrays[2][row, : num_accepted[i]])
        for token, mass in enumerate(next_weights[i]):
            if mass:
                share = weight * mass / next_weights[i].sum()
                continue_with_target(instance, (*prefix, token), share, emitted)
    return StepLaw(emitted, expected)


def continue_with_target(instance: Instance, path: tuple[int, ...], weight: Fraction, law: Counter) -> None:
    if len(path) == instance.num_drafts + 1:
        law[path] += weight
        return
    for token, mass in enumerate(instance.target[path]):
        if mass:
            continue_with_target(instance, (*path, token), weight * mass, law)


@pytest.mark.parametrize("rule", CHAIN_RULES)
@pytest.mark.parametrize(
    ("num_drafts", "padding", "instances"), [(0, 1, 3), (1, 0, 30), (2, 1, 30), (3, 0, 20)]
)
def test_joint_law_equals_the_target(rule, num_drafts, padding, instances):
    for seed in range(instances):
        instance = random_instance(seed, num_drafts)
        assert step_law(CHAIN_RULES[rule], instance, padding).emitted == target_law(instance)


@pytest.mark.parametrize("rule", CHAIN_RULES)
@pytest.mark.parametrize("num_drafts", [2, 3])
def test_deterministic_drafts_equal_the_target_and_one_hot_drafts(rule, num_drafts):
    for seed in range(15):
        instance = random_instance(seed, num_drafts, deterministic=True)
        law = step_law(CHAIN_RULES[rule], instance)
        assert law.emitted == target_law(instance)
        assert law == step_law(CHAIN_RULES[rule], instance, one_hot=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("num_drafts", "instances"), [(2, 40), (3, 6)])
def test_block_accepts_at_least_as_many_as_token(num_drafts, instances, deterministic):
    gains = []
    for seed in range(instances):
        instance = random_instance(100 + seed, num_drafts, deterministic)
        block, token = (step_law(CHAIN_RULES[rule], instance).num_accepted for rule in ("block", "token"))
        gains.append(block - token)
    assert min(gains) >= 0
    assert max(gains) > 0 or deterministic


def test_worked_example_of_block_verification():
    """Two drafts, independent of the context: 10/9 accepted token by token, 11/9 as a block."""
    third = Fraction(1, 3)
    prefixes = [p for n in range(3) for p in itertools.product(range(VOCAB), repeat=n)]
    target = {p: np.array([third, 2 * third, 0 * third], object) for p in prefixes}
    draft = {p: np.array([2 * third, third, 0 * third], object) for p in prefixes}
    instance = Instance(2, target, draft, {})
    assert step_law(CHAIN_RULES["token"], instance).num_accepted == Fraction(10, 9)
    assert step_law(CHAIN_RULES["block"], instance).num_accepted == Fraction(11, 9)


def biased_thresholds(chains: Chains) -> np.ndarray:
    return np.minimum(chains.ratios() * Fraction(21, 20), 1)


def biased_accept(chains: Chains, uniforms: np.ndarray):
    accepted = (uniforms < biased_thresholds(chains)) & chains.drafted
    return np.cumprod(accepted, axis=1).sum(axis=1), None


def target_as_residual(chains: Chains, num_accepted: np.ndarray, scale) -> np.ndarray:
    return chains.target_probs[np.arange(num_accepted.size), num_accepted]


def unscaled_accept(chains: Chains, uniforms: np.ndarray):
    return CHAIN_RULES["block"].accept(chains, uniforms)[0], None


def accept_until_first_failure(chains: Chains, uniforms: np.ndarray):
    passed = (uniforms < CHAIN_RULES["block"].thresholds(chains)) & chains.drafted
    num_accepted = np.cumprod(passed, axis=1).sum(axis=1)
    return num_accepted, path_ratios(chains)[np.arange(num_accepted.size), num_accepted]


CONTROLS = {
    "thresholds 5 % too high": (ChainRule(biased_thresholds, biased_accept), residual),
    "token, target as residual": (CHAIN_RULES["token"], target_as_residual),
    "block, target as residual": (CHAIN_RULES["block"], target_as_residual),
    "block, residual without its scale": (
        ChainRule(CHAIN_RULES["block"].thresholds, unscaled_accept),
        residual,
    ),
    "block, stopped early": (
        ChainRule(CHAIN_RULES["block"].thresholds, accept_until_first_failure),
        residual,
    ),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_controls_change_the_law(control):
    """Wrong rules that the enumeration must tell from the right ones."""
    rule, residual_of = CONTROLS[control]
    instances = [random_instance(seed, 2) for seed in range(10)]
    wrong = [step_law(rule, i, residual_of=residual_of).emitted != target_law(i) for i in instances]
    assert sum(wrong) >= 3


def test_inverse_cdf_is_exact():
    """The left end of each token's interval draws that token, a point just below it the one before."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = random_law(rng) * Fraction(3, 7)
        support = [x for x in range(VOCAB) if weights[x]]
        left = [weights[:x].sum() / weights.sum() for x in support]
        rows = np.array([weights] * len(support), object)
        assert inverse_cdf(rows, np.array(left, object)).tolist() == support
        below = [u - Fraction(1, 10**9) for u in left[1:]]
        if below:
            assert inverse_cdf(rows[1:], np.array(below, object)).tolist() == support[:-1]


@pytest.mark.parametrize("rule", CHAIN_RULES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_decisions_equal_exact_decisions(rule, deterministic, dtype):
    """Away from the boundaries, float arrays and fractions accept the same drafts and draw the same token."""
    rng = np.random.default_rng(1)
    for seed in range(10):
        arrays, _ = build_chains(random_instance(200 + seed, 3, deterministic))
        rows = rng.integers(0, len(arrays[2]), 300)
        target, draft, tokens, num_drafts = take(arrays, rows)
        uniforms = rng.integers(0, 2**20, (300, 4))
        exact_uniforms = np.array(
            [[Fraction(2 * int(u) + 1, 2**21) for u in row] for row in uniforms], object
        )
        exact = verify_chains(
            rule, target, draft, tokens, num_drafts, exact_uniforms[:, :3], exact_uniforms[:, 3]
        )
        numbers = exact_uniforms.astype(np.float64)
        draft = None if draft is None else draft.astype(dtype)
        floats = verify_chains(
            rule, target.astype(dtype), draft, tokens, num_drafts, numbers[:, :3], numbers[:, 3]
        )
        assert (floats[0] == exact[0]).all()
        assert (floats[1] == exact[1]).all()


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_accept_is_defined_by_the_thresholds(rule):
    """Token: drafts before the first failure. Block: the largest draft that does not fail."""
    rng = np.random.default_rng(2)
    for seed in range(10):
        arrays, _ = build_chains(random_instance(300 + seed, 3))
        chains = Chains.build(*take(arrays, rng.integers(0, len(arrays[2]), 200)))
        uniforms = np.array(
            [[Fraction(int(u), 997) for u in row] for row in rng.integers(0, 997, (200, 3))], object
        )
        passed = uniforms < CHAIN_RULES[rule].thresholds(chains)
        if rule == "token":
            expected = [len(list(itertools.takewhile(bool, row))) for row in passed]
        else:
            expected = [max([i + 1 for i in range(3) if row[i]], default=0) for row in passed]
        assert CHAIN_RULES[rule].accept(chains, uniforms)[0].tolist() == expected


def test_token_accept_never_passes_threshold_zero():
    arrays, _ = build_chains(random_instance(0, 1))
    chains = Chains.build(*arrays)
    zero = np.zeros((len(arrays[2]), 1), object)
    assert (accept_by_token(chains, zero)[0] == (chains.ratios()[:, 0] > 0)).all()
