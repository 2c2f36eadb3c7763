"""Wrong tree rules, and right ones on drafts of another kind, that the exact enumeration must tell apart."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from specdec.tree import Tree, k_ary
from specdec.verify import TREE_RULES, traversal
from specdec.verify.one_hot import _OneHotLaws
from specdec.verify.tree_base import NodeLaws, TreeRule, draft_ratios
from specdec.verify.walk import walk, walk_thresholds
from tests.verify.tree_laws import ONE, draft_law, random_instance, step_law, target_law, top_children


class Unzeroed(NodeLaws):
    """Forgets to take a rejected token out of the draft's distribution."""

    def reject(self, child, stay, scale=1):
        mass = super().reject(child, stay, scale)
        self._draft = self._drafts.draft_probs[self.rows, self._node + 1]
        return mass


class TargetAsResidual(NodeLaws):
    def weights(self):
        return self._drafts.target_probs[self.rows, self._node + 1]


def walking_with(at) -> TreeRule:
    """``at``: drafts to the laws at (node, rows)."""
    return TreeRule(
        True,
        lambda drafts: walk_thresholds(drafts, at(drafts)),
        lambda drafts, uniforms: walk(drafts, uniforms, at(drafts)),
    )


def recursive_with(laws: type[NodeLaws]) -> TreeRule:
    def at(drafts):
        ratios = draft_ratios(drafts)
        return lambda node, rows: laws(drafts, ratios, node, rows)

    return walking_with(at)


class Unnormalised(_OneHotLaws):
    """Accepts later children with target[x], not with their share of what is left."""

    def ratio(self, child):
        return self._at_tokens[self.rows, child]


def one_hot_with(laws: type[_OneHotLaws]) -> TreeRule:
    def at(drafts):
        at_tokens = drafts.at_tokens(drafts.target_probs)
        return lambda node, rows: laws(drafts, at_tokens, node, rows)

    return walking_with(at)


BRANCHING = [Tree([-1, -1, -1]), Tree([-1, -1, 0]), Tree([-1, 0, 0]), Tree([-1, -1, 1, 1])]


def num_wrong(rule: TreeRule, shapes: list[Tree] = BRANCHING, drafts_as=draft_law) -> int:
    """Instances, of three per shape, whose law differs from the target's."""
    wrong = 0
    for tree, seed in itertools.product(shapes, range(3)):
        instance = random_instance(seed, tree, 4)
        law = step_law(rule, tree, instance, drafts_as(tree, instance))
        wrong += law.emitted != target_law(instance, tree.max_depth + 1)
    return wrong


def likeliest(tree: Tree, instance) -> dict[tuple[int, ...], Fraction]:
    return {top_children(tree, instance): ONE}


CONTROLS = {
    "draft not zeroed": (recursive_with(Unzeroed), draft_law),
    "target as residual": (recursive_with(TargetAsResidual), draft_law),
    "one-hot, not renormalised": (one_hot_with(Unnormalised), likeliest),
    "recursive on deterministic children": (TREE_RULES["recursive"], likeliest),
    "traversal on deterministic children": (TREE_RULES["traversal"], likeliest),
}


def test_the_controls_start_from_exact_rules():
    assert num_wrong(recursive_with(NodeLaws)) == 0
    assert num_wrong(one_hot_with(_OneHotLaws), drafts_as=likeliest) == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_controls_change_the_law(control):
    rule, drafts_as = CONTROLS[control]
    assert num_wrong(rule, drafts_as=drafts_as) >= 4


def test_control_traversal_with_a_ratio_that_stays(monkeypatch):
    monkeypatch.setattr(traversal, "_next_ratio", lambda mass, ratio: ratio)
    assert num_wrong(TREE_RULES["traversal"], [Tree([-1, 0]), Tree([-1, 0, 0]), k_ary([2, 1])]) >= 4


def test_one_hot_is_exact_for_sampled_children_too_but_accepts_fewer():
    """Given the tree, whatever chose it, the emitted law is the target's; the draft's odds are not made use of."""
    for tree, seed in itertools.product(BRANCHING[:3], range(2)):
        instance = random_instance(seed, tree, 4)
        law = draft_law(tree, instance)
        one_hot, recursive = (step_law(TREE_RULES[r], tree, instance, law) for r in ("one_hot", "recursive"))
        assert one_hot.emitted == target_law(instance, tree.max_depth + 1)
        assert one_hot.num_accepted <= recursive.num_accepted
