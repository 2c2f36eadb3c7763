"""One case of ``sim_bench`` in a process of its own, so that its peak memory is its own.

The options come as JSON, the result goes out as one line of JSON:

    python -m experiments.sim_bench_worker azure_fixed '{"hardware": {…}, "num_requests": 1000, …}'
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import simpy

from experiments.memory import own_peak_mb
from experiments.simulations import mean_turns, sessions, with_step_times
from sim.cluster_spec import ClusterSpec, ReplicaSpec
from sim.cost_model import kv_blocks, roofline_cost_model
from sim.hardware import hardware_from_mapping
from sim.model_shape import MODEL_SHAPES
from sim.simulation import simulate
from specdec.metrics import Slo
from specdec.scheduler import SchedulerConfig
from specdec.workload import Poisson, RequestSource, SessionShape, SyntheticSource, azure_like

MODEL = "llama-3.1-8b"
MAX_MODEL_LEN, BLOCK_SIZE = 16_384, 16
MAX_TOKENS = 2048  # what a server allows by default: the scheduler does not know how long an answer will be
SLO = Slo(ttft_s=1.0, tpot_s=0.05)


def cluster(
    options: dict[str, Any], speculation: dict[str, Any], *, router: str, prefix_caching: bool
) -> ClusterSpec:
    """Replicas with chunked prefill and paged KV; drafts cost no device time, 0.7 of them are accepted."""
    chip, shape = hardware_from_mapping(options["hardware"]), MODEL_SHAPES[MODEL]
    cost_model = roofline_cost_model(chip, shape)
    limits = SchedulerConfig(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        num_blocks=kv_blocks(chip, shape, block_size=BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=prefix_caching,
    )
    if speculation["name"] == "goodput":
        speculation = with_step_times(speculation, cost_model)
    acceptance = {"name": "constant", "alpha": 0.7}
    replica = ReplicaSpec(
        limits, cost_model, policy="chunked", speculation=speculation, acceptance=acceptance
    )
    return ClusterSpec.of(replica, options["replicas"], router=router)


def azure_fixed(options: dict[str, Any]) -> tuple[RequestSource, ClusterSpec]:
    arrivals, lengths = Poisson(options["rate_per_s"]), azure_like("conversation")
    source = SyntheticSource(arrivals, lengths, options["num_requests"], options["seed"], MAX_TOKENS)
    fixed = {"name": "fixed", "max_drafts": 4}
    return source, cluster(options, fixed, router="round_robin", prefix_caching=False)


def goodput_prefix(options: dict[str, Any]) -> tuple[RequestSource, ClusterSpec]:
    starts, lengths = Poisson(options["rate_per_s"] / mean_turns()), azure_like("conversation")
    # Short thoughts, so that the stream soon flows at its rate.
    shape = SessionShape(think_time_s=2.0, max_context_len=MAX_MODEL_LEN, hash_block_size=BLOCK_SIZE)
    source = sessions(starts, lengths, options["num_requests"], options["seed"], shape)
    goodput = {"name": "goodput", "max_drafts": 4, "step_tokens": []}
    return source, cluster(options, goodput, router="prefix_affinity", prefix_caching=True)


BUILDERS = {
    "azure_fixed": azure_fixed,
    "goodput_prefix": goodput_prefix,
    "linear": azure_fixed,
    "million": azure_fixed,
}


def measure(case: str, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory of one case; the imports do not count, drawing the requests does."""
    wall_s, cpu_s = time.perf_counter(), _cpu_s()
    if case == "simpy_timeouts":
        num, extra = _timeouts(options["num_requests"]), {}
    else:
        source, spec = BUILDERS[case](options)
        summary = simulate(source, spec, seed=options["seed"], slo=SLO, workers=options["workers"]).summary
        num = summary["num_submitted"]
        extra = {key: summary[key] for key in ("utilisation", "stable", "num_steps", "simulated_s")}
    spent_s = _cpu_s() - cpu_s
    return {
        "num_requests": num,
        "requests_per_cpu_s": num / spent_s,
        "cpu_s": spent_s,
        "wall_s": time.perf_counter() - wall_s,
        "peak_rss_mb": _peak_rss_mb(options["workers"]),
        **extra,
    }


def _timeouts(num: int) -> int:
    """Bare events of SimPy: how fast this machine is."""
    env = simpy.Environment()

    def clock() -> Any:
        for _ in range(num):
            yield env.timeout(1.0)

    env.process(clock())
    env.run()
    return num


def _cpu_s() -> float:
    """Of this process and of those that it has waited for."""
    spent = os.times()  # counts in ticks of 10 ms, so not for this process
    return time.process_time() + spent.children_user + spent.children_system


def _peak_rss_mb(workers: int) -> float:
    """This process's peak and, at most, those of its workers: the kernel keeps that of the largest child only."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if workers > 1 else 0
    return own_peak_mb() + workers * children / 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))))
