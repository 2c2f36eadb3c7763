"""Active requests as a struct of arrays: one row per running request, one numpy column per fact."""

from __future__ import annotations

import numpy as np

from specdec.scheduler.plan import IntArray
from specdec.scheduler.request import Request


class RequestTable:
    """Rows of the running requests. A row number is stable while its request runs, then reused.

    Args:
        max_rows: most requests that run at once (``max_num_seqs``).
        max_blocks: most KV blocks one request can need.

    Attributes (columns are [max_rows] and meaningful for active rows only):
        active: int32 [n], active rows in admission order.
        num_known: prompt tokens plus generated tokens.
        num_computed: tokens whose KV is committed to the cache.
        num_generated: tokens emitted so far.
        max_tokens: limit of ``num_generated``.
        num_accepted, num_rejected: draft tokens accepted, and verification steps that ended in a rejection;
            their ratio accepted / (accepted + rejected) estimates the acceptance rate.
        num_drafted: draft tokens verified.
        num_steps: steps in which the row emitted.
        num_blocks: blocks held.
        num_registered: leading blocks already named in the prefix cache.
        block_table: int32 [max_rows, max_blocks].
    """

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self.max_rows = max_rows
        self.active: IntArray = np.empty(0, np.int32)
        self.request_ids = np.full(max_rows, -1, np.int64)
        self.num_known = np.zeros(max_rows, np.int32)
        self.num_computed = np.zeros(max_rows, np.int32)
        self.num_generated = np.zeros(max_rows, np.int32)
        self.max_tokens = np.zeros(max_rows, np.int32)
        self.num_drafted = np.zeros(max_rows, np.int32)
        self.num_accepted = np.zeros(max_rows, np.int32)
        self.num_rejected = np.zeros(max_rows, np.int32)
        self.num_steps = np.zeros(max_rows, np.int32)
        self.num_blocks = np.zeros(max_rows, np.int32)
        self.num_registered = np.zeros(max_rows, np.int32)
        self.block_table = np.zeros((max_rows, max_blocks), np.int32)
        self._requests: list[Request | None] = [None] * max_rows
        self._free_rows = list(range(max_rows - 1, -1, -1))

    def __len__(self) -> int:
        return self.active.size

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

    def insert(self, request: Request, blocks: IntArray, num_cached: int) -> int:
        """Give ``request`` a row that holds ``blocks``, of whose tokens ``num_cached`` are computed."""
        row = self._free_rows.pop()
        self._requests[row] = request
        self.request_ids[row] = request.request_id
        self.num_known[row] = request.num_known
        self.num_computed[row] = num_cached
        self.num_generated[row] = request.num_generated
        self.max_tokens[row] = request.max_tokens
        self.num_drafted[row] = request.num_drafted
        self.num_accepted[row] = request.num_accepted
        self.num_rejected[row] = request.num_rejected
        self.num_steps[row] = request.num_steps
        self.num_blocks[row] = blocks.size
        self.num_registered[row] = 0
        self.block_table[row, : blocks.size] = blocks
        self.active = np.append(self.active, np.int32(row))
        return row

    def append_blocks(self, rows: IntArray, counts: IntArray, blocks: IntArray) -> None:
        """Append the next ``counts[i]`` of ``blocks`` to ``rows[i]``, row after row."""
        offsets = self.num_blocks[rows] - (np.cumsum(counts) - counts)
        places = np.repeat(offsets, counts) + np.arange(blocks.size)
        self.block_table[np.repeat(rows, counts), places] = blocks
        self.num_blocks[rows] += counts

    def truncate_blocks(self, row: int, count: int) -> IntArray:
        """Keep the first ``count`` blocks of ``row``; the others, which it no longer holds."""
        dropped = self.blocks(row)[count:].copy()
        self.num_blocks[row] = count
        return dropped

    def remove(self, row: int) -> Request:
        """Take ``row`` out, writing its progress back to the request it returns."""
        request = self.request(row)
        request.num_generated = int(self.num_generated[row])
        request.num_drafted = int(self.num_drafted[row])
        request.num_accepted = int(self.num_accepted[row])
        request.num_rejected = int(self.num_rejected[row])
        request.num_steps = int(self.num_steps[row])
        self._requests[row] = None
        self.request_ids[row] = -1
        self.num_blocks[row] = 0
        self._free_rows.append(row)
        self.active = self.active[self.active != row]
        return request
