"""Decoder passes recorded once for each size and replayed: CUDA graphs, which spare a GPU the cost of many launches.

A step is padded to the next size that is recorded: rows to ``R``, tokens to ``R · Q`` with Q tokens a row, so few sizes
serve all plain, drafting and verifying steps. Padding tokens store nothing (their slot is −1) and belong to no row.
Steps that are larger than any recorded size, such as long prompt chunks, run as they are.

Legend: T tokens, R rows, N rows of logits, B blocks of the longest request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.model.batch import Captured, ForwardBatch
from specdec.rows import StepInput

ROW_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TOKEN_SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128)
"""Tokens of a row: drafts and the one before them, so powers of two and one more."""
MAX_TOKENS = 2048
"""Of a recorded step, padding included: beyond it a GPU is busy for longer than launches take."""

GRAPH_MODES = ("auto", "off", "padded")
"""``padded`` pads as ``auto`` does on a GPU but records nothing; it is for tests."""


class Recorder(Protocol):
    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Something that does what ``run`` does, on the very tensors that it used."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory; replays never overlap, so their scratch may."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before the recording
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


class NoRecorder:
    """Runs everything anew."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return run


@dataclass(frozen=True, slots=True)
class Size:
    """What one recording is for. ``all_logits``: of every token, instead of one of each row at most."""

    rows: int
    tokens: int
    all_logits: bool
    has_trees: bool
    layers: tuple[int, ...] | None
    captured: tuple[int, ...]

    @property
    def num_logits(self) -> int:
        return self.tokens if self.all_logits else self.rows


def size_of(
    batch: StepInput, layers: Sequence[int] | None, captured: Captured | None, max_rows: int
) -> Size | None:
    """The size that ``batch`` is padded to; ``None`` if it is larger than any."""
    counts = np.diff(batch.query_start)
    num_rows, longest, total = counts.size, int(counts.max(initial=1)), int(counts.sum())
    if num_rows > max_rows or longest > TOKEN_SIZES[-1]:
        return None
    row_sizes = [size for size in ROW_SIZES if size < max_rows] + [max_rows]
    rows = row_sizes[bisect_left(row_sizes, num_rows)]
    # The mean of a row: a few long ones among many short ones do not make all long.
    tokens = rows * TOKEN_SIZES[bisect_left(TOKEN_SIZES, -(-total // rows))]
    if tokens > MAX_TOKENS:
        return None
    return Size(
        rows,
        tokens,
        batch.logit_rows.size > rows,
        batch.tree_mask is not None,
        None if layers is None else tuple(layers),
        () if captured is None else tuple(captured.layers),
    )


class StepGraphs:
    """Recorded passes of one decoder.

    Args:
        forward: logits [N, V] of a batch, with the layers to run and what to capture.
        max_rows, max_blocks: of the engine: rows of a step, and blocks of one request.
        hidden_size: of what is captured.
        recorder: how passes are recorded.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch, Sequence[int] | None, Captured | None], Tensor],
        max_rows: int,
        max_blocks: int,
        hidden_size: int,
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        self._forward, self._max_rows, self._max_blocks = forward, max_rows, max_blocks
        self._hidden_size, self._device, self._recorder = hidden_size, device, recorder
        self._recorded: dict[Size, _Recorded] = {}

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    def run(
        self, batch: StepInput, layers: Sequence[int] | None = None, captured: Captured | None = None
    ) -> Tensor | None:
        """Logits float32 [N, V], valid until the next step; ``None`` if no size fits, and nothing was done."""
        size = size_of(batch, layers, captured, self._max_rows)
        if size is None:
            return None
        recorded = self._recorded.get(size)
        if recorded is None:
            inputs = _Inputs(size, self._max_blocks, self._device)
            recorded = self._recorded[size] = _Recorded(inputs, self._hidden_size)
            inputs.fill(batch)
            recorded.replay = self._recorder.record(lambda: recorded.run(self._forward))
        recorded.inputs.fill(batch)
        recorded.replay()
        if captured is not None:
            assert recorded.captured is not None
            captured.hidden.copy_(recorded.captured.hidden[:, : batch.token_ids.size])
        assert recorded.logits is not None
        return recorded.logits[: batch.logit_rows.size]


class _Recorded:
    """One recording: its inputs, its outputs and the way to replay it."""

    def __init__(self, inputs: _Inputs, hidden_size: int) -> None:
        self.inputs, self.logits, self.replay = inputs, None, _never
        size = inputs.size
        self.captured = (
            Captured.empty(size.captured, size.tokens, hidden_size, inputs.batch.token_ids.device)
            if size.captured
            else None
        )
        self.logits: Tensor | None

    def run(self, forward: Callable[[ForwardBatch, Sequence[int] | None, Captured | None], Tensor]) -> None:
        self.logits = forward(self.inputs.batch, self.inputs.size.layers, self.captured)


def _never() -> None:
    raise AssertionError("nothing was recorded")


class _Inputs:
    """A padded batch in fixed memory, filled by two copies to the device."""

    def __init__(self, size: Size, max_blocks: int, device: torch.device) -> None:
        self.size = size
        wide = {"token_ids": size.tokens, "positions": size.tokens, "slot_mapping": size.tokens}
        wide |= {"logit_rows": size.num_logits, "tree_mask": 2 * size.tokens if size.has_trees else 0}
        narrow = {"query_start": size.rows + 1, "context_lens": size.rows}
        narrow |= {"block_tables": size.rows * max_blocks}
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._host: dict[str, np.ndarray] = {}
        views: dict[str, Tensor] = {}
        for lengths, dtype in ((wide, torch.int64), (narrow, torch.int32)):
            pinned = device.type == "cuda"
            host = torch.zeros(sum(lengths.values()), dtype=dtype, pin_memory=pinned)
            there = host.to(device).clone()
            self._buffers.append((there, host))
            for name, mine, theirs in zip(
                lengths, host.split(list(lengths.values())), there.split(list(lengths.values())), strict=True
            ):
                self._host[name], views[name] = mine.numpy(), theirs
        self._tables = self._host["block_tables"].reshape(size.rows, max_blocks)
        self.batch = ForwardBatch(
            token_ids=views["token_ids"],
            positions=views["positions"],
            query_start=views["query_start"],
            context_lens=views["context_lens"],
            block_tables=views["block_tables"].view(size.rows, max_blocks),
            slot_mapping=views["slot_mapping"],
            logit_rows=views["logit_rows"],
            tree_mask=views["tree_mask"].view(size.tokens, 2) if size.has_trees else None,
        )

    def fill(self, batch: StepInput) -> None:
        """Put ``batch`` into the device's memory, padded."""
        for name, padding in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1), ("logit_rows", 0)):
            self._put(name, getattr(batch, name), padding)
        self._put("query_start", batch.query_start, batch.query_start[-1])
        self._put("context_lens", batch.context_lens, 0)
        if batch.tree_mask is not None:
            self._put("tree_mask", batch.tree_mask.ravel(), 0)
        rows, width = batch.block_tables.shape
        self._tables[:rows, :width] = batch.block_tables
        for there, host in self._buffers:
            there.copy_(host, non_blocking=True)

    def _put(self, name: str, values: np.ndarray, padding: int) -> None:
        target = self._host[name]
        target[: values.size] = values
        target[values.size :] = padding
