"""The calibration of a tiny model: a short run of seconds, resumed, and what it writes used in a simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments import calibrate, device_passes, simulations
from experiments.device_passes import MIN_SIZES, DevicePasses, Size, WholeStep
from sim.cost_model import CostModel
from sim.hardware import load_hardware
from sim.step_features import StepFeatures, check_features, stack_features
from specdec.config import register, validate
from specdec.run import conf_dir, execute
from specdec.scheduler import SchedulerConfig
from tests.experiments.tiny import run_tiny
from tests.test_configs import build

SMALL = (
    "experiment.budget_s=1.5",
    "engine.max_num_seqs=4",
    "experiment.whole_steps=4",
    "experiment.device_name=tiny",
)
KINDS = {"dense", "head", "decode", "verify", "tree", "prefill", "mixed", "engine", "draft", "device"}


@pytest.fixture(scope="module")
def calibrated(tiny_llama_dir, tmp_path_factory) -> tuple[dict, Path]:
    directory = tmp_path_factory.mktemp("calibrated") / "run"
    return run_tiny("calibrate", tiny_llama_dir, directory, *SMALL), directory


def read(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "passes.jsonl").read_text().splitlines()]


def test_every_kind_is_measured_in_rounds(calibrated):
    summary, directory = calibrated
    rows = read(directory)
    assert {row["kind"] for row in rows} == KINDS
    passes = [row for row in rows if row["kind"] in calibrate.read_passes(rows)["kind"].unique()]
    assert all(row["seconds"] > 0.0 for row in passes)
    first, second = ([row for row in passes if row["round"] == number] for number in (0, 1))
    sizes = [
        [(row["kind"], row["rows"], row["tokens"], row["context"]) for row in one] for one in (first, second)
    ]
    assert sorted(sizes[0]) == sorted(sizes[1]) and sizes[0] != sizes[1], "rounds have orders of their own"
    assert all(
        sum(size[0] == kind for size in sizes[0]) >= MIN_SIZES for kind in ("dense", "decode", "prefill")
    )
    assert summary["num_rounds"] >= 2 and summary["whole_steps"]["num_points"] == 4
    assert set(summary["held_out"]) == {
        "dense",
        "lm_head",
        "decode_attention",
        "verification",
        "prefill_attention",
        "tree_verification",
    }
    for name in ("operators", "whole_steps"):
        assert (directory / "plots" / f"{name}.png").is_file()


def test_what_is_written_is_a_cost_model_with_its_sheet(calibrated):
    summary, directory = calibrated
    folder = directory / "hardware" / "tiny"
    model, sheet = CostModel.load(folder), load_hardware(folder / "hardware.yaml")
    assert sheet.timings == str(folder) and sheet.kind == "cpu" and "measured" in sheet.sheet_source
    assert sheet.memory_bytes_per_s > 0.0 and sheet.flops_per_s["float32"] > 0.0
    for name in ("model", "device", "torch", "date", "backend", "threads"):
        assert model.metadata[name], name
    assert model.metadata["backend"] == "eager" and model.operators.draft_row_s > 0.0
    small, large = (
        model.predict_scalar(StepFeatures(rows, rows, rows, rows, rows * 50, 0, 0, 0, 0, 0)).total_s
        for rows in (1, 4)
    )
    assert 0.0 < small <= large < 1.0
    assert (
        summary["command"].startswith("CostModel.load(")
        and "no shape that simulate knows" in summary["command"]
    )


def test_a_stopped_run_goes_on(calibrated, tiny_llama_dir, monkeypatch):
    summary, directory = calibrated
    path = directory / "passes.jsonl"
    lines = path.read_text().splitlines()
    (directory / "summary.json").unlink()
    half = len(lines) // 2
    path.write_text("\n".join(lines[:half]) + '\n{"kind": "den')
    again = run_tiny("calibrate", tiny_llama_dir, directory, *SMALL)
    kept = path.read_text().splitlines()
    assert kept[:half] == lines[:half]
    rows = [
        row for row in (json.loads(line) for line in kept if line.endswith("}")) if row["kind"] != "draft"
    ]
    assert len({calibrate._key(row) for row in rows}) == len(rows), "nothing is measured twice"
    assert again["held_out"].keys() == summary["held_out"].keys()
    # All is there: only the fit is made again, and a copy written.
    (directory / "summary.json").unlink()
    monkeypatch.setattr(calibrate.common, "build_llm", None)
    copy = directory.parent / "copy"
    same = run_tiny(
        "calibrate", tiny_llama_dir, directory, *SMALL, f"experiment.output={copy}", "experiment.budget_s=0.1"
    )
    assert same["held_out"] == again["held_out"]
    assert CostModel.load(copy / "hardware" / "tiny").metadata == CostModel.load(same["folders"][0]).metadata


def test_simulations_use_the_folder(calibrated, tmp_path):
    """The tiny model's curves under the name of a model that simulations know."""
    _, directory = calibrated
    found = CostModel.load(directory / "hardware" / "tiny")
    folder = tmp_path / "hardware" / "tiny"
    known = found.metadata | {"model": "smollm2-135m", "dtype": "bfloat16"}
    CostModel(found.operators, num_layers=30, metadata=known).save(folder)
    chosen = (f"hardware.timings={folder}", "experiment.model=smollm2-135m", "speculation=fixed")
    for experiment in ("simulate", "policy_sweep"):
        config = build(*chosen, experiment=experiment)
        model = simulations.cluster(config).pools["main"].replica.cost_model
        assert model.operators.dense == found.operators.dense
    with pytest.raises(ValueError, match=r"is of model 'smollm2-135m', not of 'llama-3\.1-8b'"):
        simulations.cluster(build(chosen[0], "experiment.model=llama-3.1-8b", experiment="simulate"))


def test_the_printed_command_composes(calibrated, tmp_path):
    _, directory = calibrated
    folder = tmp_path / "hardware" / "tiny"
    sheet = yaml.safe_load((directory / "hardware" / "tiny" / "hardware.yaml").read_text())
    found = CostModel.load(directory / "hardware" / "tiny")
    known = found.metadata | {"model": "smollm2-135m", "dtype": "bfloat16"}
    CostModel(found.operators, num_layers=30, metadata=known).save(folder)
    text = "# @package hardware\n" + yaml.safe_dump(sheet | {"timings": str(folder)})
    (folder / "hardware.yaml").write_text(text)
    limits = {"max_num_seqs": 4, "num_blocks": 100, "block_size": 16, "max_model_len": 512}
    device = {"model": "smollm2-135m", "limits": limits, "dtype": "bfloat16"}
    words = calibrate._command(tmp_path, "tiny", device, 0.5).split()
    assert words[:5] == ["python", "-m", "specdec.run", "--config-dir", str(tmp_path)]
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = validate(
            compose(
                "config", overrides=[*words[5:], "tracking=disabled", f"hydra.searchpath=[file://{tmp_path}]"]
            )
        )
    assert config.hardware.name == "tiny" and config.experiment.num_blocks == 100
    assert (config.experiment.rate_per_s, config.experiment.prompt_len) == (2.0, 64)
    assert config.hardware.price_per_hour_usd is None, "nothing is left of another chip's sheet"
    assert simulations.cluster(config).pools["main"].replica.scheduler.num_blocks == 100
    summary = execute(config, tmp_path / "simulated", None)
    assert summary["num_requests"] == 200 and summary["timings"] == [known["origin"]]


def passes(monkeypatch, law, **limits) -> DevicePasses:
    found = object.__new__(DevicePasses)
    found._limits = SchedulerConfig(**limits)
    found.max_tokens = min(found._limits.max_num_batched_tokens, found._limits.num_blocks)
    found.longest = min(found._limits.max_model_len, found._limits.num_blocks * found._limits.block_size) - 1
    found._max_logits = found.max_tokens
    monkeypatch.setattr(DevicePasses, "size_s", lambda self, size: law(size))
    return found


def test_the_grid_stays_within_the_limits(monkeypatch):
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 600, "max_model_len": 1000}
    grid = passes(monkeypatch, None, **limits).grid()
    assert len(grid) == len(set(grid))
    for size in grid:
        assert size.rows * -(-(size.context + size.tokens) // 16) <= 600
        assert size.context + size.tokens < 1000 and size.rows * size.tokens <= 512
    dense = {size.rows for size in grid if size.kind == "dense"}
    assert {size.rows * size.tokens for size in grid} <= dense, "each pass has single tokens to compare with"
    assert {size.rows for size in grid if size.kind == "decode"} >= {1, 2, 4, 8, 16, 32, 64}


def test_a_slow_device_measures_fewer_sizes(monkeypatch):
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 600, "max_model_len": 1000}

    def law(size: Size) -> float:
        return 1e-3 * size.work

    made = passes(monkeypatch, law, **limits)
    ample, scarce = made.affordable(1e5), made.affordable(10.0)
    assert set(ample) == set(made.grid()) and set(scarce) < set(ample)
    assert {size.total for size in scarce} <= {size.rows for size in scarce if size.kind == "dense"}
    for kind in ("dense", "head", "decode", "verify", "prefill"):
        assert sum(size.kind == kind for size in scarce) >= MIN_SIZES


def test_trees_are_binary_and_rows_have_their_own(monkeypatch):
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_blocks": 100, "max_model_len": 200}
    made = passes(monkeypatch, None, **limits)
    assert {(size.rows, size.tokens) for size in made.grid() if size.kind == "tree"} == {
        (1, 4), (4, 4), (1, 16), (4, 16), (1, 64)
    }  # fmt: skip
    depths, masks = device_passes._binary_trees(2, 6)
    assert depths.tolist() == [0, 1, 1, 2, 2, 2, 2] * 2
    seen = [[node for node in range(7) if mask >> node & 1] for mask in masks[:7, 0].tolist()]
    assert [len(one) for one in seen[1:]] == [2, 2, 3, 3, 3, 3], "itself and all above it"
    assert (masks[:7] == masks[7:]).all()


def test_random_steps_are_those_of_a_plan(monkeypatch):
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 600, "max_model_len": 1000}
    made = passes(monkeypatch, None, **limits)
    steps = made.whole_steps(20, made.grid(), np.random.default_rng(0))
    check_features(stack_features([step.features for step in steps]))
    assert sum(step.counts.size > step.decoding for step in steps) == 10
    again = made.whole_steps(20, made.grid(), np.random.default_rng(0))
    assert all((one.contexts == two.contexts).all() for one, two in zip(steps, again, strict=True))
    step = WholeStep(np.array([5, 9, 100], np.int32), np.array([3, 3, 40], np.int32), 2)
    assert step.features == StepFeatures(46, 7, 2, 6, 14, 40, 40 * (100 + 20.5), 0, 0, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.budget_s=0", r"experiment\.budget_s=0"),
        ("experiment.device_name=a/b", r"experiment\.device_name='a/b' must consist"),
        ("experiment.whole_steps=-1", r"experiment\.whole_steps=-1"),
    ],
)
def test_options_out_of_range(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        build(override, experiment="calibrate")
