"""Counter-based uniforms, so that a request's noise does not depend on the batch it runs in.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps (key, counter) to
random bits with no state. The key is the request's seed; the counter holds the number of tokens known when
the step began, the stream and the index. The same request therefore draws the same noise alone, in a batch,
or after it was preempted and recomputed.

>>> uniforms(np.array([7], np.uint64), np.array([12], np.uint64), Stream.ACCEPT, 4).shape
(1, 4)
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LARGEST = 1.0 - 2.0**-24
"""The largest float32 below 1."""


class Stream(enum.IntEnum):
    """Independent noise streams. Sharing one between two uses biases the output distribution."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2


def philox4x32(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox-4x32 with 10 rounds; every 32-bit word is held in a uint64.

    Args:
        counters: uint64 [4, ...], counter words.
        keys: uint64 [2, ...], key words; trailing axes broadcast against those of ``counters``.

    Returns:
        uint64 [4, ...] random words below 2**32.
    """
    axes = (slice(None),) + (None,) * (keys.ndim - 1)
    rounds = np.arange(_ROUNDS, dtype=np.uint64).reshape(_ROUNDS, *(1,) * keys.ndim)
    round_keys = (keys + rounds * _KEY_STEPS[axes]) & _LOW_32
    multipliers = _MULTIPLIERS[(slice(None),) + (None,) * (counters.ndim - 1)]
    even, odd = counters[0::2], counters[1::2]
    for round_key in round_keys:
        product = even * multipliers
        even = (product >> _SHIFT_32)[::-1] ^ odd ^ round_key
        odd = (product & _LOW_32)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: NDArray[Any], counters: NDArray[Any], stream: Stream, width: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1) that depend only on (seed, counter, stream, index), not on ``width`` or the batch.

    Values are multiples of 2**-53; those above 1 - 2**-24 are rounded down to it, so that a conversion to
    float32 never gives 1.

    Args:
        seeds: integers [n] in [0, 2**64), one per request.
        counters: integers [n] in [0, 2**64), tokens known when the step began.
        stream: what the noise is used for.
        width: uniforms per row.

    Returns:
        float64 [n, width].
    """
    seeds, counters = np.asarray(seeds, np.uint64), np.asarray(counters, np.uint64)
    num_blocks = -(-width // 2)
    words = np.empty((4, seeds.size, num_blocks), np.uint64)
    words[0] = np.arange(num_blocks, dtype=np.uint64)
    words[1] = stream
    words[2] = (counters & _LOW_32)[:, None]
    words[3] = (counters >> _SHIFT_32)[:, None]
    keys = np.stack((seeds & _LOW_32, seeds >> _SHIFT_32))[:, :, None]
    bits = philox4x32(words, keys)
    mantissas = ((bits[0::2] >> np.uint64(5)) << np.uint64(26)) | (bits[1::2] >> np.uint64(6))
    values = mantissas.transpose(1, 2, 0).reshape(seeds.size, 2 * num_blocks)[:, :width] * 2.0**-53
    return np.minimum(values, _LARGEST)


def derive_seed(seed: int, index: int) -> int:
    """A seed in [0, 2**64) for the ``index``-th request of an engine with ``seed``."""
    counter = np.array([index & 0xFFFFFFFF, index >> 32, 0, 0xFFFFFFFF], np.uint64)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
    words = philox4x32(counter[:, None], key[:, None])[:, 0]
    return int(words[0]) | int(words[1]) << 32
