"""Replicas that come and go: autoscaling with cold starts, failure and repair."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import simpy

from sim.cluster_spec import Autoscaling, Failures
from sim.pool import Member, Pool
from sim.replica import Process, SimRequest


def autoscale(
    env: simpy.Environment, pool: Pool, spec: Autoscaling, on_launch: Callable[[Member], None]
) -> Process:
    """Decide every interval how many replicas the pool has; ``on_launch`` is told of each new one."""
    while True:
        yield env.timeout(spec.interval_s)
        wanted = math.ceil(pool.num_outstanding / spec.target_outstanding)
        wanted = min(max(wanted, spec.min_replicas), spec.max_replicas)
        staying = [member for member in pool.members if not member.is_draining]
        for member in staying[wanted:]:
            member.drain()
        for _ in range(wanted - len(staying)):
            member = pool.launch(is_warm=False)
            env.process(_warm_up(env, member, spec.cold_start_s))
            on_launch(member)


def _warm_up(env: simpy.Environment, member: Member, cold_start_s: float) -> Process:
    yield env.timeout(cold_start_s)
    member.warm_up()


def fail_and_repair(
    env: simpy.Environment,
    member: Member,
    spec: Failures,
    seed: int,
    on_loss: Callable[[Pool, SimRequest], None],
) -> Process:
    """Break and mend a replica until it retires; ``on_loss`` is told of each request that it had."""
    rng = np.random.default_rng(seed)
    while True:
        yield env.timeout(rng.exponential(spec.mean_time_to_failure_s))
        if member.retired_s <= env.now:
            return
        for request in member.fail():
            on_loss(member.pool, request)
        yield env.timeout(rng.exponential(spec.mean_repair_s))
        if member.retired_s <= env.now:
            return
        member.repair()
