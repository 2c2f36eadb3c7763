"""Ragged batches, guards and invariants of ``verify_chains`` and ``verify_greedy``."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.verify import CHAIN_RULES, verify_chains, verify_greedy

RULES = pytest.mark.parametrize("rule", CHAIN_RULES)


def random_batch(seed: int, num_rows: int, width: int, vocab_size: int, sparsity: float = 0.3):
    """Target and draft float32 with zeros, drafts inside the draft's support, ragged counts, uniforms."""
    rng = np.random.default_rng(seed)

    def laws(positions: int) -> np.ndarray:
        weights = rng.exponential(size=(num_rows, positions, vocab_size)) ** 2
        weights *= rng.random(weights.shape) > sparsity
        weights[..., rng.integers(vocab_size)] += 0.1
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    target, draft = laws(width + 1), laws(width)
    scores = np.where(draft > 0, rng.random(draft.shape), -1.0)
    tokens = scores.argmax(-1)
    num_drafts = rng.integers(0, width + 1, num_rows)
    return target, draft, tokens, num_drafts, rng.random((num_rows, width)), rng.random(num_rows)


def poison_padding(target, draft, tokens, num_drafts):
    """NaN probabilities and impossible tokens wherever there is no draft."""
    target, draft, tokens = target.copy(), draft.copy(), tokens.copy()
    for row, num in enumerate(num_drafts):
        target[row, num + 1 :], draft[row, num:], tokens[row, num:] = np.nan, np.nan, -1
    return target, draft, tokens


@RULES
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(1, 9),
    width=st.integers(0, 5),
    vocab_size=st.sampled_from([2, 3, 17, 300]),
    deterministic=st.booleans(),
)
def test_invariants(rule, seed, num_rows, width, vocab_size, deterministic):
    target, draft, tokens, num_drafts, accept, last = random_batch(seed, num_rows, width, vocab_size)
    target, draft, tokens = poison_padding(target, draft, tokens, num_drafts)
    draft_probs = None if deterministic else draft
    num_accepted, next_token = verify_chains(rule, target, draft_probs, tokens, num_drafts, accept, last)
    assert num_accepted.dtype == np.int32 and next_token.dtype == np.int64
    assert (num_accepted >= 0).all() and (num_accepted <= num_drafts).all()
    for row, num in enumerate(num_accepted):
        assert target[row, num, next_token[row]] > 0
        assert all(target[row, i, tokens[row, i]] > 0 for i in range(num))
        if num < num_drafts[row] and rule == "token":
            excess = target[row, num] - (0 if deterministic else draft[row, num])
            assert excess[next_token[row]] > 0
        if num < num_drafts[row] and deterministic:
            assert next_token[row] != tokens[row, num]


@RULES
def test_rows_do_not_depend_on_the_batch_or_the_width(rule):
    target, draft, tokens, num_drafts, accept, last = random_batch(5, 40, 4, 600)
    together = verify_chains(rule, target, draft, tokens, num_drafts, accept, last)
    for row, num in enumerate(num_drafts):
        one, k = slice(row, row + 1), int(num)
        alone = verify_chains(
            rule,
            target[one, : k + 1],
            draft[one, :k],
            tokens[one, :k],
            num_drafts[one],
            accept[one, :k],
            last[one],
        )
        assert (alone[0][0], alone[1][0]) == (together[0][row], together[1][row])


@RULES
@pytest.mark.parametrize("vocab_size", [7, 700])
def test_deterministic_drafts_equal_one_hot_drafts(rule, vocab_size):
    target, _, tokens, num_drafts, accept, last = random_batch(6, 500, 4, vocab_size)
    one_hot = np.eye(vocab_size, dtype=np.float32)[tokens]
    implicit = verify_chains(rule, target, None, tokens, num_drafts, accept, last)
    explicit = verify_chains(rule, target, one_hot, tokens, num_drafts, accept, last)
    assert (implicit[0] == explicit[0]).all()
    assert (implicit[1] == explicit[1]).mean() > 0.99  # scaling by P rounds: a boundary may move


@RULES
def test_equal_distributions_accept_everything(rule):
    target, _, _, _, accept, last = random_batch(7, 50, 4, 100)
    draft = target[:, :-1]
    tokens = draft.argmax(-1)
    num_accepted, _ = verify_chains(rule, target, draft, tokens, np.full(50, 4), accept, last)
    assert (num_accepted == 4).all()


@RULES
def test_distributions_that_differ_by_rounding_still_give_a_token(rule):
    """The target is below the draft everywhere by one rounding step, so a rejection leaves no residual mass."""
    draft = np.full((1, 1, 4), 0.25, np.float32)
    target = np.full((1, 2, 4), np.nextafter(np.float32(0.25), np.float32(0)), np.float32)
    almost_one = np.array([[1 - 2.0**-24]])
    num_accepted, token = verify_chains(
        rule, target, draft, np.array([[2]]), np.array([1]), almost_one, np.array([0.9])
    )
    assert (num_accepted[0], token[0]) == (0, 3)


@RULES
def test_one_hot_target_reproduces_greedy(rule):
    rng = np.random.default_rng(8)
    argmax = rng.integers(0, 5, (400, 4))
    target = np.eye(5, dtype=np.float32)[argmax]
    _, draft, tokens, num_drafts, accept, last = random_batch(9, 400, 3, 5, sparsity=0.0)
    greedy = verify_greedy(argmax, tokens, num_drafts)
    for draft_probs in (draft, None):
        sampled = verify_chains(rule, target, draft_probs, tokens, num_drafts, accept, last)
        assert (sampled[0] == greedy[0]).all() and (sampled[1] == greedy[1]).all()


@RULES
def test_inputs_are_not_modified(rule):
    batch = random_batch(10, 20, 3, 50)
    copies = [array.copy() for array in batch]
    verify_chains(rule, *batch)
    verify_chains(rule, batch[0], None, *batch[2:])
    assert all((array == copy).all() for array, copy in zip(batch, copies, strict=True))


@RULES
@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_unusable_rows_are_named(rule, value):
    target, draft, tokens, num_drafts, accept, last = random_batch(11, 6, 3, 40)
    for broken in (target, draft):
        num_drafts[:] = 3
        saved = broken[[2, 4]].copy()
        broken[[2, 4]] = value
        with pytest.raises(ValueError, match=r"rows \[2, 4\]"):
            verify_chains(rule, target, draft, tokens, num_drafts, accept, last)
        broken[[2, 4]] = saved
    target[3, 0] = value
    num_drafts[3] = 0
    with pytest.raises(ValueError, match=r"rows \[3\]"):
        verify_chains(rule, target, draft, tokens, num_drafts, accept, last)


def test_block_names_nan_in_a_residual_row():
    """A NaN beside the drafted token is seen by the sum over the vocabulary."""
    target = np.full((3, 3, 3), [0.5, 0.25, 0.25], np.float32)
    draft = np.full((3, 2, 3), [0.25, 0.5, 0.25], np.float32)
    target[2, 1, 2] = np.nan
    tokens, accept = np.ones((3, 2), np.int64), np.full((3, 2), [0.4, 0.9])
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        verify_chains("block", target, draft, tokens, np.full(3, 2), accept, np.zeros(3))


@RULES
def test_empty_batch(rule):
    batch = random_batch(13, 2, 3, 20)
    num_accepted, next_token = verify_chains(rule, *(array[:0] for array in batch))
    assert num_accepted.shape == next_token.shape == (0,)


def test_bad_arguments_are_named():
    target, draft, tokens, num_drafts, accept, last = random_batch(12, 4, 2, 30)
    num_drafts[:] = 2
    with pytest.raises(ValueError, match="did you mean token"):
        verify_chains("tokens", target, draft, tokens, num_drafts, accept, last)
    with pytest.raises(ValueError, match=r"num_drafts=\[2, 2, 3, 2\]"):
        verify_chains("token", target, draft, tokens, np.array([2, 2, 3, 2]), accept, last)
    tokens[1, 0] = 30
    with pytest.raises(ValueError, match=r"rows \[1\].*vocabulary of 30"):
        verify_chains("token", target, draft, tokens, num_drafts, accept, last)
    tokens[1, 0], draft[1, 0, 0] = 0, 0
    with pytest.raises(ValueError, match=r"rows \[1\] have draft probability 0"):
        verify_chains("token", target, draft, tokens, num_drafts, accept, last)


def test_greedy_ragged():
    argmax = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    drafts = np.array([[1, 2], [1, 9], [9, 2], [1, 2]])
    num_accepted, next_token = verify_greedy(argmax, drafts, np.array([2, 2, 2, 0]))
    assert num_accepted.tolist() == [2, 1, 0, 0] and num_accepted.dtype == np.int32
    assert next_token.tolist() == [3, 2, 1, 1] and next_token.dtype == np.int64


def test_greedy_without_drafts():
    num_accepted, next_token = verify_greedy(
        np.array([[4], [5]]), np.zeros((2, 0), np.int64), np.zeros(2, np.int64)
    )
    assert num_accepted.tolist() == [0, 0] and next_token.tolist() == [4, 5]
