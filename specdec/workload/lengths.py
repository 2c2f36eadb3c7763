"""How long prompts and outputs are: laws to draw from, fits to a trace, and how well they fit.

>>> fitted = fit_lengths(load_trace("trace.csv"), "quantiles", num_bins=16)
>>> prompt_len, output_len = fitted.sample(np.random.default_rng(0), 1000)
>>> length_errors(fitted, load_trace("trace.csv")).worst
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.names import unknown_name
from specdec.workload.requests import IntArray, Requests

Lengths = tuple[IntArray, IntArray]
_MAX_LEN = 131_072
_TOKENS_TOLERANCE, _LEVELS_TOLERANCE = 0.03, 0.01
_ERROR_LEVELS = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)


class LengthDistribution(Protocol):
    """A joint law of prompt and output lengths."""

    def sample(self, rng: np.random.Generator, num: int) -> Lengths:
        """Prompt and output lengths in tokens, int32 [num] each, all >= 1."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """The same for every request.

    Raises:
        ValueError: a length below 1.
    """

    prompt_len: int
    output_len: int

    def __post_init__(self) -> None:
        _check_at_least_one(prompt_len=self.prompt_len, output_len=self.output_len)

    def sample(self, rng: np.random.Generator, num: int) -> Lengths:
        return np.full(num, self.prompt_len, np.int32), np.full(num, self.output_len, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLengths:
    """Jointly lognormal, rounded, clipped to at least 1 and at most a maximum.

    Args:
        prompt_median, output_median: tokens, > 0.
        prompt_sigma, output_sigma: standard deviation of the logarithm, >= 0.
        correlation: of the logarithms, in [-1, 1].
        max_prompt_len, max_output_len: where lengths are clipped.
    """

    prompt_median: float
    prompt_sigma: float
    output_median: float
    output_sigma: float
    correlation: float = 0.0
    max_prompt_len: int = _MAX_LEN
    max_output_len: int = _MAX_LEN

    def __post_init__(self) -> None:
        for name in ("prompt_median", "output_median"):
            if not 0.0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} must be a finite number of tokens > 0")
        for name in ("prompt_sigma", "output_sigma"):
            if not 0.0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} must be a finite number >= 0")
        if not -1.0 <= self.correlation <= 1.0:
            raise ValueError(f"correlation={self.correlation} must be in [-1, 1]")
        _check_at_least_one(max_prompt_len=self.max_prompt_len, max_output_len=self.max_output_len)

    @classmethod
    def fit(cls, requests: Requests) -> LognormalLengths:
        """By the moments of the logarithms; clipped at the longest lengths seen."""
        logs = np.log(np.stack((requests.prompt_len, requests.output_len)).astype(np.float64))
        (prompt_mu, output_mu), (prompt_sigma, output_sigma) = logs.mean(1), logs.std(1)
        varied = prompt_sigma > 0.0 and output_sigma > 0.0
        return cls(
            prompt_median=math.exp(prompt_mu),
            prompt_sigma=float(prompt_sigma),
            output_median=math.exp(output_mu),
            output_sigma=float(output_sigma),
            correlation=float(np.corrcoef(logs)[0, 1].clip(-1.0, 1.0)) if varied else 0.0,
            max_prompt_len=int(requests.prompt_len.max()),
            max_output_len=int(requests.output_len.max()),
        )

    def sample(self, rng: np.random.Generator, num: int) -> Lengths:
        scores = rng.standard_normal((2, num))
        scores[1] = self.correlation * scores[0] + math.sqrt(1.0 - self.correlation**2) * scores[1]
        prompt = math.log(self.prompt_median) + self.prompt_sigma * scores[0]
        output = math.log(self.output_median) + self.output_sigma * scores[1]
        return _tokens_of_log(prompt, self.max_prompt_len), _tokens_of_log(output, self.max_output_len)


@dataclass(frozen=True, slots=True, eq=False)
class EmpiricalLengths:
    """A trace's own pairs, drawn with replacement: keeps whatever dependence there is.

    Args:
        prompt_len, output_len: int32 [n] each, n >= 1, all >= 1.
    """

    prompt_len: IntArray
    output_len: IntArray

    def __post_init__(self) -> None:
        if self.prompt_len.shape != self.output_len.shape or self.prompt_len.ndim != 1:
            raise ValueError(f"shapes {self.prompt_len.shape} and {self.output_len.shape} are not one [n]")
        if not self.prompt_len.size:
            raise ValueError("no lengths to draw from: give at least one pair")
        _check_at_least_one(prompt_len=int(self.prompt_len.min()), output_len=int(self.output_len.min()))

    @classmethod
    def fit(cls, requests: Requests) -> EmpiricalLengths:
        return cls(requests.prompt_len, requests.output_len)

    def sample(self, rng: np.random.Generator, num: int) -> Lengths:
        rows = rng.integers(0, self.prompt_len.size, num)
        return self.prompt_len[rows], self.output_len[rows]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A law of whole numbers: P(length ≤ tokens[k]) = levels[k], uniform between two neighbours.

    Args:
        tokens: [L] strictly rising from one less than the shortest length, >= 0.
        levels: [L] strictly rising from 0 to 1.
    """

    tokens: tuple[int, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        tokens, levels = np.array(self.tokens), np.array(self.levels)
        if tokens.size < 2 or tokens.shape != levels.shape:
            raise ValueError(
                f"{tokens.size} tokens and {levels.size} levels must be equally many, at least 2"
            )
        if tokens[0] < 0 or not (np.diff(tokens) > 0).all():
            raise ValueError(f"tokens={self.tokens} must rise strictly from 0 or more")
        if levels[0] != 0.0 or levels[-1] != 1.0 or not (np.diff(levels) > 0).all():
            raise ValueError(f"levels={self.levels} must rise strictly from 0 to 1")

    @classmethod
    def fit(cls, lengths: IntArray, num_levels: int) -> Quantiles:
        """``num_levels`` points of the distribution function, at most: each is added where the curve through
        the points so far is worst, be it in tokens (relative) or in probability, whichever is nearer."""
        values, counts = np.unique(lengths, return_counts=True)
        tokens = np.concatenate(([values[0] - 1], values)).astype(np.float64)
        levels = np.concatenate(([0], np.cumsum(counts))) / lengths.size
        chosen = [0, tokens.size - 1]
        while len(chosen) < min(num_levels, tokens.size):
            in_tokens = np.abs(np.interp(levels, levels[chosen], tokens[chosen]) - tokens)
            in_levels = np.abs(np.interp(tokens, tokens[chosen], levels[chosen]) - levels)
            in_tokens /= np.maximum(tokens, 1.0) * _TOKENS_TOLERANCE
            error = np.minimum(in_tokens, in_levels / _LEVELS_TOLERANCE)
            error[chosen] = -1.0
            chosen = sorted([*chosen, int(np.argmax(error))])
        return cls(tuple(tokens[chosen].astype(int).tolist()), tuple(levels[chosen].tolist()))


@dataclass(frozen=True, slots=True)
class QuantileLengths:
    """Tables of the prompt, and of the output given the prompt's rank.

    Prompts are cut into bins of equal probability, each with a table of its outputs; a single bin makes output
    and prompt independent.
    """

    prompt: Quantiles
    outputs: tuple[Quantiles, ...]

    def __post_init__(self) -> None:
        if not self.outputs:
            raise ValueError("outputs must hold the quantiles of at least one bin of prompts")

    @classmethod
    def fit(
        cls, requests: Requests, *, num_levels: int = 33, num_bins: int = 16, num_output_levels: int = 9
    ) -> QuantileLengths:
        """Tables of a trace; prompts of one length are cut into bins in the order of arrival.

        Raises:
            ValueError: fewer than one bin or than two levels, or more bins than requests.
        """
        if not 1 <= num_bins <= len(requests) or min(num_levels, num_output_levels) < 2:
            raise ValueError(
                f"num_bins={num_bins} must be in [1, {len(requests)}], "
                f"num_levels={num_levels} and num_output_levels={num_output_levels} >= 2"
            )
        by_prompt = requests.output_len[np.argsort(requests.prompt_len, kind="stable")]
        bins = np.array_split(by_prompt, num_bins)
        return cls(
            Quantiles.fit(requests.prompt_len, num_levels),
            tuple(Quantiles.fit(outputs, num_output_levels) for outputs in bins),
        )

    def sample(self, rng: np.random.Generator, num: int) -> Lengths:
        # In (0, 1], so that rounding up never gives the first entry, which is below the shortest length.
        ranks, output_ranks = 1.0 - rng.random((2, num))
        prompt = np.interp(ranks, self.prompt.levels, self.prompt.tokens)
        bins = np.ceil(ranks * len(self.outputs)) - 1.0
        # One table for all bins: bin b's levels lie in [2 b, 2 b + 1].
        levels = np.concatenate([np.array(bin.levels) + 2.0 * b for b, bin in enumerate(self.outputs)])
        tokens = np.concatenate([bin.tokens for bin in self.outputs])
        output = np.interp(2.0 * bins + output_ranks, levels, tokens)
        # Adding a bin's number rounds its ranks, the smallest to 0: hence the maximum.
        return _round_up(prompt), np.maximum(_round_up(output), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthErrors:
    """How far a law's lengths are from a trace's; ``total`` is prompt + output, so it sees their dependence.

    Attributes:
        levels: of the quantiles compared.
        prompt, output, total: signed relative error of each quantile.
        prompt_mean, output_mean, total_mean: signed relative errors.
        prompt_ks, output_ks, total_ks: greatest distance of the distribution functions.
    """

    levels: tuple[float, ...]
    prompt: tuple[float, ...]
    output: tuple[float, ...]
    total: tuple[float, ...]
    prompt_mean: float
    output_mean: float
    total_mean: float
    prompt_ks: float
    output_ks: float
    total_ks: float

    @property
    def worst(self) -> float:
        """Greatest absolute relative error of any quantile."""
        return max(abs(error) for error in self.prompt + self.output + self.total)


_FITS: dict[str, Callable[..., LengthDistribution]] = {
    "quantiles": QuantileLengths.fit,
    "lognormal": LognormalLengths.fit,
    "empirical": EmpiricalLengths.fit,
}


def fit_lengths(requests: Requests, kind: str = "quantiles", **options: int) -> LengthDistribution:
    """A law of lengths like those of ``requests``.

    Args:
        requests: of a trace.
        kind: ``"quantiles"`` (compact and close, with the options of ``QuantileLengths.fit``), ``"lognormal"``
            (seven numbers) or ``"empirical"`` (keeps all pairs).
        options: of the kind.

    Raises:
        ValueError: no requests, an unknown kind or an option that the kind does not have.
    """
    if kind not in _FITS:
        raise unknown_name("kind of lengths", kind, _FITS)
    if not len(requests):
        raise ValueError("no requests to fit lengths to")
    try:
        return _FITS[kind](requests, **options)
    except TypeError as error:
        raise ValueError(f"lengths {kind!r} do not take {options}: {error}") from error


def length_errors(
    lengths: LengthDistribution, requests: Requests, *, num_samples: int = 200_000, seed: int = 0
) -> LengthErrors:
    """Compare ``num_samples`` draws with the lengths of ``requests``.

    Raises:
        ValueError: no requests, or ``num_samples`` < 1.
    """
    if not len(requests) or num_samples < 1:
        raise ValueError(
            f"{len(requests)} requests and num_samples={num_samples}: at least one of each is needed"
        )
    drawn = lengths.sample(np.random.default_rng(seed), num_samples)
    pairs = {
        "prompt": (requests.prompt_len, drawn[0]),
        "output": (requests.output_len, drawn[1]),
        "total": (requests.prompt_len + requests.output_len, drawn[0] + drawn[1]),
    }
    fields: dict[str, Any] = {}
    for name, (true, fitted) in pairs.items():
        quantiles = np.quantile(true, _ERROR_LEVELS)
        fields[name] = tuple((np.quantile(fitted, _ERROR_LEVELS) / quantiles - 1.0).tolist())
        fields[f"{name}_mean"] = float(fitted.mean() / true.mean() - 1.0)
        fields[f"{name}_ks"] = _ks_distance(true, fitted)
    return LengthErrors(levels=_ERROR_LEVELS, **fields)


def _ks_distance(first: ArrayLike, second: ArrayLike) -> float:
    first, second = np.sort(first), np.sort(second)
    values = np.concatenate((first, second))
    cdfs = [np.searchsorted(side, values, side="right") / side.size for side in (first, second)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


def _round_up(tokens: NDArray[np.float64]) -> IntArray:
    return np.ceil(tokens).astype(np.int32)


def _tokens_of_log(logs: NDArray[np.float64], longest: int) -> IntArray:
    return np.rint(np.exp(np.minimum(logs, math.log(longest)))).clip(1, longest).astype(np.int32)


def _check_at_least_one(**lengths: int) -> None:
    for name, value in lengths.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1 token")
