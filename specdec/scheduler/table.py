"""Active requests as a struct of arrays: one row per running request, one numpy column per fact."""

from __future__ import annotations

import numpy as np

from specdec.scheduler.plan import IntArray, LongArray
from specdec.scheduler.request import Request


class RequestTable:
    """Rows of the running requests. A row number is stable while its request runs, then reused.

    Args:
        max_rows: most requests that run at once (``max_num_seqs``).
        max_blocks: most KV blocks one request can need.
        block_size: tokens per block.

    Attributes (columns are int32 [max_rows] and meaningful for active rows only):
        active: int64 [n], active rows in admission order. A view: copy it to keep it. (64 bits, because numpy
            indexes with them five times as fast as with 32.)
        num_known: prompt tokens plus generated tokens.
        num_computed: tokens whose KV is committed to the cache.
        prompt_len, max_known: least and largest ``num_known``.
        num_accepted, num_rejected: draft tokens accepted, and verification steps that ended in a rejection;
            their ratio accepted / (accepted + rejected) estimates the acceptance rate.
        num_drafted: draft tokens verified.
        num_steps: steps in which the row emitted.
        num_blocks: blocks held; ``capacity`` is the tokens that they hold.
        num_registered: leading blocks already named in the prefix cache; num_hashes: those that have a name.
        block_table: int32 [max_rows, max_blocks].
    """

    def __init__(self, max_rows: int, max_blocks: int, block_size: int) -> None:
        self.max_rows = max_rows
        self.block_size = block_size
        self.request_ids = np.full(max_rows, -1, np.int64)
        # One matrix, so that a row is written and read at once; each column is contiguous.
        self._columns = np.zeros((12, max_rows), np.int32)
        (
            self.num_known,
            self.num_computed,
            self.prompt_len,
            self.max_known,
            self.num_blocks,
            self.capacity,
            self.num_registered,
            self.num_hashes,
            self.num_drafted,
            self.num_accepted,
            self.num_rejected,
            self.num_steps,
        ) = self._columns
        self.block_table = np.zeros((max_rows, max_blocks), np.int32)
        self._order = np.zeros(max_rows, np.int64)
        self._size = 0
        self.active: LongArray = self._order[:0]
        self._requests: list[Request | None] = [None] * max_rows
        self._free_rows = list(range(max_rows - 1, -1, -1))

    def __len__(self) -> int:
        return self._size

    @property
    def is_full(self) -> bool:
        return not self._free_rows

    def request(self, row: int) -> Request:
        request = self._requests[row]
        assert request is not None, f"row {row} is not active"
        return request

    def blocks(self, row: int) -> IntArray:
        """Blocks held by ``row``, in sequence order (a view)."""
        return self.block_table[row, : self.num_blocks[row]]

    def insert(self, request: Request, blocks: LongArray, num_computed: int) -> int:
        """Give ``request`` a row that holds ``blocks``, of whose tokens ``num_computed`` are computed."""
        row = self._free_rows.pop()
        self._requests[row] = request
        self.request_ids[row] = request.request_id
        self._columns[:, row] = (
            request.num_known,
            num_computed,
            request.prompt_len,
            request.prompt_len + request.max_tokens,
            blocks.size,
            blocks.size * self.block_size,
            0,
            len(request.block_hashes),
            request.num_drafted,
            request.num_accepted,
            request.num_rejected,
            request.num_steps,
        )
        self.block_table[row, : blocks.size] = blocks
        self._order[self._size] = row
        self._resize(self._size + 1)
        return row

    def num_generated(self, rows: LongArray) -> IntArray:
        """Tokens that each of ``rows`` [n] has emitted, int32 [n]."""
        return self.num_known[rows] - self.prompt_len[rows]

    def num_left(self, rows: LongArray) -> IntArray:
        """Tokens that each of ``rows`` [n] may still emit, int32 [n]."""
        return self.max_known[rows] - self.num_known[rows]

    def append_blocks(self, rows: LongArray, counts: IntArray, blocks: LongArray) -> None:
        """Append the next ``counts[i]`` >= 1 of ``blocks`` to ``rows[i]``, row after row."""
        held = self.num_blocks[rows]
        if blocks.size == rows.size:
            self.block_table[rows, held] = blocks
        else:
            offsets = held - (np.cumsum(counts) - counts)
            places = np.repeat(offsets, counts) + np.arange(blocks.size)
            self.block_table[np.repeat(rows, counts), places] = blocks
        self.num_blocks[rows] = held + counts
        self.capacity[rows] += counts * self.block_size

    def truncate_blocks(self, row: int, count: int) -> IntArray:
        """Keep the first ``count`` blocks of ``row``; the others, which it no longer holds."""
        dropped = self.blocks(row)[count:].copy()
        self.num_blocks[row] = count
        self.capacity[row] = count * self.block_size
        return dropped

    def remove(self, row: int) -> Request:
        """Take ``row`` out, writing its progress back to the request it returns."""
        request = self.request(row)
        request.num_generated = int(self.num_known[row]) - request.prompt_len
        (
            request.num_drafted,
            request.num_accepted,
            request.num_rejected,
            request.num_steps,
        ) = self._columns[8:, row].tolist()
        self._requests[row] = None
        self.request_ids[row] = -1
        self.num_blocks[row] = 0
        self._free_rows.append(row)
        place = self.active.tolist().index(row)
        self._order[place : self._size - 1] = self._order[place + 1 : self._size]
        self._resize(self._size - 1)
        return request

    def _resize(self, size: int) -> None:
        self._size = size
        self.active = self._order[:size]
