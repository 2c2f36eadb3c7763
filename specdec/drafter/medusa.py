"""Medusa: heads guess several positions at once, and a fixed tree of their candidates is verified.

Method: arXiv 2401.10774; the heads are described in ``specdec.heads.medusa``. The tree is the paper's (section 2.3.3):
of all paths of ranks, those whose measured acceptance is highest. Drafts are deterministic whatever the temperature.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.heads.borrowed import Borrowed
from specdec.heads.files import check_target, load_head, make_medusa
from specdec.model.weights import load_model
from specdec.scheduler.plan import StepOutcome, StepPlan
from specdec.tree import Tree, static_tree


class MedusaDrafter:
    """Args:
    path: directory of trained heads.
    """

    name = "medusa"

    def __init__(self, path: str) -> None:
        self._stored = load_head(path, "medusa")
        self.captures: Sequence[int] = self._stored.layers
        ranks = self._stored.about.get("acceptance", {}).get("ranks")
        if not ranks:
            raise ValueError(
                f"{path} has no measured acceptance by rank in head.json, which its tree is made of: train the heads "
                "with python -m specdec.run +experiment=train_draft"
            )
        self.rates = np.array(ranks, np.float64)

    def bind(self, host: DraftHost) -> None:
        self._host, target = host, host.target
        check_target(self._stored, target.model)
        model = target.model if target.model.weights else load_model(target.model.source, target.dtype)
        dtype = torch.float32 if target.device.type == "cpu" else target.dtype
        self._heads = make_medusa(self._stored).to(target.device, dtype).requires_grad_(False)
        self._borrowed = Borrowed(model, self._stored.token_ids, dtype, target.device)
        self._token_ids = self._stored.token_ids.numpy()
        max_rows = host.table.max_rows
        self._hidden = torch.zeros(max_rows, target.config.hidden_size, device=target.device)
        # Whose hidden state a row of these is, and of which position.
        self._owner, self._position = np.full(max_rows, -1, np.int64), np.full(max_rows, -1, np.int64)
        self._tree = lru_cache(maxsize=None)(self._make_tree)

    def _make_tree(self, size: int) -> tuple[Tree, NDArray[np.int64]]:
        """The tree of ``size`` nodes, and each node's rank."""
        tree = static_tree(best_paths(self.rates, size))
        return tree, tree.ranks.astype(np.int64)

    @torch.inference_mode()
    def propose(self, plan: StepPlan) -> Draft:
        rows = plan.rows
        known = (self._owner[rows] == plan.request_ids) & (self._position[rows] == plan.context - 1)
        index = np.flatnonzero((plan.num_drafts > 0) & known)
        if index.size == 0:
            return Draft.none(rows.size)
        hidden = self._hidden[self._put(rows[index])].to(self._borrowed.norm_weight.dtype)
        outputs = self._heads(self._borrowed.normed(hidden).to(hidden.dtype))
        best = self._borrowed.head(outputs).topk(min(self.rates.shape[1], self._token_ids.size), dim=-1)
        candidates = self._token_ids[best.indices.numpy(force=True)]  # [K, B, R]
        width = int(plan.num_drafts[index].max())
        tokens, parents = np.zeros((rows.size, width), np.int64), np.full((rows.size, width), -1, np.int32)
        num_drafted = np.zeros(rows.size, np.int32)
        for size in np.unique(plan.num_drafts[index]).tolist():
            tree, ranks = self._tree(size)
            of_size = np.flatnonzero(plan.num_drafts[index] == size)
            chosen = candidates[tree.depths[:, None] - 1, of_size, ranks[:, None]]
            tokens[index[of_size], : len(tree)] = chosen.T
            parents[index[of_size], : len(tree)] = tree.parents
            num_drafted[index[of_size]] = len(tree)
        return Draft(tokens, num_drafted, parents=parents)

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        """Keep the hidden state of the last token that the target computed and that stays."""
        assert verified.hidden is not None
        accepted = outcome.num_accepted
        source = verified.query_start[:-1] + plan.num_new - 1
        drafted = np.flatnonzero(accepted)
        nodes = verified.path[drafted, accepted[drafted] - 1]
        source[drafted] = verified.query_start[drafted] + plan.num_new[drafted] + nodes
        self._hidden[self._put(plan.rows)] = verified.hidden[-1, self._put(source.astype(np.int64))]
        self._owner[plan.rows] = plan.request_ids
        self._position[plan.rows] = plan.context + plan.num_new - 1 + accepted

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._host.target.device)


def best_paths(rates: NDArray[np.float64], size: int) -> list[list[int]]:
    """The ``size`` paths of ranks whose product of ``rates`` is highest, fewer if there are no more.

    A rate counts at most as much as that of the rank before it, so that a sibling never comes without its elders.

    Args:
        rates: [K, R], how often the candidate of a rank is right, by draft position.
    """
    rates = np.minimum.accumulate(rates, axis=1)
    depth, num_ranks = rates.shape
    # Minus a path's product, the path, minus the product of its parent's.
    heap: list[tuple[float, tuple[int, ...], float]] = [(-float(rates[0, 0]), (0,), -1.0)]
    paths: list[list[int]] = []
    while heap and len(paths) < size:
        score, path, above = heapq.heappop(heap)
        paths.append(list(path))
        *parent, last = path
        if last + 1 < num_ranks:
            heapq.heappush(heap, (above * float(rates[len(parent), last + 1]), (*parent, last + 1), above))
        if len(path) < depth:
            heapq.heappush(heap, (score * float(rates[len(path), 0]), (*path, 0), score))
    return paths
