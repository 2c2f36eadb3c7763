"""Chi-square of the emitted tokens, through ``verify_chains`` with the engine's uniforms, and negative controls."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.random import Stream, uniforms
from specdec.verify import CHAIN_RULES, verify_chains
from specdec.verify.base import ChainRule, Chains
from specdec.verify.numerics import inverse_cdf
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

LARGE_TRIALS = 100_000


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
