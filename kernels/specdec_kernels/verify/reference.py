"""Verification of a batch of draft chains or trees, row by row in float64.

A row's *entries* are its last known token, the root (entry 0), and its drafted tokens, the nodes (node i is entry
i + 1). Nodes are numbered so that parents come before their children, siblings in the order in which they were drawn.

The rules, each of which leaves the law of the output equal to the target's:

* greedy: accept while a child is the target's argmax.
* token (Leviathan et al., arXiv 2211.17192, algorithm 1) and, for trees, recursive (SpecInfer, arXiv 2305.09781;
  Sequoia, arXiv 2402.12374): children in order, x accepted with min(1, target[x] / draft[x]); at its rejection
  target ← norm((target − draft)⁺), draft[x] ← 0, renormalised.
* one_hot (EAGLE, arXiv 2401.15077): x accepted with target[x]; at its rejection target[x] ← 0, renormalised.
* block (Sun et al., arXiv 2403.10444) and, for trees, traversal (Weng et al., arXiv 2505.12398): nodes in post-order,
  each accepted with all its ancestors with probability P; at its rejection, at its parent v,
  Z = Σ (P_v · target − draft)⁺ is the new law's mass and P_v ← Z / (Z + 1 − P_v), the root's staying 1.

Legend: R rows, K most drafts of a row, N entries of all rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHAIN_RULES = ("token", "block")
TREE_RULES = ("recursive", "one_hot", "traversal")

Outcome = tuple[Tensor, Tensor, Tensor]
"""num_accepted int32 [R], path int64 [R, K], next_token int64 [R]."""


def verify(
    rule: str,
    tokens: Tensor,
    parents: Tensor | None,
    num_drafted: Tensor,
    logit_start: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    draft_start: Tensor | None,
    accept_uniforms: Tensor,
    residual_uniforms: Tensor,
) -> Outcome:
    """Accept a path of each row's drafts and draw the token that follows it.

    Args:
        rule: "token" or "block" for chains, "recursive", "one_hot" or "traversal" for trees (and chains).
        tokens: int64 [R, K]; those past ``num_drafted`` are not read.
        parents: int32 [R, K], each node's parent among the row's nodes, −1 for the root; None for chains.
        num_drafted: int32 [R] in [0, K]. A row without drafts samples plainly.
        logit_start: int64 [R], place of the row's root in ``target_probs``, −1 for a row that emits nothing.
        target_probs: float32 [N, V], the law after each entry of a row, as sampled from.
        draft_probs: float32 [M, V], what the children of each entry were drawn from before any sibling was removed;
            entries without children are not read. None for deterministic drafts; "one_hot" ignores it.
        draft_start: int64 [R], place of the row's root in ``draft_probs``.
        accept_uniforms: float64 [R, K] in [0, 1), one for each node.
        residual_uniforms: float64 [R] in [0, 1), for the next token.

    Returns:
        num_accepted int32 [R]; path int64 [R, K], the accepted nodes from the root down and 0 behind them; next_token
        int64 [R], −1 for a row that emits nothing or whose input is of no use: NaN or nothing but zeros in a law that
        was needed, a draft outside the vocabulary, or one that ``draft_probs`` gives probability 0.

    Raises:
        ValueError: an unknown rule, or one that does not fit ``parents`` or ``draft_probs``.
    """
    uses_draft_probs = check_rule(rule, parents, draft_probs, draft_start)
    accepted, path, next_token = empty_outcome(tokens)
    path.zero_()
    for row, count in enumerate(num_drafted.tolist()):
        target_rows = _entries(target_probs, logit_start, row, count)
        draft_rows = _entries(draft_probs, draft_start, row, count) if uses_draft_probs else None
        nodes: list[int] = []
        token = -1
        if target_rows is not None:
            above = range(-1, count - 1) if parents is None else parents[row, :count].tolist()
            drafts = _Drafts(tokens[row, :count].tolist(), list(above), target_rows, draft_rows)
            try:
                laws = _decide(rule, drafts, accept_uniforms[row, :count].tolist())
                token = _inverse_cdf(laws.weights(), float(residual_uniforms[row]))
                nodes = drafts.path(laws.node)
            except _UnusableError:
                pass
        accepted[row] = len(nodes)
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int64)
        next_token[row] = token
    return accepted, path, next_token


def verify_greedy(
    tokens: Tensor, parents: Tensor | None, num_drafted: Tensor, logit_start: Tensor, logits: Tensor
) -> Outcome:
    """:func:`verify` at temperature 0: what the target's argmax alone would give; the first of equal logits counts.

    Args:
        logits: [N, V], laid out as ``target_probs``. A row that needs logits with NaN gets the next token −1.
    """
    accepted, path, next_token = empty_outcome(tokens)
    path.zero_()
    for row, count in enumerate(num_drafted.tolist()):
        above = list(range(-1, count - 1)) if parents is None else parents[row, :count].tolist()
        names, node, start, nodes = tokens[row, :count].tolist(), -1, int(logit_start[row]), []
        token = -1 if start < 0 else _argmax(logits[start])
        while True:
            children = [i for i in range(count) if above[i] == node and names[i] == token and token >= 0]
            if not children:
                break
            node = children[0]
            nodes.append(node)
            token = _argmax(logits[start + node + 1])
        accepted[row] = len(nodes)
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int64)
        next_token[row] = token
    return accepted, path, next_token


def check_rule(
    rule: str, parents: Tensor | None, draft_probs: Tensor | None, draft_start: Tensor | None
) -> bool:
    """Whether ``rule`` reads ``draft_probs``; :func:`verify` says what it raises."""
    if rule not in (*CHAIN_RULES, *TREE_RULES):
        raise ValueError(f"verification rule {rule!r} is unknown: use one of {(*CHAIN_RULES, *TREE_RULES)}")
    if rule in CHAIN_RULES and parents is not None:
        raise ValueError(
            f"rule {rule!r} verifies chains: use 'recursive', 'traversal' or 'one_hot' for trees"
        )
    if rule in ("recursive", "traversal") and draft_probs is None:
        raise ValueError(f"rule {rule!r} needs draft_probs: use 'one_hot' for deterministic drafts")
    if (draft_probs is None) != (draft_start is None):
        raise ValueError("draft_probs and draft_start belong together: pass both or neither")
    return draft_probs is not None and rule != "one_hot"


def empty_outcome(tokens: Tensor) -> Outcome:
    num_rows = tokens.shape[0]
    accepted = torch.empty(num_rows, dtype=torch.int32, device=tokens.device)
    next_token = torch.empty(num_rows, dtype=torch.int64, device=tokens.device)
    return accepted, torch.empty_like(tokens, dtype=torch.int64), next_token


def _entries(probs: Tensor | None, starts: Tensor | None, row: int, count: int) -> Tensor | None:
    """The laws of a row's entries, float64 [at most count + 1, V]; None if the row emits nothing."""
    assert probs is not None and starts is not None
    start = int(starts[row])
    return None if start < 0 else probs[start : start + count + 1].double()


class _UnusableError(Exception):
    """A row's input is of no use."""


@dataclass(frozen=True)
class _Drafts:
    """One row's drafts with the laws after its entries, [n + 1, V] each."""

    tokens: list[int]
    parents: list[int]
    target_probs: Tensor
    draft_probs: Tensor | None

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def path(self, node: int) -> list[int]:
        return [] if node < 0 else [*self.path(self.parents[node]), node]

    def laws(self, node: int) -> _Laws:
        draft = None if self.draft_probs is None else self.draft_probs[node + 1].clone()
        return _Laws(node, self.target_probs[node + 1], draft)

    def check(self) -> None:
        for token, parent in zip(self.tokens, self.parents, strict=True):
            if not 0 <= token < self.target_probs.shape[1]:
                raise _UnusableError
            if math.isnan(self.target_probs[parent + 1, token]):
                raise _UnusableError
            if self.draft_probs is not None and not self.draft_probs[parent + 1, token] > 0:
                raise _UnusableError


class _Laws:
    """Target and draft law [V] at ``node`` while its children are rejected; both unnormalised, with their sums."""

    def __init__(self, node: int, target: Tensor, draft: Tensor | None) -> None:
        self.node = node
        self._whole, self._target, self._draft = target, target, draft
        self._target_sum, self._draft_sum = 1.0, 1.0

    def ratio(self, token: int) -> float:
        target = float(self._target[token])
        if self._draft is None:
            # Rounding can leave less than the token's own mass, or nothing to divide by.
            return float(target > 0) if self._target_sum <= target else target / self._target_sum
        return target * self._draft_sum / (float(self._draft[token]) * self._target_sum)

    def reject(self, token: int, scale: float = 1.0) -> float:
        """Drop a child; Z, with ``scale`` the P."""
        if self._draft is None:
            self._target_sum -= float(self._target[token])
            self._target = self._target.clone()
            self._target[token] = 0
            return scale * self._target_sum
        residual = (self._target * (scale * self._draft_sum / self._target_sum) - self._draft).clamp(min=0)
        residual_sum = float(residual.sum())
        if math.isnan(residual_sum):
            raise _UnusableError
        mass = residual_sum / self._draft_sum
        if residual_sum != 0:
            # Else two laws differ by rounding only, and the target stands in for a residual below the resolution.
            self._target, self._target_sum = residual, residual_sum
        self._draft[token] = 0
        self._draft_sum = float(self._draft.sum())
        return mass

    def weights(self) -> Tensor:
        """Unnormalised law [V] of the next token."""
        return self._whole if float(self._target.sum()) == 0 else self._target


def _decide(rule: str, drafts: _Drafts, uniforms: list[float]) -> _Laws:
    """The laws at the last accepted entry."""
    drafts.check()
    if rule in ("block", "traversal"):
        laws = _traverse(drafts, uniforms, -1, 1.0)
        assert laws is not None
        return laws
    laws = drafts.laws(-1)
    waiting = drafts.children(-1)
    while waiting:
        child = waiting.pop(0)
        if uniforms[child] < laws.ratio(drafts.tokens[child]):
            laws, waiting = drafts.laws(child), drafts.children(child)
        else:
            laws.reject(drafts.tokens[child])
    return laws


def _traverse(drafts: _Drafts, uniforms: list[float], node: int, ratio: float) -> _Laws | None:
    """Try the nodes below ``node`` in post-order and then itself, ``ratio`` being its P.

    The laws where one was accepted, None if all were deleted. The root is accepted in any case.
    """
    laws = drafts.laws(node)
    for child in drafts.children(node):
        token = drafts.tokens[child]
        accepted = _traverse(drafts, uniforms, child, min(ratio * laws.ratio(token), 1.0))
        if accepted is not None:
            return accepted
        mass = laws.reject(token, ratio)
        if node >= 0:
            both = mass + 1 - ratio
            ratio = 1.0 if both == 0 else mass / both
    return laws if node < 0 or uniforms[node] < ratio else None


def _inverse_cdf(weights: Tensor, uniform: float) -> int:
    """The first token whose cumulative weight exceeds ``uniform`` times the sum."""
    cumulative = weights.cumsum(0)
    total = float(cumulative[-1])
    if not 0 < total < math.inf:
        raise _UnusableError
    goal = min(uniform * total, math.nextafter(total, 0))
    return int(torch.searchsorted(cumulative, goal, right=True))


def _argmax(logits: Tensor) -> int:
    """The first largest; −1 where there is NaN."""
    if bool(logits.isnan().any()):
        return -1
    return int((logits == logits.max()).nonzero()[0])
