"""How does it feel under load? Requests arrive in real time; latencies, throughput and goodput under an SLO.

python -m specdec.run +experiment=serve policy=static experiment.rate_per_s=2
python -m specdec.run --multirun +experiment=serve drafter=none,ngram policy=continuous,chunked
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments import common
from specdec import plots
from specdec.config import Config
from specdec.metrics import (
    Slo,
    acceptance_rate,
    decode_rows,
    goodput,
    latency_table,
    throughput,
    tokens_per_step,
)
from specdec.report import latency_rows, summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run
from specdec.workload import arrivals


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    rng = np.random.default_rng(config.seed)
    pool = common.prompts(config)
    items = [pool[index] for index in rng.integers(0, len(pool), options.num_requests)]
    cv = {"cv": options.cv} if options.arrivals == "gamma" else {}
    times_s = arrivals(options.arrivals, len(items), rng, rate_per_s=options.rate_per_s, **cv)
    llm = common.build_llm(config)
    llm.generate([items[0].prompt], SamplingParams(max_tokens=4, ignore_eos=True))
    common.configure(llm, config, common.drafter_options(config))
    params = common.sampling_params(config)
    served = common.generate(llm, items, params, run, "serve", arrivals_s=times_s.tolist())
    slo = Slo(ttft_s=options.slo_ttft_s, tpot_s=options.slo_tpot_s)
    rows = decode_rows(served.steps)
    summary = {
        "latency": latency_table(served.requests),
        "throughput": throughput(served.requests),
        "goodput": goodput(served.requests, slo),
        "tau": tokens_per_step(rows),
        "alpha": acceptance_rate(rows),
        "num_preemptions": int(served.requests["num_preemptions"].sum()),
        "mean_running": float(served.steps["num_running"].mean()),  # type: ignore[arg-type]
    }
    name = f"{config.policy.name}, {config.drafter.name}"
    run.console.print(
        summary_table(latency_rows(summary["latency"]), title=f"{name}, {options.rate_per_s} requests/s")
    )
    good, rate = summary["goodput"], summary["throughput"]
    run.console.print(
        f"{rate['tokens_per_s']:.0f} tokens/s, {rate['requests_per_s']:.2f} requests/s; within the SLO: "
        f"{good['share']:.0%}, {good['requests_per_s']:.2f} requests/s; τ {summary['tau']:.2f}"
    )
    run.log_table("latency", [{"latency": name, **row} for name, row in summary["latency"].items()])
    run.log_figure(
        "latency_cdf",
        plots.latency_cdf({name: served.requests}, slo_s={"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}),
    )
    common.log_steps(run, served, name="serve")
    run.log_metrics(
        {f"{name}/{key}": value for name, row in summary["latency"].items() for key, value in row.items()}
        | {f"goodput/{key}": value for key, value in summary["goodput"].items()}
    )
    return summary
