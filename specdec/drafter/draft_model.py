"""A smaller model of the same vocabulary drafts, with its own paged KV cache in the target's blocks.

It may be a quantised or pruned copy of another model, the target's own included.

Block numbers come from the target's block table, so the scheduler accounts for both caches at once and a
prefix hit serves both. The draft cache may lag behind the target's (after full acceptance the last draft
token was never fed; with speculation off nothing is): every proposal first feeds what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from specdec.drafter.autoregressive import AutoregressiveDrafter
from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.model.prune import pruner
from specdec.model.quantize import check_quantization
from specdec.model.weights import LoadedModel, check_same_vocabulary, load_model
from specdec.rows import StepInput
from specdec.runner import make_runner
from specdec.scheduler.plan import IntArray, StepOutcome, StepPlan
from specdec.tree import Tree


class DraftModelDrafter(AutoregressiveDrafter):
    """Args:
    model: name, path or loaded model, as for the target.
    backend: "auto" (the target's), "eager", "native" or "triton".
    tree: what to draft; see ``AutoregressiveDrafter``.
    quantization: "int4", "int8" or "fp8" drafts with a copy whose linear layers are quantised; see
        ``specdec.model.quantize``: it is accepted as such a model is, though only on triton as fast.
    group_size: of int4 or int8.
    pruning: drafts with a pruned copy, as ``specdec.model.prune.prune_model`` takes it, e.g. {"name": "layers",
        "num_drop": 5}. Pruning comes before quantisation.

    Raises:
        ValueError: an option that does not exist or does not fit.
    """

    name = "draft_model"

    def __init__(
        self,
        model: str | LoadedModel,
        backend: str = "auto",
        tree: str | Mapping[str, Any] | None = None,
        quantization: str | None = None,
        group_size: int | None = None,
        pruning: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tree)
        check_quantization(quantization, group_size)
        self.quantization, self.group_size = quantization, group_size
        self._prune = None if pruning is None else pruner(pruning)
        self.model = model
        self.backend = backend

    def bind(self, host: DraftHost) -> None:
        super().bind(host)
        target = host.target
        loaded = load_model(self.model, dtype=target.dtype) if isinstance(self.model, str) else self.model
        check_same_vocabulary(target.model, loaded)
        if self._prune is not None:
            loaded = self._prune(loaded)
        options = replace(
            target.options, quantization=self.quantization, group_size=self.group_size
        )  # not the target's
        if self.backend != "auto":
            is_eager = (
                self.backend == "eager"
            )  # which is never invariant, and need not be: drafts are verified
            options = replace(
                options,
                backend=self.backend,
                batch_invariant=options.batch_invariant and not is_eager,
            )
        self._runner = make_runner(
            loaded, options, target.dtype, host.num_blocks, host.block_size, target.device
        )
        self._computed = np.zeros(host.table.max_rows, np.int32)
        self._owner = np.full(host.table.max_rows, -1, np.int64)
        self._filled = np.zeros(host.num_blocks, np.bool_)

    def forward(self, batch: StepInput) -> Tensor:
        return self._runner.forward(batch)

    def first_input(self, plan: StepPlan) -> tuple[IntArray, IntArray]:
        """Rows that draft or prefill feed everything from the draft's cache to the target's input."""
        start = self._computed[plan.rows]
        end = plan.context + plan.num_new
        feeds = (plan.num_drafts > 0) | (plan.num_new > 1)
        return start, np.where(feeds, end - start, 0).astype(np.int32)

    def propose(self, plan: StepPlan) -> Draft:
        self._runner.copy_blocks(plan.copies)
        self._enter(plan)
        self._draft = super().propose(plan)
        return self._draft

    def _enter(self, plan: StepPlan) -> None:
        """Find how much of a newcomer's cached prefix the draft cache holds as well."""
        table = self._host.table
        # A preempted request may come back to the very row that it had, with other blocks.
        is_new = (self._owner[plan.rows] != plan.request_ids) | np.isin(plan.request_ids, plan.admitted)
        new = np.flatnonzero(is_new)
        for index in new.tolist():
            row, context = int(plan.rows[index]), int(plan.context[index])
            # What was swapped in is the target's cache alone; these blocks held somebody else's draft cache.
            if plan.request_ids[index] in plan.swapped_in:
                context = 0
            filled = self._filled[table.blocks(row)[: context // self._host.block_size]]
            leading = filled.size if filled.all() else int(np.argmin(filled))
            self._owner[row] = plan.request_ids[index]
            self._computed[row] = leading * self._host.block_size

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """What the draft cache holds now: tokens it was fed, as far as they were accepted."""
        rows = plan.rows
        end = plan.context + plan.num_new
        feeds = (plan.num_drafts > 0) | (plan.num_new > 1)
        kept = self._num_kept(plan, outcome)
        self._computed[rows] = np.where(feeds, end + kept, self._computed[rows])
        self._owner[rows[outcome.finished]] = -1
        table, size = self._host.table, self._host.block_size
        width = int(table.num_blocks[rows].max(initial=0))
        columns = np.arange(width)
        held = columns < table.num_blocks[rows][:, None]
        full = (columns + 1) * size <= self._computed[rows][:, None]
        self._filled[table.block_table[rows, :width][held]] = full[held]

    def _num_kept(self, plan: StepPlan, outcome: StepOutcome) -> IntArray:
        """How many drafted tokens of the draft cache are known ones by now and where these belong, int32 [R].

        They need not be what was verified (see ``MergedDrafter``). Of a tree they are its first levels, as far as
        these have one node each; the last level, like the last token of a chain, was never fed.
        """
        tokens, state = self._draft.tokens, self._host.state
        if tokens.shape[1] == 0:
            return np.zeros(plan.rows.size, np.int32)
        shape = self.tree or Tree.chain(tokens.shape[1])
        depth = np.where(plan.num_drafts, shape.depths[np.minimum(plan.num_drafts, len(shape)) - 1], 0)
        place = np.arange(tokens.shape[1])
        first = state.num_known[plan.rows] - outcome.num_emitted
        kept = tokens == state.tokens[plan.rows[:, None], first[:, None] + place]
        kept &= np.array(shape.parents) == place - 1
        kept &= place < np.minimum(depth - 1, outcome.num_emitted)[:, None]
        return np.logical_and.accumulate(kept, axis=1).sum(axis=1, dtype=np.int32)
