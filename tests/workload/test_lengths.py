"""Laws of lengths: what is fitted is found again, and what is drawn is what was fitted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from specdec.workload import (
    AZURE_SERVICES,
    EmpiricalLengths,
    FixedLengths,
    LengthDistribution,
    LognormalLengths,
    QuantileLengths,
    Quantiles,
    Requests,
    TaskClass,
    TaskMix,
    azure_like,
    fit_lengths,
    length_errors,
)

LOGNORMAL = LognormalLengths(
    prompt_median=900.0, prompt_sigma=0.8, output_median=150.0, output_sigma=0.6, correlation=-0.5
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def trace(lengths: LengthDistribution, num: int = 20_000) -> Requests:
    return Requests.build(np.zeros(num), *lengths.sample(rng(), num))


@pytest.mark.parametrize(
    "lengths",
    [FixedLengths(7, 3), LOGNORMAL, azure_like("code"), EmpiricalLengths(np.array([5]), np.array([9]))],
    ids=lambda lengths: type(lengths).__name__,
)
def test_shapes_and_least_lengths(lengths: LengthDistribution):
    for num in (0, 1, 63):
        for values in lengths.sample(rng(), num):
            assert values.shape == (num,) and np.can_cast(values.dtype, np.int64) and (values >= 1).all()


def test_lognormal_is_found_again():
    fitted = fit_lengths(trace(LOGNORMAL), "lognormal")
    assert isinstance(fitted, LognormalLengths)
    # Standard errors with n = 20,000: sigma / sqrt(n) of a log median, sigma / sqrt(2 n), (1 - rho²) / sqrt(n).
    root = math.sqrt(20_000)
    assert abs(math.log(fitted.prompt_median / 900.0)) < 4 * 0.8 / root
    assert abs(math.log(fitted.output_median / 150.0)) < 4 * 0.6 / root
    assert abs(fitted.prompt_sigma - 0.8) < 4 * 0.8 / root / math.sqrt(2)
    assert abs(fitted.output_sigma - 0.6) < 4 * 0.6 / root / math.sqrt(2)
    assert abs(fitted.correlation + 0.5) < 4 * 0.75 / root
    assert length_errors(fitted, trace(LOGNORMAL)).worst < 0.06


def test_lognormal_is_clipped():
    lengths = LognormalLengths(
        prompt_median=100,
        prompt_sigma=3,
        output_median=2,
        output_sigma=3,
        max_prompt_len=500,
        max_output_len=9,
    )
    prompt_len, output_len = lengths.sample(rng(), 5000)
    assert (prompt_len.max(), output_len.max(), output_len.min()) == (500, 9, 1)


def test_empirical_draws_pairs():
    pairs = {(5, 50), (6, 60), (7, 70)}
    requests = Requests.build([0, 0, 0], [5, 6, 7], [50, 60, 70])
    drawn = fit_lengths(requests, "empirical").sample(rng(), 1000)
    assert set(zip(*map(np.ndarray.tolist, drawn), strict=True)) == pairs


def test_quantiles_of_few_values_are_exact():
    table = Quantiles.fit(np.array([4, 4, 9, 9]), 33)
    assert table == Quantiles((3, 4, 9), (0.0, 0.5, 1.0))
    assert Quantiles.fit(np.array([7]), 33) == Quantiles((6, 7), (0.0, 1.0))
    lengths = QuantileLengths(Quantiles((0, 1), (0.0, 1.0)), (table,))
    prompt_len, output_len = lengths.sample(rng(), 40_000)
    assert set(prompt_len.tolist()) == {1}
    # Half of the outputs are 4, the others uniform from 5 to 9.
    counts = np.bincount(output_len, minlength=10)[4:]
    expected = 40_000 * np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_quantiles_follow_a_mixture_and_its_dependence():
    """Two humps and outputs that depend on them in no monotone way, which no lognormal law has."""
    draws, num = rng(), 30_000
    hump = draws.integers(0, 3, num)
    prompt = np.rint(np.array([180.0, 1000.0, 4000.0])[hump] * draws.lognormal(0, 0.05, num))
    output = np.rint(np.array([100.0, 400.0, 60.0])[hump] * draws.lognormal(0, 0.3, num))
    requests = Requests.build(np.zeros(num), prompt, output)
    errors = length_errors(fit_lengths(requests, num_bins=24), requests)
    # Three humps of exactly a third leave quantiles near 1/3 and 2/3 free, none of which is compared.
    assert errors.worst < 0.05 and max(errors.prompt_ks, errors.output_ks, errors.total_ks) < 0.02
    independent = length_errors(fit_lengths(requests, num_bins=1), requests)
    assert independent.total_ks > 2 * errors.total_ks
    assert length_errors(fit_lengths(requests, "lognormal"), requests).worst > 0.5


def test_the_drawn_correlation_is_the_fitted_one():
    drawn = fit_lengths(trace(LOGNORMAL), num_bins=32).sample(rng(1), 50_000)
    assert np.corrcoef(np.log(drawn))[0, 1] == pytest.approx(-0.5, abs=0.03)


@pytest.mark.parametrize(
    ("service", "prompt_mean", "output_mean"), [("conversation", 1154.7, 211.1), ("code", 2047.8, 27.9)]
)
def test_azure_like_means(service: str, prompt_mean: float, output_mean: float):
    prompt_len, output_len = azure_like(service).sample(rng(), 200_000)
    assert prompt_len.mean() == pytest.approx(prompt_mean, rel=0.015)
    assert output_len.mean() == pytest.approx(output_mean, rel=0.025)
    assert service in AZURE_SERVICES


def test_task_mix():
    mix = TaskMix({"chat": (3.0, FixedLengths(5, 6)), "code": TaskClass(1.0, FixedLengths(7, 8), 2, 4.0)})
    requests = mix.requests(np.arange(40_000.0), rng())
    assert requests.tasks == ("chat", "code")
    is_code = requests.task == 1
    assert abs(is_code.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 40_000)
    assert (requests.prompt_len == np.where(is_code, 7, 5)).all()
    assert (requests.output_len == np.where(is_code, 8, 6)).all()
    assert (requests.priority == np.where(is_code, 2, 0)).all()
    assert (requests.deadline_s == np.where(is_code, requests.arrival_s + 4.0, math.inf)).all()
    assert (mix.requests(np.zeros(9), rng(), max_tokens=7).max_tokens == 7).all()
    assert TaskMix.of(mix) is mix and tuple(TaskMix.of(FixedLengths(1, 1)).classes) == ("",)


BAD: list[tuple[Any, str]] = [
    (lambda: FixedLengths(0, 1), "prompt_len=0"),
    (
        lambda: LognormalLengths(prompt_median=0, prompt_sigma=1, output_median=1, output_sigma=1),
        "prompt_median=0",
    ),
    (
        lambda: LognormalLengths(prompt_median=1, prompt_sigma=1, output_median=1, output_sigma=-1),
        "output_sigma=-1",
    ),
    (lambda: EmpiricalLengths(np.array([]), np.array([])), "no lengths"),
    (lambda: EmpiricalLengths(np.array([1]), np.array([1, 2])), "shapes"),
    (lambda: EmpiricalLengths(np.array([1]), np.array([0])), "output_len=0"),
    (lambda: Quantiles((1, 2), (0.0, 0.5, 1.0)), "equally many"),
    (lambda: Quantiles((2, 2), (0.0, 1.0)), "rise strictly"),
    (lambda: Quantiles((-1, 2), (0.0, 1.0)), "from 0 or more"),
    (lambda: Quantiles((1, 2), (0.1, 1.0)), "from 0 to 1"),
    (lambda: QuantileLengths(Quantiles((1, 2), (0.0, 1.0)), ()), "at least one bin"),
    (lambda: fit_lengths(trace(LOGNORMAL, 5), num_bins=6), "num_bins=6"),
    (lambda: fit_lengths(trace(LOGNORMAL, 5), num_bins=1, num_levels=1), "num_levels=1"),
    (lambda: fit_lengths(trace(LOGNORMAL, 5), "lognormal", num_bins=6), "do not take"),
    (lambda: fit_lengths(trace(LOGNORMAL, 5), "log-normal"), "did you mean lognormal"),
    (lambda: fit_lengths(trace(LOGNORMAL, 0)), "no requests"),
    (lambda: length_errors(LOGNORMAL, trace(LOGNORMAL, 0)), "0 requests"),
    (lambda: azure_like("conversations"), "did you mean conversation"),
    (lambda: TaskMix({}), "at least one task class"),
    (lambda: TaskMix({"a": (0.0, LOGNORMAL)}), "'a': weight=0.0"),
    (lambda: TaskMix({"a": TaskClass(1.0, LOGNORMAL, 0, 0.0)}), "deadline_after_s=0.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
