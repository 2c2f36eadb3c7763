"""Token Recycling: the target's own candidates, kept from earlier steps, make the tree of the next one.

Method: Luo et al., arXiv 2408.08696. A matrix holds for every token the k likeliest tokens that the target last saw
after it, at any verified position, accepted or not. From the last known token the successors of successors are
followed. The paper's tree is fixed and tuned offline; this one has the nodes with the largest product of rates, where
the rate of rank b is how often the token that came was its predecessor's b-th successor, counted as the engine runs.

>>> llm = LLM(model, drafter="recycling", num_drafts=16)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from specdec_kernels import cpu_decoder
from torch import Tensor

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.rows import ragged_arange
from specdec.scheduler.plan import IntArray, LongArray, StepOutcome, StepPlan

PRIOR_RATE, PRIOR_DECAY, PRIOR_COUNT = 0.35, 0.5, 20.0
"""Before anything is counted: rank b has the rate PRIOR_RATE · PRIOR_DECAY^b, with the weight of PRIOR_COUNT tokens."""
SPARE = 2
"""Nodes considered per node wanted, in place of those whose predecessor has no successors yet."""


class RecyclingDrafter:
    """Deterministic: drafts depend on the known tokens and on the logits of earlier steps, those of other requests
    included, so a seeded sample may differ between a request alone and in a batch, though its law does not. (A request
    that repeats an earlier one's seed repeats its noise, on which the matrix depends through the contexts that came
    last. Tokens are then still the target's likeliest of some context, never ones that this noise drew.)

    Args:
        num_successors: k, kept per token; the matrix takes 4·k bytes per token of the vocabulary.

    Raises:
        ValueError: ``num_successors`` < 1.

    Attributes:
        successors: int32 [V, k], likeliest first; -1 for tokens not yet seen.
    """

    name = "recycling"
    captures: Sequence[int] = ()
    successors: IntArray

    def __init__(self, num_successors: int = 8) -> None:
        if num_successors < 1:
            raise ValueError(f"recycling: num_successors={num_successors} must be >= 1")
        self.num_successors = num_successors

    def bind(self, host: DraftHost) -> None:
        self._state = host.state
        vocab_size = host.target.config.vocab_size
        k = min(self.num_successors, vocab_size)
        self.successors = np.full((vocab_size, k), -1, np.int32)
        self._tried = PRIOR_COUNT
        self._hits = PRIOR_COUNT * PRIOR_RATE * PRIOR_DECAY ** np.arange(k, dtype=np.float64)
        self._shapes: dict[int, Shape] = {}
        self._shaped_at = 0.0
        native = host.target.backend == "native" and k <= cpu_decoder.MAX_TOP
        self._likeliest = cpu_decoder.top if native else likeliest

    @property
    def rates(self) -> NDArray[np.float64]:
        """float64 [k]: how often the next token is its predecessor's b-th successor."""
        return np.divide(self._hits, self._tried, dtype=np.float64)

    def propose(self, plan: StepPlan) -> Draft:
        width = int(plan.num_drafts.max(initial=0))
        if width == 0:
            return Draft.none(plan.rows.size)
        shape = self._shape_of(SPARE * width)
        known = self._state.num_known[plan.rows]
        entries = np.full((plan.rows.size, shape.parents.size + 1), -1, np.int64)
        entries[:, 0] = self._state.tokens[plan.rows, known - 1]
        for nodes in shape.levels:
            parent = entries[:, shape.parents[nodes] + 1]
            entries[:, nodes + 1] = np.where(parent < 0, -1, self.successors[parent, shape.ranks[nodes]])
        return _first_nodes(entries[:, 1:], shape, self.rates, plan.num_drafts)

    def _shape_of(self, num_nodes: int) -> Shape:
        """The shape of ``num_nodes``, made anew when a quarter more has been counted."""
        if self._tried > 1.25 * self._shaped_at:
            self._shapes, self._shaped_at = {}, self._tried
        if num_nodes not in self._shapes:
            self._shapes[num_nodes] = best_shape(self.rates, num_nodes)
        return self._shapes[num_nodes]

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Score the ranks on the emitted tokens, then take the successors at all verified positions."""
        if not plan.emits.any():
            return
        known = self._state.num_known[plan.rows]
        counts = outcome.num_emitted
        owner, place = np.repeat(plan.rows, counts), ragged_arange(counts)
        came = self._state.tokens[owner, np.repeat(known - counts, counts) + place]
        before = self._state.tokens[owner, np.repeat(known - counts, counts) + place - 1]
        seen = self.successors[before]
        self._tried += float((seen[:, 0] >= 0).sum())
        self._hits += (seen == came[:, None]).sum(axis=0)
        tokens, places = self._positions(plan, known - counts, verified)
        # Choosing rows after the search is the cheaper order: a row of logits takes longer to copy than to search.
        candidates = self._likeliest(verified.logits, self.successors.shape[1]).numpy(force=True)
        self.successors[tokens] = candidates[places]

    def _positions(self, plan: StepPlan, known: IntArray, verified: Verified) -> tuple[LongArray, LongArray]:
        """The different tokens that have logits, int64 [n], and where their latest ones are, int64 [n].

        The latest position of a token is that of the highest node, and a row's later than those of rows before.
        """
        emitting = np.flatnonzero(plan.emits)
        counts = verified.draft.num_drafted[emitting] + 1
        last = self._state.tokens[plan.rows, known - 1].astype(np.int64)
        entries = np.concatenate([last[:, None], verified.draft.tokens], axis=1)
        tokens: LongArray = entries[np.repeat(emitting, counts), ragged_arange(counts)]
        places = np.repeat(verified.logit_start[emitting], counts) + ragged_arange(counts)
        different, latest = np.unique(tokens[::-1], return_index=True)
        return different, places[::-1][latest]


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree of successor ranks, its n nodes in the order in which they are wanted.

    Attributes:
        parents: int64 [n], of a lower number; -1 is the root.
        ranks: int64 [n], which successor of its parent a node is.
        levels: node numbers by depth.
    """

    parents: LongArray
    ranks: LongArray
    levels: list[LongArray]


def best_shape(rates: NDArray[np.float64], num_nodes: int) -> Shape:
    """The ``num_nodes`` nodes with the largest product of ``rates`` [k] by rank along their path, largest first."""
    parents, ranks, depths = [], [], []
    heap: list[tuple[float, int, int, int]] = []
    node, product, depth = -1, 1.0, 0
    for node in range(-1, num_nodes - 1):
        for rank, rate in enumerate(rates.tolist()):
            heapq.heappush(heap, (-product * rate, depth + 1, node, rank))
        negative, depth, parent, rank = heapq.heappop(heap)
        product = -negative
        parents.append(parent)
        ranks.append(rank)
        depths.append(depth)
    by_depth = np.array(depths, np.int64)
    levels = [np.flatnonzero(by_depth == depth) for depth in range(1, max(depths, default=0) + 1)]
    return Shape(np.array(parents, np.int64), np.array(ranks, np.int64), levels)


def _first_nodes(tokens: LongArray, shape: Shape, rates: NDArray[np.float64], num_drafts: IntArray) -> Draft:
    """Each row's first ``num_drafts`` of the nodes that exist: ``tokens`` int64 [R, n] is -1 for the others."""
    exists = tokens >= 0
    number = np.cumsum(exists, axis=1) - 1
    row, node = np.nonzero(exists & (number < num_drafts[:, None]))
    place = number[row, node]
    num_drafted = np.minimum(exists.sum(axis=1), num_drafts).astype(np.int32)
    size = tokens.shape[0], int(num_drafted.max())
    drafted, parents = np.zeros(size, np.int64), np.full(size, -1, np.int32)
    confidence = np.zeros(size, np.float32)
    above = shape.parents[node]
    drafted[row, place] = tokens[row, node]
    parents[row, place] = np.where(above < 0, -1, number[row, above])
    confidence[row, place] = rates[shape.ranks[node]]
    return Draft(drafted, num_drafted, parents=parents, confidence=confidence)


def likeliest(logits: Tensor, k: int) -> Tensor:
    """int64 [n, k]: where the k largest of ``logits`` [n, V] are, largest first.

    Equal to ``topk`` but for ties, and several times as fast on a CPU: the k largest are in those k of the V/64
    columns of the matrix 64 × V/64 whose maxima are the largest.
    """
    height, vocab_size = 64, logits.shape[1]
    width = vocab_size // height
    if width < 2 * k:
        return logits.topk(k).indices
    grid = logits[:, : width * height].unflatten(1, (height, width))
    columns = grid.amax(dim=1).topk(k, sorted=False).indices
    places = columns[:, None, :] + width * torch.arange(height, device=logits.device)[:, None]
    rest = torch.arange(width * height, vocab_size, device=logits.device).expand(len(logits), -1)
    places = torch.cat([places.flatten(1), rest], dim=1)
    return places.gather(1, logits.gather(1, places).topk(k).indices)
