"""Schema of the experiment that measures the running device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from specdec.config_schemas import check_positive, require


@dataclass(frozen=True)
class CalibrateConfig:
    """budget_s: seconds that measuring may take, the model's loading apart; sizes that would take too long are left
    out. device_name: what the result is called, letters, digits and underscores; null for the device's own name.
    output: a folder that gets a copy of ``hardware/<device_name>``. whole_steps: random steps that are measured and
    predicted, never fitted."""

    name: str = "calibrate"
    budget_s: float = 480.0
    device_name: str | None = None
    output: str | None = None
    whole_steps: int = 24

    def __post_init__(self) -> None:
        check_positive("experiment.budget_s", self.budget_s)
        require(self.whole_steps >= 0, f"experiment.whole_steps={self.whole_steps} must be >= 0")
        require(
            self.device_name is None or re.fullmatch(r"[A-Za-z0-9_]+", self.device_name) is not None,
            f"experiment.device_name={self.device_name!r} must consist of letters, digits and underscores",
        )
