"""Seconds of a step against hand-computed rooflines, its two paths against each other, and its limits."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cost_model import (
    CostModel,
    Efficiencies,
    StepCost,
    StepFeatures,
    features,
    roofline_cost_model,
    stack_features,
)
from sim.curves import Curve, Operators
from sim.hardware import HARDWARE_NAMES, load_hardware
from sim.model_shape import MODEL_SHAPES

H100, LLAMA_8B = load_hardware("h100"), MODEL_SHAPES["llama-3.1-8b"]
BANDWIDTH, RATE, ATTENTION_RATE = 3.35e12 * 0.8, 989e12 * 0.75, 989e12 * 0.4
EMPTY = StepFeatures(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def plan(rows: list[tuple[int, int, int, bool]]) -> Any:
    """What ``features`` reads of a plan; a row is (new, drafts, context, emits)."""
    table = np.array(rows, np.int32).reshape(-1, 4)
    return SimpleNamespace(
        num_new=table[:, 0], num_drafts=table[:, 1], context=table[:, 2], emits=table[:, 3].astype(bool)
    )


def decode(rows: int, context: int, drafts: int = 0) -> StepFeatures[float]:
    return features(plan([(1, drafts, context, True)] * rows))


def prefill(new: int, context: int = 0) -> StepFeatures[float]:
    return features(plan([(new, 0, context, False)]))


def curve(*points: tuple[float, float], std: float = 0.0) -> Curve:
    x, seconds = zip(*points, strict=True)
    return Curve(x=x, seconds=seconds, relative_std=std, source="made up")


def measured(**changes: Any) -> CostModel:
    """A model fitted over small ranges, so that larger steps extrapolate."""
    operators = Operators(
        dense=curve((1, 1e-3), (64, 1.5e-3), (256, 4e-3), std=0.05),
        decode_attention=curve((32, 1e-5), (4096, 4e-5), std=0.1),
        prefill_attention=curve((100, 1e-5), (50_000, 4e-4), std=0.2),
        lm_head=curve((1, 1e-3), (128, 2e-3), std=0.03),
        sampling=curve((1, 2e-5), (128, 1e-4), std=0.3),
        verify_pair_s=2e-9,
        prefill_context_s=1e-8,
        overhead_s=3e-4,
        overhead_row_s=1e-6,
        overhead_relative_std=0.5,
    )
    return CostModel(dataclasses.replace(operators, **changes), num_layers=4, metadata={"hardware": "mine"})


MODELS = {
    "plain": roofline_cost_model(H100, LLAMA_8B),
    "draft": roofline_cost_model(H100, LLAMA_8B, draft=MODEL_SHAPES["llama-3.2-1b"]),
    "tensor parallel": roofline_cost_model(
        H100, MODEL_SHAPES["llama-3.1-70b"], tensor_parallel=4, efficiencies=Efficiencies(overhead_row_s=1e-6)
    ),
    "lookup": roofline_cost_model(H100, LLAMA_8B, efficiencies=Efficiencies(draft_row_s=2e-5)),
    "measured": measured(),
    "mixed": measured(
        mixed_attention=curve((32, 2e-5), (4096, 1e-4), std=0.1),
        mixed_row_s=1e-6,
        mixed_row_token_s=1e-9,
        decode_row_entries=64.0,
        decode_context_s=1e-8,
        prefill_token_pairs=200.0,
    ),
}

decoding = st.tuples(st.just(1), st.integers(0, 8), st.integers(0, 100_000), st.just(True))
chunks = st.tuples(st.integers(2, 3_000), st.just(0), st.integers(0, 100_000), st.booleans())
last_token = st.tuples(st.just(1), st.just(0), st.integers(0, 9), st.just(False))
plans = st.lists(decoding | chunks | last_token, min_size=0, max_size=12)


@given(plans)
def test_features_count_row_by_row(rows: list[tuple[int, int, int, bool]]):
    expected = dict.fromkeys(StepFeatures._fields, 0.0)
    for new, drafts, context, emits in rows:
        expected["num_tokens"] += new + drafts
        expected["num_logits"] += (drafts + 1) if emits else 0
        if new == 1 and emits:
            expected["decode_rows"] += 1
            expected["decode_tokens"] += 1 + drafts
            expected["decode_context"] += context
        else:
            expected["prefill_tokens"] += new
            expected["prefill_pairs"] += sum(context + 1 + i for i in range(new))
        expected["draft_steps"] = max(expected["draft_steps"], drafts)
        expected["draft_rows"] += drafts > 0
        expected["draft_tokens"] += drafts
    assert features(plan(rows))._asdict() == expected


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40)
@given(rows=st.lists(plans, min_size=1, max_size=4))
def test_one_by_one_and_all_at_once_agree(name: str, rows: list[list[tuple[int, int, int, bool]]]):
    model = MODELS[name]
    each = [features(plan(row)) for row in rows]
    together = model.predict(stack_features(each))
    for index, one in enumerate(each):
        cost = model.predict_scalar(one)
        assert all(type(value) is float for value in cost)
        assert cost == pytest.approx([column[index] for column in together], rel=1e-12, abs=0.0)
        assert cost.total_s == pytest.approx(together.total_s[index], rel=1e-12)


def test_an_empty_plan_takes_no_time():
    assert MODELS["draft"].predict(EMPTY) == StepCost(0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_matrix_product_by_hand():
    head = MODELS["plain"].operators.lm_head
    vocab, hidden = 128_256, 4_096
    one = (vocab * hidden * 2 + (vocab + hidden) * 2) / BANDWIDTH + 2 * 3e-6
    assert head(1) == pytest.approx(one, rel=1e-12)
    assert head(4_096) == pytest.approx(2 * vocab * hidden * 4_096 / RATE + 2 * 3e-6, rel=1e-9)


def test_a_layer_by_hand():
    dense = MODELS["plain"].operators.dense
    shapes = ((6_144, 4_096), (4_096, 4_096), (28_672, 4_096), (4_096, 14_336))
    for tokens in (1, 100, 300, 5_000):
        elementwise = (8 * 4_096 + 2 * (4_096 + 1_024) + 3 * 14_336) * 2 * tokens / BANDWIDTH
        products = sum(
            max((n * k + (n + k) * tokens) * 2 / BANDWIDTH, 2 * n * k * tokens / RATE) for n, k in shapes
        )
        assert dense(tokens) == pytest.approx(elementwise + products + 8 * 3e-6, rel=1e-9)


def test_decode_attention_by_hand():
    model = MODELS["plain"]
    kv_read_s = 8 * (1_000 + 1) * 4_096 / BANDWIDTH + 9e-6
    with_attention, without = (
        model.predict(decode(8, 1_000)),
        model.operators.dense(8) * 32 + model.operators.lm_head(8),
    )
    assert with_attention.verify_s - without == pytest.approx(32 * kv_read_s, rel=1e-9)


def test_verifying_many_drafts_is_bound_by_computing():
    model = MODELS["plain"]
    step = decode(16, 50_000, drafts=255)  # more query tokens than any table has: modelled
    attention_s = (
        model.predict(step).verify_s - 32 * model.operators.dense(4_096) - model.operators.lm_head(4_096)
    )
    pairs = 16 * 256 * (50_000 + 256)
    assert attention_s == pytest.approx(32 * 4 * 32 * 128 * pairs / ATTENTION_RATE, rel=1e-9)
    assert model.sources["verification"].startswith("modelled")


def test_a_short_chunk_over_a_long_context_reads_the_cache():
    model = MODELS["plain"]
    step = prefill(2, 1_000_000)
    attention_s = model.predict(step).verify_s - 32 * model.operators.dense(2)
    assert attention_s == pytest.approx(32 * (1_000_000 + 1.5) * 4_096 / BANDWIDTH, rel=1e-9)


def test_an_h100_decodes_llama_8b_plausibly():
    # 16 GB of weights at 3.35 TB/s are 4.8 ms; servers in public benchmarks take 6 to 8.
    assert 4.5e-3 < MODELS["plain"].predict(decode(1, 500)).total_s < 9e-3


def test_verification_is_cheap_alone_and_dear_in_a_crowd():
    model = MODELS["plain"]
    alone = model.predict(decode(1, 500, 4)).total_s / model.predict(decode(1, 500)).total_s
    crowd = model.predict(decode(512, 500, 4)).total_s / model.predict(decode(512, 500)).total_s
    assert 1.0 < alone < 1.05
    assert crowd > 2.0


def test_more_devices_are_faster_but_not_by_their_number():
    shape = MODEL_SHAPES["llama-3.1-70b"]
    two, eight = (
        roofline_cost_model(H100, shape, tensor_parallel=n).predict(decode(32, 1_000)).total_s for n in (2, 8)
    )
    assert 1.5 < two / eight < 4.0
    reduced = 32 * 8_192 * 2
    all_reduce = MODELS["tensor parallel"].operators.all_reduce
    assert all_reduce and all_reduce(reduced) == pytest.approx(1e-5 + reduced * 1.5 / (450e9 * 0.4), rel=1e-9)


def test_drafting_by_hand():
    model, step = MODELS["draft"], decode(8, 1_000, drafts=4)
    operators = model.operators
    assert MODELS["plain"].predict(step).draft_s == 0.0
    assert MODELS["lookup"].predict(step).draft_s == pytest.approx(8 * 2e-5)
    assert operators.draft_step and operators.draft_prefill
    passes = 4 * (float(operators.draft_step(8)) + 8 * 1_000 * 32_768 / BANDWIDTH)
    assert model.predict(step).draft_s == pytest.approx(passes, rel=1e-9)
    assert model.predict(prefill(700)).draft_s == pytest.approx(float(operators.draft_prefill(700)), rel=1e-9)
    assert model.predict(prefill(700)).sample_s == 0.0
    floor_s = 16 * (4 * 2_048 * 2_048 * 5 // 8 + 3 * 2_048 * 8_192) * 2 / BANDWIDTH
    assert float(operators.draft_prefill(1)) > floor_s


@given(st.integers(1, 400), st.integers(0, 6), st.integers(0, 4_000), st.sampled_from(sorted(MODELS)))
def test_more_work_never_takes_less_time(rows: int, drafts: int, context: int, name: str):
    model = MODELS[name]
    base = model.predict(decode(rows, context, drafts)).total_s
    assert model.predict(decode(rows + 1, context, drafts)).total_s >= base
    assert model.predict(decode(rows, context + 64, drafts)).total_s >= base
    assert model.predict(decode(rows, context, drafts + 1)).total_s >= base
    assert (
        model.predict(prefill(rows + 2, context)).total_s >= model.predict(prefill(rows + 1, context)).total_s
    )


@pytest.mark.parametrize("name", HARDWARE_NAMES)
def test_every_sheet_makes_a_model(name: str):
    model = roofline_cost_model(load_hardware(name), MODEL_SHAPES["llama-3.2-1b"], tensor_parallel=2)
    cost = model.predict(decode(4, 300))
    assert 1e-4 < cost.total_s < 0.1
    assert model.metadata["hardware"] == name


def test_smaller_types_are_faster():
    half = roofline_cost_model(H100, LLAMA_8B, dtype="fp8", kv_dtype="fp8").predict(decode(1, 100_000))
    full = MODELS["plain"].predict(decode(1, 100_000))
    assert 0.45 < (half.verify_s - 1.1e-3) / (full.verify_s - 1.1e-3) < 0.55  # but for 1.1 ms of launches
    with pytest.raises(ValueError, match="unknown data type of a100 'fp8'"):
        roofline_cost_model(load_hardware("a100"), LLAMA_8B, dtype="fp8")


def test_uncertainty_by_hand():
    model = measured()
    cost = model.predict(decode(2, 100))
    dense, attention = 4 * float(model.operators.dense(2)), 4 * float(model.operators.decode_attention(202))
    head, sampling = float(model.operators.lm_head(2)), float(model.operators.sampling(2))
    parts = np.array([0.05 * dense, 0.1 * attention, 0.03 * head, 0.3 * sampling, 0.5 * 3.02e-4])
    total = dense + attention + head + sampling + 3.02e-4
    assert cost.total_s == pytest.approx(total, rel=1e-12)
    assert cost.relative_std == pytest.approx(np.sqrt((parts**2).sum()) / total, rel=1e-12)


@pytest.mark.parametrize("stacked", [False, True])
def test_far_outside_is_warned_of_once(stacked: bool, caplog: pytest.LogCaptureFixture):
    model = measured()

    def predict(step: StepFeatures[float]) -> float:
        return (
            float(model.predict(stack_features([step])).total_s[0])
            if stacked
            else model.predict(step).total_s
        )

    with caplog.at_level(logging.WARNING):
        predict(decode(100, 80))  # the context is just within twice the range: silent
        assert not caplog.records and model.extrapolated == {}
        far = [predict(decode(1, context)) for context in (20_000, 30_000, 40_000)]
        predict(features(plan([(600, 0, 0, True)])))
        predict(features(plan([(600, 0, 0, True)])))
    names = ["decode_attention", "dense", "prefill_attention"]
    assert [record.getMessage().split()[0] for record in caplog.records] == names
    assert "size 20001 is far outside the range it was fitted on, 32 to 4096" in caplog.text
    assert model.extrapolated == {
        "decode_attention": 20_001.0,
        "dense": 600.0,
        "prefill_attention": 180_300.0,
    }
    slope = (4e-5 - 1e-5) / (4_096 - 32)
    assert np.diff(far) == pytest.approx(4 * 10_000 * slope, rel=1e-9)


def test_below_the_range_is_warned_of_too(caplog: pytest.LogCaptureFixture):
    model = measured(dense=curve((64, 1e-3), (256, 4e-3)))
    assert model.predict(decode(1, 100)).verify_s > 4e-3
    assert model.extrapolated == {"dense": 1.0} and len(caplog.records) == 1


def test_a_roofline_has_no_range(caplog: pytest.LogCaptureFixture):
    model = roofline_cost_model(H100, LLAMA_8B)
    model.predict(decode(4_000, 100_000, drafts=8))
    model.predict(prefill(100_000))
    assert not caplog.records and model.extrapolated == {}


@pytest.mark.parametrize("name", StepFeatures._fields)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("base", [EMPTY, features(plan([(1, 3, 50, True), (40, 0, 8, True)]))])
def test_impossible_features(name: str, value: float, base: StepFeatures[float]):
    for model in (MODELS["draft"], MODELS["measured"]):
        wrong = base._replace(**{name: value})
        with pytest.raises(ValueError, match=rf"{name}={value} must be finite and >= 0"):
            model.predict(wrong)
        with pytest.raises(ValueError, match=rf"{name}={value} must be finite and >= 0"):
            model.predict(stack_features([base, wrong]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 1.5}, r"num_tokens=1.5 must be a whole number"),
        ({"num_logits": 0.5}, r"num_logits=0.5 must be a whole number"),
        ({"decode_tokens": 1}, "decode_tokens must be >= decode_rows"),
        ({"decode_rows": 0, "draft_rows": 0}, "decode_rows and decode_tokens must both be 0"),
        ({"prefill_pairs": 3}, "prefill_pairs must be >= prefill_tokens"),
        ({"prefill_tokens": 0}, "prefill_tokens and prefill_pairs must both be 0"),
        ({"draft_rows": 3}, "draft_rows must be <= decode_rows"),
        ({"draft_steps": 0}, "draft_steps and draft_tokens must both be 0"),
        ({"draft_steps": 9}, r"draft_tokens must be in \[draft_steps, draft_steps · draft_rows\]"),
        ({"draft_tokens": 7}, r"draft_tokens must be in \[draft_steps, draft_steps · draft_rows\]"),
        ({"draft_steps": 0.5}, "draft_steps must be >= 1"),
    ],
)
def test_features_that_contradict_each_other(changes: dict[str, float], message: str):
    step = features(plan([(1, 3, 50, True), (1, 1, 50, True), (40, 0, 8, True)]))
    with pytest.raises(ValueError, match=message):
        MODELS["plain"].predict(step._replace(**changes))


def test_models_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"llama-3.1-70b does not fit: 141.1 GB of weights on each of 1 h100"
    ):
        roofline_cost_model(H100, MODEL_SHAPES["llama-3.1-70b"])
    with pytest.raises(ValueError, match="does not fit"):
        roofline_cost_model(load_hardware("rtx_4090"), LLAMA_8B, draft=LLAMA_8B)
    with pytest.raises(ValueError, match="tensor_parallel=5 must be >= 1 and divide"):
        roofline_cost_model(H100, LLAMA_8B, tensor_parallel=5)
    lonely = dataclasses.replace(H100, link_bytes_per_s=None)
    with pytest.raises(ValueError, match="needs the link_bytes_per_s of h100"):
        roofline_cost_model(lonely, LLAMA_8B, tensor_parallel=2)
    with pytest.raises(ValueError, match=r"memory=1.2 must be in \(0, 1\]"):
        Efficiencies(memory=1.2)
    with pytest.raises(ValueError, match="overhead_s=-1"):
        Efficiencies(overhead_s=-1.0)
    with pytest.raises(ValueError, match="draft_step and draft_prefill come together"):
        measured(draft_step=curve((1, 1.0)))
    with pytest.raises(ValueError, match=r"reduced_bytes_per_token=0.0 must be > 0"):
        measured(all_reduce=curve((1, 1.0)))


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_models_are_equal(name: str, tmp_path: Path):
    model = MODELS[name]
    model.save(tmp_path / "model")
    for copy in (CostModel.load(tmp_path / "model"), pickle.loads(pickle.dumps(model))):
        assert copy.operators == model.operators
        assert (copy.num_layers, copy.metadata) == (model.num_layers, model.metadata)
        step = features(plan([(1, 3, 500, True), (300, 0, 64, True)]))
        assert copy.predict(step) == model.predict(step)


def test_broken_folders(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no cost_model\.yaml"):
        CostModel.load(tmp_path)
    measured().save(tmp_path)
    points = pl.read_parquet(tmp_path / "curves.parquet")
    points.filter(pl.col("operator") != "dense").write_parquet(tmp_path / "curves.parquet")
    with pytest.raises(ValueError, match=r"is not a cost model: .*dense"):
        CostModel.load(tmp_path)
    (tmp_path / "cost_model.yaml").write_text("format: 99\n")
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        CostModel.load(tmp_path)


def test_rows_beside_a_chunk_take_the_kernel_that_shares_nothing():
    model = MODELS["mixed"]
    rows, chunk = [(1, 0, 99, True)] * 4, (16, 0, 0, False)
    alone = model.predict(features(plan(rows))).total_s
    together = model.predict(features(plan([*rows, chunk]))).total_s
    prompt = model.predict(features(plan([chunk]))).total_s
    entries = 4 * 100
    dense_s = 4 * np.interp(20, [1, 64], [1e-3, 1.5e-3])
    decode_s = np.interp(entries, [32, 4096], [2e-5, 1e-4]) + 4 * (1e-6 + 16e-9)
    prefill_s = np.interp(16 * 17 / 2 + 200 * 16, [100, 50_000], [1e-5, 4e-4])
    head_s = np.interp(4, [1, 128], [1e-3, 2e-3]) + np.interp(4, [1, 128], [2e-5, 1e-4])
    host_s = 3e-4 + 4e-6
    assert together == pytest.approx(dense_s + 4 * (decode_s + prefill_s) + head_s + host_s)
    assert together > max(alone, prompt)


def test_a_row_takes_the_time_of_a_tile_at_least():
    model = MODELS["mixed"]
    short, tile = (model.predict(decode(32, context)).verify_s for context in (3, 63))
    assert short == tile < model.predict(decode(32, 127)).verify_s


def test_an_unshared_context_bounds_a_single_row():
    model = MODELS["mixed"]
    one, many = model.predict(decode(1, 3_999)).verify_s, model.predict(decode(4, 999)).verify_s
    assert one - many == pytest.approx(
        4 * (1e-8 * 4_000 - np.interp(4_000, [32, 4096], [1e-5, 4e-5]))
        - 4 * (np.interp(4, [1, 64], [1e-3, 1.5e-3]) - 1e-3)
        - (np.interp(4, [1, 128], [1e-3, 2e-3]) - 1e-3)
    )
