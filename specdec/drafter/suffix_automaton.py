"""A suffix automaton with occurrence counts, grown token by token.

Method: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text". A state stands for all
substrings that end at the same places; its longest one has ``length`` tokens, and its suffix ``link`` leads to the
longest suffix that ends in more places. So the longest suffix of the text that occurred before is one link away,
what followed it is that state's transitions, and how often, the counts of their targets.

>>> automaton = SuffixAutomaton()
>>> automaton.extend([1, 2, 3, 1, 2])
>>> state = automaton.link[automaton.last]
>>> automaton.length[state], automaton.next[state]
(2, {3: 3})
"""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0
COUNTED_LEVELS = 16
"""Suffix links along which an append is counted: what bounds its cost in text of a short period."""


class SuffixAutomaton:
    """Holds one text, or several after one another, none continuing into the next.

    Attributes, lists over the states, of which 0 is the empty string's:
        length: tokens of the longest string.
        link: the longest suffix in another state; -1 for the root.
        count: places where the strings end. An append counts for the ``COUNTED_LEVELS`` longest of the suffixes
            that end in it, so a short context of a text with a short period may be counted too seldom.
        next: transitions by token.
        last: state of the text so far.
        num_tokens: tokens appended.
    """

    def __init__(self) -> None:
        self.length = [0]
        self.link = [-1]
        self.count = [0]
        self.next: list[dict[int, int]] = [{}]
        self.last = ROOT
        self.num_tokens = 0

    def new_text(self) -> None:
        """What is appended from here on does not continue what is there."""
        self.last = ROOT

    def extend(self, tokens: Iterable[int]) -> None:
        """Append ``tokens``, in amortised constant time each."""
        for token in tokens:
            self.last = self._append(token)
            self.num_tokens += 1
            self._count(self.last)

    def _append(self, token: int) -> int:
        length, link, following = self.length, self.link, self.next
        state = self.last
        known = following[state].get(token)
        if known is not None:  # after new_text: the string is one of an earlier text
            return known if length[known] == length[state] + 1 else self._split(state, known, token)
        new = self._new_state(length[state] + 1, {})
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state < 0:
            link[new] = ROOT
            return new
        target = following[state][token]
        link[new] = target if length[target] == length[state] + 1 else self._split(state, target, token)
        return new

    def _split(self, state: int, target: int, token: int) -> int:
        """A state for those strings of ``target`` that end in more places: ``state``'s longest, then ``token``."""
        clone = self._new_state(self.length[state] + 1, dict(self.next[target]))
        self.link[clone], self.count[clone] = self.link[target], self.count[target]
        self.link[target] = clone
        while state >= 0 and self.next[state].get(token) == target:
            self.next[state][token] = clone
            state = self.link[state]
        return clone

    def _new_state(self, length: int, following: dict[int, int]) -> int:
        self.length.append(length)
        self.link.append(-1)
        self.count.append(0)
        self.next.append(following)
        return len(self.length) - 1

    def _count(self, state: int) -> None:
        link, count = self.link, self.count
        for _ in range(COUNTED_LEVELS):
            if state <= ROOT:
                break
            count[state] += 1
            state = link[state]

    def step(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Where a text goes by ``token`` if its longest suffix in here has ``matched`` tokens and lies in ``state``."""
        while state > ROOT and token not in self.next[state]:
            state = self.link[state]
            matched = self.length[state]
        target = self.next[state].get(token)
        return (ROOT, 0) if target is None else (target, matched + 1)
