"""EAGLE: a head of one decoder layer drafts from the target's own hidden states.

Methods: arXiv 2401.15077 (EAGLE), 2406.16858 (dynamic trees), 2503.01840 (EAGLE-3); the head is described in
``specdec.heads.eagle``. What the target computed in a step, :meth:`EagleDrafter.observe` keeps; the next proposal feeds
it, so the cache holds nothing but entries of known tokens with the target's features, wherever these are known.

They are not known where the target skipped a token: in a cached prefix whose head entries are gone or were never made,
and after a swap. Entries there use the head's trained stand-in for an unknown feature, and a row whose last token lacks
its feature does not draft. That costs acceptance, never correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from specdec_kernels.ops import TORCH
from torch import Tensor

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.drafter.eagle_tree import TreePass, grow_trees
from specdec.drafter.pending import PendingHidden
from specdec.heads.borrowed import Borrowed
from specdec.heads.files import check_target, load_head, make_eagle
from specdec.heads.runner import make_head_runner
from specdec.model.weights import load_model
from specdec.names import unknown_name
from specdec.random import Stream, uniforms
from specdec.rows import StepInput, ragged_arange
from specdec.sampling import sample_from_probs
from specdec.scheduler.plan import IntArray, LongArray, StepOutcome, StepPlan

MOST_PENDING = 32
"""A row that does not draft is fed when it has more new entries than this."""


@dataclass(slots=True)
class _Ends:
    """Where rows stand after a pass of the head. Legend: B rows that draft, D draft vocabulary, H hidden size.

    Attributes:
        index: int64 [B], into the plan's rows.
        logits: float32 [B, D].
        outputs, inputs: [B, H], of the layer.
    """

    index: LongArray
    logits: Tensor
    outputs: Tensor
    inputs: Tensor

    def only(self, mask: NDArray[np.bool_]) -> _Ends:
        if mask.all():
            return self
        at = torch.from_numpy(mask).to(self.logits.device)
        return _Ends(self.index[mask], self.logits[at], self.outputs[at], self.inputs[at])


class EagleDrafter:
    """Chains, sampled from the head's own law where requests sample, or EAGLE-2's trees of its best guesses.

    Args:
        path: directory of a trained head.
        shape: "chain", or "tree" whose ``num_drafts`` nodes follow the head's confidence.
        sampled: what requests with a temperature get when ``shape`` is "tree": "tree", of deterministic drafts, or
            "chain", drawn from the head's law.
        top_k: children per expanded node of a tree, and nodes expanded per level.
        depth: most levels of a tree.
        backend: "auto" (the target's, with its ops), "eager" or "native".
    """

    name = "eagle"

    def __init__(
        self,
        path: str,
        shape: str = "chain",
        sampled: str = "tree",
        top_k: int = 8,
        depth: int = 6,
        backend: str = "auto",
    ) -> None:
        for option, value, known in (
            ("shape", shape, ("chain", "tree")),
            ("sampled", sampled, ("chain", "tree")),
            ("backend", backend, ("auto", "eager", "native")),
        ):
            if value not in known:
                raise unknown_name(option, value, known)
        for option, value in (("top_k", top_k), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{option}={value} must be >= 1")
        self._stored = load_head(path, "eagle")
        self.captures: Sequence[int] = self._stored.layers
        self.shape, self.sampled, self.top_k, self.depth, self.backend = shape, sampled, top_k, depth, backend

    def bind(self, host: DraftHost) -> None:
        self._host, target = host, host.target
        check_target(self._stored, target.model)
        model = target.model if target.model.weights else load_model(target.model.source, target.dtype)
        config, dtype = target.config, torch.float32 if target.device.type == "cpu" else target.dtype
        self._head = make_eagle(self._stored, config).to(target.device, dtype).requires_grad_(False)
        token_ids = self._stored.token_ids
        self._borrowed = Borrowed(model, token_ids, dtype, target.device)
        self._token_ids, self._vocab_size = token_ids.numpy(), config.vocab_size
        self._top_k = min(self.top_k, token_ids.numel())
        backend = target.backend if self.backend == "auto" else self.backend
        self._runner = make_head_runner(
            self._head,
            self._borrowed,
            config,
            backend,
            host.num_blocks,
            host.block_size,
            target.ops if self.backend == "auto" else TORCH,
        )
        stride = host.state.tokens.shape[1] + 1
        self._pending = PendingHidden(len(self.captures), config.hidden_size, stride, target.device)
        self._computed = np.zeros(host.table.max_rows, np.int32)
        self._owner = np.full(host.table.max_rows, -1, np.int64)
        self._filled = np.zeros(host.num_blocks, np.int32)  # leading entries of each block

    @torch.inference_mode()
    def propose(self, plan: StepPlan) -> Draft:
        self._runner.copy_blocks(plan.copies)
        self._filled[plan.copies[:, 1]] = self._filled[plan.copies[:, 0]]
        self._enter(plan)
        ends = self._feed(plan)
        if ends is None:
            return Draft.none(plan.rows.size)
        state, num_rows, width = self._host.state, plan.rows.size, int(plan.num_drafts.max())
        sampled = state.temperature[plan.rows[ends.index]] > 0
        chained = np.ones_like(sampled) if self.shape == "chain" else sampled & (self.sampled == "chain")
        has_trees = not chained.all()
        draft = Draft(
            tokens=np.zeros((num_rows, width), np.int64),
            num_drafted=np.zeros(num_rows, np.int32),
            parents=np.tile(np.arange(-1, width - 1, dtype=np.int32), (num_rows, 1)) if has_trees else None,
            confidence=np.zeros((num_rows, width), np.float32),
            probs=np.zeros((num_rows, width + has_trees, self._vocab_size), np.float32)
            if (sampled & chained).any()
            else None,
        )
        if chained.any():
            self._chains(plan, ends.only(chained), draft)
        if has_trees:
            self._trees(plan, ends.only(~chained), draft)
        return draft

    def _enter(self, plan: StepPlan) -> None:
        """Find how much of a newcomer's cached prefix the head's cache holds as well."""
        table, size = self._host.table, self._host.block_size
        left = np.concatenate([plan.preempted, plan.admitted])
        if left.size:
            self._owner[np.isin(self._owner, left)] = -1
        new = np.flatnonzero(self._owner[plan.rows] != plan.request_ids)
        self._pending.drop(plan.rows[new])
        for index in new.tolist():
            row, context = int(plan.rows[index]), int(plan.context[index])
            # What was swapped in is the target's cache alone; these blocks held somebody else's entries.
            if plan.request_ids[index] in plan.swapped_in:
                context = 0
            filled = self._filled[table.blocks(row)[: -(-context // size)]]
            leading = int(np.argmin(np.append(filled == size, False)))
            rest = int(filled[leading]) if leading < filled.size else 0
            self._owner[row] = plan.request_ids[index]
            self._computed[row] = min(leading * size + rest, context)

    def _feed(self, plan: StepPlan) -> _Ends | None:
        """Compute the entries of known tokens, up to the one behind what the target has computed."""
        rows = plan.rows
        drafts, start, end = plan.num_drafts > 0, self._computed[rows], plan.context + 1
        counts = np.where(drafts | (end - start > MOST_PENDING), end - start, 0).astype(np.int32)
        fed = np.flatnonzero(counts)
        if fed.size == 0:
            return None
        wanted = drafts[fed].astype(np.int32)
        batch = self._input(rows[fed], start[fed], counts[fed], wanted)
        hidden, known = self._pending.find(np.repeat(rows[fed], counts[fed]), batch.positions - 1)
        x = self._runner.inputs(batch.token_ids, hidden, known)
        logits, outputs = self._runner.forward(x, batch)
        self._computed[rows[fed]] = end[fed]
        self._pending.drop(rows[fed])
        self._mark_filled(rows[fed])
        ends = _Ends(fed[drafts[fed]], logits, outputs, x[self._put(batch.logit_rows)])
        ends = ends.only(known[batch.logit_rows] | (batch.positions[batch.logit_rows] == 0))
        return ends if ends.index.size else None

    def _chains(self, plan: StepPlan, ends: _Ends, draft: Draft) -> None:
        """Token by token; fills the rows of ``ends`` in ``draft``."""
        state = self._host.state
        draft.num_drafted[ends.index] = plan.num_drafts[ends.index]
        for step in range(draft.tokens.shape[1]):
            self._choose(plan, ends, step, draft)
            ends = ends.only(plan.num_drafts[ends.index] > step + 1)
            if ends.index.size == 0:
                break
            chosen = draft.tokens[ends.index, step]
            rows = plan.rows[ends.index]
            ones = np.ones(rows.size, np.int32)
            x = self._runner.own_inputs(chosen, ends.outputs)
            batch = self._input(rows, state.num_known[rows] + step, ones, ones)
            logits, outputs = self._runner.forward(x, batch)
            ends = _Ends(ends.index, logits, outputs, x)

    def _choose(self, plan: StepPlan, ends: _Ends, step: int, draft: Draft) -> None:
        """Draft token ``step`` of each row: the argmax, or for sampled rows a draw whose law goes into ``probs``.

        Penalties are not applied: any distribution will do, as long as it is the one reported.
        """
        state, rows = self._host.state, plan.rows[ends.index]
        chosen = ends.logits.argmax(dim=-1).numpy(force=True)
        sampled = np.flatnonzero(state.temperature[rows] > 0)
        if sampled.size:
            assert draft.probs is not None
            some = rows[sampled]
            law = state.probs(ends.logits[self._put(sampled)], some)
            noise = uniforms(
                state.seeds[some], state.num_known[some].astype(np.uint64), Stream.DRAFT, step + 1
            )
            chosen[sampled] = sample_from_probs(law, noise[:, step])
            draft.probs[ends.index[sampled, None], step, self._token_ids] = law.numpy(force=True)
        confidence = ends.logits.softmax(-1).gather(1, self._put(chosen)[:, None])[:, 0]
        assert draft.confidence is not None
        draft.confidence[ends.index, step] = confidence.numpy(force=True)
        draft.tokens[ends.index, step] = self._token_ids[chosen]

    def _trees(self, plan: StepPlan, ends: _Ends, draft: Draft) -> None:
        """Dynamic trees; fills the rows of ``ends`` in ``draft``."""
        assert draft.parents is not None and draft.confidence is not None
        sizes = plan.num_drafts[ends.index]
        expander = _Expander(self, plan.rows[ends.index])
        trees, confidence = grow_trees(
            expander, ends.logits, ends.outputs, ends.inputs, sizes, self._top_k, self.depth
        )
        width = trees.tokens.shape[1]
        draft.num_drafted[ends.index] = trees.counts
        draft.tokens[ends.index, :width] = trees.tokens
        draft.parents[ends.index, :width] = trees.parents
        draft.confidence[ends.index, :width] = confidence

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Keep the hidden states of the tokens that the target computed and that stay."""
        assert verified.hidden is not None
        rows = plan.rows
        self._owner[rows[outcome.finished]] = -1
        self._pending.drop(rows[outcome.finished])
        kept = np.where(outcome.finished, 0, plan.num_new + outcome.num_accepted)
        index, place = np.repeat(np.arange(rows.size), kept), ragged_arange(kept)
        source = verified.query_start[index] + place
        drafted = np.flatnonzero(place >= plan.num_new[index])
        nodes = verified.path[index[drafted], place[drafted] - plan.num_new[index[drafted]]]
        source[drafted] = verified.query_start[index[drafted]] + plan.num_new[index[drafted]] + nodes
        hidden = verified.hidden[:, self._put(source)]
        self._pending.add(rows[index], plan.context[index] + place, hidden)
        self._mark_filled(rows)

    def _mark_filled(self, rows: LongArray) -> None:
        """Count the entries in the blocks that ``rows`` hold."""
        table, size = self._host.table, self._host.block_size
        columns = np.arange(int(table.num_blocks[rows].max(initial=0)))
        held = columns < table.num_blocks[rows][:, None]
        entries = np.clip(self._computed[rows][:, None] - columns * size, 0, size)
        self._filled[table.block_table[rows][:, columns][held]] = entries[held]

    def _input(
        self, rows: LongArray, start: IntArray, counts: IntArray, logits: IntArray, **tree: Any
    ) -> StepInput:
        host = self._host
        return StepInput(
            host.state, host.table.block_table, host.block_size, rows, start, counts, logits, **tree
        )

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._host.target.device)


@dataclass(frozen=True, slots=True)
class _Expander:
    """What trees need of their drafter: see ``eagle_tree.Expander``; ``rows`` int64 [B] are the table's."""

    drafter: EagleDrafter
    rows: LongArray

    def top(self, logits: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        places, log_probs = self.drafter._runner.top(logits, self.drafter._top_k)
        return self.drafter._token_ids[places], log_probs

    def child_inputs(self, tokens: NDArray[np.int64], outputs: Tensor) -> Tensor:
        return self.drafter._runner.own_inputs(tokens, outputs)

    def run(self, tree_pass: TreePass) -> tuple[Tensor, Tensor]:
        drafter, rows = self.drafter, self.rows[tree_pass.rows]
        batch = drafter._input(
            rows,
            drafter._host.state.num_known[rows] - 1,
            tree_pass.counts,
            tree_pass.logit_counts,
            depths=tree_pass.depths,
            tree_mask=tree_pass.tree_mask,
        )
        return drafter._runner.forward(tree_pass.inputs, batch)
