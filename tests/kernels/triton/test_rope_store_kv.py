"""``rope_store_kv``: queries, and every slot of the caches and their scales, against float64."""

# pyright: reportCallIssue=false
# Arguments are spread from tuples whose lengths the type checker does not know.

from __future__ import annotations

import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.rope_store_kv import reference

from tests.kernels.triton import runtime  # noqa: F401 - before any kernel
from tests.kernels.triton.broken import broken

from specdec_kernels.rope_store_kv import triton as op  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = ((4, 2, 64), (9, 3, 80), (5, 1, 96), (12, 12, 128), (3, 1, 256), (1, 1, 2), (2, 2, 6))  # G, H, D
NUM_BLOCKS, BLOCK_SIZE = 3, 16
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def _inputs(heads, dtype, device, num_tokens=5, seed=0):
    """q, k and v as slices of one tensor, positions, frequencies, slots (the third token has none), norm weights."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    parts = (num_heads, num_kv_heads, num_kv_heads)
    qkv = torch.randn(num_tokens, sum(parts), head_dim, generator=generator).to(device, dtype)
    positions = torch.randint(0, 3000, (num_tokens,), generator=generator)
    positions[:2] = torch.tensor((0, 100_003))[:num_tokens]
    inv_freq = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens]
    slots[2:3] = -1
    weights = torch.randn(2, head_dim, generator=generator).to(device, dtype)
    return qkv.split(parts, dim=1), (positions.to(device), inv_freq.to(device)), slots.to(device), weights


def _caches(heads, dtype, device):
    """Keys, values and both scales; nobody has written any."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, heads[1])
    if dtype in LARGEST:
        caches = [torch.full((*shape, heads[2]), 0x7F, dtype=torch.uint8).view(dtype) for _ in range(2)]
    else:
        caches = [torch.full((*shape, heads[2]), torch.nan, dtype=dtype) for _ in range(2)]
    scales = [torch.full(shape, torch.nan) for _ in range(2)]
    return [x.to(device) for x in (*caches, *scales)]


def _expected(heads, qkv, place, slots, options):
    """Float64 from the same inputs: q, keys [stored, H, D], values."""
    caches = _caches(heads, torch.float64, slots.device)[:2]
    options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    q = reference.rope_store_kv(*(x.double() for x in qkv), *place, *caches, slots, **options)
    return q, *(_stored(cache, slots) for cache in caches)


def _stored(tensor, slots):
    return tensor.flatten(0, 1)[slots[slots >= 0]]


def _others_are_unwritten(before, after, slots):
    is_other = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool, device=slots.device)
    is_other[slots[slots >= 0]] = False
    return all(
        torch.equal(*(x.flatten(0, 1).view(torch.uint8)[is_other] for x in pair))
        for pair in zip(before, after, strict=True)
    )


def _norms(weights, has_norm):
    return dict(q_norm=weights[0], k_norm=weights[1], norm_eps=1e-5, norm_offset=1.0) if has_norm else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("has_norm", (False, True), ids=("plain", "norms"))
def test_agrees_with_float64(heads, dtype, has_norm, device):
    qkv, place, slots, weights = _inputs(heads, dtype, device)
    options = _norms(weights, has_norm)
    caches = _caches(heads, dtype, device)[:2]
    before = [cache.clone() for cache in caches]
    out = op.rope_store_kv(*qkv, *place, *caches, slots, **options)
    assert out.dtype == dtype and out.shape == qkv[0].shape
    q, k, v = _expected(heads, qkv, place, slots, options)
    assert tolerances.op_error(out, q) < tolerances.OPS[dtype]
    assert tolerances.op_error(_stored(caches[0], slots), k) < tolerances.OPS[dtype]
    assert torch.equal(_stored(caches[1], slots).double(), v)
    assert _others_are_unwritten(before, caches, slots)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("cache_dtype", LARGEST, ids=str)
@pytest.mark.parametrize("heads", HEADS[1:6], ids=str)
def test_quantised_caches(heads, cache_dtype, dtype, device):
    qkv, place, slots, weights = _inputs(heads, dtype, device)
    caches = _caches(heads, cache_dtype, device)
    before = [cache.clone() for cache in caches]
    options = _norms(weights, True)
    op.rope_store_kv(*qkv, *place, *caches[:2], slots, k_scale=caches[2], v_scale=caches[3], **options)
    assert _others_are_unwritten(before, caches, slots)
    for cache, scale, expected in zip(
        caches[:2], caches[2:], _expected(heads, qkv, place, slots, options)[1:], strict=True
    ):
        scales, codes = _stored(scale, slots)[..., None].double(), _stored(cache, slots).double()
        peaks = expected.abs().amax(-1, keepdim=True)
        assert tolerances.op_error(scales, peaks / LARGEST[cache_dtype]) < tolerances.OPS[dtype]
        # Half a step of the codes, and what the number itself may be off by.
        step = 1.0 if cache_dtype == torch.int8 else (codes.abs() / 8).clamp(min=2**-9)
        allowed = 0.51 * step * scales + tolerances.OPS[dtype] * (expected.std() + expected.abs())
        assert ((codes * scales - expected).abs() <= allowed).all()


@pytest.mark.parametrize("cache_dtype", LARGEST, ids=str)
def test_codes_are_those_of_the_reference(cache_dtype, device):
    """With inputs in float32 both see the same numbers, but for the last bit of a scale."""
    heads = (2, 3, 64)
    qkv, place, slots, _ = _inputs(heads, torch.float32, device, num_tokens=12)
    both = []
    for function in (op.rope_store_kv, reference.rope_store_kv):
        caches = _caches(heads, cache_dtype, device)
        function(*qkv, *place, *caches[:2], slots, k_scale=caches[2], v_scale=caches[3])
        both.append([_stored(cache, slots) for cache in caches])
    for index in (0, 1):
        differs = both[0][index].view(torch.uint8) != both[1][index].view(torch.uint8)
        assert differs.sum() <= 2  # of 2112
        assert torch.allclose(both[0][2 + index], both[1][2 + index], rtol=1e-6)


def _every_rounding(cache_dtype):
    """Numbers of both signs that are codes, lie half-way between two, or just beside that; [n]."""
    codes = torch.arange(128, dtype=torch.uint8).view(cache_dtype).float()
    codes = codes[codes.isfinite()]
    middles = (codes[1:] + codes[:-1]) / 2
    beside = [middles.nextafter(torch.full_like(middles, end)) for end in (0.0, torch.inf)]
    numbers = torch.cat((codes, middles, *beside))
    return torch.cat((numbers, -numbers))


@pytest.mark.parametrize("cache_dtype", LARGEST, ids=str)
def test_every_code_rounds_to_nearest_and_ties_to_even(cache_dtype, device):
    numbers, largest = _every_rounding(cache_dtype), LARGEST[cache_dtype]
    width = 128
    v = torch.nn.functional.pad(numbers, (0, -len(numbers) % (width - 1))).view(-1, 1, width - 1)
    v = torch.cat((v, torch.full_like(v[..., :1], largest)), dim=-1).to(device)  # so that scales are 1
    heads = (1, 1, width)
    slots = torch.arange(len(v), device=device)
    _, place, _, _ = _inputs(heads, torch.float32, device, num_tokens=len(v))
    caches = _caches(heads, cache_dtype, device)
    op.rope_store_kv(v, v, v, *place, *caches[:2], slots, k_scale=caches[2], v_scale=caches[3])
    expected = (v.round() if cache_dtype == torch.int8 else v).to(cache_dtype)
    assert (_stored(caches[3], slots) == 1).all()
    assert torch.equal(_stored(caches[1], slots).float(), expected.float())


@pytest.mark.parametrize("cache_dtype", LARGEST, ids=str)
@pytest.mark.parametrize("size", (0.0, 1e-38))
def test_vectors_of_zeros_stay_zeros(cache_dtype, size, device):
    heads = (2, 2, 64)
    (q, k, v), place, slots, _ = _inputs(heads, torch.float32, device)
    k, v = k.sign() * size, v.sign() * size
    for function in (op.rope_store_kv, reference.rope_store_kv):
        caches = _caches(heads, cache_dtype, device)
        function(q, k, v, *place, *caches[:2], slots, k_scale=caches[2], v_scale=caches[3])
        for cache, scale in zip(caches[:2], caches[2:], strict=True):
            numbers = _stored(cache, slots).float() * _stored(scale, slots)[..., None]
            assert (numbers.abs() <= size).all()


def test_no_tokens(device):
    heads = (4, 2, 64)
    qkv, place, slots, _ = _inputs(heads, torch.float32, device, num_tokens=0)
    caches = _caches(heads, torch.float32, device)[:2]
    assert op.rope_store_kv(*qkv, *place, *caches, slots).shape == (0, 4, 64)


def test_a_cache_of_another_floating_dtype(device):
    heads = (4, 2, 64)
    qkv, place, slots, _ = _inputs(heads, torch.float32, device)
    caches = _caches(heads, torch.float16, device)[:2]
    op.rope_store_kv(*qkv, *place, *caches, slots)
    _, k, v = _expected(heads, qkv, place, slots, {})
    for cache, expected in zip(caches, (k, v), strict=True):
        assert tolerances.op_error(_stored(cache, slots), expected) < tolerances.OPS[torch.float16]


@pytest.mark.parametrize("cache_dtype", LARGEST, ids=str)
def test_quantised_caches_need_scales(cache_dtype, device):
    heads = (2, 2, 64)
    qkv, place, slots, _ = _inputs(heads, torch.float32, device)
    caches = _caches(heads, cache_dtype, device)
    for function in (op.rope_store_kv, reference.rope_store_kv):
        with pytest.raises(ValueError, match="needs k_scale and v_scale"):
            function(*qkv, *place, *caches[:2], slots, k_scale=caches[2])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("second_wide * cos + first_wide * sin", "second_wide * cos - first_wide * sin"),
        ("(quadrant + 1) & 2", "quadrant & 2"),
        ("-0.0004825592041015625", "-0.000482559"),
        ("t * (1.0 / 20)", "t * (1.0 / 21)"),
        ("squares / (2 * HALF)", "squares / HALF"),
        ("weight_ptr + HALF + column", "weight_ptr + column"),
        ("other=0.0).to(tl.float32) + offset", "other=0.0).to(tl.float32)"),
        ("head, k_head_stride", "head, q_head_stride * 2"),
        ("token * v_stride", "token * k_head_stride"),
        ("slot * num_kv_heads + head", "slot * num_heads + head"),
        ("if slot >= 0:", "if slot >= -1:"),
        ("ptr + HALF, second, mask=mask", "ptr + HALF - 1, second, mask=mask"),
        ("(group - num_query_groups) * HEADS", "0 * HEADS"),
        ("k_norm_ptr, norm_eps, norm_offset, HALF", "q_norm_ptr, norm_eps, norm_offset, HALF"),
    ],
)
def test_a_broken_copy_is_noticed(old, new, device):
    heads = (10, 9, 80)
    qkv, place, slots, weights = _inputs(heads, torch.float32, device)
    options = _norms(weights, True)
    # A block on either side takes writes beyond the caches.
    room = [torch.cat((x[:1], x, x, x[:1])) for x in _caches(heads, torch.float32, device)[:2]]
    before = [x.clone() for x in room]
    out = broken(op, old, new).rope_store_kv(*qkv, *place, *(x[1:4] for x in room), slots, **options)
    expected = _expected(heads, qkv, place, slots, options)
    actual = (out, *(_stored(x[1:4], slots) for x in room))
    agrees = all(tolerances.op_error(*pair) < 2e-5 for pair in zip(actual, expected, strict=True))
    for old_room, new_room in zip(before, room, strict=True):
        new_room[1:4].flatten(0, 1)[slots[slots >= 0]] = torch.nan  # as before
        agrees &= torch.equal(old_room.isnan(), new_room.isnan())
    assert not agrees


@pytest.mark.parametrize(
    ("cache_dtype", "old", "new"),
    [
        (torch.int8, "(x + 12582912.0) - 12582912.0", "x"),
        (torch.int8, "tl.maximum(tl.abs(first), tl.abs(second))", "tl.abs(first)"),
        (torch.float8_e4m3fn, "& 1)", "& 0)"),
        (torch.float8_e4m3fn, "+ 0x7FFFF +", "+"),
        (torch.float8_e4m3fn, "size < 0x3C800000", "size < 0x3B800000"),
        (torch.float8_e4m3fn, "code | ((bits >> 24) & 0x80)", "code"),
        (torch.float8_e4m3fn, "v_scale_ptr, vector, inside", "v_scale_ptr, vector + 1, inside"),
    ],
)
def test_a_broken_quantisation_is_noticed(cache_dtype, old, new, device, monkeypatch):
    copy = broken(op, old, new)
    monkeypatch.setattr(op, "rope_store_kv", copy.rope_store_kv)
    with pytest.raises(AssertionError):
        test_every_code_rounds_to_nearest_and_ties_to_even(cache_dtype, device)
