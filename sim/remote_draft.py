"""A draft model on a device of its own: another cost model says how long it drafts, and a network lies between."""

from __future__ import annotations

from sim.replica import StepTimes
from sim.step_features import StepCost, StepFeatures


class RemoteDraft:
    """Seconds of a step whose drafts come from elsewhere. Drafting and verification follow one another.

    Args:
        target: seconds of everything but drafting.
        draft: its ``draft_s`` counts alone, the draft's own prefill included.
        round_trip_s: network time of a step that drafts: tokens there, drafts back.
    """

    def __init__(self, target: StepTimes, draft: StepTimes, round_trip_s: float) -> None:
        self._target, self._draft, self._round_trip_s = target, draft, round_trip_s

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        """Seconds of one step; the relative error is the target's."""
        draft_s = self._draft.predict_scalar(features).draft_s
        if features.draft_steps:
            draft_s += self._round_trip_s
        return self._target.predict_scalar(features)._replace(draft_s=draft_s)
