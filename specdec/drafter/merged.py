"""One tree from several drafters: their nodes joined, and of those the likeliest kept.

Children of one node with the same token are one node. Each source's own estimate of acceptance
(``Draft.confidence``), or for a source without one the depth of the node, is corrected by what was observed: in each
interval of estimates, the nodes that came true over the sum of the estimates. A source's nodes are scored on the tokens
that were emitted, whether or not they were drafted, so sources that rarely win are still measured.

>>> llm = LLM(model, drafter={"name": "merged", "drafters": ["suffix", "recycling"]}, num_drafts=16)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from specdec.drafter.base import MODEL_FREE, Draft, Drafter, DraftHost, Verified
from specdec.drafter.nodes import Nodes, pack
from specdec.scheduler.plan import StepOutcome, StepPlan

NUM_BUCKETS = 16
PRIOR_COUNT = 4.0
"""Accepted nodes that the prior, no correction, counts as."""
MAX_RATE = 0.99
SURE = 0.7
LEAST = 0.0
UNKNOWN_CONFIDENCE = 0.5
"""Of a source that gives none, before anything is observed."""


class Calibration:
    """Corrects one source's confidence by its record: of the nodes whose parent came true, how many did.

    Buckets are intervals of the log-odds of the confidence, half a unit wide, or depths of sources without one.
    """

    def __init__(self) -> None:
        self._expected = np.full(NUM_BUCKETS, PRIOR_COUNT)
        self._came = np.full(NUM_BUCKETS, PRIOR_COUNT)

    def buckets(self, draft: Draft) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Bucket int64 [R, K] and raw confidence float64 [R, K] of each node."""
        if draft.confidence is not None:
            raw = np.clip(draft.confidence.astype(np.float64), 1e-3, MAX_RATE)
            place = 2.0 * np.log(raw / (1.0 - raw)) + NUM_BUCKETS / 2
            return np.clip(place, 0, NUM_BUCKETS - 1).astype(np.int64), raw
        return np.minimum(_depths(draft) - 1, NUM_BUCKETS - 1), np.full(
            draft.tokens.shape, UNKNOWN_CONFIDENCE
        )

    def rates(self, draft: Draft) -> NDArray[np.float64]:
        """Corrected confidence, float64 [R, K]."""
        bucket, raw = self.buckets(draft)
        return np.minimum(raw * (self._came / self._expected)[bucket], MAX_RATE)

    def learn(self, draft: Draft, emitted: Sequence[Sequence[int]]) -> None:
        """Score ``draft`` on the tokens that each row has ``emitted`` after it was made."""
        buckets, raw = self.buckets(draft)
        for index, tokens in enumerate(emitted):
            # Depths of the nodes that came true, else -1; the root's is at the end, where its number -1 finds it.
            count = int(draft.num_drafted[index]) if tokens else 0
            parents = range(-1, count - 1) if draft.parents is None else draft.parents[index, :count].tolist()
            reached = [-1] * count + [0]
            for node, (parent, token) in enumerate(
                zip(parents, draft.tokens[index, :count].tolist(), strict=True)
            ):
                depth = reached[parent]
                if 0 <= depth < len(tokens):
                    came = token == tokens[depth]
                    self._expected[buckets[index, node]] += raw[index, node]
                    self._came[buckets[index, node]] += came
                    if came:
                        reached[node] = depth + 1


class MergedDrafter:
    """Deterministic like its sources, each of which proposes as many tokens as the plan wants.

    Args:
        sources: the drafters.
        step_tokens: tokens that a step verifies over all rows that draft, at least one of each; beyond that the least
            likely nodes of all are left out, so sure rows draft more than unsure ones. ``None``: no such limit. What a
            device verifies at the same cost is a good choice: 32 tokens are two tiles of AMX.
        sure: sources that run a model are not asked for rows where the others' likeliest next token is at least so
            likely, by their corrected confidence: in a passage that is being copied a pass buys nothing. 1 asks always.
        least: nodes that are accepted with a smaller chance, by the product of confidence along their path, are left
            out. A node pays if its chance exceeds what its verification costs in units of the time per emitted token.

    Raises:
        ValueError: no source, a limit below 1, or a probability out of range.
    """

    name = "merged"

    def __init__(
        self,
        sources: Sequence[Drafter],
        step_tokens: int | None = None,
        sure: float = SURE,
        least: float = LEAST,
    ) -> None:
        if not sources:
            raise ValueError("merged has no drafters: name some, e.g. drafters=['suffix', 'recycling']")
        if step_tokens is not None and step_tokens < 1:
            raise ValueError(f"step_tokens={step_tokens} must be >= 1, or None for no limit")
        if not 0.0 < sure <= 1.0:
            raise ValueError(f"sure={sure} must lie in (0, 1]: 1 asks all drafters in every step")
        if not 0.0 <= least < 1.0:
            raise ValueError(f"least={least} must lie in [0, 1): 0 leaves no node out")
        self.sources, self._step_tokens = list(sources), step_tokens
        self._sure, self._least = sure, least
        self.captures: Sequence[int] = sorted({layer for source in sources for layer in source.captures})
        self._is_free = [source.name in MODEL_FREE for source in self.sources]
        self._calibrations = [Calibration() for _ in sources]
        self._drafts: list[Draft] = []
        self._plans: list[StepPlan] = []

    def bind(self, host: DraftHost) -> None:
        self._state = host.state
        for source in self.sources:
            source.bind(host)

    def propose(self, plan: StepPlan) -> Draft:
        """The ``plan.num_drafts`` nodes of each row with the largest product of confidence along their path.

        Raises:
            ValueError: a source drew its tokens at random. A node of two sources would have two laws; one-hot
                verification is exact because the whole tree is a function of the prefix.
        """
        asked = self._ask(plan)
        self._drafts = [draft for draft, _ in asked]
        rows = [
            merge([_row(draft, rates, index) for draft, rates in asked], count, self._least)
            for index, count in enumerate(plan.num_drafts.tolist())
        ]
        if self._step_tokens is not None:
            rows = likeliest(rows, self._step_tokens - int((plan.num_drafts > 0).sum()))
        return pack(rows, tree=True)

    def _ask(self, plan: StepPlan) -> list[tuple[Draft, NDArray[np.float64]]]:
        """Each source's draft and its corrected confidence; first of those that run no model."""
        found: dict[int, tuple[Draft, NDArray[np.float64]]] = {}
        self._plans = [plan] * len(self.sources)
        best = np.zeros(plan.rows.size)
        for index in sorted(range(len(self.sources)), key=lambda index: not self._is_free[index]):
            source, wanted = self.sources[index], plan
            if not self._is_free[index] and self._sure < 1.0:
                unsure = np.where(best < self._sure, plan.num_drafts, 0).astype(np.int32)
                self._plans[index] = wanted = plan._replace(num_drafts=unsure)
            draft = source.propose(wanted)
            if draft.probs is not None:
                raise ValueError(
                    f"merged takes deterministic drafts only, and {source.name!r} samples its own at temperature > 0: "
                    "set temperature=0, or leave it out of drafters"
                )
            rates = self._calibrations[index].rates(draft)
            found[index] = draft, rates
            if self._is_free[index] and draft.tokens.size:
                best = np.maximum(best, _likeliest_first(draft, rates))
        return [found[index] for index in range(len(self.sources))]

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Score each source on the emitted tokens, and let it learn: ``verified`` holds the merged draft."""
        known = self._state.num_known[plan.rows]
        emitted = [
            self._state.tokens[row, end - count : end].tolist()
            for row, end, count in zip(
                plan.rows.tolist(), known.tolist(), outcome.num_emitted.tolist(), strict=True
            )
        ]
        for index, source in enumerate(self.sources):
            if self._drafts[index].tokens.size:
                self._calibrations[index].learn(self._drafts[index], emitted)
            # The plan that it drafted for: a draft model knows from it what it has computed.
            source.observe(self._plans[index], outcome, self._captured_for(source, verified))

    def _captured_for(self, source: Drafter, verified: Verified) -> Verified:
        """``verified`` with the hidden states that ``source`` asked for."""
        if verified.hidden is None or list(source.captures) == list(self.captures):
            return verified
        places = [list(self.captures).index(layer) for layer in source.captures]
        return replace(verified, hidden=verified.hidden[places] if places else None)


def merge(proposals: Sequence[Nodes], max_nodes: int, least: float = 0.0) -> Nodes:
    """The ``max_nodes`` nodes of all ``proposals`` with the largest product of confidence, largest first; none whose
    product is below ``least``."""
    joined, number = Nodes(), {}
    for nodes in proposals:
        places = []
        for token, parent, confidence in zip(nodes.tokens, nodes.parents, nodes.confidence, strict=True):
            key = (places[parent] if parent >= 0 else -1, token)
            place = number.setdefault(key, len(joined.tokens))
            places.append(place)
            if place == len(joined.tokens):
                joined.append(token, key[0], confidence)
            else:
                joined.confidence[place] = max(joined.confidence[place], confidence)
    products = _products(joined)
    # A parent's product is not smaller than its children's and its number is, so it is chosen before them.
    chosen = sorted(range(len(products)), key=lambda node: (-products[node], node))[:max_nodes]
    place_of, kept = {-1: -1}, Nodes()
    for place, node in enumerate(chosen):
        if products[node] < least:
            break
        place_of[node] = place
        kept.append(joined.tokens[node], place_of[joined.parents[node]], joined.confidence[node])
    return kept


def likeliest(rows: Sequence[Nodes], max_nodes: int) -> list[Nodes]:
    """The ``max_nodes`` nodes with the largest products of all ``rows``, each of which :func:`merge` has ordered."""
    products = [_products(nodes) for nodes in rows]
    ranked = sorted(
        ((-product, node, row) for row, own in enumerate(products) for node, product in enumerate(own))
    )
    counts = [0] * len(rows)
    for _, _, row in ranked[: max(0, max_nodes)]:
        counts[row] += 1
    # Within a row the largest come first, parents before their children, so that what stays is a tree.
    return [
        Nodes(nodes.tokens[:count], nodes.parents[:count], nodes.confidence[:count])
        for nodes, count in zip(rows, counts, strict=True)
    ]


def _products(nodes: Nodes) -> list[float]:
    """Each node's confidence times that of all above it."""
    products: list[float] = []
    for parent, confidence in zip(nodes.parents, nodes.confidence, strict=True):
        products.append(confidence * (products[parent] if parent >= 0 else 1.0))
    return products


def _likeliest_first(draft: Draft, rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest of ``rates`` [R, K] among each row's children of the root, 0 without any."""
    nodes = np.arange(draft.tokens.shape[1])
    is_first = nodes == 0 if draft.parents is None else draft.parents < 0
    return np.where(is_first & (nodes < draft.num_drafted[:, None]), rates, 0.0).max(axis=1)


def _row(draft: Draft, rates: NDArray[np.float64], index: int) -> Nodes:
    count = int(draft.num_drafted[index])
    parents = range(-1, count - 1) if draft.parents is None else draft.parents[index, :count].tolist()
    return Nodes(draft.tokens[index, :count].tolist(), list(parents), rates[index, :count].tolist())


def _depths(draft: Draft) -> NDArray[np.int64]:
    """int64 [R, K], 1 for children of the root."""
    num_rows, width = draft.tokens.shape
    if draft.parents is None:
        return np.tile(np.arange(1, width + 1), (num_rows, 1))
    depths = np.zeros((num_rows, width + 1), np.int64)  # the last column is the root's, where -1 finds it
    for node in range(width):
        depths[:, node] = depths[np.arange(num_rows), draft.parents[:, node]] + 1
    return depths[:, :-1]
