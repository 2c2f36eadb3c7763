"""Self-speculation: the target without some of its middle layers drafts for itself.

Method: Zhang et al., "Draft & Verify", arXiv 2309.08168. The draft reads the target's own KV cache, which
holds the full model's keys and values for the context, and writes its own for the drafted positions; the
verification pass then overwrites them. So it needs no memory and no catching up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from specdec.drafter.autoregressive import AutoregressiveDrafter
from specdec.drafter.base import DraftHost
from specdec.rows import StepInput
from specdec.scheduler.plan import IntArray, StepPlan


class LayerSkipDrafter(AutoregressiveDrafter):
    """Args:
    num_skip: how many layers to leave out, taken from the middle. Default: a sixth of them.
    skip_layers: exactly which layers to leave out, instead of ``num_skip``.
    tree: what to draft; see ``AutoregressiveDrafter``.
    """

    name = "layer_skip"

    def __init__(
        self,
        num_skip: int | None = None,
        skip_layers: Sequence[int] | None = None,
        tree: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tree)
        if num_skip is not None and skip_layers is not None:
            raise ValueError("give num_skip or skip_layers, not both")
        if num_skip is not None and num_skip < 0:
            raise ValueError(f"num_skip={num_skip} must be >= 0")
        self.num_skip = num_skip
        self.skip_layers = None if skip_layers is None else tuple(skip_layers)

    def bind(self, host: DraftHost) -> None:
        super().bind(host)
        num_layers = host.target.config.num_layers
        skipped = self._skipped(num_layers)
        if not all(0 <= layer < num_layers for layer in skipped) or len(set(skipped)) >= num_layers:
            raise ValueError(
                f"layer_skip leaves out layers {skipped} of a model with {num_layers}: give indices in "
                f"0..{num_layers - 1} and keep at least one layer"
            )
        self.layers = [layer for layer in range(num_layers) if layer not in skipped]

    def _skipped(self, num_layers: int) -> tuple[int, ...]:
        if self.skip_layers is not None:
            return self.skip_layers
        num_skip = max(1, num_layers // 6) if self.num_skip is None else self.num_skip
        first = (num_layers - num_skip) // 2
        return tuple(range(first, first + num_skip))

    def forward(self, batch: StepInput) -> Tensor:
        return self._host.target.forward(batch, layers=self.layers)

    def first_input(self, plan: StepPlan) -> tuple[IntArray, IntArray]:
        return plan.context, np.where(plan.num_drafts > 0, plan.num_new, 0).astype(np.int32)
