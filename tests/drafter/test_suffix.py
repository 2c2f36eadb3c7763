"""The automaton against brute force; what is drafted from it; what is remembered, and for how long."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafter import make_drafter
from specdec.drafter.nodes import Nodes
from specdec.drafter.suffix import Corpus, History, SuffixDrafter, continuations, grow
from specdec.drafter.suffix_automaton import COUNTED_LEVELS, SuffixAutomaton
from tests.drafter.steps import Rig

# Short enough that every suffix is counted.
short_texts = st.lists(st.lists(st.integers(0, 2), max_size=COUNTED_LEVELS), min_size=1, max_size=4)
texts = st.lists(st.integers(0, 2), max_size=80)


def automaton_of(*parts: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for part in parts:
        automaton.new_text()
        automaton.extend(part)
    return automaton


def occurrences(parts: list[list[int]]) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(part[start:end])
        for part in parts
        for start in range(len(part))
        for end in range(start + 1, len(part) + 1)
    )


def longest_known_suffix(text: list[int], parts: list[list[int]]) -> int:
    known = occurrences(parts)
    return max((n for n in range(1, len(text) + 1) if tuple(text[-n:]) in known), default=0)


@given(short_texts)
def test_every_substring_is_found_and_counted(parts: list[list[int]]):
    automaton = automaton_of(*parts)
    for string, count in occurrences(parts).items():
        state = 0
        for token in string:
            state = automaton.next[state][token]
        assert automaton.count[state] == count
        assert automaton.length[automaton.link[state]] < len(string) <= automaton.length[state]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=COUNTED_LEVELS))
def test_the_longest_repeated_suffix_and_what_followed_it(text: list[int]):
    automaton = automaton_of(text)
    state = automaton.link[automaton.last]
    count = occurrences([text])
    length = max((n for n in range(1, len(text)) if count[tuple(text[-n:])] > 1), default=0)
    assert automaton.length[state] == length
    if length:
        ends = [
            end for end in range(length, len(text)) if text[end - length : end] == text[len(text) - length :]
        ]
        followed = Counter(text[end] for end in ends)
        assert {token: automaton.count[target] for token, target in automaton.next[state].items()} == followed


@given(st.lists(st.integers(0, 1), max_size=300), st.integers(1, 4))
def test_matches_are_exact_in_long_and_in_periodic_texts(text: list[int], period: int):
    for tokens in (text, (text[:period] * 60)[:200]):
        automaton = automaton_of(tokens)
        string = "".join(map(str, tokens))
        best = next(
            (n for n in range(len(string) - 1, 0, -1) if string.find(string[-n:]) < len(string) - n), 0
        )
        assert automaton.length[automaton.link[automaton.last]] == best
        assert len(automaton.length) <= max(2 * len(tokens), 2)


@given(st.lists(texts, min_size=1, max_size=3), texts)
def test_a_text_is_followed_through_others(parts: list[list[int]], text: list[int]):
    automaton = automaton_of(*parts)
    locus = (0, 0)
    for end, token in enumerate(text, start=1):
        locus = automaton.step(*locus, token)
        assert locus[1] == longest_known_suffix(text[:end], parts)
        assert automaton.length[automaton.link[locus[0]]] < max(locus[1], 1) or locus == (0, 0)


@settings(max_examples=50)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_a_history_follows_a_corpus_that_changes(events: list[tuple[list[int], list[int]]]):
    corpus, history, known = Corpus(60), History(0), [0]
    for appended, finished in events:
        known += appended
        automata, loci = history.follow(np.array(known, np.int32), corpus)
        for automaton, (state, matched) in zip(automata[1:], loci[1:], strict=True):
            fresh = (0, 0)
            for token in known:
                fresh = automaton.step(*fresh, token)
            # A text is followed for ever, but searched again over its last 32 tokens only.
            assert matched == fresh[1] or 32 <= matched < fresh[1]
            assert automaton.length[automaton.link[state]] < max(matched, 1) or state == 0
        assert automata[0].num_tokens == len(known)
        corpus.add(finished)


def test_probabilities_are_those_of_partial_matching():
    text = [7, 1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 4, 8, 2, 5, 1, 2]
    automaton = automaton_of(text)
    state = automaton.link[automaton.last]
    found = dict(continuations([automaton], [(state, automaton.length[state])], 1e-9))
    # After (1, 2): 3, 3, 4, so n = 3, d = 2, e = 1.5 / 2; then after (2) what is new: 5 once, with e = 1.5.
    assert found[3] == pytest.approx(2 / 4.5)
    assert found[4] == pytest.approx(1 / 4.5)
    assert found[5] == pytest.approx(1.5 / 4.5 * 1 / 2.5)
    assert set(found) == {3, 4, 5}


def products(nodes: Nodes) -> list[float]:
    found: list[float] = []
    for parent, confidence in zip(nodes.parents, nodes.confidence, strict=True):
        found.append(confidence * (found[parent] if parent >= 0 else 1.0))
    return found


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 12))
def test_the_likeliest_nodes_come_first(text: list[int], count: int):
    automaton = automaton_of(text)
    state = automaton.link[automaton.last]
    locus = [(state, automaton.length[state])]
    some, more = (grow([automaton], locus, size, 0.02, True) for size in (count, 40))
    assert products(some) == sorted(products(some), reverse=True)
    assert all(product >= 0.02 * (1 - 1e-9) for product in products(more))
    assert more.tokens[:count] == some.tokens and more.parents[:count] == some.parents
    chain = grow([automaton], locus, count, 0.02, False)
    assert chain.parents == list(range(-1, len(chain.tokens) - 1))
    assert set(chain.tokens[:1]) <= set(some.tokens)


def test_longer_matches_give_longer_drafts():
    lengths = []
    for match in (1, 3, 8, 20):
        rig = Rig(SuffixDrafter(max_corpus_tokens=0, tree=False), vocab_size=100)
        rig.load(0, 0, [*range(40, 60 - match), *range(60), 99, *range(20 - match, 20)])
        draft = rig.propose([0], [32])
        count = int(draft.num_drafted[0])
        lengths.append(count)
        assert draft.tokens[0, :count].tolist() == list(range(20, 20 + count))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == 32


def test_nothing_known_nothing_drafted():
    rig = Rig(SuffixDrafter())
    rig.load(0, 0, [1, 2, 3])
    rig.load(1, 1, [1, 2, 1, 2, 1])
    assert rig.propose([0, 1], [5, 0]).num_drafted.tolist() == [0, 0]
    assert rig.propose([0, 1], [5, 2]).num_drafted.tolist() == [0, 2]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_that_change_hands_draft_like_new_ones(data: st.DataObject):
    """Requests leave a row (preempted) and come back to any, with all that they know."""
    rig = Rig(SuffixDrafter(max_corpus_tokens=0), max_rows=2)
    requests = {number: [number, 1] for number in range(3)}
    for _ in range(12):
        number = data.draw(st.sampled_from(sorted(requests)))
        row = data.draw(st.integers(0, 1))
        requests[number] += data.draw(st.lists(st.integers(0, 3), max_size=6))
        rig.load(row, number, requests[number])
        fresh = Rig(SuffixDrafter(max_corpus_tokens=0))
        fresh.load(0, number, requests[number])
        got, expected = rig.propose([row], [8]), fresh.propose([0], [8])
        assert np.array_equal(got.tokens, expected.tokens) and np.array_equal(got.parents, expected.parents)


def test_a_finished_output_serves_later_requests_once():
    cycle = [3, 1, 4, 1, 5, 2, 6, 5]

    def logits_of(prefix: list[int]) -> np.ndarray:
        return np.eye(8)[cycle[len(prefix) % 8]]

    drafter = SuffixDrafter()
    rig = Rig(drafter, logits_of)
    rig.load(0, 0, [7] * 8)
    for _ in range(9):
        rig.step([0], [0])
    assert drafter.corpus.num_tokens == 0
    rig.step([0], [0], finished=[0])
    assert drafter.corpus.num_tokens == 10
    rig.load(0, 1, [0] * 8)  # the same row, of which nothing is remembered
    rig.step([0], [0])
    assert rig.propose([0], [4]).tokens[0, 0] == cycle[1]
    assert rig.step([0], [7], finished=[0])[1][0] >= 3
    assert drafter.corpus.num_tokens == 10 + len(rig.known(0)) - 8


@pytest.mark.parametrize(("temperature", "seed", "drafts"), [(0.0, 5, True), (1.0, 6, True), (1.0, 5, False)])
def test_a_sample_is_not_drafted_for_its_own_seed(temperature: float, seed: int, drafts: bool):
    """The noise that verified it would verify it again, and the second output's law would be another."""
    rig = Rig(SuffixDrafter(), lambda prefix: np.eye(8)[(prefix[-1] + 1) % 8], max_rows=2)
    rig.load(0, 0, [0], temperature=1.0, seed=5)
    rig.load(1, 1, [0], temperature, seed)
    rig.step([0, 1], [0, 0])
    assert rig.propose([1], [2]).num_drafted == [0]
    for end in range(4):
        rig.step([0], [0], finished=[0] if end == 3 else [])
    assert (rig.propose([1], [2]).num_drafted > 0) == drafts


@given(st.lists(st.lists(st.integers(0, 5), max_size=30), max_size=30), st.integers(2, 60))
def test_the_corpus_is_bounded_and_drops_the_oldest(outputs: list[list[int]], limit: int):
    corpus = Corpus(limit)
    for number, output in enumerate(outputs):
        corpus.add([*output, 100 + number])
        assert corpus.num_tokens <= limit
        assert 100 + number in corpus.automata[1].next[0]
        kept = [token for automaton in corpus.automata for token in automaton.next[0] if token >= 100]
        assert sorted(kept) == list(range(100 + number + 1 - len(kept), 100 + number + 1))


def test_a_corpus_of_nothing_keeps_nothing():
    corpus = Corpus(0)
    corpus.add([1, 2, 3])
    assert corpus.num_tokens == 0 and corpus.version == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_corpus_tokens": -1}, "max_corpus_tokens=-1 must be >= 0"),
        ({"min_probability": 0.0}, r"min_probability=0.0 must lie in \(0, 1\)"),
        ({"min_probability": 1.5}, r"min_probability=1.5 must lie in \(0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_drafter({"name": "suffix", **options})
