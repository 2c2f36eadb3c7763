"""How fast is the simulator, on one core? Cases in processes of their own, and growth with the number of requests.

``simpy_timeouts`` are bare events of SimPy, the yardstick of how fast this machine is just now: compare its figure
before comparing the others.

    python -m specdec.run +experiment=sim_bench
    python -m specdec.run +experiment=sim_bench experiment.cases=[linear] experiment.max_requests=1000000
    python -m specdec.run +experiment=sim_bench experiment.cases=[simpy_timeouts] experiment.million=true
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from experiments import common
from specdec import plots_load
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

MILLION = 1_000_000
SMALLEST = 1000
TIMEOUTS = 1_000_000
COLUMNS = {
    "case": "case",
    "num_requests": "requests",
    "requests_per_cpu_s": "requests / CPU s",
    "wall_s": "wall s",
    "peak_rss_mb": "peak MB",
}


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    plan = _plan(options)
    results: dict[str, dict[str, Any]] = {}
    # Results are written as they come.
    with common.progress(run) as bar, (run.directory / "cases.jsonl").open("w") as lines:
        task = bar.add_task("cases", total=len(plan))
        for name, case, num_requests, workers in plan:
            bar.update(task, description=name)
            results[name] = _measure(config, case, num_requests, workers)
            lines.write(json.dumps({"case": name, **results[name]}) + "\n")
            lines.flush()
            bar.advance(task)
    rows = [{"case": name, **result} for name, result in results.items()]
    title = f"simulating {options.replicas} replicas at {options.rate_per_s:g} requests/s; one core, but million two"
    run.console.print(summary_table(rows, COLUMNS, title=title))
    run.log_table("cases", rows)
    names = ("requests_per_cpu_s", "wall_s", "peak_rss_mb")
    run.log_metrics({f"{case}/{key}": result[key] for case, result in results.items() for key in names})
    grown = [results[name] for name, case, *_ in plan if case == "linear"]
    summary: dict[str, Any] = {"cases": results, **results}
    if len(grown) > 1:
        figure, slope = plots_load.growth(
            [one["num_requests"] for one in grown], [one["cpu_s"] for one in grown]
        )
        run.log_figure("growth", figure)
        run.console.print(f"CPU seconds grow as requests^{slope:.2f}")
        summary["slope"] = slope
    return summary


def _plan(options: Any) -> list[tuple[str, str, int, int]]:
    """Name, case, requests and processes of each measurement; the yardstick goes first."""
    sizes = {
        "simpy_timeouts": TIMEOUTS,
        "azure_fixed": options.num_requests,
        "goodput_prefix": options.num_prefix_requests,
    }
    plan = [(case, case, num, 1) for case, num in sizes.items() if case in options.cases]
    if "linear" in options.cases:
        steps = 1 + math.floor(2.0 * math.log10(options.max_requests / SMALLEST) + 1e-9)
        grown = [round(SMALLEST * 10.0 ** (step / 2)) for step in range(steps)]
        plan += [(f"linear_{num}", "linear", num, 1) for num in grown]
    return [*plan, ("million", "million", MILLION, 2)] if options.million else plan


def _measure(config: Config, case: str, num_requests: int, workers: int) -> dict[str, Any]:
    """One case in a new process.

    Raises:
        RuntimeError: the process failed, with what it said.
    """
    options = config.experiment
    message = {
        "hardware": asdict(config.hardware),
        "num_requests": num_requests,
        "replicas": options.replicas,
        "rate_per_s": options.rate_per_s,
        "seed": config.seed,
        "workers": workers,
    }
    words = [sys.executable, "-m", "experiments.sim_bench_worker", case, json.dumps(message)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"case {case} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
