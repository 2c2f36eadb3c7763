"""What the engine did on real models, the scheduler plans again from the trace alone, array for array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sim.replay import ReplayError, replay
from specdec import LLM, SamplingParams
from specdec.scheduler import SchedulerConfig, StepLoop, make_controller, make_policy
from specdec.trace import TraceWriter, read_requests, read_steps

SHARED_PREFIX = np.random.default_rng(7).integers(5, 25, 32).tolist()
PROMPTS = [
    SHARED_PREFIX + np.random.default_rng(index).integers(5, 25, 3 + 5 * index).tolist() for index in range(8)
]
ROOMY: dict[str, Any] = {"num_blocks": 128, "max_num_batched_tokens": 256}
TIGHT: dict[str, Any] = {"num_blocks": 14, "max_num_batched_tokens": 128, "watermark": 0.0}
CHUNKED: dict[str, Any] = {"num_blocks": 128, "max_num_batched_tokens": 24}
RUNS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "plain": ("chunked", None, "off", ROOMY),
    "static": ("static", {"name": "synthetic", "alpha": 0.7}, "fixed", ROOMY),
    "dynamic": ("dynamic", {"name": "synthetic", "alpha": 0.7}, "fixed", ROOMY),
    "continuous": ("continuous", {"name": "synthetic", "alpha": 0.7}, "fixed", ROOMY),
    "chunked prefill": ("chunked", {"name": "ngram"}, "fixed", CHUNKED),
    "adaptive": ("chunked", {"name": "synthetic", "alpha": 0.5}, "adaptive", ROOMY),
    "load threshold": ("chunked", {"name": "ngram"}, "load_threshold", ROOMY),
    "preemption": ("chunked", {"name": "synthetic", "alpha": 0.7}, "fixed", TIGHT),
    "preemption by swap": ("continuous", {"name": "ngram"}, "fixed", TIGHT | {"num_swap_blocks": 20}),
}


def record(run: str, directory: Path, model: Path) -> tuple[pl.DataFrame, pl.DataFrame, SchedulerConfig]:
    """Serve the prompts twice, the second time out of the prefix cache."""
    policy, drafter, speculation, limits = RUNS[run]
    options = {"name": speculation} | ({"max_running": 4} if speculation == "load_threshold" else {})
    scheduler = {"policy": policy, "speculation": options, "max_num_seqs": 6, **limits}
    num_blocks = scheduler.pop("num_blocks")
    llm = LLM(str(model), drafter, dtype="float32", max_model_len=128, num_blocks=num_blocks, **scheduler)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    if drafter and drafter["name"] == "synthetic":  # it first runs the target alone, on the same scheduler
        llm.generate(PROMPTS, params)
        llm.configure(drafter, **scheduler)
    arrivals_s = [0.0, 0.0, 0.0, 0.002, 0.01, 0.02, 0.02, 0.05] * 2
    with TraceWriter(directory) as trace:
        llm.generate(PROMPTS * 2, params, arrivals_s=arrivals_s, trace=trace)
    return read_steps(directory), read_requests(directory), llm.engine.loop.config


def fresh_loop(run: str, config: SchedulerConfig, num_drafts: int = 4) -> StepLoop:
    policy, _, speculation, _ = RUNS[run]
    options = {} if speculation == "off" else {"max_drafts": num_drafts}
    options |= {"max_running": 4} if speculation == "load_threshold" else {}
    return StepLoop(config, make_policy(policy), make_controller(speculation, **options))


@pytest.mark.parametrize("run", RUNS)
def test_the_engines_plans_are_planned_again(run: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    steps, requests, config = record(run, tmp_path, tiny_llama_dir)
    assert replay(steps, requests, fresh_loop(run, config)) == steps.height
    reached = {
        "chunked prefill": steps["num_new"].list.len().max() and not steps["emits"].explode().all(),
        "preemption": steps["num_preempted"].sum() > 0,
        "preemption by swap": steps["swapped_in"].list.len().sum() > 0,
    }
    assert reached.get(run, True), f"the run does not show {run}"
    if run not in ("plain", "load threshold"):
        assert steps["num_accepted"].sum() > 0
    assert requests["num_cached"].sum() > 0, "no prefix hit"


def test_another_policy_or_length_or_budget_is_noticed(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Negative controls: the comparison can fail."""
    steps, requests, config = record("chunked prefill", tmp_path, tiny_llama_dir)
    with pytest.raises(ReplayError, match=r"step \d+: num_\w+ is"):
        replay(steps, requests, fresh_loop("chunked prefill", config, num_drafts=3))
    with pytest.raises(ReplayError, match=r"step \d+: "):
        replay(
            steps,
            requests,
            StepLoop(config, make_policy("chunked", decode_first=False), make_controller("fixed")),
        )


def test_one_other_outcome_is_noticed(tmp_path: Path, tiny_llama_dir: Path) -> None:
    steps, requests, config = record("continuous", tmp_path, tiny_llama_dir)
    step = int(steps.filter(pl.col("num_accepted") > 0)["step"][3])
    one_less = pl.when(pl.col("step") == step).then(
        pl.col("row_accepted").list.eval(pl.max_horizontal(pl.element() - 1, 0))
    )
    altered = steps.with_columns(row_accepted=one_less.otherwise(pl.col("row_accepted")))
    with pytest.raises(ReplayError, match=f"step {step + 1}: context is"):
        replay(altered, requests, fresh_loop("continuous", config))


def test_a_trace_that_ends_early_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    steps, requests, config = record("plain", tmp_path, tiny_llama_dir)
    with pytest.raises(ReplayError, match="the trace ends after 5 steps"):
        replay(steps.head(5), requests, fresh_loop("plain", config))
