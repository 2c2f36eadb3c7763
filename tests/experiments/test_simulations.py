"""The simulating experiments, each small and in this process; one sweep in real processes of joblib, one of Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import common, policy_sweep, sim_bench, simulations
from sim.model_shape import MODEL_SHAPES
from specdec import plots_load
from specdec.config import Config
from specdec.run import execute
from specdec.scheduler import make_controller
from specdec.workload import collect
from tests.test_configs import build

SMALL = (
    "tracking=disabled",
    "experiment.lengths=fixed",
    "experiment.prompt_len=100",
    "experiment.output_len=8",
    "experiment.num_requests=30",
)


def simulated(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    return execute(build(*SMALL, *overrides, experiment="simulate"), tmp_path, None)


def test_a_small_run_leaves_tables_plots_and_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = simulated(tmp_path, "experiment.num_replicas=2", "experiment.trace_steps=true")
    assert summary["status"] == "ok"
    assert summary["num_finished"] == 30
    assert summary["stable"]
    assert 1.0 < summary["tau"] < 5.0
    assert 0.0 < summary["pools"][0]["peak_kv_share"] < 1.0
    assert summary["cost"]["per_million_tokens_usd"] > 0.0
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"latency_cdf.png", "load_over_time.png", "gantt.png"}
    assert json.loads((tmp_path / "trace" / "main-0.perfetto.json").read_text())["traceEvents"]
    assert json.loads((tmp_path / "summary.json").read_text())["throughput"] == summary["throughput"]
    shown = capsys.readouterr().out
    for word in ("ttft", "p99", "within the SLO", "utilisation", "million tokens", "2 × 1 h100"):
        assert word in shown


def test_large_runs_and_parallel_ones_are_not_traced():
    source = simulations.source(build(*SMALL, experiment="simulate"))
    from experiments.simulate import _is_traced

    for overrides, traced in [
        ((), True),
        (("experiment.trace_steps=false",), False),
        (("experiment.workers=2",), False),
    ]:
        config = build(*SMALL, *overrides, experiment="simulate")
        assert _is_traced(config, source) is traced
    large = build("experiment.num_requests=2001", experiment="simulate")
    assert not _is_traced(large, simulations.source(large))


def test_an_unknown_price_is_a_dash_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = simulated(tmp_path, "hardware.price_per_hour_usd=null", "experiment.trace_steps=false")
    assert summary["cost"]["per_million_tokens_usd"] is None
    assert "– (hardware.price_per_hour_usd" in capsys.readouterr().out


def test_a_load_above_capacity_is_called_unstable(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("experiment.rate_per_s=500", "experiment.max_num_seqs=2", "experiment.num_requests=600")
    summary = simulated(tmp_path, *words, "experiment.trace_steps=false", "speculation=off")
    assert not summary["stable"]
    assert "above the capacity" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "rate_per_s"),
    [
        (("experiment.arrivals=uniform",), 10.0),
        (("experiment.arrivals=gamma", "experiment.cv=2"), 10.0),
        (("experiment.arrivals=mmpp", "experiment.rates_per_s=[2,30]", "experiment.dwell_s=[1,1]"), 16.0),
        (("experiment.arrivals=diurnal", "experiment.amplitude=0.5", "experiment.period_s=10"), 10.0),
        (("experiment.multi_turn=true",), 10.0),
    ],
)
def test_processes_have_their_rate_and_can_be_given_another(overrides: tuple[str, ...], rate_per_s: float):
    config = build(*SMALL, *overrides, "experiment.num_requests=20000", experiment="simulate")
    for asked, expected in [(None, rate_per_s), (40.0, 40.0)]:
        requests = collect(simulations.source(config, asked))
        # Of sessions the last turns trail behind, so the middle of the run counts.
        middle_s = requests.arrival_s[5000:15000]
        assert 10_000 / (middle_s[-1] - middle_s[0]) == pytest.approx(expected, rel=0.1)


def test_users_who_wait_and_everything_at_once_are_simulated(tmp_path: Path):
    users = ("experiment.arrivals=closed_loop", "experiment.num_users=3", "experiment.think_time_s=0.1")
    summary = simulated(tmp_path / "users", *users, "experiment.trace_steps=false")
    assert summary["num_finished"] == 30
    assert summary["mean_in_system"] <= 3.0
    summary = simulated(tmp_path / "once", "experiment.arrivals=all_at_once", "experiment.trace_steps=false")
    assert summary["num_finished"] == 30


def write_trace(path: Path, *rows: str) -> str:
    path.write_text("\n".join(["arrival_s,prompt_len,output_len", *rows]) + "\n")
    return f"experiment.trace={path}"


def test_a_trace_is_replayed_at_another_rate(tmp_path: Path):
    file = write_trace(tmp_path / "trace.csv", "0.0,100,5", "2.0,50,9", "4.0,70,1")
    words = ["tracking=disabled", file, "experiment.arrivals=trace", "experiment.rate_factor=2"]
    config = build(*words, "experiment.num_requests=null", experiment="simulate")
    requests = collect(simulations.source(config))
    assert requests.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert requests.output_len.tolist() == [5, 9, 1]
    assert execute(config, tmp_path / "run", None)["num_finished"] == 3
    drawn = build(file, "experiment.lengths=trace", "experiment.num_requests=50", experiment="simulate")
    assert set(collect(simulations.source(drawn)).prompt_len.tolist()) == {50, 70, 100}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=l40s", "experiment.model=llama-3.1-70b"], r"does not fit: .*raise tensor_parallel"),
        (["experiment.tensor_parallel=3"], r"tensor_parallel=3 must .*divide the 32 query heads"),
        (["experiment.num_blocks=2"], r"needs 7 KV blocks of 16 tokens, the pool has num_blocks=2"),
        (["experiment.max_model_len=64"], r"exceeds max_model_len=64"),
        (["experiment.draft=llama-3.2-1b", "speculation=off"], r"never drafts: drop one"),
        (["experiment.router=least_outstanding", "experiment.workers=2"], r"needs independent replicas"),
        (["hardware.memory_bytes=-1"], r"hardware: memory_bytes=-1 must be a finite number > 0"),
        (["policy=static", "experiment.max_num_batched_tokens=256"], r""),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, overrides: list[str], message: str):
    if not message:
        assert simulated(tmp_path, *overrides)["num_finished"] == 30
        return
    with pytest.raises(ValueError, match=message) as caught:
        simulated(tmp_path, *overrides, "experiment.trace_steps=false")
    assert "\n" not in str(caught.value)


def test_a_broken_trace_line_is_named(tmp_path: Path):
    file = write_trace(tmp_path / "trace.csv", "0.0,100,5", "1.0,many,9")
    config = build("tracking=disabled", file, "experiment.arrivals=trace", experiment="simulate")
    with pytest.raises(ValueError, match="line 3") as caught:
        execute(config, tmp_path / "run", None)
    assert "\n" not in str(caught.value)


def test_the_goodput_controller_gets_the_times_of_the_cost_model():
    config = build("speculation=goodput", "experiment.draft=llama-3.2-1b", experiment="simulate")
    replica = simulations.cluster(config).pools["main"].replica
    assert isinstance(replica.speculation, dict)
    times_s = replica.speculation["step_s"]
    assert len(times_s) == len(replica.speculation["step_tokens"])
    assert 0.004 < times_s[0] < 0.02, "16 GB of weights at 3.35 TB/s"
    assert 0.0005 < replica.speculation["draft_step_s"] < 0.005
    assert make_controller(**replica.speculation).max_drafts == 8
    own = build(
        "speculation=goodput",
        "speculation.step_tokens=[1,8]",
        "speculation.step_s=[1,2]",
        experiment="simulate",
    )
    given = simulations.cluster(own).pools["main"].replica.speculation
    assert isinstance(given, dict)
    assert given["step_s"] == [1.0, 2.0]


def test_a_draft_model_takes_memory_and_time_only_where_something_drafts():
    words = ("experiment.draft=llama-3.2-1b",)
    plain, drafting = (
        simulations.cluster(build(*words, f"speculation={name}", experiment="simulate")).pools["main"].replica
        for name in ("off", "fixed")
    )
    assert plain.scheduler.num_blocks > drafting.scheduler.num_blocks
    assert plain.num_chips == drafting.num_chips == 1


def test_swapping_moves_blocks_over_the_host_link():
    words = ("experiment.num_swap_blocks=100", "experiment.host_link_bytes_per_s=1e10")
    replica = simulations.cluster(build(*words, experiment="simulate")).pools["main"].replica
    assert replica.scheduler.preemption == "swap"
    block_bytes = 16 * MODEL_SHAPES["llama-3.1-8b"].kv_bytes_per_token
    assert replica.swap_block_s == pytest.approx(block_bytes / 1e10)


class FakeLLM:
    def configure(self, drafter: Any, **options: Any) -> FakeLLM:
        self.options = options
        return self


def configured(*overrides: str) -> dict[str, Any]:
    fake: Any = FakeLLM()
    common.configure(fake, build(*overrides))
    return fake.options


def test_the_engine_gets_the_options_of_its_scheduler():
    options = configured("policy.order=priority", "policy.ageing_s=2", "policy.decode_first=false")
    assert options["policy"] == {"name": "chunked", "decode_first": False}
    assert (options["order"], options["ageing_s"]) == ("priority", 2.0)
    options = configured("engine.num_swap_blocks=7", "engine.num_scheduler_steps=3")
    assert (options["num_swap_blocks"], options["num_scheduler_steps"]) == (7, 3)
    assert options["ageing_s"] == float("inf")
    options = configured("speculation=load_threshold", "speculation.max_running=5")
    assert (options["num_drafts"], options["speculation"]) == (
        4,
        {"name": "load_threshold", "max_running": 5},
    )
    times = ("speculation.step_tokens=[1,2]", "speculation.step_s=[0.1,0.2]", "speculation.draft_step_s=0.01")
    options = configured("speculation=goodput", *times)
    assert make_controller(max_drafts=options["num_drafts"], **options["speculation"]).max_drafts == 8


def sweep_config(*overrides: str) -> Config:
    words = (
        *SMALL,
        "experiment.only=[static,chunked_sjf]",
        "experiment.loads=[0.3,3]",
        "experiment.workers=1",
    )
    return build(*words, "experiment.max_num_seqs=4", *overrides, experiment="policy_sweep")


def test_a_sweep_says_what_each_policy_serves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = sweep_config()
    summary = execute(config, tmp_path, None)
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 6, "two saturated runs and two loads of two policies"
    assert summary["num_cells"] == 4
    assert set(summary["policies"]) == {"static", "chunked_sjf"}
    chunked = summary["policies"]["chunked_sjf"]
    assert chunked["served_load_per_s"] == pytest.approx(0.3 * summary["capacity_per_s"])
    assert chunked["breaks_at_per_s"] == pytest.approx(3 * summary["capacity_per_s"])
    assert (tmp_path / "plots" / "goodput_and_latency.png").is_file()

    calls: list[float | None] = []
    simulate_cell = policy_sweep.simulate_cell

    def counted(config: Config, key: str, name: str, rate_per_s: float | None) -> dict[str, Any]:
        calls.append(rate_per_s)
        return simulate_cell(config, key, name, rate_per_s)

    monkeypatch.setattr(policy_sweep, "simulate_cell", counted)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "ab')  # killed while it wrote
    again = execute(replace(config, experiment=replace(config.experiment, min_share=0.5)), tmp_path, None)
    assert calls == []
    assert again["capacity_per_s"] == summary["capacity_per_s"]
    execute(sweep_config("experiment.loads=[0.3,3,1]"), tmp_path, None)
    assert calls == [pytest.approx(summary["capacity_per_s"])] * 2


def test_a_wrong_policy_of_a_sweep_is_named_before_anything_runs(tmp_path: Path):
    config = sweep_config("experiment.policies.static.policy.name=statik")
    with pytest.raises(ValueError, match=r"unknown experiment\.policies\.static\.policy\.name 'statik'"):
        execute(config, tmp_path, None)
    assert not (tmp_path / "cells.jsonl").exists()


def test_the_bench_measures_each_case_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sim_bench, "TIMEOUTS", 1000)
    cases = "experiment.cases=[simpy_timeouts,azure_fixed,goodput_prefix]"
    words = ["tracking=disabled", cases, "experiment.num_requests=60", "experiment.num_prefix_requests=40"]
    summary = execute(build(*words, "experiment.rate_per_s=60", experiment="sim_bench"), tmp_path, None)
    for case, least in [("simpy_timeouts", 1000), ("azure_fixed", 60), ("goodput_prefix", 10)]:
        assert summary[case]["num_requests"] >= least
        assert summary[case]["requests_per_cpu_s"] > 0
        assert summary[case]["wall_s"] > 0
        assert 20 < summary[case]["peak_rss_mb"] < 500, "of the process, not of the one that started it"
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 3


def test_the_bench_grows_by_half_decades_and_adds_the_million_when_asked():
    options = build(
        "experiment.cases=[linear]", "experiment.max_requests=100000", experiment="sim_bench"
    ).experiment
    assert [num for _, _, num, _ in sim_bench._plan(options)] == [1000, 3162, 10_000, 31_623, 100_000]
    assert sim_bench._plan(replace(options, million=True))[-1] == ("million", "million", 1_000_000, 2)
    figure, slope = plots_load.growth([1e3, 1e4, 1e5], [2.0, 20.0, 200.0])
    assert slope == pytest.approx(1.0)
    assert "slope 1.00" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    with pytest.raises(ValueError, match="at least two"):
        plots_load.growth([1.0], [1.0])


def test_curves_mark_where_policies_break():
    cells = pl.DataFrame(
        {
            "policy": ["static", "static", "chunked", "chunked"],
            "rate_per_s": [1.0, 2.0, 1.0, 2.0],
            "goodput_per_s": [0.5, 0.1, 1.0, 1.9],
            "ttft_p99_s": [1.0, 9.0, 0.1, 0.4],
            "tpot_p99_s": [0.1, 0.2, 0.01, None],
        }
    )
    figure = plots_load.policy_curves(cells, {"static": 2.0}, slo_s={"ttft_s": 1.0})
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == ["static", "chunked", "breaks"]
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in crosses] == [[2.0]]


def multirun(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "specdec.run", "--multirun", "+experiment=simulate", *SMALL]
    return subprocess.run(
        [*start, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def seeds_and_states(folder: Path) -> list[tuple[str, int | None]]:
    files = sorted(folder.rglob("summary.json"))
    return [(one["status"], one.get("num_finished")) for one in (json.loads(f.read_text()) for f in files)]


def test_a_sweep_of_simulations_goes_through_joblib_and_survives_a_failure(tmp_path: Path):
    done = multirun(tmp_path, "experiment.num_blocks=2,500", "experiment.trace_steps=false")
    assert "Joblib.Parallel(n_jobs=-1" in done.stdout
    assert done.returncode == 1
    assert "needs 7 KV blocks" in done.stderr and "Traceback" not in done.stderr
    assert seeds_and_states(tmp_path) == [("failed", None), ("ok", 30)]


def test_a_sweep_of_simulations_goes_through_ray(tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    words = ("hydra/launcher=ray", "seed=0,1", "experiment.trace_steps=false")
    done = multirun(tmp_path, *words, HOME=str(tmp_path))  # where Ray puts its token
    assert done.returncode == 0, done.stderr
    assert seeds_and_states(tmp_path / "runs") == [("ok", 30), ("ok", 30)]
