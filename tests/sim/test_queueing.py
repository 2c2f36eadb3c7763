"""The closed forms against recursions that simulate the same queues, customer by customer."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from scipy import stats

from sim.queueing import erlang_c, md1, mg1, mm1, mmc

NUM_CUSTOMERS = 400_000
ARRIVAL_PER_S, SERVICE_PER_S = 7.0, 10.0


def lindley_waits_s(gaps_s: np.ndarray, services_s: np.ndarray) -> np.ndarray:
    """W_{n+1} = max(0, W_n + S_n − A_n) (Lindley 1952), unrolled: a random walk above its running minimum."""
    walk = np.concatenate([[0.0], np.cumsum(services_s[:-1] - gaps_s[1:])])
    return walk - np.minimum.accumulate(walk)


def multi_server_waits_s(gaps_s: np.ndarray, services_s: np.ndarray, num_servers: int) -> np.ndarray:
    """The next customer takes the server that is free first (Kiefer and Wolfowitz 1955)."""
    free_s = [0.0] * num_servers
    waits_s = []
    for arrival_s, service_s in zip(np.cumsum(gaps_s).tolist(), services_s.tolist(), strict=True):
        start_s = max(arrival_s, free_s[0])
        heapq.heapreplace(free_s, start_s + service_s)
        waits_s.append(start_s - arrival_s)
    return np.array(waits_s)


def assert_mean_within_bounds(samples: np.ndarray, truth: float, num_batches: int = 40):
    """The truth lies in the 99.9 % interval of the batch means, which is narrow enough to mean something."""
    steady = samples[samples.size // 10 :]
    means = steady[: steady.size // num_batches * num_batches].reshape(num_batches, -1).mean(axis=1)
    half_width = stats.t.ppf(0.9995, num_batches - 1) * means.std(ddof=1) / math.sqrt(num_batches)
    assert abs(means.mean() - truth) < half_width
    assert half_width < 0.1 * truth


def assert_queue_agrees(gaps_s: np.ndarray, waits_s: np.ndarray, wait_s: float, num_waiting: float):
    assert_mean_within_bounds(waits_s, wait_s)
    # Poisson arrivals see time averages (Wolff 1982): count those that an arrival finds waiting.
    arrivals_s = np.cumsum(gaps_s)
    started = np.searchsorted(arrivals_s + waits_s, arrivals_s, side="left")
    assert_mean_within_bounds(np.arange(arrivals_s.size) - started, num_waiting)


def services_of(name: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Service times of mean 1 / SERVICE_PER_S and their coefficient of variation."""
    mean_s = 1.0 / SERVICE_PER_S
    if name == "constant":
        return np.full(NUM_CUSTOMERS, mean_s), 0.0
    if name == "exponential":
        return rng.exponential(mean_s, NUM_CUSTOMERS), 1.0
    if name == "erlang-4":
        return rng.gamma(4.0, mean_s / 4.0, NUM_CUSTOMERS), 0.5
    long = rng.random(NUM_CUSTOMERS) < 0.1  # one in ten is 5.5 times the mean, the others half of it
    return np.where(long, 5.5, 0.5) * mean_s, 1.5


@pytest.mark.parametrize("name", ["constant", "exponential", "erlang-4", "two sizes"])
def test_one_server(name: str):
    rng = np.random.default_rng(11)
    services_s, service_cv = services_of(name, rng)
    assert services_s.std() / services_s.mean() == pytest.approx(service_cv, abs=0.01)
    gaps_s = rng.exponential(1.0 / ARRIVAL_PER_S, NUM_CUSTOMERS)
    queue = mg1(ARRIVAL_PER_S, SERVICE_PER_S, service_cv)
    assert_queue_agrees(gaps_s, lindley_waits_s(gaps_s, services_s), queue.wait_s, queue.num_waiting)


@pytest.mark.parametrize("num_servers", [2, 5])
def test_many_servers(num_servers: int):
    rng = np.random.default_rng(12)
    arrival_per_s = num_servers * ARRIVAL_PER_S
    gaps_s = rng.exponential(1.0 / arrival_per_s, NUM_CUSTOMERS)
    services_s = rng.exponential(1.0 / SERVICE_PER_S, NUM_CUSTOMERS)
    waits_s = multi_server_waits_s(gaps_s, services_s, num_servers)
    queue = mmc(arrival_per_s, SERVICE_PER_S, num_servers)
    assert_queue_agrees(gaps_s, waits_s, queue.wait_s, queue.num_waiting)
    assert_mean_within_bounds(waits_s > 0.0, erlang_c(arrival_per_s, SERVICE_PER_S, num_servers))


def test_textbook_values():
    queue = mm1(arrival_per_s=8.0, service_per_s=10.0)
    assert queue.utilisation == 0.8
    assert queue.num_in_system == pytest.approx(4.0)  # ρ / (1 − ρ)
    assert queue.num_waiting == pytest.approx(3.2)
    assert queue.sojourn_s == pytest.approx(0.5)  # 1 / (μ − λ)
    assert md1(8.0, 10.0).wait_s == pytest.approx(queue.wait_s / 2)
    assert mmc(8.0, 10.0, 1).wait_s == pytest.approx(queue.wait_s)


@pytest.mark.parametrize(("offered", "num_servers"), [(0.5, 1), (3.0, 4), (8.0, 10), (1.9, 2)])
def test_erlang_c_is_the_sum(offered: float, num_servers: int):
    queued = offered**num_servers / math.factorial(num_servers) * num_servers / (num_servers - offered)
    free = sum(offered**n / math.factorial(n) for n in range(num_servers))
    assert erlang_c(offered, 1.0, num_servers) == pytest.approx(queued / (free + queued))


def test_erlang_c_of_many_servers_does_not_overflow():
    assert 0.0 < erlang_c(1990.0, 1.0, 2000) < 1.0


@pytest.mark.parametrize("arrival_per_s", [10.0, 12.0])
def test_unstable_load_names_the_rates(arrival_per_s: float):
    for queue in (lambda: mm1(arrival_per_s, 10.0), lambda: mmc(3 * arrival_per_s, 10.0, 3)):
        with pytest.raises(ValueError, match=r"unstable: .*λ=\d+\.0 .*μ=10\.0 .*c=[13]"):
            queue()


def test_bad_input():
    with pytest.raises(ValueError, match=r"arrival_per_s=0\.0 must be a finite rate > 0"):
        mm1(0.0, 1.0)
    with pytest.raises(ValueError, match="service_per_s=nan"):
        md1(1.0, math.nan)
    with pytest.raises(ValueError, match="num_servers=0"):
        mmc(1.0, 2.0, 0)
    with pytest.raises(ValueError, match=r"service_cv=-1\.0"):
        mg1(1.0, 2.0, -1.0)
