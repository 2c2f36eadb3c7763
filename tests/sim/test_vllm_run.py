"""Recorded vLLM runs: what is read of them, and that simulating one from its lengths gives what the engine would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from sim.acceptance import make_acceptance
from sim.model_shape import MODEL_SHAPES
from sim.overlapped import OverlappedReplica
from sim.replica import SimRequest
from sim.shared_prompts import PromptSharing
from sim.step_features import StepCost, StepFeatures
from sim.vllm_run import (
    chip_named,
    errors_pct,
    expected_kv_blocks,
    read_run,
    read_summary,
    shape_named,
    simulate_run,
    statistics,
)
from specdec.scheduler import SchedulerConfig, StepLoop, make_controller, make_policy
from tests.helpers.operator_profiles import write_run

STEP_S = 1.0


class EvenSteps:
    """Every step takes a second."""

    def predict_scalar(self, features: StepFeatures[float]) -> StepCost[float]:
        return StepCost(0.0, STEP_S, 0.0, 0.0, 0.0)


def request(arrival_s: float, prompt: int = 32, output: int = 4, **times: float) -> dict[str, Any]:
    defaults = {"queued_ts": arrival_s, "first_token_ts": arrival_s + 1.0, "last_token_ts": arrival_s + 4.0}
    return {"input_toks": prompt, "output_toks": output, "arrival_time": arrival_s, **(defaults | times)}


def replica(*, plans_ahead: bool) -> tuple[simpy.Environment, OverlappedReplica]:
    env = simpy.Environment()
    loop = StepLoop(
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=100, max_model_len=512),
        make_policy("chunked"),
        make_controller("off"),
    )
    acceptance = make_acceptance("constant", alpha=0.0)
    return env, OverlappedReplica(env, loop, EvenSteps(), acceptance, plans_ahead=plans_ahead)


@pytest.mark.parametrize(("plans_ahead", "first_token_s"), [(True, 3.0), (False, 2.0)])
def test_a_newcomer_waits_out_the_step_that_is_planned_already(plans_ahead: bool, first_token_s: float):
    env, one = replica(plans_ahead=plans_ahead)
    early = SimRequest(request_id=0, prompt_len=8, max_tokens=9, output_len=9)
    late = SimRequest(request_id=1, prompt_len=8, max_tokens=2, output_len=2, arrival_s=0.5)
    one.submit(early)

    def arrive() -> Any:
        yield env.timeout(0.5)
        one.submit(late)

    env.process(arrive())
    env.run()
    assert early.first_token_s == 1.0 and early.finish_s == 9.0
    assert one.seen_s == {0: 0.0, 1: 1.0}  # at the end of the step in progress
    assert late.first_token_s == first_token_s


def test_an_idle_engine_sees_an_arrival_at_once(tmp_path: Path):
    recorded = read_run(write_run(tmp_path / "run", [request(0.0), request(10.25)]))
    simulated = simulate_run(recorded, EvenSteps(), 200)
    np.testing.assert_allclose(simulated.seen_s, [0.0, 10.25])
    np.testing.assert_allclose(simulated.latencies["ttft"], STEP_S)
    np.testing.assert_allclose(simulated.latencies["tpot"], STEP_S)
    np.testing.assert_allclose(simulated.latencies["e2e"], 4 * STEP_S)


def test_preempted_blocks_stay_in_the_prefix_cache(tmp_path: Path):
    """Three requests outgrow the pool; the one sent back resumes with what is still cached."""
    rows = [request(0.01 * index, prompt=64, output=64) for index in range(3)]
    settings = {"num_gpu_blocks": 20, "block_size": 16}
    cached = simulate_run(read_run(write_run(tmp_path / "a", rows, **settings)), EvenSteps(), 20)
    assert cached.num_preemptions > 0
    plain_run = read_run(write_run(tmp_path / "b", rows, enable_prefix_caching=False, **settings))
    plain = simulate_run(plain_run, EvenSteps(), 20)
    assert cached.last_token_s.max() <= plain.last_token_s.max()


def test_what_prompts_share_is_computed_once_and_held_once(tmp_path: Path):
    """Two prompts of 256 tokens, one step each; the second begins with 240 tokens of the first."""
    rows = [request(0.0, prompt=256, output=8), request(3.0, prompt=256, output=8)]
    recorded = read_run(write_run(tmp_path / "run", rows, num_gpu_blocks=24))
    sharing = PromptSharing(2, ((1, 0, 240),))
    alone, shared = simulate_run(recorded, EvenSteps(), 24), simulate_run(recorded, EvenSteps(), 24, sharing)
    assert alone.first_token_s[1] > alone.last_token_s[0]  # no room beside the first: 17 of 23 blocks
    assert shared.first_token_s[1] < shared.last_token_s[0]


def test_statistics_and_errors_are_signed_and_named(tmp_path: Path):
    recorded = read_run(write_run(tmp_path / "run", [request(0.0), request(1.0), request(2.0)]))
    found = statistics(recorded.latencies)
    assert found["ttft_mean"] == found["ttft_p99"] == pytest.approx(1.0)
    assert set(found) == {
        f"{kind}_{s}" for kind in ("ttft", "tpot", "e2e") for s in ("mean", "p50", "p90", "p95", "p99")
    }
    slower = {name: 1.1 * values for name, values in recorded.latencies.items()}
    assert errors_pct(slower, recorded.latencies)["e2e_p50"] == pytest.approx(10.0)


def test_expected_blocks_follow_from_memory_and_settings(tmp_path: Path):
    folder = write_run(tmp_path / "run", [request(0.0)])
    recorded = read_run(folder)
    shape = MODEL_SHAPES["llama-3.1-8b"]
    blocks = expected_kv_blocks(recorded, shape)
    free = 0.9 * 25_250_627_584 - shape.weight_bytes
    assert 0.9 * free / (16 * shape.kv_bytes_per_token) < blocks < free / (16 * shape.kv_bytes_per_token)
    meta = json.loads((folder / "meta.json").read_text())
    meta["engine_kwargs"]["max_num_seqs"] = 512
    (folder / "meta.json").write_text(json.dumps(meta))
    assert expected_kv_blocks(read_run(folder), shape) < blocks


def test_names_of_models_and_devices():
    assert shape_named("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"
    assert shape_named("meta-llama/Meta-Llama-3.1-8B").name == "llama-3.1-8b"
    assert shape_named("Qwen/Qwen3-30B-A3B-Instruct-2507").name == "qwen3-30b-a3b"
    assert chip_named("NVIDIA RTX PRO 6000 Blackwell Server Edition") == "rtx_pro_6000"
    assert chip_named("NVIDIA H100 80GB HBM3") == "h100"
    assert chip_named("Some other card") is None
    with pytest.raises(ValueError, match="not known: add it"):
        shape_named("someone/unheard-of-3b")


def test_a_request_that_never_finished_is_refused(tmp_path: Path):
    broken = request(0.0) | {"last_token_ts": None}
    with pytest.raises(ValueError, match="has no last_token_ts"):
        read_run(write_run(tmp_path / "run", [broken]))


def test_the_published_summary_is_read(tmp_path: Path):
    (tmp_path / "summary.txt").write_text("Metric vLLM Sim Diff%\n----\nTTFT P90   200.0   210.0   +5.0%\n")
    assert read_summary(tmp_path) == {"ttft_p90": (200.0, 210.0)}
    assert read_summary(tmp_path / "nowhere") == {}
