"""Block accounting by itself: hashes, reference counts, the prefix cache and what is evicted first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specdec.scheduler import BlockPool, hash_blocks

REPEATABLE = settings(derandomize=True, deadline=None, database=None)
TOKENS = st.lists(st.integers(0, 2), max_size=20)


def tokens_of(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


@REPEATABLE
@given(TOKENS, TOKENS, st.integers(1, 5))
def test_equal_hashes_mean_equal_prefixes(left: list[int], right: list[int], block_size: int) -> None:
    left_hashes = hash_blocks(tokens_of(left), block_size)
    right_hashes = hash_blocks(tokens_of(right), block_size)
    assert len(left_hashes) == len(left) // block_size
    for count, (a, b) in enumerate(zip(left_hashes, right_hashes, strict=False), start=1):
        assert (a == b) == (left[: count * block_size] == right[: count * block_size])
        assert 0 < a < 2**64


@REPEATABLE
@given(TOKENS, st.integers(1, 4), st.integers(0, 5))
def test_hashes_can_be_continued(tokens: list[int], block_size: int, first: int) -> None:
    hashes = hash_blocks(tokens_of(tokens), block_size)
    first = min(first, len(hashes))
    parent = hashes[first - 1] if first else 0
    assert hash_blocks(tokens_of(tokens[first * block_size :]), block_size, parent) == hashes[first:]


def test_hashes_do_not_depend_on_dtype_or_layout() -> None:
    tokens = np.arange(12, dtype=np.int64)
    assert hash_blocks(tokens, 4) == hash_blocks(tokens.astype(np.int32), 4)  # pyright: ignore
    assert hash_blocks(np.repeat(tokens, 2)[::2], 4) == hash_blocks(tokens, 4)  # pyright: ignore


def test_a_released_block_stays_known_until_it_is_needed() -> None:
    pool = BlockPool(3, 4)
    held = pool.allocate(2)
    for block, value in zip(held.tolist(), (11, 12), strict=True):
        pool.register([block], [value])
    pool.release(held)
    assert pool.num_free == 3 and pool.match([11, 12, 13]) == held.tolist()
    pool.allocate(0, pool.match([11, 12]))
    assert pool.num_free == 1 and pool.num_evictable(held.tolist()) == 0
    pool.release(held)
    pool.allocate(2)
    assert pool.match([11, 12]) == held[:1].tolist(), "the tail of the prefix is evicted first"
    pool.allocate(1)
    assert pool.match([11, 12]) == [] and pool.num_free == 0


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = BlockPool(2, 1)
    for value in (21, 22):
        block = pool.allocate(1)
        pool.register([int(block[0])], [value])
        pool.release(block)
    pool.allocate(0, pool.match([21]))
    pool.release(np.array(pool.match([21]), np.int32))
    pool.allocate(1)
    assert pool.match([21]) and not pool.match([22])


def test_a_match_stops_at_the_first_unknown_block() -> None:
    pool = BlockPool(2, 1)
    pool.register([int(pool.allocate(1)[0])], [32])
    assert pool.match([31, 32]) == []


def test_the_first_block_of_a_hash_keeps_the_name() -> None:
    pool = BlockPool(2, 1)
    first, second = pool.allocate(2).tolist()
    pool.register([first], [5])
    pool.register([second], [5])
    pool.register([first], [6])
    assert pool.match([5]) == [first] and pool.match([6]) == []


def test_a_shared_block_is_free_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(2, 1)
    block = pool.allocate(1)
    pool.allocate(0, block.tolist())
    pool.release(block)
    assert pool.num_free == 1
    pool.release(block)
    assert pool.num_free == 2


def test_without_prefix_caching_nothing_is_remembered() -> None:
    pool = BlockPool(2, 1, prefix_caching=False)
    block = pool.allocate(1)
    pool.register([int(block[0])], [5])
    pool.release(block)
    assert pool.match([5]) == []
    pool.check([])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (63, 4)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16).blocks_for(tokens) == blocks


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "named"), [(0, 4, "num_blocks=0"), (4, 0, "block_size=0")]
)
def test_sizes_below_one(num_blocks: int, block_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BlockPool(num_blocks, block_size)


def test_misuse_is_caught() -> None:
    pool = BlockPool(2, 1)
    block = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 free"):
        pool.allocate(2)
    with pytest.raises(AssertionError, match="reference counts differ"):
        pool.check([])
    pool.release(block)
    with pytest.raises(AssertionError, match="not held"):
        pool.register([int(block[0])], [5])
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(block)


class PoolMachine(RuleBasedStateMachine):
    """Sequences that come, grow, share and go, against a plain dictionary of names."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 2)
        self.sequences: list[tuple[list[int], np.ndarray]] = []

    @rule(hashes=st.lists(st.integers(1, 2), max_size=4))
    def admit(self, hashes: list[int]) -> None:
        # As in real chains, a name stands for its whole prefix.
        chain = [hash(tuple(hashes[: i + 1])) & 0xFFFF for i in range(len(hashes))]
        shared = self.pool.match(chain)
        fresh = len(chain) - len(shared)
        if fresh <= self.pool.num_free - self.pool.num_evictable(shared):
            self.pool.allocate(0, shared)
            blocks = np.concatenate([np.array(shared, np.int32), self.pool.allocate(fresh)])
            for block, value in zip(blocks.tolist(), chain, strict=True):
                self.pool.register([block], [value])
            self.sequences.append((chain, blocks))

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 5))
    def leave(self, index: int) -> None:
        _, blocks = self.sequences.pop(index % len(self.sequences))
        self.pool.release(blocks)

    @invariant()
    def nothing_is_lost_and_held_prefixes_are_found(self) -> None:
        self.pool.check([blocks for _, blocks in self.sequences])
        for chain, blocks in self.sequences:
            matched = self.pool.match(chain)
            assert len(matched) == len(chain) or len(set(matched) - set(blocks.tolist())) == 0


PoolMachine.TestCase.settings = settings(REPEATABLE, max_examples=60, stateful_step_count=30)
TestPool = PoolMachine.TestCase
