"""The union of trees against brute force, what calibration learns, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.drafter import make_drafter
from specdec.drafter.base import Draft, Verified
from specdec.drafter.merged import MAX_RATE, MergedDrafter, likeliest, merge
from specdec.drafter.nodes import Nodes
from tests.drafter.steps import Rig, branches


@st.composite
def trees(draw: st.DrawFn) -> Nodes:
    nodes, used = Nodes(), set()
    for node in range(draw(st.integers(0, 8))):
        key = draw(st.integers(-1, node - 1)), draw(st.integers(0, 3))
        if key in used or key[0] >= len(nodes.tokens):
            continue
        used.add(key)
        nodes.append(key[1], key[0], draw(st.floats(0.05, MAX_RATE)))
    return nodes


def paths(nodes: Nodes) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(nodes.tokens, nodes.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@given(st.lists(trees(), min_size=1, max_size=3), st.integers(0, 12))
def test_the_likeliest_nodes_of_the_union_are_kept(proposals: list[Nodes], count: int):
    confidence: dict[tuple[int, ...], float] = {}
    for nodes in proposals:
        for path, value in zip(paths(nodes), nodes.confidence, strict=True):
            confidence[path] = max(value, confidence.get(path, 0.0))
    product = {
        path: float(np.prod([confidence[path[: depth + 1]] for depth in range(len(path))]))
        for path in confidence
    }
    assert merge(proposals, count, 1.0).tokens == []
    some, every = merge(proposals, count, 0.3), merge(proposals, count)
    assert paths(some) == [path for path in paths(every) if product[path] >= 0.3]
    merged = merge(proposals, count)
    kept = paths(merged)
    assert len(set(kept)) == len(kept) == min(count, len(product))
    assert all(path[:-1] in ((), *kept[:place]) for place, path in enumerate(kept))
    assert [confidence[path] for path in kept] == merged.confidence
    assert [product[path] for path in kept] == pytest.approx(sorted(product.values(), reverse=True)[:count])


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(-1, 20))
def test_over_all_rows_the_likeliest_nodes_are_kept_and_stay_trees(rows: list[Nodes], count: int):
    def products(nodes: Nodes) -> list[float]:
        confidence = dict(zip(paths(nodes), nodes.confidence, strict=True))
        return [
            float(np.prod([confidence[path[: depth + 1]] for depth in range(len(path))]))
            for path in confidence
        ]

    ordered = [merge([nodes], 8) for nodes in rows]
    kept = likeliest(ordered, count)
    assert sum(len(nodes.tokens) for nodes in kept) == min(max(count, 0), sum(len(n.tokens) for n in ordered))
    for ours, whole in zip(kept, ordered, strict=True):
        assert paths(ours) == paths(whole)[: len(ours.tokens)], "no node without its parent"
    everything = sorted((p for nodes in ordered for p in products(nodes)), reverse=True)
    found = sorted((p for nodes in kept for p in products(nodes)), reverse=True)
    assert found == pytest.approx(everything[: len(found)])


class Fixed:
    """Always the same tree."""

    name = "fixed"

    def __init__(self, tokens, parents=None, confidence=None, probs=None, captures=()):
        self.given, self.captures, self.seen = (tokens, parents, confidence, probs), captures, []

    def bind(self, host):
        pass

    def propose(self, plan):
        tokens, parents, confidence, probs = self.given
        count = np.minimum(plan.num_drafts, len(tokens)).astype(np.int32)

        def rows(values, dtype):
            return None if values is None else np.tile(np.array(values, dtype), (plan.rows.size, 1))

        return Draft(
            rows(tokens, np.int64), count, probs, rows(parents, np.int32), rows(confidence, np.float32)
        )

    def observe(self, plan, outcome, verified):
        self.seen.append(verified)


def test_sure_rows_draft_what_unsure_ones_leave():
    """A step of 8 tokens and two rows: the last token of each leaves room for six nodes."""

    class Unsure(Fixed):
        def propose(self, plan):
            draft = super().propose(plan)
            draft.confidence[plan.rows == 1] *= 0.1
            return draft

    source = Unsure([1, 2, 3, 4, 5], None, [0.9] * 5)
    rig = Rig(MergedDrafter([source], step_tokens=8))
    rig.load(0, 0, [1])
    rig.load(1, 1, [1])
    assert rig.propose([0, 1], [5, 5]).num_drafted.tolist() == [5, 1]
    assert rig.propose([0, 1], [3, 3]).num_drafted.tolist() == [3, 3], "no more than the plan allows"
    assert rig.propose([0], [5]).num_drafted.tolist() == [5]
    with pytest.raises(ValueError, match="step_tokens=0 must be >= 1"):
        MergedDrafter([source], step_tokens=0)


def test_a_model_is_not_asked_where_the_others_are_sure():
    """Its own rows go on: what it is not asked for, it does not draft."""

    class Costly(Fixed):
        name = "costly"

        def propose(self, plan):
            self.asked = plan.num_drafts.tolist()
            return super().propose(plan)

        def observe(self, plan, outcome, verified):
            assert plan.num_drafts.tolist() == self.asked, "it observes what it drafted for"
            super().observe(plan, outcome, verified)

    class Lookup(Fixed):
        name = "ngram"

        def propose(self, plan):
            draft = super().propose(plan)
            draft.confidence[plan.rows == 1] = 0.3
            return draft

    costly, lookup = Costly([5], [-1], [0.9]), Lookup([1, 2], [-1, 0], [0.95, 0.2])
    for sure, asked in ((0.9, [0, 2]), (0.2, [0, 0]), (1.0, [2, 2])):
        rig = Rig(MergedDrafter([costly, lookup], sure=sure))
        rig.load(0, 0, [1])
        rig.load(1, 1, [1])
        draft = rig.propose([0, 1], [2, 2])
        assert costly.asked == asked
        assert [[5] in branches(draft, row) for row in (0, 1)] == [count > 0 for count in asked]
        rig.step([0, 1], [2, 2])
    with pytest.raises(ValueError, match=r"sure=0 must lie in \(0, 1\]"):
        MergedDrafter([lookup], sure=0)


def counting(prefix: list[int]) -> np.ndarray:
    return np.eye(8)[(prefix[-1] + 1) % 8]


def test_a_source_that_boasts_is_corrected():
    boaster = Fixed([7, 6], [-1, -1], [0.9, 0.8])
    modest = Fixed([0, 1, 2, 3], None, [0.3, 0.3, 0.3, 0.3])
    rig = Rig(MergedDrafter([boaster, modest]), counting)
    rig.load(0, 0, [7])
    first = rig.propose([0], [3])
    assert branches(first, 0) == [[7], [6], [0]]
    for number in range(1, 30):
        rig.load(0, number, [7])
        rig.step([0], [2])
    draft, accepted = rig.step([0], [4])
    assert accepted == [0]  # the prompt went on, and these four tokens come after a 7
    rig.load(0, 99, [7])
    draft, accepted = rig.step([0], [4])
    assert branches(draft, 0) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert accepted == [4]


def test_sources_without_confidence_are_rated_by_depth():
    source = Fixed([0, 1, 5, 6])
    rig = Rig(MergedDrafter([source]), counting)
    for number in range(60):
        rig.load(0, number, [7])
        rig.step([0], [4])
    rig.load(0, 99, [7])
    draft = rig.propose([0], [4])
    assert draft.confidence is not None
    assert branches(draft, 0) == [[0], [0, 1], [0, 1, 5], [0, 1, 5, 6]]
    assert draft.confidence[0, :2] == pytest.approx(64 / (4 + 30) * 0.5, abs=0.06)
    assert draft.confidence[0, 2] == pytest.approx(4 / (4 + 30) * 0.5, abs=1e-6)
    assert draft.confidence[0, 3] == pytest.approx(0.5), "its parent never came true, so it was never tried"


def test_an_undrafted_node_is_scored_as_well():
    """A source whose nodes find no room still learns how often they would have been right."""
    loud, quiet = Fixed([3], [-1], [0.95]), Fixed([0], None, [0.1])
    rig = Rig(MergedDrafter([loud, quiet]), counting)
    drafted = []
    for number in range(40):
        rig.load(0, number, [7])
        drafted += branches(rig.step([0], [1])[0], 0)
    assert drafted == sorted(drafted, reverse=True), "first [3], then always [0]"
    assert 1 < drafted.count([0]) < 40
    draft = rig.propose([0], [1])
    assert draft.confidence is not None and draft.confidence[0, 0] > 0.5


def test_sources_that_sample_are_refused():
    rig = Rig(MergedDrafter([Fixed([1], probs=np.ones((1, 1, 8), np.float32))]))
    rig.load(0, 0, [1])
    with pytest.raises(ValueError, match="'fixed' samples its own at temperature > 0: set temperature=0"):
        rig.propose([0], [1])


def test_each_source_gets_the_layers_that_it_asked_for():
    sources = [Fixed([1], captures=(2, 7)), Fixed([1]), Fixed([1], captures=(7, 4))]
    drafter = MergedDrafter(sources)
    assert drafter.captures == [2, 4, 7]
    verified = Verified(
        draft=Draft.none(1),
        logits=torch.zeros(1, 8),
        logit_start=np.zeros(1, np.int64),
        path=np.zeros((1, 0), np.int64),
        query_start=np.array([0, 1], np.int32),
        hidden=torch.tensor([2.0, 4.0, 7.0])[:, None, None].expand(3, 1, 5),
    )
    layers = [drafter._captured_for(source, verified).hidden for source in sources]
    assert [None if hidden is None else hidden[:, 0, 0].tolist() for hidden in layers] == [
        [2.0, 7.0],
        None,
        [7.0, 4.0],
    ]


def test_specs_name_the_sources():
    drafter = make_drafter(
        {"name": "merged", "drafters": ["suffix", {"name": "recycling", "num_successors": 4}, "ngram"]}
    )
    assert isinstance(drafter, MergedDrafter)
    assert [source.name for source in drafter.sources] == ["suffix", "recycling", "ngram"]
    unnamed = make_drafter("merged")
    assert isinstance(unnamed, MergedDrafter)
    assert [source.name for source in unnamed.sources] == ["suffix", "recycling"]


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ([], r"no drafters: name some, e\.g\."),
        ("suffix", "drafters='suffix' must be a list"),
        (["suffix", "none"], "must not name 'none'"),
        (["suffix", {"name": "synthetic", "alpha": 0.5}], "'synthetic' drafts alone"),
        (["sufix"], r"unknown drafter 'sufix': did you mean suffix\?"),
        ([{"name": "suffix", "num": 3}], "does not take these options"),
    ],
)
def test_specs_that_do_not_fit_are_refused(drafters, message: str):
    with pytest.raises(ValueError, match=message):
        make_drafter({"name": "merged", "drafters": drafters})
