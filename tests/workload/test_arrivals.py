"""Arrival processes have the laws they claim, and chunks are the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from specdec.workload import (
    PROCESSES,
    AllAtOnce,
    ArrivalProcess,
    Diurnal,
    Gamma,
    Mmpp,
    Poisson,
    Uniform,
    arrival_chunks,
    arrivals,
    make_process,
)

NUM = 200_000
BURSTS = Mmpp(rates_per_s=(2.0, 40.0), dwell_s=(3.0, 0.5))
EVERY = (
    Poisson(4.0),
    Gamma(4.0, 3.0),
    Uniform(3.0),
    AllAtOnce(),
    BURSTS,
    Mmpp(rates_per_s=(0.0, 5.0), dwell_s=(0.1, 0.2)),
    Diurnal(rate_per_s=5.0, amplitude=1.0, period_s=600.0),
)


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation(cv: float):
    named = arrivals("gamma", NUM, rng(), rate_per_s=4.0, cv=cv)
    assert (named == arrivals(Gamma(4.0, cv), NUM, rng())).all()
    gaps = np.diff(named, prepend=0.0) * 4.0
    assert (gaps >= 0).all()
    assert abs(gaps.mean() - 1.0) < 4.0 * cv / math.sqrt(NUM)
    # A gamma law's excess kurtosis is 6 cv², so the mean of (gap - 1)² has this standard error.
    error = cv**2 * math.sqrt((6.0 * cv**2 + 2.0) / NUM)
    assert abs(((gaps - 1.0) ** 2).mean() - cv**2) < 4.0 * error


def test_poisson_gaps_are_exponential():
    times_s = arrivals("poisson", 20_000, rng(), rate_per_s=4.0)
    assert stats.kstest(np.diff(times_s, prepend=0.0), "expon", args=(0.0, 0.25)).pvalue > 1e-3


def test_arrivals_without_chance():
    assert arrivals("uniform", 3, rng(), rate_per_s=2.0).tolist() == [0.5, 1.0, 1.5]
    assert arrivals("all_at_once", 2, rng()).tolist() == [0.0, 0.0]
    assert arrivals("poisson", 0, rng(), rate_per_s=1.0).shape == (0,)


@pytest.mark.parametrize("process", EVERY, ids=lambda process: type(process).__name__)
def test_chunks_are_the_whole(process: ArrivalProcess):
    num = 140_001
    whole = arrivals(process, num, rng())
    assert whole.shape == (num,) and (np.diff(whole) >= 0).all() and whole[0] >= 0
    for size in (999, 65_536, 200_000):
        chunks = list(arrival_chunks(process, num, rng(), size=size))
        assert {len(chunk) for chunk in chunks[:-1]} <= {size} and 0 < len(chunks[-1]) <= size
        assert (np.concatenate(chunks) == whole).all()
    assert (arrivals(process, 5_000, rng()) == whole[:5_000]).all()
    assert list(arrival_chunks(process, 0, rng())) == []


@pytest.mark.parametrize("process", EVERY, ids=lambda process: type(process).__name__)
def test_mean_rates(process: ArrivalProcess):
    times_s = arrivals(process, NUM, rng())
    if process.mean_rate_per_s == math.inf:
        assert not times_s.any()
    else:
        assert NUM / times_s[-1] == pytest.approx(process.mean_rate_per_s, rel=0.03)


def mmpp_dispersion(process: Mmpp, window_s: float) -> float:
    """Variance / mean of the counts in a window, as in the docstring of ``Mmpp``."""
    (rate_0, rate_1), (dwell_0, dwell_1) = process.rates_per_s, process.dwell_s
    share, decay = dwell_0 / (dwell_0 + dwell_1), 1.0 / dwell_0 + 1.0 / dwell_1
    limit = 2.0 * share * (1.0 - share) * (rate_0 - rate_1) ** 2 / (process.mean_rate_per_s * decay)
    return 1.0 + limit * (1.0 + math.expm1(-decay * window_s) / (decay * window_s))


@pytest.mark.parametrize("window_s", [0.05, 0.5, 5.0])
def test_mmpp_index_of_dispersion(window_s: float):
    times_s = arrivals(BURSTS, NUM, rng())
    # Windows 4 s apart are independent but for exp(-4 · 2.33) of their covariance.
    edges_s = np.arange(0.0, times_s[-1] - window_s, window_s + 4.0)
    counts = np.diff(np.searchsorted(times_s, [edges_s, edges_s + window_s]), axis=0)[0]
    mean, deviations = BURSTS.mean_rate_per_s * window_s, (counts - BURSTS.mean_rate_per_s * window_s) ** 2
    error = deviations.std() / math.sqrt(counts.size)
    assert abs(deviations.mean() - mean * mmpp_dispersion(BURSTS, window_s)) < 4.0 * error
    assert mmpp_dispersion(BURSTS, window_s) > 1.3


def test_mmpp_with_a_silent_state_is_an_interrupted_poisson_process():
    on_rate, dwell_s = 5.0, (0.7, 0.2)
    gaps_s = np.diff(arrivals(Mmpp(rates_per_s=(0.0, on_rate), dwell_s=dwell_s), NUM, rng()))
    leave_off, leave_on = 1.0 / dwell_s[0], 1.0 / dwell_s[1]
    # Its gaps are independent and hyperexponential (Kuczura, Bell System Technical Journal 1973).
    squared_cv = 1.0 + 2.0 * on_rate * leave_on / (leave_on + leave_off) ** 2
    mean_s = (1.0 + leave_on / leave_off) / on_rate
    assert abs(gaps_s.mean() - mean_s) < 4.0 * mean_s * math.sqrt(squared_cv / NUM)
    assert gaps_s.var() / mean_s**2 == pytest.approx(squared_cv, rel=0.03)


def test_mmpp_begins_in_its_stationary_law():
    process = Mmpp(rates_per_s=(0.0, 1000.0), dwell_s=(3.0, 1.0))
    first_s = np.array([arrivals(process, 1, rng(seed))[0] for seed in range(400)])
    assert stats.binomtest(int((first_s < 0.02).sum()), 400, 0.25 + 0.75 * 0.02 / 3.0).pvalue > 1e-3


@pytest.mark.parametrize(("amplitude", "phase"), [(0.6, 0.0), (1.0, 0.25)])
def test_diurnal_profile(amplitude: float, phase: float):
    process = Diurnal(rate_per_s=50.0, amplitude=amplitude, period_s=100.0, phase=phase)
    times_s = arrivals(process, NUM, rng())
    num_periods, num_bins = int(times_s[-1] // process.period_s), 40
    counts, edges = np.histogram(
        times_s[times_s < num_periods * process.period_s] % process.period_s, bins=num_bins, range=(0, 100)
    )
    angle = 2.0 * np.pi * (edges / process.period_s + phase)
    integral = edges - amplitude * process.period_s / (2.0 * np.pi) * np.cos(angle)
    expected = num_periods * process.rate_per_s * np.diff(integral)
    assert stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), num_bins) > 1e-3
    assert process.rate_at(np.array([100.0 * (0.25 - phase)])) == pytest.approx(50.0 * (1.0 + amplitude))


def test_processes_by_name():
    assert make_process("poisson", rate_per_s=2.0) == Poisson(2.0)
    assert make_process("mmpp", rates_per_s=[1, 2], dwell_s=[3, 4]) == Mmpp(
        rates_per_s=(1, 2), dwell_s=(3, 4)
    )
    assert make_process("diurnal", rate_per_s=1.0, amplitude=0.2).mean_rate_per_s == 1.0
    assert make_process("all_at_once") == AllAtOnce()
    for name in PROCESSES:
        assert arrivals(name, 5, rng(), rate_per_s=2.0).shape == (5,)
    with pytest.raises(ValueError, match="did you mean diurnal"):
        make_process("dirnal")
    with pytest.raises(ValueError, match=r"'poisson' .*rate"):
        make_process("poisson", rate=2.0)


def test_bad_input():
    with pytest.raises(ValueError, match="did you mean poisson"):
        arrivals("poison", 3, rng(), rate_per_s=1.0)
    for rate_per_s in (0.0, -1.0, math.inf, math.nan):
        for name in ("poisson", "gamma", "uniform"):
            with pytest.raises(ValueError, match="rate_per_s="):
                arrivals(name, 3, rng(), rate_per_s=rate_per_s)
        with pytest.raises(ValueError, match="rate_per_s="):
            Diurnal(rate_per_s=rate_per_s)
    for name, cv in (("gamma", 0.0), ("poisson", 2.0)):
        with pytest.raises(ValueError, match="cv="):
            arrivals(name, 3, rng(), rate_per_s=1.0, cv=cv)
    with pytest.raises(ValueError, match="num=-1"):
        arrivals("uniform", -1, rng(), rate_per_s=1.0)
    with pytest.raises(ValueError, match="size=0"):
        arrival_chunks(Poisson(1.0), 3, rng(), size=0)
    bad: tuple[tuple[Any, Any], ...] = (
        ((0, 0), (1, 1)),
        ((-1, 1), (1, 1)),
        ((1, 2), (0, 1)),
        ((1, 2, 3), (1, 1)),
    )
    for rates, dwells in bad:
        with pytest.raises(ValueError, match=r"rates_per_s=|dwell_s="):
            Mmpp(rates_per_s=rates, dwell_s=dwells)
    for changed in ({"amplitude": 1.1}, {"period_s": 0.0}, {"phase": math.nan}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            Diurnal(rate_per_s=1.0, **changed)
