"""The controller in the loop: two steps, the second of a length that follows from what the first accepted.

By exact enumeration, as in ``test_verify_exact``: the joint law of what both steps emit is the target's, because the
lengths depend on earlier steps alone. A controller that looks at the drafted token changes it.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from specdec.scheduler import make_controller
from specdec.scheduler.speculation import SpeculationController
from specdec.verify import CHAIN_RULES
from specdec.verify.base import ChainRule, Chains, residual
from tests.scheduler.test_speculation import a_table
from tests.verify.test_verify_exact import (
    ONE,
    VOCAB,
    Instance,
    accept_cells,
    build_chains,
    continue_with_target,
    random_law,
    take,
    target_law,
)

HORIZON, LONGEST = 4, 2
Path = tuple[int, ...]
Peek = Callable[[Path], int]
Law = dict[Path, Fraction]
# One more draft costs 0.35 of a plain step, so 0, 1 or 2 are best at rates of 1/3, 1/2 and 2/3.
PRIOR = {"max_drafts": LONGEST, "prior_accepted": 1.0, "prior_rejected": 1.0}
CONTROLLERS: dict[str, dict[str, Any]] = {
    "adaptive": {"name": "adaptive", "cost_ratio": 0.35, **PRIOR},
    "goodput": {"name": "goodput", "step_tokens": (1, 2, 3), "step_s": (1.0, 1.35, 1.7), **PRIOR},
}


@dataclass(frozen=True)
class Laws:
    """Distributions [VOCAB] of the token after each prefix."""

    target: dict[Path, np.ndarray]
    draft: dict[Path, np.ndarray]

    @staticmethod
    def random(seed: int) -> Laws:
        rng = np.random.default_rng(seed)
        longest = HORIZON + LONGEST
        prefixes = [p for n in range(longest + 1) for p in itertools.product(range(VOCAB), repeat=n)]
        return Laws({p: random_law(rng) for p in prefixes}, {p: random_law(rng) for p in prefixes})

    def after(self, prefix: Path, num_drafts: int) -> Instance:
        """What a step with so many drafts sees."""
        paths = [p for n in range(num_drafts + 1) for p in itertools.product(range(VOCAB), repeat=n)]
        target, draft = ({p: law[prefix + p] for p in paths} for law in (self.target, self.draft))
        return Instance(num_drafts, target, draft, {})


def step(rule: ChainRule, instance: Instance, peek: Peek | None = None) -> dict[tuple[int, Path], Fraction]:
    """Weights of (accepted drafts, emitted tokens). ``peek`` says how many drafts of a path are verified."""
    arrays, path_weights = build_chains(instance, padding=1)
    if peek:
        verified = [peek(tuple(path[: instance.num_drafts])) for path in arrays[2].tolist()]
        arrays = (*arrays[:3], np.array(verified))
    rows, uniforms, measures = accept_cells(rule.thresholds(Chains.build(*arrays)))
    taken: Any = take(arrays, rows)
    chains = Chains.build(*taken)
    num_accepted, scale = rule.accept(chains, uniforms)
    next_weights = residual(chains, num_accepted, scale)
    law: dict[tuple[int, Path], Fraction] = defaultdict(Fraction)
    for index, row in enumerate(rows):
        count = int(num_accepted[index])
        accepted = tuple(arrays[2][row, :count].tolist())
        for token, mass in enumerate(next_weights[index]):
            if mass:
                share = path_weights[row] * measures[index] * mass / next_weights[index].sum()
                law[count, (*accepted, token)] += share
    return law


def length(controller: SpeculationController, accepted: int, rejected: int) -> int:
    table = a_table([(accepted, rejected)])
    return int(controller.num_drafts(table, table.active, 0.0)[0])


def two_steps(
    rule: ChainRule, laws: Laws, controller: SpeculationController, accepted: int, peek: Peek | None = None
) -> tuple[Law, set[int]]:
    """Law of the first HORIZON tokens of two steps and then the target, and the second step's lengths.

    ``accepted``: drafts accepted before, of which none were rejected. ``peek`` applies to the second step.
    """
    first = length(controller, accepted, 0)
    emitted: Law = defaultdict(Fraction)
    lengths: set[int] = set()
    for (count, path), weight in step(rule, laws.after((), first)).items():
        second = length(controller, accepted + count, int(count < first))
        lengths.add(second)
        for (_, more), share in step(rule, laws.after(path, second), peek).items():
            emitted[path + more] += weight * share
    law: Any = Counter()  # of fractions
    whole = Instance(HORIZON - 1, laws.target, None, {})
    for path, weight in emitted.items():
        continue_with_target(whole, path[:HORIZON], weight, law)
    return law, lengths


def expected(laws: Laws) -> Law:
    law: Any = target_law(Instance(HORIZON - 1, laws.target, None, {}))
    return law


@pytest.mark.parametrize("rule", CHAIN_RULES)
@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize(("accepted", "first", "second"), [(0, 1, {0, 2}), (1, 2, {1, 2})])
def test_lengths_from_past_acceptance_keep_the_joint_law(
    rule: str, name: str, accepted: int, first: int, second: set[int]
) -> None:
    controller = make_controller(**CONTROLLERS[name])
    assert length(controller, accepted, 0) == first
    for seed in range(2):
        laws = Laws.random(seed)
        law, lengths = two_steps(CHAIN_RULES[rule], laws, controller, accepted)
        assert lengths == second, "the second step's length must follow from the first step"
        assert law == expected(laws)
        assert sum(law.values()) == ONE


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_controller_that_looks_at_the_drafted_token_is_noticed(rule: str) -> None:
    """Drafts that begin with token 0 are dropped unverified: that token then comes too rarely or too often."""

    def peek(path: Path) -> int:
        return 0 if path[:1] == (0,) else len(path)

    controller = make_controller(**CONTROLLERS["goodput"])
    differences: list[Fraction] = []
    for seed in range(4):
        laws = Laws.random(seed)
        law, _ = two_steps(CHAIN_RULES[rule], laws, controller, 1, peek)
        assert sum(law.values()) == ONE
        right = expected(laws)
        differences.append(max(abs(law[path] - weight) for path, weight in right.items()))
    assert sum(difference > 0 for difference in differences) >= 3
