"""Philox uniforms: published vectors, independence of batch and width, moments, no correlation between streams."""

import numpy as np
import pytest

from specdec.random import Stream, philox4x32, uniforms

# Known-answer vectors of the Random123 library (philox4x32, 10 rounds): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32(words(*counter), words(*key)).tolist() == list(expected)


def test_philox_is_vectorised_over_trailing_axes():
    counters = np.array([a[0] for a in KNOWN_ANSWERS], np.uint64).T
    keys = np.array([a[1] for a in KNOWN_ANSWERS], np.uint64).T
    assert philox4x32(counters, keys).T.tolist() == [list(a[2]) for a in KNOWN_ANSWERS]


def test_noise_depends_on_seed_counter_stream_and_index_only():
    seeds, counters = words(3, 2**64 - 1, 3), words(10, 2**40, 11)
    batch = uniforms(seeds, counters, Stream.ACCEPT, 7)
    for row in range(3):
        alone = uniforms(seeds[row : row + 1], counters[row : row + 1], Stream.ACCEPT, 4)
        assert (alone[0] == batch[row, :4]).all()
    others = uniforms(seeds, counters, Stream.DRAFT, 7)
    everything = np.concatenate([batch.ravel(), others.ravel()])
    assert np.unique(everything).size == everything.size


def test_high_words_of_seed_and_counter_matter():
    base = uniforms(words(5), words(6), Stream.DRAFT, 2)
    assert (base != uniforms(words(5 + 2**32), words(6), Stream.DRAFT, 2)).all()
    assert (base != uniforms(words(5), words(6 + 2**32), Stream.DRAFT, 2)).all()


def test_width_zero_and_no_rows():
    assert uniforms(words(1, 2), words(1, 2), Stream.DRAFT, 0).shape == (2, 0)
    assert uniforms(words(), words(), Stream.DRAFT, 3).shape == (0, 3)


def test_uniform_and_uncorrelated():
    counters = np.arange(100_000, dtype=np.uint64)
    seeds = np.zeros_like(counters)
    columns = np.concatenate([uniforms(seeds, counters, stream, 3) for stream in Stream], axis=1)
    assert columns.min() >= 0 and columns.astype(np.float32).max() < 1
    # Standard errors at 100,000 draws: mean 0.0009, correlation 0.0032. Five of them are allowed.
    assert np.abs(columns.mean(axis=0) - 0.5).max() < 0.005
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 0.016
    successive = np.corrcoef(columns[:-1, 0], columns[1:, 0])[0, 1]
    assert abs(successive) < 0.016


def test_largest_value_survives_float32(monkeypatch):
    def all_ones(counters, keys):
        return np.full_like(counters, 0xFFFFFFFF)

    monkeypatch.setattr("specdec.random.philox4x32", all_ones)
    value = uniforms(words(0), words(0), Stream.DRAFT, 1)
    assert value[0, 0] < 1 and value.astype(np.float32)[0, 0] < 1
