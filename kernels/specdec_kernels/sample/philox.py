"""Counter-based noise in Triton, the same bits as ``reference.uniforms``."""

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.sample.reference import LARGEST_UNIFORM

_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)


@triton.jit
def words(seed, counter, stream, block):
    """Four words of 32 random bits for each of ``block``, int32; the others are scalars."""
    return tl.philox(
        seed, block, tl.cast(stream, tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    )


@triton.jit
def uniform(high, low):
    """A uniform of 53 bits from two words, float64."""
    mantissa = ((high >> 5).to(tl.uint64) << 26) | (low >> 6).to(tl.uint64)
    return tl.minimum(mantissa.to(tl.float64) * 1.1102230246251565e-16, _LARGEST_UNIFORM)


@triton.jit
def log_exponentials(seed, counter, stream, first, BLOCK: tl.constexpr):
    """``log(-log(1 - u))`` of the uniforms ``first`` (even) and on: minus Gumbel noise, float32 [BLOCK]."""
    a, b, c, d = words(seed, counter, stream, first // 2 + tl.arange(0, BLOCK // 2))
    u = tl.interleave(_narrow_uniform(a, b), _narrow_uniform(c, d))
    # Tokens win by small uniforms, so these need their relative precision: log(1 - u) = -2 artanh(u / (2 - u)).
    s = u / (2.0 - u)
    t = s * s
    series = 2.0 * s * (1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9)))))
    return tl.log(tl.where(u < 0.25, series, -tl.log(1.0 - u)))


@triton.jit
def _narrow_uniform(high, low):
    """``uniform`` rounded to float32, and at least 2**-54."""
    u = (high >> 5).to(tl.float32) * 7.450580596923828e-09 + (low >> 6).to(
        tl.float32
    ) * 1.1102230246251565e-16
    return tl.minimum(tl.maximum(u, 5.551115123125783e-17), _LARGEST_UNIFORM)
