"""Clusters from the command line: pools, autoscaling, failures, limits, drafts on chips of their own, energy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import bill, simulations
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES
from specdec.run import execute
from tests.test_configs import build

KV_BYTES = MODEL_SHAPES["llama-3.1-8b"].kv_bytes_per_token
LONG_PROMPTS = (
    "tracking=disabled",
    "experiment.lengths=fixed",
    "experiment.prompt_len=2000",
    "experiment.output_len=32",
    "experiment.num_requests=60",
    "speculation=off",
)
UNTRACED = ("experiment.trace_steps=false",)
REMOTE = (
    "experiment.draft=llama-3.2-1b",
    "experiment.draft_hardware=l40s",
    "experiment.draft_round_trip_s=0.01",
)


def simulated(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    return execute(build(*LONG_PROMPTS, *overrides, experiment="simulate"), tmp_path, None)


def pools(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["pool"]: row for row in summary["pools"]}


def conserved(summary: dict[str, Any]) -> None:
    ended = summary["num_finished"] + summary["num_rejected"] + summary["num_failed"]
    assert summary["num_submitted"] == ended == 60


def test_prefills_elsewhere_leave_decoding_undisturbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = simulated(tmp_path / "apart", "cluster=disaggregated")
    shown = capsys.readouterr().out
    together = build(*LONG_PROMPTS, *UNTRACED, "experiment.num_replicas=2", experiment="simulate")
    single = replace(together, experiment=replace(together.experiment, num_requests=1))
    mixed, alone = (
        execute(config, tmp_path / str(index), None)["latency"]["tpot_s"]
        for index, config in enumerate((together, single))
    )
    assert mixed["p99"] > 1.3 * alone["p99"], "where a prompt is computed, answers wait"
    assert summary["latency"]["tpot_s"]["p99"] < 1.1 * alone["p99"]

    moved = summary["kv_transfers"]
    assert moved["num"] == summary["num_finished"] == 60
    assert moved["bytes"] == 60 * 2000 * KV_BYTES
    chip = load_hardware("h100")
    assert chip.link_bytes_per_s and chip.link_latency_s
    bare_s = 2000 * KV_BYTES / chip.link_bytes_per_s + chip.link_latency_s
    assert bare_s <= moved["mean_s"] < 1.2 * bare_s, "two prompts that end together wait for the link"

    prefill, decode = pools(summary)["prefill"], pools(summary)["decode"]
    assert prefill["num_finished"] == decode["num_finished"] == 60
    assert decode["replica_s"] == pytest.approx(summary["simulated_s"])
    busy = (prefill["utilisation"] + decode["utilisation"]) / 2
    assert busy == pytest.approx(summary["utilisation"])
    assert prefill["peak_kv_share"] is None and 0.0 < decode["peak_kv_share"] < 1.0
    for word in ("KV transfers", "prefill", "decode", "disaggregated"):
        assert word in shown
    plots = {path.stem for path in (tmp_path / "apart" / "plots").iterdir()}
    assert {"latency_cdf", "gantt_prefill", "gantt_decode", "load_over_time_decode"} <= plots
    assert json.loads((tmp_path / "apart" / "tables" / "pools.json").read_text())[0]["pool"] == "prefill"


def test_a_link_is_the_sheets_unless_given_and_a_draft_s_kv_moves_too():
    def link(*overrides: str) -> Any:
        return simulations.cluster(build("cluster=disaggregated", *overrides, experiment="simulate"))

    plain, given = link().disaggregation, link("cluster.link_bytes_per_s=5e10").disaggregation
    wide = link("experiment.tensor_parallel=2").disaggregation
    assert wide.link_bytes_per_s == 2 * plain.link_bytes_per_s == 2 * 4.5e11
    assert given.link_bytes_per_s == 5e10
    drafting = link("experiment.draft=llama-3.2-1b")
    draft_bytes = MODEL_SHAPES["llama-3.2-1b"].kv_bytes_per_token
    assert drafting.disaggregation.kv_bytes_per_token == plain.kv_bytes_per_token + draft_bytes
    assert not drafting.pools["prefill"].replica.speculates and drafting.pools["decode"].replica.speculates
    far = link(*REMOTE)
    assert far.disaggregation.kv_bytes_per_token == plain.kv_bytes_per_token, (
        "the draft's KV is where it drafts"
    )
    assert [pool.replica.num_chips for pool in far.pools.values()] == [1, 2]


def test_simple_requests_go_to_the_small_model_and_some_on_to_the_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ("cluster=model_routing", "cluster.simple_share=0.6", "cluster.escalation=0.25")
    many = ("experiment.num_requests=600", "experiment.prompt_len=50", "experiment.output_len=4")
    summary = simulated(tmp_path, *words, *many, *UNTRACED)
    small, large = pools(summary)["small"], pools(summary)["large"]
    num_simple = summary["tasks"]["simple"]["num_requests"]
    assert abs(num_simple - 360) < 4 * math.sqrt(600 * 0.6 * 0.4)
    assert small["num_finished"] == num_simple
    assert large["num_finished"] == 600 - num_simple + summary["num_escalated"]
    assert summary["escalated_share"] == summary["num_escalated"] / num_simple
    assert abs(summary["escalated_share"] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / num_simple)
    assert summary["discarded_tokens"] == summary["num_escalated"] * 54
    assert (small["model"], large["model"]) == ("llama-3.2-1b", "llama-3.1-8b")
    assert small["num_blocks"] > large["num_blocks"]
    assert "of the small model's answers" in capsys.readouterr().out
    tpot_s = {task: row["latency"]["tpot_s"]["p50"] for task, row in summary["tasks"].items()}
    assert tpot_s["simple"] < 0.5 * tpot_s["complex"]


def test_a_draft_model_is_one_of_the_large_model():
    words = ("cluster=model_routing", "experiment.tensor_parallel=2", "cluster.num_small=3")
    for overrides, expected in [((), [True, True]), (("experiment.draft=llama-3.2-1b",), [False, True])]:
        built = simulations.cluster(build(*words, *overrides, experiment="simulate")).pools
        assert [pool.replica.speculates for pool in built.values()] == expected
        assert [pool.num_replicas for pool in built.values()] == [3, 1]
        assert [pool.replica.num_chips for pool in built.values()] == [1, 2]


def test_a_replayed_trace_has_its_own_simple_tasks(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    lines = ["Timestamp,Request tokens,Response tokens,Log Type"]
    lines += [f"{i},50,4,{'chat' if i % 3 else 'api'}" for i in range(9)]
    trace.write_text("\n".join(lines) + "\n")
    words = [
        "tracking=disabled",
        "cluster=model_routing",
        "cluster.escalation=0",
        f"experiment.trace={trace}",
    ]
    words += ["experiment.arrivals=trace", "experiment.num_requests=null", *UNTRACED]
    config = build(*words, "cluster.simple_tasks=[chat]", experiment="simulate")
    summary = execute(config, tmp_path / "run", None)
    assert [pools(summary)[name]["num_finished"] for name in ("small", "large")] == [6, 3]
    assert summary["num_escalated"] == summary["escalated_share"] == 0
    for override, message in [
        ("cluster.simple_tasks=[chats]", r"cluster\.simple_tasks 'chats': did you mean chat"),
        ("cluster.simple_share=0.5", r"needs cluster\.simple_tasks"),
    ]:
        config = build(*words, override, experiment="simulate")
        with pytest.raises(ValueError, match=message):
            simulations.cluster(config)
            simulations.source(config)


SURGE = (
    "experiment.rate_per_s=40",
    "experiment.router=least_outstanding",
    "autoscaling=on",
    "autoscaling.target_outstanding=4",
    "autoscaling.interval_s=0.2",
    "autoscaling.cold_start_s=0.1",
)


def test_autoscaling_pays_for_replicas_only_while_they_are_there(tmp_path: Path):
    summary = simulated(tmp_path / "scaled", *SURGE)
    fixed = simulated(tmp_path / "fixed", *SURGE[:2])
    main, span_s = pools(summary)["main"], summary["simulated_s"]
    conserved(summary)
    assert main["num_launched"] == 4
    assert 1.0 < main["mean_replicas"] < 4.0
    assert (
        main["replica_s"] == pytest.approx(summary["chip_s"]) == pytest.approx(main["mean_replicas"] * span_s)
    )
    assert summary["latency"]["ttft_s"]["mean"] < 0.7 * fixed["latency"]["ttft_s"]["mean"]
    rent = summary["chip_s"] / 3600 * 2.69 / summary["num_generated"] * 1e6
    assert summary["cost"]["per_million_tokens_usd"] == pytest.approx(rent)
    assert not (tmp_path / "scaled" / "trace").exists(), "replicas that come and go are not traced"


FAILING = ("failures=on", "failures.mean_time_to_failure_s=1.5", "failures.mean_repair_s=0.3")


def test_failures_make_requests_begin_anew_and_lose_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = (*FAILING, "experiment.num_replicas=2", "failures.max_retries=50")
    summary = simulated(tmp_path / "patient", *words)
    conserved(summary)
    assert summary["num_retried"] > 0 == summary["num_failed"]
    assert pools(summary)["main"]["num_failures"] > 1
    assert "a request began anew" in capsys.readouterr().out
    strict = simulated(tmp_path / "strict", *words, "failures.max_retries=0")
    conserved(strict)
    assert strict["num_failed"] > 0 == strict["num_retried"]
    assert "failed" in capsys.readouterr().out


OVERLOAD = ("experiment.rate_per_s=150", "limits.max_outstanding=5", "failures.mean_time_to_failure_s=0.2")


@pytest.mark.parametrize("kind", ["plain", "disaggregated", "model_routing"])
def test_everything_goes_with_every_cluster_and_nobody_is_lost(tmp_path: Path, kind: str):
    summary = simulated(tmp_path, f"cluster={kind}", *SURGE, *FAILING, *OVERLOAD)
    conserved(summary)
    assert summary["num_rejected"] > 0
    assert summary["num_retried"] > 0
    assert sum(row["num_launched"] for row in summary["pools"]) > len(summary["pools"])
    if kind == "disaggregated":
        assert summary["kv_transfers"]["num"] >= summary["num_finished"]


def test_what_is_above_a_limit_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("experiment.arrivals=all_at_once", "experiment.num_replicas=2", *UNTRACED)
    summary = simulated(tmp_path, *words, "limits.max_outstanding_per_replica=8")
    assert (summary["num_rejected"], summary["num_finished"]) == (44, 16)
    assert "rejected 44 (73.3%)" in capsys.readouterr().out


def test_a_draft_on_its_own_chip_adds_the_network_to_each_step(tmp_path: Path):
    words = ("speculation=fixed", "experiment.arrivals=closed_loop", "experiment.num_users=1")
    words += ("experiment.think_time_s=0", "experiment.num_requests=4", *REMOTE)
    slow = simulated(tmp_path / "slow", *words)
    fast = simulated(tmp_path / "fast", *words, "experiment.draft_round_trip_s=0")
    near = simulated(tmp_path / "near", *words[:5], "experiment.draft=llama-3.2-1b")
    steps = [summary["drafting"]["step_s"] for summary in (slow, fast, near)]
    assert steps[0] - steps[1] == pytest.approx(0.01)
    assert steps[2] < 0.5 * steps[1], "an L40S reads the draft's weights at a quarter of the speed"
    assert slow["drafting"]["share"] > fast["drafting"]["share"] > near["drafting"]["share"] > 0.0
    assert slow["chip_s"] == pytest.approx(2 * slow["simulated_s"])
    assert near["chip_s"] == pytest.approx(near["simulated_s"])
    assert slow["pools"][0]["num_blocks"] > near["pools"][0]["num_blocks"], "the weights are elsewhere"
    usd = slow["simulated_s"] / 3600 * (2.69 + 0.79) / slow["num_generated"] * 1e6
    assert slow["cost"]["per_million_tokens_usd"] == pytest.approx(usd)


def test_drafting_that_was_not_recorded_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = simulated(tmp_path, "speculation=fixed", *REMOTE, "experiment.trace_steps=false")
    assert summary["drafting"]["step_s"] is None
    assert "– (steps were not recorded: experiment.trace_steps=true" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_goodput_controller_knows_the_network():
    def draft_step_s(*overrides: str) -> float:
        config = build("speculation=goodput", "speculation.num_drafts=4", *overrides, experiment="simulate")
        speculation: Any = simulations.cluster(config).pools["main"].replica.speculation
        return speculation["draft_step_s"]

    far, near = draft_step_s(*REMOTE), draft_step_s(*REMOTE, "experiment.draft_round_trip_s=0")
    assert far - near == pytest.approx(0.01 / 4)
    assert near > 2 * draft_step_s("experiment.draft=llama-3.2-1b")


def test_kv_blocks_are_as_many_as_both_chips_hold():
    words = ("experiment.draft=llama-3.1-8b", "experiment.draft_hardware=rtx_4090", "hardware=b200")
    words += ("experiment.draft_round_trip_s=0",)
    num_blocks = (
        simulations.cluster(build(*words, experiment="simulate")).pools["main"].replica.scheduler.num_blocks
    )
    free = 0.9 * 25250627584 - MODEL_SHAPES["llama-3.1-8b"].weight_bytes
    assert num_blocks == free // (16 * KV_BYTES)


def energy_of(*overrides: str) -> dict[str, Any]:
    """Two replicas, one for 100 s half busy and one for 50 s all busy, that made 1000 tokens, half of them good."""
    config = build(*overrides, experiment="simulate")
    rows = [
        {"name": "main-0", "paid_s": 100.0, "utilisation": 0.5},
        {"name": "main-1", "paid_s": 50.0, "utilisation": 1.0},
    ]
    summary = {
        "num_requests": 10,
        "num_generated": 1000,
        "goodput": {"tokens_per_s": 5.0},
        "throughput": {"duration_s": 100.0},
        "replicas": rows,
    }
    return bill.energy(config, simulations.cluster(config), summary)


def test_energy_is_idle_and_working_power_by_time():
    total_j = 100 * (80.3 + 0.5 * (700 - 80.3)) + 50 * 700
    energy = energy_of("hardware=h200")
    assert energy["total_j"] == pytest.approx(total_j)
    assert energy["per_token_j"] == pytest.approx(total_j / 1000)
    assert energy["per_million_tokens_kwh"] == pytest.approx(total_j / 1000 * 1e6 / 3.6e6)
    assert energy["per_million_good_tokens_kwh"] == pytest.approx(2 * energy["per_million_tokens_kwh"])
    assert energy["reason"] is None
    four = energy_of("hardware=h200", "experiment.tensor_parallel=4")
    assert four["total_j"] == pytest.approx(4 * total_j)
    own = energy_of("hardware.idle_w=70", "experiment.draft=llama-3.2-1b", *remote_on("h200"))
    target_j = 100 * (70 + 0.5 * 630) + 50 * 700
    assert own["total_j"] == pytest.approx(target_j + total_j), "the draft's chip is at work with its target"


def remote_on(chip: str) -> list[str]:
    return [f"experiment.draft_hardware={chip}", "experiment.draft_round_trip_s=0"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], r"hardware\.idle_w of h100 is null: give it, or 700 \(its tdp_w\) as a bound"),
        (["hardware=tpu_v5e", "experiment.dtype=int8"], r"hardware\.tdp_w of tpu_v5e is null: give it$"),
        (
            ["hardware=h200", "experiment.draft=llama-3.2-1b", *remote_on("l40s")],
            r"^idle_w of l40s is null: give it in conf/hardware/l40s\.yaml",
        ),
    ],
)
def test_unknown_power_gives_no_energy_but_the_reason(overrides: list[str], reason: str):
    energy = energy_of(*overrides)
    assert energy["per_million_tokens_kwh"] is energy["total_j"] is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(energy["reason"])


def test_the_energy_of_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = simulated(tmp_path, "hardware=h200", "experiment.trace_steps=false")
    expected_j = summary["chip_s"] * (80.3 + summary["utilisation"] * (700 - 80.3))
    assert summary["energy"]["total_j"] == pytest.approx(expected_j)
    assert "kWh per million tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster=disaggregated", "experiment.num_replicas=2"],
            r"num_replicas=2 is of cluster=plain.*num_prefill",
        ),
        (
            ["cluster=model_routing", "experiment.num_replicas=2"],
            r"num_replicas=2 is of cluster=plain.*num_small",
        ),
        (
            ["cluster=disaggregated", "hardware=tpu_v5e"],
            r"link_latency_s of tpu_v5e is null: give cluster\.link_la",
        ),
        (
            ["cluster=model_routing", "cluster.simple_tasks=[a]"],
            r"simple_tasks=\['a'\] is for experiment\.arrivals=t",
        ),
        (
            ["autoscaling=on", "experiment.num_replicas=5"],
            r"num_replicas=5 is not within autoscaling\.min_replicas=1",
        ),
        (
            ["autoscaling=on", "cluster=disaggregated", "cluster.num_decode=5"],
            r"cluster\.num_decode=5 is not within",
        ),
        (
            ["autoscaling=on", "experiment.trace_steps=true"],
            r"trace_steps=true does not go with autoscaling=on",
        ),
        (["failures=on", "experiment.trace_steps=true"], r"trace_steps=true does not go with failures=on"),
        (
            ["failures=on", "experiment.workers=2"],
            r"workers=2 needs independent replicas, but after a failure",
        ),
        (["limits.max_outstanding=4", "experiment.workers=2"], r"workers=2 .* a limit over all replicas"),
        (["cluster=disaggregated", "experiment.workers=2"], r"workers=2 .* disaggregation hands requests"),
        (["experiment.draft=llama-3.2-1b", "speculation=off"], r"speculation=off never drafts: drop one"),
        (
            ["speculation=fixed", "speculation.num_drafts=0", *REMOTE],
            r"speculation\.num_drafts=0 never drafts",
        ),
        (
            ["speculation=fixed", "experiment.draft=qwen3-32b", *remote_on("rtx_4090")],
            r"qwen3-32b does not fit: .* rtx_4090",
        ),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_runs(
    tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(ValueError, match=message) as caught:
        simulated(tmp_path, *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "plots").exists()
