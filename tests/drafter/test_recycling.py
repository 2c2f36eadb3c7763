"""What is recycled, the tree that it is followed along, and the rates that shape it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafter import make_drafter
from specdec.drafter.recycling import SPARE, RecyclingDrafter, best_shape, likeliest
from tests.drafter.steps import Rig, branches

VOCAB = 12


def noise(prefix: list[int], vocab_size: int = VOCAB) -> np.ndarray:
    """Logits that depend on the last two tokens."""
    return np.random.default_rng(prefix[-2:]).normal(size=vocab_size)


def rig(successors: int = 3, **options) -> Rig:
    return Rig(RecyclingDrafter(successors), noise, VOCAB, **options)


@given(st.lists(st.floats(0.01, 0.4), min_size=1, max_size=4), st.integers(0, 20))
def test_the_shape_has_the_largest_products(rates: list[float], count: int):
    shape = best_shape(np.array(rates), count)
    products: list[float] = []
    paths: list[tuple[int, ...]] = []
    for parent, rank in zip(shape.parents.tolist(), shape.ranks.tolist(), strict=True):
        products.append(rates[rank] * (products[parent] if parent >= 0 else 1.0))
        paths.append((*(paths[parent] if parent >= 0 else ()), rank))
    assert len(set(paths)) == count
    every = sorted(
        (
            float(np.prod([rates[rank] for rank in path]))
            for depth in range(1, 5)
            for path in itertools.product(range(len(rates)), repeat=depth)
        ),
        reverse=True,
    )
    deepest = max((len(path) for path in paths), default=0)
    if deepest < 5:  # beyond, brute force has not looked
        assert products == pytest.approx(every[:count])
    assert products == sorted(products, reverse=True)
    assert np.concatenate([[], *shape.levels]).tolist() == sorted(
        range(count), key=lambda node: (len(paths[node]), node)
    )
    shorter = best_shape(np.array(rates), count // 2)
    assert shorter.parents.tolist() == shape.parents[: count // 2].tolist()


@settings(deadline=None)
@given(st.data())
def test_the_tree_is_the_matrix_followed_along_the_shape(data: st.DataObject):
    """Against a search in plain Python, with tokens that have no successors yet."""
    tried = rig()
    drafter = tried.drafter
    assert isinstance(drafter, RecyclingDrafter)
    for token in data.draw(st.sets(st.integers(0, VOCAB - 1))):
        drafter.successors[token] = data.draw(st.permutations(range(VOCAB)))[:3]
    wanted = [data.draw(st.integers(0, 9)) for _ in range(3)]
    for row in range(3):
        tried.load(row, row, [data.draw(st.integers(0, VOCAB - 1))])
    draft = tried.propose([0, 1, 2], wanted)
    shape = best_shape(drafter.rates, SPARE * max(wanted, default=0))
    for row, count in enumerate(wanted):
        tokens: list[int] = []
        paths: dict[int, list[int]] = {-1: []}
        expected = []
        for node, (parent, rank) in enumerate(zip(shape.parents.tolist(), shape.ranks.tolist(), strict=True)):
            above = tried.known(row)[-1] if parent < 0 else tokens[parent]
            tokens.append(-1 if above < 0 else int(drafter.successors[above, rank]))
            if tokens[-1] >= 0:
                paths[node] = [*paths[parent], tokens[-1]]
                expected.append(paths[node])
        assert branches(draft, row)[: draft.num_drafted[row]] == expected[:count]


def test_every_verified_position_is_recycled_and_the_latest_wins():
    tried = rig()
    drafter = tried.drafter
    assert isinstance(drafter, RecyclingDrafter)
    expected: dict[int, list[int]] = {}
    for row in range(3):
        tried.load(row, row, [row, row + 1])
    for _ in range(12):
        before = [tried.known(row) for row in range(3)]
        draft, _ = tried.step([0, 1, 2], [6, 0, 3])
        for row in range(3):
            prefixes = [before[row], *(before[row] + path for path in branches(draft, row))]
            for prefix in prefixes[: int(draft.num_drafted[row]) + 1]:
                expected[prefix[-1]] = np.argsort(-noise(prefix))[:3].tolist()
        unseen = [token for token in range(VOCAB) if token not in expected]
        assert (drafter.successors[unseen] == -1).all()
        assert {token: drafter.successors[token].tolist() for token in expected} == expected
    assert len(expected) > VOCAB // 2


def test_rates_count_where_the_next_token_stood():
    tried = Rig(RecyclingDrafter(2), lambda prefix: np.eye(VOCAB)[(prefix[-1] + 1) % VOCAB], VOCAB)
    drafter = tried.drafter
    assert isinstance(drafter, RecyclingDrafter)
    start = drafter.rates
    tried.load(0, 0, [0])
    for _ in range(VOCAB):
        tried.step([0], [0])
    assert np.array_equal(drafter.rates, start), "no token had successors, so nothing was tried"
    for _ in range(60):
        tried.step([0], [0])
    assert drafter.rates[0] == pytest.approx((20 * start[0] + 60) / 80)
    assert drafter.rates[1] == pytest.approx(20 * start[1] / 80)
    accepted = [tried.step([0], [8])[1][0] for _ in range(5)]
    assert accepted == [8] * 5, "at such rates the tree is a chain"


def test_a_row_of_a_batch_drafts_as_alone():
    tried = rig(max_rows=6)
    for row in range(6):
        tried.load(row, row, [row, 2 * row % VOCAB])
    for _ in range(10):
        tried.step(range(6), [8] * 6)
    together = tried.propose(range(6), [3, 8, 0, 5, 1, 8])
    for row, count in enumerate([3, 8, 0, 5, 1, 8]):
        alone = tried.propose([row], [count])
        assert branches(alone, 0) == branches(together, row)[:count]


@pytest.mark.parametrize("vocab_size", [9, 63, 320, 1024, 1050, 49_155])
@pytest.mark.parametrize("k", [1, 8])
def test_likeliest_is_topk(vocab_size: int, k: int):
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    assert torch.equal(likeliest(logits, k), logits.topk(k).indices)
    tied = (logits * 2).round()
    assert torch.equal(tied.gather(1, likeliest(tied, k)), tied.topk(k).values)


def test_more_successors_than_tokens_are_not_kept():
    tried = Rig(RecyclingDrafter(30), noise, VOCAB)
    tried.load(0, 0, [1])
    tried.step([0], [4])
    assert isinstance(tried.drafter, RecyclingDrafter)
    assert tried.drafter.successors.shape == (VOCAB, VOCAB)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_successors=0 must be >= 1"):
        make_drafter({"name": "recycling", "num_successors": 0})
