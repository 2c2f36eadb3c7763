"""Logits to probabilities to tokens: against transformers' warpers, hand-computed penalties, and edge cases."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.sampling import (
    PenaltyRow,
    apply_penalties,
    greatest,
    process_logits,
    sample_from_probs,
    top_logprobs,
)

NO_TOKENS = np.array([], np.int64)


def random_logits(rows: int, vocab_size: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(rows + vocab_size))


def transformers_probs(logits, temperature, top_k, top_p, min_p):
    """Row by row through the warpers, in the order in which transformers applies them."""
    rows = []
    for i, row in enumerate(logits):
        warpers = [TemperatureLogitsWarper(float(temperature[i]))]
        warpers += [TopKLogitsWarper(int(top_k[i]))] if top_k[i] else []
        warpers += [TopPLogitsWarper(float(top_p[i]))] if top_p[i] < 1 else []
        warpers += [MinPLogitsWarper(float(min_p[i]))] if min_p[i] > 0 else []
        scores = row[None]
        for warper in warpers:
            scores = warper(None, scores)
        rows.append(scores.softmax(-1)[0])
    return torch.stack(rows)


FILTERS = [
    (0, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (0, 1.0, 0.1),
    (40, 0.8, 0.0),
    (40, 0.95, 0.05),
    (1, 0.5, 0.5),
]


@pytest.mark.parametrize("vocab_size", [63, 500, 5000])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_filters_match_transformers(vocab_size, spread):
    """Flat logits (spread 1) at 5000 tokens need the full sort, peaked ones do not."""
    logits = random_logits(2 * len(FILTERS), vocab_size, spread)
    top_k, top_p, min_p = (np.array(column) for column in zip(*(FILTERS + FILTERS), strict=True))
    temperature = np.linspace(0.5, 2.0, len(logits), dtype=np.float32)
    probs = process_logits(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = transformers_probs(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=1e-4)
    assert ((probs > 0) == (expected > 0)).all()


def test_top_p_beyond_the_candidates_sorts_the_row():
    logits = random_logits(3, 20_000, spread=0.1)
    probs = process_logits(logits, np.ones(3), top_p=np.array([0.01, 0.5, 0.9999]))
    expected = transformers_probs(logits, np.ones(3), np.zeros(3), np.array([0.01, 0.5, 0.9999]), np.zeros(3))
    kept, expected_kept = (probs > 0).sum(-1), (expected > 0).sum(-1)
    # transformers accumulates in float32 from the small end: at 20,000 terms the cut may differ by a few.
    assert (kept - expected_kept).abs().max() <= 3
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))


def test_rows_do_not_depend_on_the_batch():
    logits = random_logits(len(FILTERS), 2000)
    top_k, top_p, min_p = (np.array(column) for column in zip(*FILTERS, strict=True))
    together = process_logits(logits, np.full(len(FILTERS), 0.9), top_k=top_k, top_p=top_p, min_p=min_p)
    for i in range(len(FILTERS)):
        one = slice(i, i + 1)
        alone = process_logits(
            logits[one], np.array([0.9]), top_k=top_k[one], top_p=top_p[one], min_p=min_p[one]
        )
        assert torch.equal(alone[0], together[i])


def test_temperature_zero_is_one_hot_in_a_mixed_batch():
    logits = random_logits(3, 100)
    probs = process_logits(logits, np.array([0.0, 1.0, 0.0]), top_k=np.array([3, 0, 0]))
    assert torch.equal(probs[[0, 2]].argmax(-1), logits[[0, 2]].argmax(-1))
    assert probs[[0, 2]].sum() == 2 and probs[[0, 2]].max() == 1
    torch.testing.assert_close(probs[1], logits[1].softmax(-1))


def test_process_logits_leaves_its_input_alone():
    logits = random_logits(2, 50)
    before = logits.clone()
    process_logits(logits, np.ones(2), top_k=np.array([3, 0]), top_p=np.array([1.0, 0.5]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e4])
def test_extreme_temperatures_are_finite(temperature):
    probs = process_logits(1e4 * random_logits(2, 50), np.full(2, temperature), min_p=np.full(2, 0.1))
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))


def test_ties_with_the_last_kept_token_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (process_logits(logits, np.ones(1), top_k=np.array([2])) > 0).tolist() == [[True] * 4 + [False]]
    assert (process_logits(logits, np.ones(1), top_p=np.array([0.6])) > 0).tolist() == [[True] * 4 + [False]]


def test_strictest_filters_keep_the_most_likely_token():
    logits = random_logits(3, 64)
    probs = process_logits(
        logits,
        np.ones(3),
        top_k=np.array([1, 0, 0]),
        top_p=np.array([1, 1e-9, 1]),
        min_p=np.array([0, 0, 1.0]),
    )
    assert torch.equal((probs > 0).sum(-1), torch.ones(3, dtype=torch.int64))
    assert torch.equal(probs.argmax(-1), logits.argmax(-1))


def test_unusable_logits_are_named():
    logits = random_logits(4, 33)
    logits[1, 7], logits[2, 0], logits[3] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(ValueError, match=r"rows \[1, 2, 3\]"):
        process_logits(logits, np.ones(4))


def test_greatest_finds_places_and_shows_what_has_no_law():
    logits = random_logits(5, 33)
    logits[1, 7], logits[2, 0], logits[3], logits[4, 5] = float("nan"), float("inf"), float("-inf"), 9.0
    places, peaks = greatest(logits)
    assert places[[1, 2, 4]].tolist() == [7, 0, 5] and places[0] == logits[0].argmax()
    assert np.isfinite(peaks).tolist() == [True, False, False, False, True]
    assert peaks[0] == logits[0].max() and peaks[4] == 9.0


def test_penalties_by_hand():
    """Prompt 0 1, generated 1 2; the second row has drafts 3 and 2 before it."""
    base = torch.tensor([4.0, -2.0, 1.0, 3.0, 5.0])
    logits = torch.stack([base, base, base])
    tokens = np.array([0, 1, 1, 2])
    histories = [PenaltyRow(0, tokens, 2, NO_TOKENS), PenaltyRow(1, tokens, 2, np.array([3, 2]))]
    apply_penalties(logits, histories, np.array([2.0, 2.0, 2.0]), np.array([0.5, 0.5, 0.5]))
    assert logits[0].tolist() == [2.0, -4.5, 0.0, 3.0, 5.0]
    assert logits[1].tolist() == [2.0, -4.5, 0.0, 1.0, 5.0]
    assert torch.equal(logits[2], base)


def test_repetition_penalty_matches_transformers():
    logits = random_logits(1, 200)
    tokens = np.random.default_rng(0).integers(0, 200, 90)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(tokens)[None], logits.clone())
    apply_penalties(logits, [PenaltyRow(0, tokens[:80], 60, tokens[80:])], np.array([1.3]), np.array([0.0]))
    torch.testing.assert_close(logits, expected)


def test_top_logprobs_match_log_softmax():
    logits = random_logits(4, 300)
    tokens = np.array([0, 5, 299, 17])
    chosen, top, top_tokens = top_logprobs(logits, tokens, 3)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, expected[torch.arange(4), torch.from_numpy(tokens)])
    torch.testing.assert_close(top, expected.topk(3).values)
    assert torch.equal(top_tokens, logits.topk(3).indices)
    assert top_logprobs(logits, tokens, 0)[1].shape == (4, 0)


@pytest.mark.parametrize("vocab_size", [1, 3, 255, 256, 257, 1000])
def test_inverse_cdf_inverts_the_cumulative_sum(vocab_size):
    rng = np.random.default_rng(vocab_size)
    probs = rng.random((200, vocab_size)).astype(np.float32) * (rng.random((200, vocab_size)) < 0.3)
    probs[:, rng.integers(vocab_size)] += 0.1
    probs /= probs.sum(axis=1, keepdims=True)
    uniforms = rng.random(200)
    uniforms[:4] = 0.0, np.nextafter(1.0, 0), 1 - 2.0**-24, 0.5
    tokens = sample_from_probs(torch.from_numpy(probs.astype(np.float32)), uniforms)
    cumulative = probs.astype(np.float64).cumsum(axis=1) / probs.astype(np.float64).sum(axis=1, keepdims=True)
    rows = np.arange(200)
    assert (probs[rows, tokens] > 0).all()
    # The chunk sums are float32: allow their rounding where a uniform falls on a boundary.
    assert (cumulative[rows, tokens] > uniforms - 1e-6).all()
    assert (cumulative[rows, tokens] - probs[rows, tokens] <= uniforms + 1e-6).all()


def test_sampling_names_rows_without_mass():
    probs = torch.full((3, 5), 0.2)
    probs[1], probs[2, 3] = 0.0, float("nan")
    with pytest.raises(ValueError, match=r"rows \[1, 2\]"):
        sample_from_probs(probs, np.full(3, 0.5))
