"""Kernels that decide which drafts of a row are accepted, one program a row. ``laws`` explains links and steps.

Thresholds are float64 numbers, as in the host's rules; only masses over the vocabulary are summed in float32. So the
decisions of "token" and "one_hot", which need no mass, are the host's bit for bit.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# Inside kernels everything is a tensor or a constant of Triton's, which its own annotations do not show.

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.verify.laws import NO_MASS, entry_of, reject


@triton.jit(do_not_specialize=["num_entries"])
def prepare(
    tokens_ptr,
    parents_ptr,
    num_drafted_ptr,
    logit_start_ptr,
    draft_start_ptr,
    target_ptr,
    draft_ptr,
    links_ptr,
    odds_ptr,
    usable_ptr,
    num_columns,
    num_entries,
    ENTRIES: tl.constexpr,
    IS_CHAIN: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
):
    """A row's links, its odds float32 [2, E] (both laws at each entry's token), and whether its input is of use."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    start = tl.load(logit_start_ptr + row)
    count = tl.where(start >= 0, tl.load(num_drafted_ptr + row), 0)
    drafted = (entry > 0) & (entry <= count)
    tokens_ptr += row * (num_entries - 1)
    parents_ptr += row * (num_entries - 1)
    token = tl.load(tokens_ptr + entry - 1, mask=drafted, other=0)
    parent = entry - 1
    if not IS_CHAIN:
        parent = tl.load(parents_ptr + entry - 1, mask=drafted, other=-1).to(tl.int32) + 1
    known = drafted & (token >= 0) & (token < num_columns) & (parent >= 0) & (parent < entry)
    target = tl.load(target_ptr + (start + parent) * num_columns + token, mask=known, other=0.0)
    good = known & (target >= 0.0)
    draft = tl.full([ENTRIES], 1.0, tl.float32)
    if HAS_DRAFT:
        draft_start = tl.load(draft_start_ptr + row)
        draft = tl.load(draft_ptr + (draft_start + parent) * num_columns + token, mask=known, other=1.0)
        good = good & (draft > 0.0)
    bad = tl.sum((drafted & ~good).to(tl.int32), axis=0)
    tl.store(usable_ptr + row, ((start >= 0) & (bad == 0)).to(tl.int32))

    first = tl.where(entry < count, entry + 1, 0)
    following = tl.zeros([ENTRIES], tl.int32)
    if not IS_CHAIN:
        first = tl.zeros([ENTRIES], tl.int32)
        for place in range(count):
            other = count - place  # from the last to the first, so that the first one is what stays
            above = tl.load(parents_ptr + other - 1).to(tl.int32) + 1
            following = tl.where((parent == above) & (entry < other), other, following)
            first = tl.where(entry == above, other, first)
    inside = entry < num_entries
    links_ptr += row * 3 * num_entries
    tl.store(links_ptr + entry, first, mask=inside)
    tl.store(links_ptr + num_entries + entry, following, mask=inside)
    tl.store(links_ptr + 2 * num_entries + entry, parent, mask=inside)
    odds_ptr += row * 2 * num_entries
    tl.store(odds_ptr + entry, target, mask=inside)
    tl.store(odds_ptr + num_entries + entry, draft, mask=inside)


@triton.jit(do_not_specialize=["num_entries"])
def walk(
    tokens_ptr,
    logit_start_ptr,
    draft_start_ptr,
    target_ptr,
    draft_ptr,
    uniforms_ptr,
    links_ptr,
    odds_ptr,
    usable_ptr,
    steps_ptr,
    last_ptr,
    accepted_ptr,
    path_ptr,
    num_columns,
    num_entries,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
):
    """From the root down: recursive rejection sampling, or with one-hot drafts. ``last`` is −1 for a useless row."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    inside = entry < num_entries
    tokens_ptr += row * (num_entries - 1)
    uniforms_ptr += row * (num_entries - 1)
    links_ptr += row * 3 * num_entries
    steps_ptr += row * 3 * num_entries
    odds_ptr += row * 2 * num_entries
    parent = tl.load(links_ptr + 2 * num_entries + entry, mask=inside, other=-1)
    target_at = tl.load(odds_ptr + entry, mask=inside, other=0.0).to(tl.float64)
    draft_at = tl.load(odds_ptr + num_entries + entry, mask=inside, other=1.0).to(tl.float64)
    usable = tl.load(usable_ptr + row) != 0
    one = tl.full([], 1.0, tl.float64)
    target_sum = one
    draft_sum = one
    node = tl.full([], 0, tl.int32)
    num_accepted = tl.full([], 0, tl.int32)
    path = tl.zeros([ENTRIES], tl.int32)
    child = tl.where(usable, tl.load(links_ptr), 0)
    while child > 0:
        target = entry_of(target_at, entry, child)
        if HAS_DRAFT:
            ratio = target * draft_sum / (entry_of(draft_at, entry, child) * target_sum)
        else:
            # Rounding can leave less than the token's own mass, or nothing to divide by.
            none_left = target_sum <= target
            ratio = tl.where(
                none_left, tl.where(target > 0.0, one, 0.0), target / tl.where(none_left, one, target_sum)
            )
        if tl.load(uniforms_ptr + child - 1).to(tl.float64) < ratio:
            path = tl.where(entry == num_accepted, child - 1, path)
            num_accepted += 1
            node = child
            child = tl.load(links_ptr + child)
            target_sum = one
            draft_sum = one
        else:
            following = tl.load(links_ptr + num_entries + child)
            if HAS_DRAFT:
                scale = draft_sum / target_sum
                mass, rest = reject(
                    target_ptr + (tl.load(logit_start_ptr + row) + node) * num_columns,
                    draft_ptr + (tl.load(draft_start_ptr + row) + node) * num_columns,
                    tokens_ptr,
                    links_ptr,
                    steps_ptr,
                    tl.load(links_ptr + node),
                    child,
                    scale,
                    following > 0,
                    num_columns,
                    num_entries,
                    BLOCK,
                )
                draft_sum = rest
                if not (mass < NO_MASS):
                    target_sum = mass
                    left = target_at * scale - draft_at
                    target_at = tl.where(parent == node, tl.where(left < 0.0, 0.0, left), target_at)
            else:
                target_sum -= target
            child = following
    tl.store(last_ptr + row, tl.where(usable, node, -1))
    tl.store(accepted_ptr + row, num_accepted)
    tl.store(path_ptr + row * (num_entries - 1) + entry, path.to(tl.int64), mask=entry < num_entries - 1)


@triton.jit(do_not_specialize=["num_entries"])
def traverse(
    tokens_ptr,
    logit_start_ptr,
    draft_start_ptr,
    target_ptr,
    draft_ptr,
    uniforms_ptr,
    links_ptr,
    odds_ptr,
    usable_ptr,
    steps_ptr,
    last_ptr,
    accepted_ptr,
    path_ptr,
    num_columns,
    num_entries,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
):
    """From the leaves up: traversal verification, on chains block verification; one-hot drafts on chains only."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    inside = entry < num_entries
    tokens_ptr += row * (num_entries - 1)
    uniforms_ptr += row * (num_entries - 1)
    links_ptr += row * 3 * num_entries
    steps_ptr += row * 3 * num_entries
    odds_ptr += row * 2 * num_entries
    parent = tl.load(links_ptr + 2 * num_entries + entry, mask=inside, other=-1)
    target_at = tl.load(odds_ptr + entry, mask=inside, other=0.0).to(tl.float64)
    draft_at = tl.load(odds_ptr + num_entries + entry, mask=inside, other=1.0).to(tl.float64)
    usable = tl.load(usable_ptr + row) != 0
    one = tl.full([], 1.0, tl.float64)
    none = tl.full([], 0, tl.int32)
    ratios = tl.full([ENTRIES], 1.0, tl.float64)  # P of the entries on the way to the present one
    target_sums = tl.full([ENTRIES], 1.0, tl.float64)
    draft_sums = tl.full([ENTRIES], 1.0, tl.float64)
    node = none
    child = tl.load(links_ptr)
    searching = usable
    while searching:
        lost = none
        if child > 0:
            odds = entry_of(target_at, entry, child) / entry_of(draft_at, entry, child)
            if HAS_DRAFT:
                odds *= entry_of(draft_sums, entry, node) / entry_of(target_sums, entry, node)
            ratio = entry_of(ratios, entry, node) * odds
            if ratio > 0.0:
                ratios = tl.where(entry == child, tl.where(ratio > 1.0, one, ratio), ratios)
                node = child
                child = tl.load(links_ptr + child)
            else:
                lost = child  # with all below it
        else:
            uniform = tl.load(uniforms_ptr + node - 1, mask=node > 0, other=0.0).to(tl.float64)
            if (node == 0) | (uniform < entry_of(ratios, entry, node)):
                searching = node < 0
            else:
                lost = node
                node = tl.load(links_ptr + 2 * num_entries + node)
        if lost > 0:
            child = tl.load(links_ptr + num_entries + lost)
            ratio = entry_of(ratios, entry, node)
            uniform = tl.load(uniforms_ptr + node - 1, mask=node > 0, other=0.0).to(tl.float64)
            if (node > 0) & (child == 0) & (uniform >= ratio):
                ratios = tl.where(entry == node, 0.0, ratios)  # P only falls, so the mass is not needed
            elif HAS_DRAFT:
                draft_sum = entry_of(draft_sums, entry, node)
                scale = ratio * draft_sum / entry_of(target_sums, entry, node)
                mass, rest = reject(
                    target_ptr + (tl.load(logit_start_ptr + row) + node) * num_columns,
                    draft_ptr + (tl.load(draft_start_ptr + row) + node) * num_columns,
                    tokens_ptr,
                    links_ptr,
                    steps_ptr,
                    tl.load(links_ptr + node),
                    lost,
                    scale,
                    (node > 0) | (child > 0),
                    num_columns,
                    num_entries,
                    BLOCK,
                )
                usable = usable & (mass == mass)
                draft_sums = tl.where(entry == node, rest, draft_sums)
                if node > 0:
                    ratios = tl.where(entry == node, next_ratio(mass / draft_sum, ratio), ratios)
                if not (mass < NO_MASS):
                    target_sums = tl.where(entry == node, mass, target_sums)
                    left = target_at * scale - draft_at
                    target_at = tl.where(parent == node, tl.where(left < 0.0, 0.0, left), target_at)
            else:
                mass = ratio * (1.0 - entry_of(target_at, entry, lost))
                if node > 0:
                    ratios = tl.where(entry == node, next_ratio(mass, ratio), ratios)
    depth = none
    above = node
    while above > 0:
        depth += 1
        above = tl.load(links_ptr + 2 * num_entries + above)
    path = tl.zeros([ENTRIES], tl.int32)
    above = node
    place = depth
    while above > 0:
        place -= 1
        path = tl.where(entry == place, above - 1, path)
        above = tl.load(links_ptr + 2 * num_entries + above)
    tl.store(last_ptr + row, tl.where(usable, node, -1))
    tl.store(accepted_ptr + row, tl.where(usable, depth, 0))
    tl.store(path_ptr + row * (num_entries - 1) + entry, path.to(tl.int64), mask=entry < num_entries - 1)


@triton.jit
def next_ratio(mass, ratio):
    """Z / (Z + 1 − P) with 0/0 = 1: laws that agree below the resolution."""
    both = mass + 1.0 - ratio
    settled = both == 0.0
    return tl.where(settled, 1.0, mass / tl.where(settled, 1.0, both))
