"""Closed forms against what was measured elsewhere: steady serving, and published speed-ups."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES
from sim.profiles.chips import chip_cost_model
from sim.published import Engine, Predictor, fit_engine, known_chips, left_out_predictions, orders, read_table
from sim.silicon import fit_host, predict, read_rows
from sim.steady_state import HostOverhead, OperatingPoint, kernel_seconds, latencies

HEADER = "id,backend,model_path,system,mode,isl,osl,gemm_quant_mode,batch_size,tp_size,silicon_ttft_ms,silicon_tpot_ms"


@pytest.fixture(scope="module")
def a100() -> Predictor:
    table = read_table()
    return Predictor(load_hardware(table.chip), table.target, table.context)


def test_a_plain_step_has_no_speed_up(a100: Predictor):
    table = read_table()
    for method in table.methods:
        parts = a100.parts(method, Engine())
        assert parts.verify_s >= parts.plain_s > 0.0
        assert a100.speedup(method, Engine()) == pytest.approx(method.tau / parts.relative)


def test_published_speed_ups_are_predicted_from_the_other_methods(a100: Predictor):
    table = read_table()
    predicted = left_out_predictions(a100, table.methods)
    errors = np.array([predicted[one.name] / one.speedup - 1.0 for one in table.methods])
    assert np.median(np.abs(errors)) < 0.06 and np.abs(errors).max() < 0.2


def test_fewer_operations_per_byte_cost_methods_that_verify_many_tokens(a100: Predictor):
    table = read_table()
    (consumer,) = (Predictor(chip, table.target, table.context) for chip in known_chips(["rtx_3090"]))
    alone, batched = (orders([a100, consumer], table, batch) for batch in (1, 8))
    assert alone["rtx_3090"]["Lookahead"] < 1.0 < alone["a100"]["Lookahead"]
    assert list(batched["a100"]) != list(batched["rtx_3090"])
    assert batched["rtx_3090"]["prompt lookup"] > batched["rtx_3090"]["EAGLE-2"]
    assert batched["a100"]["prompt lookup"] < batched["a100"]["EAGLE-2"]


def test_an_engine_needs_three_methods(a100: Predictor):
    with pytest.raises(ValueError, match="cannot tell three figures"):
        fit_engine(a100, read_table().methods[:2])


def test_a_table_of_another_form_is_refused(tmp_path: Path):
    (tmp_path / "table.yaml").write_text("source: somewhere\n")
    with pytest.raises(ValueError, match="is not such a table"):
        read_table(tmp_path / "table.yaml")


def test_one_user_waits_for_nobody():
    model = chip_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
    kernels = kernel_seconds(model, OperatingPoint(prompt=1000, output=100, concurrency=1))
    ttft_s, tpot_s = latencies(
        OperatingPoint(prompt=1000, output=100, concurrency=1), kernels, HostOverhead()
    )
    assert tpot_s == pytest.approx(kernels.decode_s)
    assert ttft_s == pytest.approx(kernels.prefill_s + 1.5 * kernels.decode_s)


def test_others_prompts_slow_each_token_down():
    model = chip_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
    point = OperatingPoint(prompt=4000, output=100, concurrency=64)
    kernels = kernel_seconds(model, point)
    _, tpot_s = latencies(point, kernels, HostOverhead(step_s=1e-3))
    assert tpot_s == pytest.approx(1e-3 + kernels.decode_s + 63 * kernels.prefill_s / 100)


def test_users_that_do_not_fit_wait_outside():
    model = chip_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
    point = OperatingPoint(prompt=1000, output=100, concurrency=64, max_running=16.5)
    kernels = kernel_seconds(model, point)
    assert (kernels.running, kernels.waiting) == (16.0, 48.0)


def test_silicon_rows_are_chosen_split_and_fitted(tmp_path: Path):
    path = tmp_path / "silicon.csv"
    model = chip_cost_model(load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"])
    truth = HostOverhead(step_s=2e-3, request_s=0.05)
    lines = [HEADER, "moe,vllm,deepseek-ai/DeepSeek-R1,h100_sxm,agg,1,1,fp8,1,8,1,1"]
    lines.append("fp4,vllm,meta-llama/Llama-3.1-8B,b200_sxm,agg,100,100,nvfp4,1,1,1,1")
    for number, users in enumerate((1, 4, 16, 32, 64, 128)):
        point = OperatingPoint(prompt=500, output=200, concurrency=users)
        ttft_s, tpot_s = latencies(point, kernel_seconds(model, point), truth)
        lines.append(
            f"row{number},vllm,meta-llama/Llama-3.1-8B,h100_sxm,agg,500,200,,{users},1,{1e3 * ttft_s},{1e3 * tpot_s}"
        )
    path.write_text("\n".join(lines) + "\n")
    rows, left = read_rows(path)
    assert left == {"not a dense model that is known here": 1, "products in nvfp4": 1}
    assert [row.is_held_out for row in rows] == [zlib.crc32(row.row_id.encode()) % 2 == 1 for row in rows]
    host = fit_host(rows)
    ttft_s, tpot_s = predict(rows, host)
    np.testing.assert_allclose(tpot_s, [row.tpot_s for row in rows], rtol=0.03)
    np.testing.assert_allclose(ttft_s, [row.ttft_s for row in rows], rtol=0.1)


def test_a_table_without_columns_is_refused(tmp_path: Path):
    (tmp_path / "silicon.csv").write_text("id,backend\na,b\n")
    with pytest.raises(ValueError, match="has no column model_path"):
        read_rows(tmp_path / "silicon.csv")
