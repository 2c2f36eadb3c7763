"""Sampling: the tokens of ``specdec.sampling``, the noise of ``specdec.random``, and the law of Gumbel draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from specdec_kernels.sample import reference

from specdec.random import Stream
from specdec.random import uniforms as host_uniforms
from specdec.sampling import process_logits, sample_from_probs
from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken

from specdec_kernels.sample import filters, philox  # isort: skip
from specdec_kernels.sample import triton as op  # isort: skip

VOCAB_SIZES = (17, 1000, 4099)
ROWS = (  # temperature, top-k, top-p, min-p
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (2.0, 0, 1.0, 0.1),
    (0.5, 40, 0.9, 0.02),
    (1.0, 3, 0.3, 0.0),
    (0.0, 3, 0.5, 0.1),
    (1e-30, 9, 0.99, 0.0),
    (0.25, 10_000, 1.0, 1.0),
    (1.5, 6, 0.7, 0.0),
)


def _logits(num_rows, vocab_size, device, seed=0):
    """Rounded to eighths, so that many tie; a few tokens are impossible."""
    generator = torch.Generator().manual_seed(seed + vocab_size)
    logits = (3 * torch.randn(num_rows, vocab_size, generator=generator) * 8).round() / 8
    logits[:, 5::7] = -torch.inf
    return logits.to(device)


def _columns(rows, device):
    temperature, top_k, top_p, min_p = (
        torch.tensor(column, device=device) for column in zip(*rows, strict=True)
    )
    return temperature, top_k, top_p, min_p


def _draw(num_rows, device, seed=0):
    return torch.rand(num_rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def _words(num_rows, device, seed=0):
    """Seeds and counters over the whole range of 64 bits."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(2**63), 2**63 - 1, (2, num_rows), generator=generator)
    return numbers.to(device)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_tokens_and_probabilities_are_those_of_the_host(vocab_size, device):
    rows = ROWS if vocab_size < 1000 else ROWS[::2]  # for the interpreter's sake
    logits, options, draws = (
        _logits(len(rows), vocab_size, device),
        _columns(rows, device),
        _draw(len(rows), device),
    )
    expected = process_logits(logits, options[0], top_k=options[1], top_p=options[2], min_p=options[3])
    expected_tokens = sample_from_probs(expected, draws.numpy(force=True))
    for module in (reference, op):
        probs = module.filtered_probs(logits, *options)
        assert torch.equal(probs > 0, expected > 0)
        assert torch.allclose(probs, expected, rtol=2e-5, atol=0)
        assert np.array_equal(module.sample(logits, *options, draws).numpy(force=True), expected_tokens)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_gumbel_tokens_are_those_of_the_reference(vocab_size, device):
    rows = ROWS[: vocab_size if vocab_size < 1000 else 4]  # filters are the same code as in the test above
    logits, options = _logits(len(rows), vocab_size, device), _columns(rows, device)
    seeds, counters = _words(len(rows), device)
    expected = reference.sample_gumbel(logits, *options, seeds, counters, 5)
    assert torch.equal(op.sample_gumbel(logits, *options, seeds, counters, 5), expected)


@pytest.mark.parametrize("present", range(8))
def test_every_combination_of_absent_filters(present, device):
    rows = [ROWS[index] for index in (1, 4, 6)]
    logits, (temperature, *some) = _logits(len(rows), 40, device), _columns(rows, device)
    some = [column if present >> index & 1 else None for index, column in enumerate(some)]
    draws, (seeds, counters) = _draw(len(rows), device), _words(len(rows), device)
    expected = reference.filtered_probs(logits, temperature, *some)
    assert torch.allclose(op.filtered_probs(logits, temperature, *some), expected, rtol=2e-5, atol=0)
    for name, noise in (("sample", (draws,)), ("sample_gumbel", (seeds, counters, 1))):
        expected = getattr(reference, name)(logits, temperature, *some, *noise)
        assert torch.equal(getattr(op, name)(logits, temperature, *some, *noise), expected)


def test_float64_reference_gives_the_same_law(device):
    logits, options = _logits(len(ROWS), 1000, device), _columns(ROWS, device)
    wide = reference.filtered_probs(logits.double(), *options)
    assert wide.dtype == torch.float64
    assert torch.allclose(reference.filtered_probs(logits, *options).double(), wide, rtol=2e-5, atol=1e-12)


def test_a_large_vocabulary_and_a_strided_row(device):
    """Several tiles, and rows that lie apart in memory."""
    whole = torch.randn(3, 11_000, generator=torch.Generator().manual_seed(1)).to(device)
    logits = whole[:, 500:10_501]
    temperature = torch.ones(3, device=device)
    draws = torch.tensor([0.0, 0.7, 1 - 2**-24], dtype=torch.float64, device=device)
    expected = sample_from_probs(logits.softmax(-1), draws.numpy(force=True))
    tokens = op.sample(logits, temperature, None, None, None, draws).numpy(force=True)
    assert np.array_equal(tokens, expected) and expected[0] < 10 and expected[2] > 9_900


def test_the_ends_of_the_uniforms(device):
    """A token of probability zero is never drawn, at neither end, and float32 uniforms do as well."""
    logits = torch.full((4, 50), -torch.inf, device=device)
    logits[:, 7], logits[:, 33] = 1.0, 2.0
    draws = torch.tensor([0.0, 1 - 2**-24, 0.2689, 0.269], dtype=torch.float32, device=device)
    tokens = op.sample(logits, torch.ones(4, device=device), None, None, None, draws)
    assert tokens.tolist() == [7, 33, 7, 33]


def test_greedy_takes_the_lowest_of_equals_even_across_tiles(device):
    logits = torch.zeros(3, 4500, device=device)
    logits[0, [4400, 17, 2]], logits[1, [4300, 4200]] = 1.0, 5.0
    options = torch.zeros(3, device=device), None, None, None
    expected = torch.tensor([2, 4200, 0], device=device)
    seeds, counters = _words(3, device)
    assert torch.equal(op.sample(logits, *options, _draw(3, device)), expected)
    assert torch.equal(op.sample_gumbel(logits, *options, seeds, counters, 1), expected)
    probs = op.filtered_probs(logits, *options)
    assert torch.equal(probs.argmax(-1), expected) and torch.equal(
        probs.sum(-1), torch.ones(3, device=device)
    )


def test_rows_that_cannot_be_sampled_are_marked(device):
    logits = _logits(6, 40, device)
    logits[1, 3], logits[2, 39], logits[3], logits[4, 0] = torch.nan, torch.inf, -torch.inf, -torch.nan
    rows = [(1.0, 0, 1.0, 0.01), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.9, 0.0), *[(1.0, 0, 1.0, 0.01)] * 3]
    rows[4] = (0.0, 0, 1.0, 0.0)
    options, draws, (seeds, counters) = _columns(rows, device), _draw(6, device), _words(6, device)
    is_bad = torch.tensor([False, True, True, True, True, False], device=device)
    for module in (reference, op):
        assert torch.equal(module.sample(logits, *options, draws) == -1, is_bad)
        assert torch.equal(module.sample_gumbel(logits, *options, seeds, counters, 1) == -1, is_bad)
        probs = module.filtered_probs(logits, *options)
        assert torch.equal(probs.isnan().all(-1), is_bad) and torch.equal(probs.isnan().any(-1), is_bad)
    temperature = torch.ones(6, device=device)  # the pass of a kernel without filters marks them, too
    assert torch.equal(
        op.sample_gumbel(logits, temperature, None, None, None, seeds, counters, 1) == -1, is_bad
    )


def test_no_rows(device):
    logits, options = _logits(0, 40, device), (torch.ones(0, device=device), None, None, None)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert op.filtered_probs(logits, *options).shape == (0, 40)
    assert op.sample(logits, *options, none.double()).shape == (0,)
    assert op.sample_gumbel(logits, *options, none, none, 1).shape == (0,)
    assert op.uniforms(none, none, 1, 5).shape == (0, 5)
    assert op.uniforms(none.new_zeros(2), none.new_zeros(2), 1, 0).shape == (2, 0)


@pytest.mark.parametrize("width", (1, 2, 7, 300))
@pytest.mark.parametrize("stream", (Stream.ACCEPT, Stream.RESIDUAL, 0xFFFFFFFF))
def test_uniforms_are_bit_for_bit_those_of_the_host(width, stream, device):
    seeds = np.array([0, 7, 2**64 - 1, 2**63 + 12345, 2**32], np.uint64)
    counters = np.array([12, 0, 2**33 + 1, 2**64 - 1, 2**32 - 1], np.uint64)
    expected = host_uniforms(seeds, counters, stream, width)
    for kind in (np.int64, np.uint64):
        words = [torch.from_numpy(x.view(kind)).to(device) for x in (seeds, counters)]
        for module in (reference, op):
            assert np.array_equal(module.uniforms(*words, int(stream), width).numpy(force=True), expected)


def _chi_square(module, num_draws, device):
    """The p-value of draws over a vocabulary of 16 of unequal tokens, some of them filtered."""
    logits = torch.linspace(-2, 2, 16, device=device).expand(num_draws, -1)
    options = _columns([(0.8, 0, 1.0, 0.02)] * num_draws, device)
    counters = torch.arange(num_draws, device=device)
    tokens = module.sample_gumbel(logits, *options, torch.full_like(counters, 7), counters, 1)
    probs = process_logits(logits[:1], options[0][:1], min_p=options[3][:1])[0].double().numpy(force=True)
    counts = np.bincount(tokens.numpy(force=True), minlength=16)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    return float(stats.chisquare(counts[kept], num_draws * probs[kept] / probs[kept].sum()).pvalue)


def test_gumbel_draws_follow_the_distribution(device):
    """The interpreter takes one draw after another, so there the kernel's draws stand on being the reference's."""
    assert _chi_square(reference, 20_000, device) > 1e-3
    if not runtime.IS_INTERPRETED:
        assert _chi_square(op, 20_000, device) > 1e-3


def test_gumbel_draws_of_equals_are_fair_at_any_temperature(device):
    """Logits divided by a tiny temperature must not swallow the noise."""
    logits = torch.tensor([20.0, -3.0, 20.0, 20.0], device=device).expand(60, -1)
    temperature = torch.full((60,), 1e-6, device=device)
    seeds, counters = _words(60, device)
    tokens = op.sample_gumbel(logits, temperature, None, None, None, seeds, counters, 1)
    assert torch.equal(
        tokens, reference.sample_gumbel(logits, temperature, None, None, None, seeds, counters, 1)
    )
    assert (torch.bincount(tokens, minlength=4)[[0, 2, 3]] > 8).all()


def _with_broken(module, name, old, new, monkeypatch):
    """A fresh copy of the op that calls ``name`` of a broken copy of ``module``."""
    monkeypatch.setattr(module, name, getattr(broken(module, old, new), name))
    return broken(op, "from __future__", "from __future__")


@pytest.mark.parametrize(
    ("name", "row", "old", "new"),
    [
        ("find_peak", 6, "x > best", "x >= best"),
        ("find_limit", 1, "low, high = middle, far", "low, high = near, middle"),
        ("find_limit", 1, "limit = tl.div_rn(gap, temperature)", "limit = gap"),
        ("find_limit", 1, "in_middle += tl.where(gap <= middle", "in_middle += tl.where(gap <= far"),
        ("find_limit", 2, "1.4426950408889634 / temperature", "1.0 / temperature"),
        (
            "find_limit",
            9,
            "top_p.to(tl.float64) * mass.to(tl.float64)",
            "top_p.to(tl.float64) * 17592186044416.0",
        ),
        ("find_limit", 9, "<= limit, fixed(", "<= float('inf'), fixed("),
        ("find_limit", 3, "-least.to(tl.float32)", "-1.1 * least.to(tl.float32)"),
        ("kept_mass", 0, "127 - (bits >> 23)", "126 - (bits >> 23)"),
        ("kept_mass", 8, "d <= limit", "d < limit"),
    ],
)
def test_a_broken_filter_is_noticed(name, row, old, new, device, monkeypatch):
    logits, options = (
        _logits(1, 4100 if name == "find_peak" else 40, device),
        _columns(ROWS[row : row + 1], device),
    )
    if name == "find_peak":
        logits = torch.zeros_like(logits)
    expected = reference.filtered_probs(logits, *options)
    assert torch.allclose(op.filtered_probs(logits, *options), expected, rtol=2e-5, atol=0)
    copy = _with_broken(filters, name, old, new, monkeypatch)
    assert not torch.allclose(copy.filtered_probs(logits, *options), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("words", "counter >> 32", "counter >> 33"),
        ("words", "tl.cast(stream, tl.uint32)", "0"),
        ("uniform", "low >> 6", "low >> 5"),
        ("uniform", "_LARGEST_UNIFORM)", "0.9)"),
        ("log_exponentials", "first // 2", "first"),
        (
            "log_exponentials",
            "tl.interleave(_narrow_uniform(a, b), ",
            "tl.interleave(_narrow_uniform(c, b), ",
        ),
    ],
)
def test_broken_noise_is_noticed(name, old, new, device, monkeypatch):
    seeds, counters = _words(6, device)
    logits, temperature = _logits(6, 5000, device) / 8, torch.ones(6, device=device)
    copy = _with_broken(philox, name, old, new, monkeypatch)
    if name == "log_exponentials":
        actual, expected = (
            module.sample_gumbel(logits, temperature, None, None, None, seeds, counters, 1)
            for module in (copy, reference)
        )
    else:
        actual, expected = (module.uniforms(seeds, counters, 1, 40) for module in (copy, reference))
    assert not torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("filtered_probs", "tl.exp(-d) / total", "tl.exp(-d)"),
        ("filtered_probs", "column == token", "column == 0"),
        ("sample", "cumulative <= rest", "cumulative < rest"),
        ("sample", "rest - in_tile", "rest"),
        ("sample", "token = tile + ", "token = "),
        ("sample_gumbel", "best += (peak - lane_peak) * rate", "best += 0.0"),
        ("sample_gumbel", "best += (higher - lane_peak) * rate", "best += 0.0"),
        ("sample_gumbel", "seed, counter, stream, first, BLOCK", "seed, counter, stream, 0, BLOCK"),
        ("sample_gumbel", "<= limit, score", "<= 4.0 * limit, score"),
        ("sample_gumbel", "1.0 / temperature, 1e38", "1.0, 1e38"),
        ("uniforms", "mask=2 * block < width", "mask=2 * block + 1 < width"),
        ("uniforms", "philox.uniform(c, d)", "philox.uniform(a, d)"),
    ],
)
def test_a_broken_copy_is_noticed(name, old, new, device):
    rows = [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.3), (0.1, 0, 1.0, 0.0)] * 2
    logits, options = _logits(len(rows), 5000, device) / 2, _columns(rows, device)
    logits[:, 0] = -torch.inf
    seeds, counters = _words(len(rows), device)
    draws = _draw(len(rows), device)
    draws[0] = 0.0
    arguments = {
        "filtered_probs": (logits, *options),
        "sample": (logits, *options, draws),
        "sample_gumbel": (logits, *options, seeds, counters, 1),
        "uniforms": (seeds, counters, 1, 7),
    }[name]
    expected, actual = (getattr(module, name)(*arguments) for module in (reference, broken(op, old, new)))
    assert not torch.allclose(actual, expected, rtol=2e-5, atol=0)
