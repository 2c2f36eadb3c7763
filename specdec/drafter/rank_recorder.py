"""A drafter that counts, while another one drafts, which rank of child verification accepts at which depth.

>>> llm.configure({"name": "layer_skip", "tree": {"name": "k_ary", "branching": [6, 3, 2, 1]}}, num_drafts=96)
>>> llm.engine.drafter = recorder = RankRecorder(llm.engine.drafter)
>>> llm.generate(prompts)
>>> recorder.counts.pooled()
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafter.base import Draft, Drafter, DraftHost, Verified
from specdec.scheduler.plan import StepOutcome, StepPlan
from specdec.tree.rank_rates import RankCounts


class RankRecorder:
    """Drafts what ``drafter`` drafts. Chains count as trees of one child per node.

    Args:
        drafter: bound to an engine already, or bound through this one.

    Attributes:
        counts: of all verifications so far.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.captures: Sequence[int] = drafter.captures
        self.counts = RankCounts()

    @property
    def name(self) -> str:
        return self._drafter.name

    def bind(self, host: DraftHost) -> None:
        self._drafter.bind(host)

    def propose(self, plan: StepPlan) -> Draft:
        return self._drafter.propose(plan)

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        draft = verified.draft
        for index in (plan.emits & (draft.num_drafted > 0)).nonzero()[0].tolist():
            count = int(draft.num_drafted[index])
            parents = range(-1, count - 1) if draft.parents is None else draft.parents[index, :count].tolist()
            path = verified.path[index, : outcome.num_accepted[index]].tolist()
            self.counts.add(parents, path)
        self._drafter.observe(plan, outcome, verified)
