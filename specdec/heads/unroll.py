"""An EAGLE head over whole sequences, as it is trained: every entry at once, then chains from some of them.

Drafting feeds the head its own outputs. Trained on the target's features alone it does badly there, so EAGLE-3 unrolls
it during training, "training-time test" (arXiv 2503.01840, section 3.2). Doing so from every entry costs a pass each
time; here only *anchors*, a sample of the entries, grow chains. The expected gradient is the same.

Sequences of a batch are packed: their tokens stand one after another, nothing is padded, and only attention looks at
one sequence at a time. Legend: T tokens of all sequences, N entries with outputs, A anchors in rising order, J chain
steps, H hidden size, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.heads.borrowed import Borrowed
from specdec.heads.eagle import EagleHead


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences one after another.

    Attributes:
        tokens: int64 [T].
        lengths: tokens of each sequence.
        positions: int64 [T], places in their sequences.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    positions: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> Packed:
        lengths = tuple(sequence.numel() for sequence in sequences)
        return cls(torch.cat(list(sequences)), lengths, torch.cat([torch.arange(n) for n in lengths]))

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each sequence begins and ends within T."""
        return pairwise((0, *accumulate(self.lengths)))


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of a head: outputs g [N, H] of some of them, rotated keys and values [T, kv_heads, D] of all."""

    outputs: Tensor
    k: Tensor
    v: Tensor


def forward(
    head: EagleHead,
    borrowed: Borrowed,
    packed: Packed,
    hidden: Tensor,
    rows: Tensor,
    known: Tensor | None = None,
) -> Entries:
    """Every entry p with the target's feature f_(p−1).

    Args:
        hidden: float [L, T, H], the target's outputs at each token.
        rows: int64 [N], the entries whose outputs are wanted, among T; of the others, prompts mostly, more than half
            of the work is not done.
        known: bool [T], whether entry p has its feature; first entries never have. ``None``: all others have.
    """
    shifted = torch.roll(head.features(hidden), 1, dims=0)
    known = packed.positions > 0 if known is None else known & (packed.positions > 0)
    features = torch.where(known[:, None], shifted, head.unknown)
    x = head.inputs(borrowed.embedding(packed.tokens), features)
    q, k, v = head.project(x, packed.positions)
    attended = torch.cat([causal_attention(q[a:b], k[a:b], v[a:b]) for a, b in packed.spans])
    return Entries(head.finish(x[rows], attended[rows]), k, v)


def chains(
    head: EagleHead,
    borrowed: Borrowed,
    packed: Packed,
    entries: Entries,
    anchors: Tensor,
    output: Tensor,
    num_steps: int,
) -> Iterator[Tensor]:
    """Outputs g [A, H] of the entries 1, 2, …, ``num_steps`` after each anchor, fed with the head's own outputs.

    Args:
        anchors: int64 [A], indices into T; the sequence must have ``num_steps`` tokens behind each.
        output: [A, H], the anchors' own outputs.
    """
    own_k: list[Tensor] = []
    own_v: list[Tensor] = []
    for step in range(1, num_steps + 1):
        at = anchors + step
        x = head.inputs(borrowed.embedding(packed.tokens[at]), head.own_features(output))
        q, k, v = head.project(x, packed.positions[at])
        own_k.append(k)
        own_v.append(v)
        with torch.autocast(q.device.type, enabled=False):
            attended = _chain_attention(packed, entries, anchors, q, own_k, own_v)
        output = head.finish(x, attended)
        yield output


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence: q [n, heads, D], k and v [n, kv_heads, D] to [n, heads, D]."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _chain_attention(
    packed: Packed, entries: Entries, anchors: Tensor, q: Tensor, own_k: list[Tensor], own_v: list[Tensor]
) -> Tensor:
    """Attention of q [A, heads, D] over the entries up to its anchor and the chain's own, of which it is the last.

    In float32: these products are small, no two have the same shape, and bfloat16 would compile kernels for each.
    """
    dtype, q = q.dtype, q.float()
    k_AJ, v_AJ = torch.stack(own_k, dim=1).float(), torch.stack(own_v, dim=1).float()
    k_T, v_T = entries.k.float(), entries.v.float()
    num_kv_heads = k_AJ.shape[2]
    q = q.unflatten(1, (num_kv_heads, -1))
    ends = torch.searchsorted(anchors.contiguous(), torch.tensor([b for _, b in packed.spans])).tolist()
    outs: list[Tensor] = []
    for (a, b), (first, last) in zip(packed.spans, pairwise([0, *ends]), strict=True):
        if first == last:
            continue
        # Chains need not look further than the last anchor.
        b = min(b, int(anchors[last - 1]) + 1)
        visible = torch.arange(a, b) <= anchors[first:last, None]
        queries = q[first:last] * q.shape[-1] ** -0.5
        before = torch.einsum("akgd,tkd->akgt", queries, k_T[a:b])
        before = before.masked_fill(~visible[:, None, None], -torch.inf)
        own = torch.einsum("akgd,ajkd->akgj", queries, k_AJ[first:last])
        probs = torch.cat([before, own], dim=-1).softmax(-1)
        before, own = probs.split([b - a, len(own_k)], dim=-1)
        out = torch.einsum("akgt,tkd->akgd", before, v_T[a:b])
        outs.append(out + torch.einsum("akgj,ajkd->akgd", own, v_AJ[first:last]))
    return torch.cat(outs).flatten(1, 2).to(dtype)
