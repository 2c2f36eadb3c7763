"""Trees that are worth a try: the best one for measured rates and times, others of its size, and what each should give.

Free of models: all it needs is what was measured before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.tree import (
    MAX_PACKED_NODES,
    SequoiaChoice,
    Tree,
    choose_tree,
    expected_tokens,
    k_ary,
    sequoia_tree,
)

FloatArray = NDArray[np.float64]
TAKE_A_TREE = ("draft_model", "layer_skip")
CHAINS: dict[str, dict[str, Any]] = {
    "eagle": {"shape": "chain"},
    "recycling": {"num_successors": 1},
    "suffix": {"tree": False},
}
"""Drafters with trees of their own that can draft chains as well, and with which options."""
WIDTHS = (2, 3, 4)


@dataclass(frozen=True)
class BatchTimes:
    """Seconds of a step at one batch.

    Attributes:
        batch: requests at once.
        verify_s: float64 [128], of a step of the target with 0, 1, … nodes for each request, host included.
        draft_s: float64 [D + 1], of drafting so many levels for all requests.
    """

    batch: int
    verify_s: FloatArray
    draft_s: FloatArray


def times_at(times: Mapping[str, Any], batch: int, context: float, max_depth: int) -> BatchTimes:
    """Step times at ``batch``, from measured ones as the goodput controller takes them.

    Args:
        times: ``step_tokens``, ``step_s``, ``context_token_s``, ``verify_context_token_s``, ``overhead_s``,
            ``overhead_row_s``, ``draft_step_s``, ``draft_token_s`` (counted with the nodes, as verification is) and
            ``draft_row_s``.
        context: mean tokens of a request whose KV a step reads.
        max_depth: D.
    """
    nodes = np.arange(MAX_PACKED_NODES + 1.0)
    tokens = batch * (nodes + 1.0)
    known, seconds = np.array(times["step_tokens"], np.float64), np.array(times["step_s"], np.float64)
    slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
    verify_s = np.interp(tokens, known, seconds) + slope * np.maximum(tokens - known[-1], 0.0)
    fixed_s = times["overhead_s"] + batch * (times["overhead_row_s"] + context * times["context_token_s"])
    verify_s += batch * nodes * (times["draft_token_s"] + context * times["verify_context_token_s"])
    levels = np.arange(max_depth + 1)
    draft_s = times["draft_step_s"] * levels + times["draft_row_s"] * batch * (levels > 0)
    return BatchTimes(batch, verify_s + fixed_s, draft_s)


@dataclass(frozen=True)
class Candidate:
    """One way to draft.

    Attributes:
        label: unique among those of a batch.
        kind: "sequoia", "own", "chain", "k-ary" or "goodput".
        drafter, speculation: as ``LLM.configure`` takes them.
        nodes, depth: of the tree, at most.
        tau: predicted tokens per step; ``None`` where the tree changes from step to step.
        speedup: predicted, over plain decoding.
        is_chosen: whether measured rates and times say that it is the best tree.
    """

    label: str
    kind: str
    drafter: Mapping[str, Any]
    speculation: Mapping[str, Any]
    nodes: int
    depth: int
    tau: float | None
    speedup: float | None
    is_chosen: bool = False


def choose(rates: FloatArray, times: BatchTimes, max_size: int) -> SequoiaChoice:
    """The tree of at most ``max_size`` nodes, no deeper than ``rates`` [D, B], with the least time per token."""
    return choose_tree(rates, times.draft_s, times.verify_s, max_size, len(rates))


def predicted_speedup(tree_tokens: float, nodes: int, depth: int, times: BatchTimes) -> float:
    """Over plain decoding at the same batch."""
    return float(tree_tokens * times.verify_s[0] / (times.verify_s[nodes] + times.draft_s[depth]))


def candidates(
    drafter: Mapping[str, Any],
    rates: FloatArray,
    rank_rates: Sequence[float],
    times: BatchTimes,
    measured: Mapping[str, Any],
    max_size: int,
    sizes: Sequence[int],
) -> tuple[SequoiaChoice, list[Candidate]]:
    """What is chosen for the batch, and all that is tried: the chosen tree first.

    Where plain decoding is chosen, the others are made as large as the smallest of ``sizes``.

    Args:
        drafter: options of the drafter, whose tree is left out.
        rates: float64 [D, B], by depth of the parent and rank.
        rank_rates: those of all depths, for the goodput controller.
        times: of the batch.
        measured: the times that the goodput controller decides by.
        max_size: of the chosen tree.
        sizes: nodes of further ones.
    """
    choice = choose(rates, times, max_size)
    takes_tree, max_depth = drafter["name"] in TAKE_A_TREE, len(rates)
    reference = sequoia_tree(rates, choice.size or min(sizes), choice.depth or max_depth)
    base = {key: value for key, value in drafter.items() if key != "tree"}
    made: dict[Tree, Candidate] = {}

    def add(kind: str, label: str, tree: Tree, options: Mapping[str, Any], is_chosen: bool = False) -> None:
        if tree in made or len(tree) == 0:
            return
        tau = expected_tokens(tree, rates)
        speedup = predicted_speedup(tau, len(tree), tree.max_depth, times)
        fixed = {"name": "fixed", "max_drafts": len(tree)}
        spec = {**base, **options}
        made[tree] = Candidate(label, kind, spec, fixed, len(tree), tree.max_depth, tau, speedup, is_chosen)

    def best(size: int, depth: int, is_chosen: bool = False) -> None:
        """A drafter's own tree has the best shape by its own estimates, so the same forecast."""
        tree = sequoia_tree(rates, size, depth)
        options = {"tree": spec_of(rates, size, depth)} if takes_tree else {}
        kind = "sequoia" if takes_tree else "own"
        suffix = f", depth {tree.max_depth}" if takes_tree else ""
        add(kind, f"{kind} {len(tree)}{suffix}", tree, options, is_chosen)

    if choice.size:
        best(choice.size, choice.depth, is_chosen=True)
    for size in sizes:
        best(size, max_depth)
    chain, depth = Tree.chain(reference.max_depth), reference.max_depth
    if takes_tree:
        add("chain", f"chain {depth}", chain, {})
        branching = near_k_ary(len(reference), max_depth)
        options = {"tree": {"name": "k_ary", "branching": branching}}
        add("k-ary", f"k-ary {'·'.join(map(str, branching))}", k_ary(branching), options)
    elif drafter["name"] in CHAINS:
        add("chain", f"chain {depth}", chain, CHAINS[drafter["name"]])
    tree = {"tree": spec_of(rates, len(reference), reference.max_depth)} if takes_tree else {}
    nodes = len(reference) if takes_tree else max(len(reference), *sizes)
    goodput = {"name": "goodput", "max_drafts": nodes, "rank_rates": list(rank_rates), **measured}
    controlled = Candidate(
        "goodput", "goodput", {**base, **tree}, goodput, nodes, reference.max_depth, None, None
    )
    return choice, [*made.values(), controlled]


def spec_of(rates: FloatArray, size: int, depth: int) -> dict[str, Any]:
    """The Sequoia tree as ``specdec.tree.make_tree`` takes it."""
    return {"name": "sequoia", "rates": rates[:depth].tolist(), "size": size, "max_depth": depth}


def near_k_ary(size: int, max_depth: int) -> list[int]:
    """Branching of the k-ary tree, of one of ``WIDTHS``, whose number of nodes is nearest to ``size``."""
    shapes = [[width] * depth for width in WIDTHS for depth in range(1, max_depth + 1)]
    counts = [sum(shape[0] ** level for level in range(1, len(shape) + 1)) for shape in shapes]
    fitting = [place for place, count in enumerate(counts) if count <= MAX_PACKED_NODES]
    return shapes[min(fitting, key=lambda place: abs(counts[place] - size))]
