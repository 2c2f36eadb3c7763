"""Chi-square of the emitted tokens, through ``verify_chains`` with the engine's uniforms, and negative controls.

Bins expected below 5 are merged; the threshold is df + 10 √(2 df), ten standard deviations of the statistic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from specdec.random import Stream, uniforms
from specdec.verify import CHAIN_RULES, verify_chains
from specdec.verify.base import ChainRule, Chains
from specdec.verify.numerics import inverse_cdf

NUM_DRAFTS = 3
NUM_TRIALS = 200_000
LARGE_TRIALS = 100_000
SEED = np.uint64(20240229)


@dataclass(frozen=True)
class Model:
    """Distributions after each of ``contexts`` = previous token modulo the number of contexts, float32.

    ``target`` and ``draft`` are [NUM_DRAFTS + 1, contexts, V]; the first token follows context 0.
    """

    target: np.ndarray
    draft: np.ndarray

    @property
    def num_contexts(self) -> int:
        return self.target.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.target.shape[2]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def make_model(vocab_size: int, num_contexts: int) -> Model:
    rng = np.random.default_rng(vocab_size)
    logits = 1.5 * rng.standard_normal((NUM_DRAFTS + 1, num_contexts, vocab_size))
    return Model(softmax(logits), softmax(logits + rng.standard_normal(logits.shape)))


def speculate(model: Model, rule: str, trials: np.ndarray, accept_stream: Stream, deterministic: bool):
    """One step per trial: emitted tokens [n, NUM_DRAFTS + 1], filled up from the target, and accepted counts."""
    seeds = np.full(trials.size, SEED)
    draft_noise = uniforms(seeds, trials, Stream.DRAFT, NUM_DRAFTS)
    context = np.zeros(trials.size, np.int64)
    tokens, draft_probs, contexts = [], [], [context]
    for position in range(NUM_DRAFTS):
        law = model.draft[position][context]
        token = law.argmax(axis=1) if deterministic else inverse_cdf(law, draft_noise[:, position])
        context = token % model.num_contexts
        tokens.append(token)
        draft_probs.append(law)
        contexts.append(context)
    target_probs = np.stack([model.target[i][contexts[i]] for i in range(NUM_DRAFTS + 1)], axis=1)
    num_accepted, next_token = verify_chains(
        rule,
        target_probs,
        None if deterministic else np.stack(draft_probs, axis=1),
        np.stack(tokens, axis=1),
        np.full(trials.size, NUM_DRAFTS),
        uniforms(seeds, trials, accept_stream, NUM_DRAFTS),
        uniforms(seeds, trials, Stream.RESIDUAL, 1)[:, 0],
    )
    return fill_up(model, np.stack(tokens, axis=1), num_accepted, next_token, trials), num_accepted


def fill_up(model: Model, tokens, num_accepted, next_token, trials) -> np.ndarray:
    """Positions after ``next_token``, drawn plainly from the target with noise of another seed."""
    emitted = np.concatenate([tokens, np.zeros_like(tokens[:, :1])], axis=1)
    emitted[np.arange(trials.size), num_accepted] = next_token
    noise = uniforms(np.full(trials.size, SEED + np.uint64(1)), trials, Stream.DRAFT, NUM_DRAFTS + 1)
    for position in range(1, NUM_DRAFTS + 1):
        rows = np.flatnonzero(position > num_accepted)
        law = model.target[position][emitted[rows, position - 1] % model.num_contexts]
        emitted[rows, position] = inverse_cdf(law, noise[rows, position])
    return emitted


def run(model: Model, rule: str, accept_stream=Stream.ACCEPT, deterministic=False, num_trials=NUM_TRIALS):
    chunk = max(1, 2**22 // (model.vocab_size * (NUM_DRAFTS + 1)))
    parts = [
        speculate(
            model,
            rule,
            np.arange(i, min(i + chunk, num_trials), dtype=np.uint64),
            accept_stream,
            deterministic,
        )
        for i in range(0, num_trials, chunk)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def marginals(model: Model) -> list[np.ndarray]:
    """Exact law of the token at each position, float64 [V] each."""
    context_law = np.eye(model.num_contexts)[0]
    laws = []
    for position in range(NUM_DRAFTS + 1):
        laws.append(context_law @ model.target[position].astype(np.float64))
        context = np.arange(model.vocab_size) % model.num_contexts
        context_law = np.bincount(context, weights=laws[-1], minlength=model.num_contexts)
    return laws


def excess(tokens: np.ndarray, law: np.ndarray) -> float:
    """(chi-square − df) / √(2 df): standard deviations above its mean."""
    expected = law / law.sum() * tokens.size
    observed = np.bincount(tokens, minlength=law.size).astype(np.float64)
    order = np.argsort(expected)
    expected, observed = expected[order], observed[order]
    # Merge from the small end until the merged bin and all others hold 5 or more.
    merged = max(np.searchsorted(expected, 5.0), 1)
    while expected[:merged].sum() < 5:
        merged += 1
    expected = np.append(expected[merged:], expected[:merged].sum())
    observed = np.append(observed[merged:], observed[:merged].sum())
    degrees = expected.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


def worst_excess(model: Model, emitted: np.ndarray) -> float:
    return max(excess(emitted[:, i], law) for i, law in enumerate(marginals(model)))


SMALL = make_model(16, 16)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_small_vocabulary(rule, deterministic):
    emitted, _ = run(SMALL, rule, deterministic=deterministic)
    assert worst_excess(SMALL, emitted) < 10
    pairs = marginals(SMALL)[0][:, None] * SMALL.target[1].astype(np.float64)
    assert excess(emitted[:, 0] * 16 + emitted[:, 1], pairs.ravel()) < 10


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_large_vocabulary(rule):
    model = make_model(4096, 1)
    emitted, num_accepted = run(model, rule, num_trials=LARGE_TRIALS)
    assert worst_excess(model, emitted) < 10
    assert 0.2 < num_accepted.mean() < NUM_DRAFTS


def test_block_accepts_more_than_token():
    means = {rule: run(SMALL, rule)[1].mean() for rule in CHAIN_RULES}
    # The standard error of a mean is below 0.003 here.
    assert means["block"] > means["token"] + 0.02


def test_accepted_count_matches_its_expectation():
    """Token rule, first draft: P(accept) = Σ min(target, draft)."""
    _, num_accepted = run(SMALL, "token")
    expected = np.minimum(SMALL.target[0, 0], SMALL.draft[0, 0]).sum()
    assert abs((num_accepted >= 1).mean() - expected) < 5 * np.sqrt(0.25 / NUM_TRIALS)


def biased_accept(chains: Chains, noise: np.ndarray):
    accepted = noise < np.minimum(1.05 * chains.ratios(), 1)
    return np.cumprod(accepted & chains.drafted, axis=1).sum(axis=1), None


def target_as_residual(chains: Chains, num_accepted: np.ndarray, scale) -> np.ndarray:
    return chains.target_probs[np.arange(num_accepted.size), num_accepted]


def test_control_thresholds_too_high(monkeypatch):
    monkeypatch.setitem(CHAIN_RULES, "biased", ChainRule(CHAIN_RULES["token"].thresholds, biased_accept))
    assert worst_excess(SMALL, run(SMALL, "biased")[0]) > 10


@pytest.mark.parametrize("rule", ["token", "block"])
def test_control_target_as_residual(rule, monkeypatch):
    monkeypatch.setattr("specdec.verify.chains.residual", target_as_residual)
    assert worst_excess(SMALL, run(SMALL, rule)[0]) > 10


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("shared", [Stream.DRAFT, Stream.RESIDUAL])
def test_control_shared_noise(rule, shared):
    """Accept noise equal to the draft's or to the residual's biases a small vocabulary."""
    assert worst_excess(SMALL, run(SMALL, rule, accept_stream=shared)[0]) > 10
