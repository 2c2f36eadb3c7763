"""Drafts from repetition: what followed the longest earlier matches of the text's end, in a tree of likely nodes.

Method: SuffixDecoding (Oliaro et al., arXiv 2411.04975) looks up the end of the text in the request's own tokens and in
earlier outputs, and drafts as many tokens as the statistics of the match bear. Here a suffix automaton finds the
matches, and a token's probability is the estimate of prediction by partial matching (Moffat 1990, method C): with n
continuations of a context, d of them different and c of them this token, it is c / (n + d·e), and d·e / (n + d·e) is
left for shorter contexts. e falls with the length of the context, so that long matches give long drafts.

>>> llm = LLM(model, drafter={"name": "suffix", "max_corpus_tokens": 0}, num_drafts=16)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.drafter.nodes import Nodes, pack
from specdec.drafter.suffix_automaton import ROOT, SuffixAutomaton
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan

ESCAPE = 1.5
"""e of a context of one token; a context of L tokens has e = ESCAPE / L."""
CORPUS_LENGTH = 0.4
"""A match in another request's output counts as so much of its length."""
CONTEXTS = 2
"""Contexts that a node's children come from: the longest, then the next shorter one."""
MAX_CORPUS_MATCH = 32

Locus = tuple[int, int]
"""State of an automaton, and how many of the last tokens lead to it; (0, 0) if the last token does not occur."""


class Corpus:
    """Outputs of finished requests, in two automata: when the young one is full, the old one is dropped.

    Args:
        max_tokens: most tokens held; an output counts with its last ``max_tokens // 2`` at most.

    Attributes:
        automata: the old one and the young one.
        seeds: of the sampled requests whose outputs each holds. A draft must not depend on the noise that will verify
            it, so a request does not draft from what was sampled with its own seed.
        version: how often they have changed.
    """

    def __init__(self, max_tokens: int) -> None:
        self.automata = [SuffixAutomaton(), SuffixAutomaton()]
        self.seeds: list[set[int]] = [set(), set()]
        self.version = 0
        self._half = max_tokens // 2

    @property
    def num_tokens(self) -> int:
        return sum(automaton.num_tokens for automaton in self.automata)

    def add(self, output: Sequence[int], seed: int | None = None) -> None:
        """Take in the output of a request; ``seed`` is that of its noise, ``None`` if it was greedy."""
        if self._half == 0:
            return
        output = output[-self._half :]
        if self.automata[1].num_tokens + len(output) > self._half:
            self.automata = [self.automata[1], SuffixAutomaton()]
            self.seeds = [self.seeds[1], set()]
        self.automata[1].new_text()
        self.automata[1].extend(output)
        if seed is not None:
            self.seeds[1].add(seed)
        self.version += 1


@dataclass(slots=True)
class History:
    """One running request's tokens.

    Attributes:
        seed: of its noise, ``None`` if it is greedy.
        own: automaton of its known tokens.
        loci: where they lie in the corpus's automata of ``version``.
    """

    request_id: int
    seed: int | None = None
    own: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    loci: list[Locus] = field(default_factory=list)
    version: int = -1

    def follow(self, known: IntArray, corpus: Corpus) -> tuple[list[SuffixAutomaton], list[Locus]]:
        """Take in those of the ``known`` tokens that are new; the automata to draft from and the loci in them."""
        new = known[self.own.num_tokens :].tolist()
        self.own.extend(new)
        if self.version != corpus.version:
            new = known[-MAX_CORPUS_MATCH:].tolist()
            self.loci, self.version = [(ROOT, 0)] * 2, corpus.version
        for place, automaton in enumerate(corpus.automata):
            if self.seed in corpus.seeds[place]:
                continue
            for token in new:
                self.loci[place] = automaton.step(*self.loci[place], token)
        repeated = self.own.link[self.own.last]
        return [self.own, *corpus.automata], [(repeated, self.own.length[repeated]), *self.loci]


class SuffixDrafter:
    """Deterministic: drafts depend on the known tokens and on the outputs that finished in earlier steps.

    With a corpus they also depend on what ran before, so a seeded sample may differ between a request alone and in
    a batch, though its law does not.

    Args:
        max_corpus_tokens: most tokens of finished outputs kept for later requests, about 400 bytes each; the oldest
            are dropped. 0 keeps requests apart.
        min_probability: nodes less likely to be accepted are not drafted.
        tree: draft trees, or else the likeliest chain.

    Raises:
        ValueError: a value out of range.
    """

    name = "suffix"
    captures: Sequence[int] = ()

    def __init__(
        self, max_corpus_tokens: int = 65_536, min_probability: float = 0.02, tree: bool = True
    ) -> None:
        if max_corpus_tokens < 0:
            raise ValueError(
                f"suffix: max_corpus_tokens={max_corpus_tokens} must be >= 0 (0 keeps no outputs)"
            )
        if not 0.0 < min_probability < 1.0:
            raise ValueError(f"suffix: min_probability={min_probability} must lie in (0, 1)")
        self.min_probability = min_probability
        self.tree = tree
        self.corpus = Corpus(max_corpus_tokens)

    def bind(self, host: DraftHost) -> None:
        self._state = host.state
        self._histories: dict[int, History] = {}

    def propose(self, plan: StepPlan) -> Draft:
        rows: list[Nodes] = [Nodes() for _ in range(plan.rows.size)]
        for index in np.flatnonzero(plan.num_drafts).tolist():
            row, request_id = int(plan.rows[index]), int(plan.request_ids[index])
            history = self._histories.get(row)
            if history is None or history.request_id != request_id:
                history = self._histories[row] = History(request_id, self._seed(row))
            automata, loci = history.follow(self._state.known(row), self.corpus)
            rows[index] = grow(automata, loci, int(plan.num_drafts[index]), self.min_probability, self.tree)
        return pack(rows, self.tree)

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Finished outputs join the corpus."""
        for row in plan.rows[outcome.finished].tolist():
            self._histories.pop(row, None)
            output = self._state.known(row)[self._state.num_prompt[row] :]
            self.corpus.add(output.tolist(), self._seed(row))

    def _seed(self, row: int) -> int | None:
        return int(self._state.seeds[row]) if self._state.temperature[row] > 0 else None


def grow(
    automata: Sequence[SuffixAutomaton],
    loci: Sequence[Locus],
    max_nodes: int,
    min_probability: float,
    branching: bool,
) -> Nodes:
    """The ``max_nodes`` likeliest continuations, likeliest first; fewer where none reach ``min_probability``.

    Args:
        automata: the request's own, then the corpus's.
        loci: where the known tokens lie in each.
        branching: give each node all its children, or only the likeliest.
    """
    nodes = Nodes()
    node, probability, here = -1, 1.0, list(loci)
    # Ties go to what was found first. Entries: −probability, serial, parent, token, confidence, the parent's loci.
    heap: list[tuple[float, int, int, int, float, list[Locus]]] = []
    serial = 0
    while len(nodes.tokens) < max_nodes:
        children = continuations(automata, here, min_probability / probability)
        if children and not branching:
            children = [max(children, key=lambda child: child[1])]
        for token, confidence in children:
            serial += 1
            heapq.heappush(heap, (-probability * confidence, serial, node, token, confidence, here))
        if not heap:
            break
        negative, _, parent, token, confidence, here = heapq.heappop(heap)
        node, probability = len(nodes.tokens), -negative
        nodes.append(token, parent, confidence)
        here = [automaton.step(*locus, token) for automaton, locus in zip(automata, here, strict=True)]
    return nodes


def continuations(
    automata: Sequence[SuffixAutomaton], loci: Sequence[Locus], min_probability: float
) -> list[tuple[int, float]]:
    """The tokens that may follow, each with its probability, at least ``min_probability``.

    Of equally long contexts the first automaton's comes first; tokens of longer contexts are not counted again.
    """
    found: list[tuple[int, float]] = []
    seen: set[int] = set()
    contexts, left = list(loci), 1.0
    for _ in range(CONTEXTS):
        longest, best = 0.0, -1
        for place, (_, matched) in enumerate(contexts):
            length = matched * CORPUS_LENGTH if place else matched
            if length > longest:
                longest, best = length, place
        if best < 0 or left < min_probability:
            break
        automaton, (state, _) = automata[best], contexts[best]
        following = automaton.next[state]
        if seen:
            following = {token: target for token, target in following.items() if token not in seen}
        shorter = automaton.link[state]
        contexts[best] = (shorter, automaton.length[shorter])
        if not following:
            continue
        counts = [automaton.count[target] for target in following.values()]
        escape = ESCAPE / longest * len(counts)
        share = left / (sum(counts) + escape)
        least = min_probability / share
        found += [
            (token, share * count) for token, count in zip(following, counts, strict=True) if count >= least
        ]
        seen |= following.keys()
        left = share * escape
    return found
