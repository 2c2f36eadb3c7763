"""A small language model with its chi-square test, which the statistical tests of chains and of trees share.

Bins expected below 5 are merged; callers compare with 10, that is df + 10 √(2 df): ten standard deviations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.random import Stream, uniforms
from specdec.verify.numerics import inverse_cdf

NUM_DRAFTS = 3
NUM_TRIALS = 200_000
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
