"""Mean waits and queue lengths of M/M/1, M/D/1, M/G/1 and M/M/c: truths that the simulator is tested against.

Requests arrive as a Poisson process of rate λ, wait first come first served without limit, and are served
one by one by c servers of rate μ each. Kleinrock, Queueing Systems 1 (1975), chapters 3 and 5.

>>> mm1(arrival_per_s=8.0, service_per_s=10.0).wait_s
0.4
>>> md1(arrival_per_s=8.0, service_per_s=10.0).wait_s
0.2
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueMeans:
    """A queue in its steady state, averages over requests (seconds) and over time (numbers).

    Attributes:
        utilisation: ρ = λ / (c μ), share of the time in which a server is busy.
        wait_s: W_q, from arrival to the start of service.
        sojourn_s: W, from arrival to departure.
        num_waiting: L_q = λ W_q.
        num_in_system: L = λ W.
    """

    utilisation: float
    wait_s: float
    sojourn_s: float
    num_waiting: float
    num_in_system: float


def mm1(arrival_per_s: float, service_per_s: float) -> QueueMeans:
    """Exponential service, one server: W_q = ρ / (μ − λ).

    Args:
        arrival_per_s: λ > 0.
        service_per_s: μ > λ.

    Raises:
        ValueError: a rate that is not positive and finite, or ρ >= 1: the queue grows without bound.
    """
    return mg1(arrival_per_s, service_per_s, service_cv=1.0)


def md1(arrival_per_s: float, service_per_s: float) -> QueueMeans:
    """Every service takes 1 / μ, one server: W_q = ρ / (2 (μ − λ)). Arguments and errors as :func:`mm1`."""
    return mg1(arrival_per_s, service_per_s, service_cv=0.0)


def mg1(arrival_per_s: float, service_per_s: float, service_cv: float) -> QueueMeans:
    """Any service times, independent of each other, one server.

    Pollaczek and Khinchine: W_q = λ E[S²] / (2 (1 − ρ)) = ρ / (μ − λ) · (1 + C²) / 2.

    Args:
        arrival_per_s, service_per_s: as for :func:`mm1`; 1 / μ is the mean service time.
        service_cv: C >= 0, standard deviation of the service time / its mean.

    Raises:
        ValueError: as :func:`mm1`, or ``service_cv`` negative or not finite.
    """
    _check_stable(arrival_per_s, service_per_s, 1)
    if not 0.0 <= service_cv < math.inf:
        raise ValueError(f"service_cv={service_cv} must be finite and >= 0 (0 is constant, 1 exponential)")
    utilisation = arrival_per_s / service_per_s
    wait_s = utilisation / (service_per_s - arrival_per_s) * (1.0 + service_cv**2) / 2.0
    return _means(arrival_per_s, service_per_s, 1, wait_s)


def mmc(arrival_per_s: float, service_per_s: float, num_servers: int) -> QueueMeans:
    """Exponential service, c servers, one queue: W_q = C(c, λ/μ) / (c μ − λ), C being :func:`erlang_c`.

    Args:
        arrival_per_s: λ > 0.
        service_per_s: μ > 0, of each server.
        num_servers: c >= 1, with c μ > λ.

    Raises:
        ValueError: a value out of range, or ρ >= 1.
    """
    chance = erlang_c(arrival_per_s, service_per_s, num_servers)
    wait_s = chance / (num_servers * service_per_s - arrival_per_s)
    return _means(arrival_per_s, service_per_s, num_servers, wait_s)


def erlang_c(arrival_per_s: float, service_per_s: float, num_servers: int) -> float:
    """Chance that a request has to wait in M/M/c. Arguments and errors as :func:`mmc`.

    From Erlang's loss formula B(c, a) = a B(c − 1, a) / (c + a B(c − 1, a)), which no number of servers can
    overflow: C = B / (1 − ρ (1 − B)).
    """
    _check_stable(arrival_per_s, service_per_s, num_servers)
    offered = arrival_per_s / service_per_s
    loss = 1.0
    for servers in range(1, num_servers + 1):
        loss = offered * loss / (servers + offered * loss)
    return loss / (1.0 - offered / num_servers * (1.0 - loss))


def _means(arrival_per_s: float, service_per_s: float, num_servers: int, wait_s: float) -> QueueMeans:
    sojourn_s = wait_s + 1.0 / service_per_s
    return QueueMeans(
        utilisation=arrival_per_s / (num_servers * service_per_s),
        wait_s=wait_s,
        sojourn_s=sojourn_s,
        num_waiting=arrival_per_s * wait_s,
        num_in_system=arrival_per_s * sojourn_s,
    )


def _check_stable(arrival_per_s: float, service_per_s: float, num_servers: int) -> None:
    for name, value in (("arrival_per_s", arrival_per_s), ("service_per_s", service_per_s)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a finite rate > 0")
    if num_servers < 1:
        raise ValueError(f"num_servers={num_servers} must be >= 1")
    utilisation = arrival_per_s / (num_servers * service_per_s)
    if utilisation >= 1.0:
        raise ValueError(
            f"unstable: ρ = λ / (c μ) = {utilisation:g} with λ={arrival_per_s} arrivals/s, "
            f"μ={service_per_s} services/s and c={num_servers} server(s); the queue grows without bound: "
            "lower λ, or raise μ or c until ρ < 1"
        )
