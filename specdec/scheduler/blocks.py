"""KV block accounting: who holds which block of the paged cache. Integers only; the tensors live elsewhere.

A block is *held* (reference count > 0), *cached* (count 0, but its content is still known by a hash and
may be shared again), or *free*. Allocation takes free blocks first, then evicts cached blocks, least recently
used first. Prefix sharing and chained hashes follow vLLM's automatic prefix caching (SOSP 2023, section 4.4).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specdec.scheduler.plan import IntArray, LongArray


def hash_blocks(token_ids: NDArray[np.int32], block_size: int, parent: int = 0) -> list[int]:
    """Chained 64-bit hashes of the full blocks of ``token_ids``; a trailing partial block has none.

    Each hash covers its block and, through ``parent``, everything before it, so equal hashes mean equal
    prefixes. 0 is reserved for "no parent".

    Args:
        token_ids: int32 [n].
        block_size: tokens per block.
        parent: hash of the block before the first, 0 at the start of a sequence.
    """
    hashes: list[int] = []
    tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
    for start in range(0, tokens.size - block_size + 1, block_size):
        digest = hashlib.blake2b(parent.to_bytes(8, "little"), digest_size=8)
        digest.update(tokens[start : start + block_size].tobytes())
        parent = int.from_bytes(digest.digest(), "little") or 1
        hashes.append(parent)
    return hashes


class BlockPool:
    """Reference-counted blocks with a prefix cache.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        prefix_caching: remember full blocks by hash after they are released.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be >= 1")
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be >= 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.ref_counts = np.zeros(num_blocks, np.int32)
        # Block numbers are 64 bits wide where they index arrays: numpy is several times faster so.
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int64)
        self._stack_size = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of_hash: dict[int, int] = {}
        self._hash_of_block: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now; cached blocks count, they can be evicted."""
        return self._stack_size + len(self._cached)

    @property
    def num_empty(self) -> int:
        """Free blocks that hold nothing: allocating these evicts no prefix."""
        return self._stack_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, shared: Sequence[int] = ()) -> LongArray:
        """Hold the matched blocks ``shared`` once more, and ``count`` fresh ones behind them.

        Returns:
            int64 [len(shared) + count]. The caller has checked ``num_free``.
        """
        if not shared and count <= self._stack_size:
            self._stack_size -= count
            blocks = self._stack[self._stack_size : self._stack_size + count][::-1].copy()
            self.ref_counts[blocks] = 1
            return blocks
        for block in shared:
            self._cached.pop(block, None)
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        from_stack = min(count, self._stack_size)
        self._stack_size -= from_stack
        blocks = self._stack[self._stack_size : self._stack_size + from_stack][::-1].copy()
        evicted = [self._evict() for _ in range(count - from_stack)]
        blocks = np.concatenate([np.array(shared, np.int64), blocks, np.array(evicted, np.int64)])
        self.ref_counts[blocks] += 1
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of_hash[self._hash_of_block.pop(block)]
        return block

    def match(self, hashes: Sequence[int]) -> list[int]:
        """Blocks holding the longest known prefix of ``hashes``. Does not hold them; see :meth:`allocate`."""
        if not self.prefix_caching:
            return []
        blocks: list[int] = []
        for value in hashes:
            block = self._block_of_hash.get(value)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_evictable(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` would leave the free count if shared."""
        return sum(block in self._cached for block in blocks)

    def register(self, blocks: Sequence[int], hashes: Sequence[int]) -> None:
        """Name held, full, committed blocks by their hashes. The first block of a hash keeps the name."""
        if not self.prefix_caching:
            return
        block_of_hash, hash_of_block = self._block_of_hash, self._hash_of_block
        for block, value in zip(blocks, hashes, strict=True):
            assert self.ref_counts[block] > 0, f"block {block} is not held"
            if value not in block_of_hash and block not in hash_of_block:
                block_of_hash[value] = block
                hash_of_block[block] = value

    def release(self, blocks: IntArray | LongArray) -> None:
        """Drop one reference to each block of a sequence, given in sequence order.

        The last block is released first, so that eviction takes the tail of a prefix before its head.
        """
        blocks = blocks.astype(np.int64)
        if not self.prefix_caching:  # then no block is shared
            self.ref_counts[blocks] = 0
            self._push(blocks[::-1])
            return
        counts = self.ref_counts[blocks] - 1
        assert counts.min(initial=0) >= 0, "a block was released more often than held"
        self.ref_counts[blocks] = counts
        nameless: list[int] = []
        for block in blocks[counts == 0][::-1].tolist():
            if block in self._hash_of_block:
                self._cached[block] = None
            else:
                nameless.append(block)
        self._push(np.array(nameless, np.int64))

    def _push(self, blocks: LongArray) -> None:
        assert self._stack_size + blocks.size <= self.num_blocks, "a block was released more often than held"
        self._stack[self._stack_size : self._stack_size + blocks.size] = blocks
        self._stack_size += blocks.size

    def check(self, held: Sequence[IntArray]) -> None:
        """Assert that exactly the sequences in ``held`` hold the blocks, and that none is lost or doubled."""
        counts = np.zeros(self.num_blocks, np.int32)
        for blocks in held:
            np.add.at(counts, blocks, 1)
        assert (counts == self.ref_counts).all(), "reference counts differ from the sequences' blocks"
        free = self._stack[: self._stack_size].tolist() + list(self._cached)
        assert len(set(free)) == len(free), "a block is free twice"
        assert sorted(free) == np.flatnonzero(counts == 0).tolist(), "a block leaked or is free while held"
        assert self._hash_of_block == {b: h for h, b in self._block_of_hash.items()}, "hash maps disagree"
