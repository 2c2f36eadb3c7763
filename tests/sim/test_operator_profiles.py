"""Operator profiles of one model become the cost model of that model, and the curves of its chip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sim.cost_model import roofline_cost_model
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES, PROFILED_SHAPES
from sim.profiles.chips import chip_cost_model, load_profile
from sim.profiles.fitting import hold_out, simplified
from sim.profiles.llmservingsim import profile_folders, read_profile
from sim.profiles.transfer import chip_profile, completed
from sim.step_features import StepFeatures
from tests.helpers.operator_profiles import decode_us, layer_us, mixed_us, prefill_us, write_profile

LLAMA = MODEL_SHAPES["llama-3.1-8b"]


def step(rows: int = 0, context: int = 0, chunk: int = 0) -> StepFeatures[float]:
    pairs = 0.5 * chunk * (chunk + 1.0)
    return StepFeatures(rows + chunk, rows, rows, rows, rows * context, chunk, pairs, 0, 0, 0)


@pytest.mark.parametrize(
    ("rows", "context", "chunk"), [(8, 1024, 0), (64, 256, 0), (0, 0, 1024), (32, 1024, 256)]
)
def test_a_step_is_the_sum_of_the_profiled_kernels(tmp_path: Path, rows: int, context: int, chunk: int):
    model = read_profile(write_profile(tmp_path / "profile")).cost_model(num_layers=32)
    tokens = rows + chunk
    layer = layer_us(tokens) + 2.0 + 2.0 / 32
    attention = prefill_us(chunk, 0) if chunk else 0.0
    attention += (
        mixed_us(rows, context, chunk) if rows and chunk else decode_us(rows, context) if rows else 0.0
    )
    head = 520.0 + 0.2 * rows if rows else 0.0
    assert model.predict(step(rows, context, chunk)).total_s * 1e6 == pytest.approx(
        32 * (layer + attention) + head, rel=0.12
    )


def test_held_out_errors_name_every_operator(tmp_path: Path):
    errors = read_profile(write_profile(tmp_path / "profile")).held_out()
    assert set(errors) == {
        "dense",
        "lm_head",
        "sampling",
        "decode_attention",
        "prefill_attention",
        "mixed_attention",
    }
    assert errors["lm_head"]["median"] < 0.01
    assert all(0.0 <= error["median"] <= error["p90"] for error in errors.values())


def test_whole_sizes_are_left_out_and_never_the_ends():
    sizes, seen = np.repeat(np.arange(6), 2), list[set[int]]()

    def fit(kept: np.ndarray):
        seen.append(set(sizes[~kept].tolist()))
        return lambda left: np.full(int(left.sum()), 2.0)

    error = hold_out(fit, sizes.astype(np.int64), np.ones(12), num_folds=2)
    assert seen == [{1, 3}, {2, 4}]
    assert error.median == pytest.approx(1.0) and error.num_points == 8


def test_chips_curves_give_the_profiled_model_back(tmp_path: Path):
    profile = read_profile(write_profile(tmp_path / "profile"))
    chip = chip_profile([(profile, LLAMA)], load_hardware("rtx_4090"))
    chip.save(tmp_path / "chip.json")
    assert (tmp_path / "chip.json").stat().st_size < 30_000
    again = load_profile(tmp_path / "chip.json")
    assert again.mixed is not None and again.sampling is not None and again.licence.startswith("MIT")
    assert again.decode[4](np.array([4096.0 * 1e5])) == pytest.approx(
        chip.decode[4](np.array([4096.0 * 1e5])), rel=1e-3
    )


def test_a_profile_is_completed_only_by_one_of_the_same_chip(tmp_path: Path):
    profile = read_profile(write_profile(tmp_path / "profile"))
    chip = chip_profile([(profile, LLAMA)], load_hardware("rtx_4090"))
    with pytest.raises(ValueError, match="cannot complete one of rtx_4090"):
        completed(chip, chip_profile([(profile, LLAMA)], load_hardware("l40s")))


def test_several_devices_need_an_all_reduce(tmp_path: Path):
    folder = write_profile(tmp_path / "profile")
    (folder / "tp1").rename(folder / "tp2")
    with pytest.raises(ValueError, match="holds no all-reduce"):
        read_profile(folder, tensor_parallel=2).cost_model(32)


@pytest.mark.parametrize("name", ["dense", "attention", "per_sequence"])
def test_a_missing_table_is_named(tmp_path: Path, name: str):
    folder = write_profile(tmp_path / "profile")
    (folder / "tp1" / f"{name}.csv").unlink()
    with pytest.raises(ValueError, match=rf"no {name}\.csv"):
        read_profile(folder)


def test_experts_cost_what_the_profile_says_of_as_many_as_are_awake(tmp_path: Path):
    """Two of eight experts for a token, 10 us for each that is awake, 1 us for a token; no other feed-forward layer."""
    folder = write_profile(tmp_path / "profile")
    path = folder / "tp1" / "dense.csv"
    lines = path.read_text().splitlines()
    feed_forward = ("gate_up_proj", "down_proj", "act_fn")
    path.write_text("\n".join(line for line in lines if not line.startswith(feed_forward)))
    with pytest.raises(ValueError, match="no feed-forward layer"):
        read_profile(folder)
    before = write_profile(tmp_path / "dense")
    rows = [(t, e, 10.0 * e + t) for t in (1, 4, 64, 2048) for e in (2, 4, 8) if e <= 2 * t]
    (folder / "tp1" / "moe.csv").write_text(
        "tokens,activated_experts,time_us\n" + "\n".join(f"{t},{e},{us}" for t, e, us in rows)
    )
    tokens, with_experts = read_profile(folder).layer_seconds()
    _, dense = read_profile(before).layer_seconds()
    for count in (1, 4, 64, 2048):
        place = int(np.flatnonzero(tokens == count)[0])
        awake = 8 * (1.0 - 0.75**count)
        expected_us = 10.0 * awake + count - 0.63 * layer_us(count)
        assert 1e6 * (with_experts - dense)[place] == pytest.approx(expected_us, rel=1e-6)


def test_a_mixture_of_experts_takes_a_profile():
    shape = PROFILED_SHAPES["qwen3-30b-a3b"]
    assert shape.num_params == pytest.approx(30.5e9, rel=0.01)
    with pytest.raises(ValueError, match="give an operator profile"):
        roofline_cost_model(load_hardware("h100"), shape)
    with pytest.raises(ValueError, match="give an operator profile"):
        chip_cost_model(load_hardware("h100"), shape)


def test_profiles_are_found_below_a_folder(tmp_path: Path):
    write_profile(tmp_path / "chip" / "model" / "bf16")
    assert profile_folders(tmp_path) == [tmp_path / "chip" / "model" / "bf16" / "tp1"]


def test_simplifying_keeps_a_curve_within_its_tolerance():
    from sim.curves import Curve

    x = np.arange(1.0, 200.0)
    curve = Curve(x=tuple(x), seconds=tuple(1e-3 + 1e-5 * x**1.5), relative_std=0.0, source="made up")
    thin = simplified(curve, tolerance=0.01)
    assert len(thin.x) < 20
    np.testing.assert_allclose(thin(x), curve(x), rtol=0.011)
