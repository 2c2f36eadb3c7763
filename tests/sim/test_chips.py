"""The fitted curves of chips: which ship, when they are used, and that they give sound cost models of any shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from sim.hardware import HARDWARE_NAMES, load_hardware
from sim.model_shape import MODEL_SHAPES
from sim.profiles import splitwise, vidur
from sim.profiles.aiconfigurator import find_systems, fit_profile, read_tables
from sim.profiles.chips import (
    DATA,
    chip_cost_model,
    draft_cost_model,
    load_profile,
    profile_of,
    shipped_profile,
)
from sim.profiles.gemm import fit_gemm
from sim.step_features import StepFeatures, stack_features

FITTED = ("a100", "b200", "h100", "h200", "l40s", "rtx_4090", "rtx_pro_6000")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "timings"
LLAMA = MODEL_SHAPES["llama-3.1-8b"]


def decode(rows: int, context: int) -> StepFeatures[float]:
    return StepFeatures(rows, rows, rows, rows, rows * context, 0, 0, 0, 0, 0)


def test_the_promised_chips_ship_small_and_with_licence():
    assert tuple(sorted(path.stem for path in DATA.glob("*.json"))) == FITTED
    for name in FITTED:
        assert (DATA / f"{name}.json").stat().st_size < 40_000
        profile = shipped_profile(name)
        assert profile is not None and profile.name == name
        assert "Apache-2.0" in profile.licence or "MIT" in profile.licence
        assert profile.source and profile.held_out["gemm"]["median"] < 0.1
        assert profile.fits(load_hardware(name))


@pytest.mark.parametrize("name", FITTED)
def test_fitted_curves_give_times_that_rise_and_stay_near_the_roofline(name: str):
    sheet = load_hardware(name)
    fitted = chip_cost_model(sheet, LLAMA)
    plain = chip_cost_model(dataclasses.replace(sheet, timings="roofline"), LLAMA)
    assert str(fitted.metadata["origin"]).startswith("fitted") and plain.metadata["origin"] == "roofline"
    points = [decode(rows, context) for rows in (1, 8, 64, 200) for context in (64, 1_000, 8_000)]
    each = np.array([fitted.predict_scalar(point).total_s for point in points])
    np.testing.assert_allclose(fitted.predict(stack_features(points)).total_s, each, rtol=1e-12)
    assert (np.diff(each.reshape(4, 3), axis=0) >= 0).all() and (
        np.diff(each.reshape(4, 3), axis=1) > 0
    ).all()
    ratio = each / [plain.predict_scalar(point).total_s for point in points]
    assert ((ratio > 0.5) & (ratio < 2.0)).all()
    assert fitted.predict(decode(1, 100)).verify_s > LLAMA.weight_bytes / sheet.memory_bytes_per_s * 0.9


def test_the_roofline_is_taken_where_nothing_fits():
    assert profile_of(load_hardware("tpu_v5e")) is None
    faster = dataclasses.replace(load_hardware("h100"), memory_bytes_per_s=7e12)
    assert profile_of(faster) is None  # a sheet that was changed is another chip
    with pytest.raises(ValueError, match="its sheet was changed"):
        profile_of(dataclasses.replace(faster, timings="fitted"))
    with pytest.raises(ValueError, match="no profile ships"):
        profile_of(dataclasses.replace(load_hardware("tpu_v5e"), timings="fitted"))
    with pytest.raises(ValueError, match="must be one of"):
        dataclasses.replace(load_hardware("h100"), timings="guessed")


def test_every_sheet_gives_a_cost_model_with_a_draft_on_two_devices():
    for name in HARDWARE_NAMES:
        sheet = load_hardware(name)
        model = chip_cost_model(
            sheet, MODEL_SHAPES["llama-3.2-1b"], tensor_parallel=2, draft=MODEL_SHAPES["smollm2-135m"]
        )
        drafting = StepFeatures(40.0, 40.0, 8.0, 40.0, 8e3, 0.0, 0.0, 4.0, 8.0, 32.0)
        assert 0.0 < model.predict(drafting).draft_s < 0.05
        assert draft_cost_model(sheet, MODEL_SHAPES["smollm2-135m"]).predict(drafting).draft_s > 0.0


def test_fp8_products_are_measured_where_the_chip_has_them():
    model = chip_cost_model(load_hardware("h100"), LLAMA, dtype="fp8")
    assert str(model.metadata["origin"]).startswith("fitted")
    assert (
        model.predict(decode(1, 100)).total_s
        < 0.75 * chip_cost_model(load_hardware("h100"), LLAMA).predict(decode(1, 100)).total_s
    )
    assert chip_cost_model(load_hardware("rtx_4090"), LLAMA, dtype="fp8").metadata["origin"] == "roofline"


def test_products_are_found_again_from_noisy_points():
    generator = np.random.default_rng(0)
    m, n, k = (
        generator.choice([1, 16, 64, 256, 1024], 4000),
        *generator.choice([512, 2048, 8192], (2, 4000)),
    )
    m, n, k = (values.astype(np.float64) for values in (m, n, k))
    roofline = np.maximum((2 * n * k + 2 * (n + k) * m) / 1e12, 2 * m * n * k / 1e14)
    seconds = roofline / 0.7 * np.exp(generator.normal(0.0, 0.02, 4000))
    grid, error = fit_gemm(m, n, k, seconds, flops_per_s=1e14, bytes_per_s=1e12, weight_bytes=2.0)
    assert error is not None and error.median < 0.03
    truth = max((2 * 4096**2 + 4 * 4096 * 64) / 1e12, 2 * 64 * 4096**2 / 1e14) / 0.7
    assert grid(np.array([64.0]), 4096, 4096)[0] == pytest.approx(truth, rel=0.05)


def write_aiconfigurator(folder: Path, system: str = "l40s") -> Path:
    folder.mkdir(parents=True)
    sizes = (256, 1024, 4096)
    gemm = [
        (m, n, k, 1e3 * max(2.5 * n * k / 1e12, 3 * m * n * k / 3e14))
        for m in (1, 64, 1024)
        for n in sizes
        for k in sizes
    ]
    pl.DataFrame(gemm, schema=["m", "n", "k", "latency_ms"], orient="row").write_csv(folder / "gemm.csv")
    heads = [(8, 8), (32, 8)]
    decode_rows = [
        (rows, 1, step, h, kv, 128, 1e3 * (8e-6 + rows * (step + 1) * kv * 512 / 7e11), "made up")
        for rows in (1, 4, 16, 64)
        for step in (127, 1023, 8191)
        for h, kv in heads
    ]
    prompts = [
        (1, new, 0, h, kv, 128, 1e3 * (8e-6 + h * 128 * new * new / 1e14), "made up")
        for new in (16, 128, 512, 1024, 4096)
        for h, kv in heads
    ]
    names = [
        "batch_size",
        "isl",
        "step",
        "num_heads",
        "num_key_value_heads",
        "head_dim",
        "latency_ms",
        "kernel_source",
    ]
    reduce = [
        ("vLLM", "0.0", 2, size, 1e3 * (1e-5 + 2 * size / 2e10), "vllm_graph")
        for size in (128, 4096, 1048576)
    ]
    columns = ["framework", "version", "num_gpus", "message_size", "latency", "backend"]
    for name, frame in {
        "gemm_perf.bf16.csv.gz": pl.DataFrame(gemm, schema=["m", "n", "k", "latency_ms"], orient="row"),
        "generation_attention_perf.bf16.csv.gz": pl.DataFrame(decode_rows, schema=names, orient="row"),
        "context_attention_perf.bf16.csv.gz": pl.DataFrame(prompts, schema=names, orient="row"),
    }.items():
        import gzip

        (folder / f"{system}.{name}").write_bytes(gzip.compress(frame.write_csv().encode()))
    pl.DataFrame(reduce, schema=columns, orient="row").write_csv(folder / f"{system}.allreduce.csv")
    return folder


def test_aiconfigurators_tables_become_a_profile(tmp_path: Path):
    folder = write_aiconfigurator(tmp_path / "tables")
    assert find_systems(folder) == {"l40s": folder}
    profile = fit_profile(read_tables("l40s", folder))
    profile.save(tmp_path / "l40s.json")
    sheet = dataclasses.replace(load_hardware("l40s"), timings=str(tmp_path / "l40s.json"))
    model = chip_cost_model(sheet, LLAMA, tensor_parallel=2)
    assert "aiconfigurator l40s" in str(model.metadata["origin"])
    assert model.operators.all_reduce is not None
    assert model.operators.all_reduce(np.array([2 * 4096.0])) == pytest.approx(
        1e-5 + 2 * 4096 / 2e10, rel=0.05
    )
    entries = 64 * 1024
    assert model.operators.decode_attention(np.array([float(entries)])) == pytest.approx(
        8e-6 + entries * 4 * 512 / 7e11, rel=0.1
    )


def test_a_folder_without_tables_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no tables of aiconfigurator"):
        find_systems(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_profile(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a chip's profile"):
        load_profile(tmp_path / "broken.json")


def test_splitwises_whole_steps_become_cost_models(tmp_path: Path):
    header = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
    rows = [
        f"llama2-70b,h100-80gb,{prompt},{batch},128,"
        f"{20 + 0.05 * prompt * batch},{20 + 0.1 * batch + 1e-4 * prompt * batch},8"
        for prompt in (128, 512, 2048)
        for batch in (1, 8, 32)
    ]
    (tmp_path / "perf_model.csv").write_text(header + "\n".join(rows) + "\n")
    (model,) = splitwise.read_cost_models(tmp_path).values()
    assert model.predict(decode(8, 2048)).total_s * 1e3 == pytest.approx(20 + 0.8 + 1e-4 * 2048 * 8, rel=0.15)


def test_vidurs_host_is_a_line_over_rows(tmp_path: Path):
    parts = ["schedule", "prepare_inputs_e2e", "process_model_outputs"]
    header = ",".join([*(f"{part}_median" for part in parts), "batch_size", "tensor_parallel_degree"]) + "\n"
    lines = [f"0.1,0.2,{0.1 + 0.01 * rows},{rows},1" for rows in (8, 16, 64)]
    (tmp_path / "cpu.csv").write_text(header + "\n".join(lines) + "\n")
    host = vidur.read_host_overhead(tmp_path / "cpu.csv")
    assert host.step_s == pytest.approx(4e-4) and host.row_s == pytest.approx(1e-5)


@pytest.mark.skipif(not (SHARED / "vidur").is_dir(), reason="the published tables are not here")
def test_vidurs_a100_agrees_with_the_one_that_ships(tmp_path: Path):
    vidur.chip_profile(SHARED / "vidur", load_hardware("a100")).save(tmp_path / "a100.json")
    other = dataclasses.replace(load_hardware("a100"), timings=str(tmp_path / "a100.json"))
    for rows in (1, 32, 128):
        ours, theirs = (
            chip_cost_model(sheet, LLAMA).predict(decode(rows, 1000)).total_s
            for sheet in (load_hardware("a100"), other)
        )
        assert theirs == pytest.approx(ours, rel=0.25)


def test_sources_stand_in_the_published_table():
    table = yaml.safe_load((DATA / "spec_bench_a100.yaml").read_text())
    assert "Spec-Bench" in table["source"] and len(table["methods"]) == 9
