"""``compact_kv``: every slot of every layer afterwards, bit for bit."""

# pyright: reportCallIssue=false
# Arguments are spread from tuples whose lengths the type checker does not know.

from __future__ import annotations

import pytest
import torch
from specdec_kernels.compact_kv.reference import compact_kv as reference

from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.broken import broken

from specdec_kernels.compact_kv import triton as op  # isort: skip

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
LAYOUTS = (  # leading dimensions, H, D
    ((2, 2), 3, 64),
    ((), 1, 8),
    ((1, 2), 5, 3),
    ((3,), 2, 20),
    ((1, 2), 8, 80),
)
NUM_BLOCKS, BLOCK_SIZE = 24, 16
# Accepted paths: indices into a row's draft tree, which are moved to 0, 1, 2 and so on.
PATHS = ((1, 2, 5), (), (3,), tuple(range(1, 20)), (0, 1, 4, 7, 30), tuple(range(2, 11)))


def _moves(device, seed=0):
    """Slots of rows with their own blocks in random order: sources, destinations, where each row's moves begin."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randperm(NUM_BLOCKS, generator=generator).view(len(PATHS), -1)
    sources, destinations, start = [], [], [0]
    for table, path, context in zip(tables, PATHS, (0, 3, 17, 10, 15, 31), strict=True):
        for depth, index in enumerate(path):
            if index != depth:
                for slots, place in ((sources, context + index), (destinations, context + depth)):
                    slots.append(int(table[place // BLOCK_SIZE]) * BLOCK_SIZE + place % BLOCK_SIZE)
        start.append(len(sources))
    return (
        torch.tensor(sources, device=device),
        torch.tensor(destinations, device=device),
        torch.tensor(start, dtype=torch.int32, device=device),
    )


def _bytes(*shape, seed=0):
    """Random bytes: any pattern, NaN's included, must survive."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _cache(dtype, layout, device):
    planes, num_heads, head_dim = layout
    size = head_dim * torch.empty((), dtype=dtype).element_size()
    cache = _bytes(*planes, NUM_BLOCKS, BLOCK_SIZE, num_heads, size).to(device).view(dtype)
    scales = _bytes(*planes, NUM_BLOCKS, BLOCK_SIZE, num_heads * 4, seed=1).to(device).view(torch.float32)
    return cache, scales


def _same(actual, expected):
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def _expected(tensor, sources, destinations, num_planes):
    """By plain indexing over a copy."""
    out = tensor.clone()
    before, after = (x.view(torch.uint8).view(num_planes, NUM_BLOCKS * BLOCK_SIZE, -1) for x in (tensor, out))
    after[:, destinations] = before[:, sources]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("has_starts", (False, True), ids=("one row", "rows"))
def test_every_byte_is_where_it_belongs(dtype, layout, has_starts, device):
    cache, scales = _cache(dtype, layout, device)
    sources, destinations, start = _moves(device)
    num_planes = torch.Size(layout[0]).numel()
    expected = [_expected(tensor, sources, destinations, num_planes) for tensor in (cache, scales)]
    for function in (op.compact_kv, reference):
        moved = cache.clone(), scales.clone()
        function(moved[0], sources, destinations, start if has_starts else None, moved[1])
        assert _same(moved[0], expected[0]) and _same(moved[1], expected[1])
    moved = cache.clone()
    op.compact_kv(moved, sources, destinations, start if has_starts else None)
    assert _same(moved, expected[0])


@pytest.mark.parametrize("has_starts", (False, True), ids=("one row", "rows"))
def test_padding_moves_nothing(has_starts, device):
    """A CUDA graph holds more moves and rows than a step has."""
    cache, scales = _cache(torch.bfloat16, LAYOUTS[0], device)
    sources, destinations, start = _moves(device)
    padded = [torch.nn.functional.pad(slots, (0, 7), value=-1) for slots in (sources, destinations)]
    padded[0][-3:] = 5  # one negative side is enough
    padded_start = torch.cat((start, start[-1:].expand(3), start[-1:] + 7)) if has_starts else None
    moved = [cache.clone(), scales.clone()]
    op.compact_kv(moved[0], *padded, padded_start, moved[1])
    assert _same(moved[0], _expected(cache, sources, destinations, 4))
    assert _same(moved[1], _expected(scales, sources, destinations, 4))
    moved = [cache.clone(), scales.clone()]
    reference(moved[0], *padded, padded_start, moved[1])
    assert _same(moved[0], _expected(cache, sources, destinations, 4))


def test_moves_outside_the_rows_are_not_made(device):
    cache, _ = _cache(torch.bfloat16, LAYOUTS[1], device)
    sources, destinations, start = _moves(device)
    some = slice(int(start[2]), int(start[4]))
    expected = _expected(cache, sources[some], destinations[some], 1)
    for function in (op.compact_kv, reference):
        moved = cache.clone()
        function(moved, sources, destinations, start[2:5])
        assert _same(moved, expected)


def test_nothing_to_move(device):
    cache, scales = _cache(torch.float32, LAYOUTS[0], device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    for function in (op.compact_kv, reference):
        for start in (None, torch.zeros(1, dtype=torch.int32, device=device)):
            moved = cache.clone()
            function(moved, none, none, start, scales)
            assert _same(moved, cache)


def test_a_cache_that_is_not_contiguous_is_refused(device):
    cache, _ = _cache(torch.float32, LAYOUTS[0], device)
    sources, destinations, _ = _moves(device)
    with pytest.raises(ValueError, match="contiguous"):
        op.compact_kv(cache.transpose(0, 1), sources, destinations)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("index < end", "index < num_moves - 1"),
        ("start, end, MOVES", "start, start + 1, MOVES"),
        ("first + tl.arange(0, MOVES)", "start + tl.arange(0, MOVES)"),
        ("(source >= 0) & (destination >= 0)", "source >= 0"),
        ("tl.num_programs(2) - 1", "0"),
        ("first_slot + source, first_slot + destination", "source, destination"),
        ("chunk * CHUNK + ", ""),
        ("(word < SLOT_WORDS)", "(word < CHUNK)"),
        ("tl.program_id(0) + 1", "1"),
    ],
)
def test_a_broken_copy_is_noticed(old, new, device):
    cache, scales = _cache(torch.bfloat16, ((2,), 9, 160), device)
    sources, destinations, start = _moves(device)
    expected = [_expected(tensor, sources, destinations, 2) for tensor in (cache, scales)]
    sources, destinations = (torch.cat((x, x.new_tensor((40, 41)))) for x in (sources, destinations))
    destinations[-2:] = -1
    start = torch.cat((start, start[-1:] + 2))
    # A slot on either side takes writes beyond the planes.
    room = [torch.cat((x[:1], x, x[:1])) for x in (cache, scales)]
    broken(op, old, new).compact_kv(room[0][1:-1], sources, destinations, start, room[1][1:-1])
    assert not (_same(room[0][1:-1], expected[0]) and _same(room[1][1:-1], expected[1]))
