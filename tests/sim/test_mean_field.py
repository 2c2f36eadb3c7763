"""The closed form of a loaded replica, its drafts and perturbed cost models, against hand figures and the simulator."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim.cluster_spec import ClusterSpec, ReplicaSpec
from sim.cost_model import CostModel, StepFeatures, roofline_cost_model
from sim.hardware import load_hardware
from sim.mean_field import MeanField, Mix, break_even_rate
from sim.model_shape import MODEL_SHAPES
from sim.perturbation import perturbed
from sim.simulation import simulate
from sim.speculative_step import EAGLE, LOOKUP, PLAIN, Drafts, draft_shape, step_seconds
from specdec.scheduler import SchedulerConfig
from specdec.workload import FixedLengths, Poisson, SyntheticSource

TARGET = MODEL_SHAPES["llama-3.1-8b"]


@pytest.fixture(scope="module")
def model() -> CostModel:
    draft = draft_shape(EAGLE, TARGET)
    return roofline_cost_model(load_hardware("h100"), TARGET, draft=draft)


def test_steps_are_those_of_the_cost_model(model: CostModel):
    rows, context, k = 8.0, 1000.0, 3
    tokens = rows * (1 + k)
    whole = model.predict_scalar(
        StepFeatures(tokens, tokens, rows, tokens, rows * context, 0.0, 0.0, float(k), rows, rows * k)
    )
    assert float(step_seconds(model, rows, context, Drafts.chain(k))) == pytest.approx(whole.total_s)
    plain = model.predict_scalar(StepFeatures(rows, rows, rows, rows, rows * context, *[0.0] * 5))
    assert float(step_seconds(model, rows, context)) == pytest.approx(plain.total_s)
    assert step_seconds(model, [1, 64], context).shape == (2,)


def test_a_cost_ratio_takes_the_place_of_the_drafter(model: CostModel):
    plain = float(step_seconds(model, 4, 500))
    free = float(step_seconds(model, 4, 500, Drafts.chain(3), draft_cost_ratio=0.0))
    priced = float(step_seconds(model, 4, 500, Drafts.chain(3), draft_cost_ratio=0.1))
    assert priced - free == pytest.approx(3 * 0.1 * plain)
    tree = float(step_seconds(model, 4, 500, Drafts(2, 6)))
    assert tree > float(step_seconds(model, 4, 500, Drafts.chain(2)))


def test_drafts_and_drafters_that_make_no_sense_are_refused():
    for depth, nodes in ((3, 2), (0, 1), (-1, 0)):
        with pytest.raises(ValueError, match="a node per level"):
            Drafts(depth, nodes)
    assert Drafts.chain(0) == PLAIN
    assert draft_shape(LOOKUP, TARGET) is None
    with pytest.raises(ValueError, match=r"llama-3\.1-70b has as many parameters"):
        draft_shape("llama-3.1-70b", TARGET)


def test_a_mix_weighs_contexts_by_how_long_they_decode():
    mix = Mix.of([100, 100], [10, 30])
    assert mix.prompt == 100.0 and mix.output == 20.0
    assert mix.context == pytest.approx((100 * 40 + 0.5 * (100 + 900)) / 40)
    with pytest.raises(ValueError, match="as many of both"):
        Mix.of([1], [1, 2])


def test_more_load_is_a_larger_batch_and_slower(model: CostModel):
    field = MeanField(model, Mix.of([1000], [200]), 128)
    points = [field.at(share * field.capacity_per_s) for share in (0.001, 0.2, 0.6, 0.9)]
    assert [point.batch for point in points] == sorted(point.batch for point in points)
    assert [point.tpot_s for point in points] == sorted(point.tpot_s for point in points)
    for point in points:  # Little's law
        assert point.batch == pytest.approx(point.rate_per_s * 200 * point.tpot_s, rel=1e-9)
    over = field.at(1.01 * field.capacity_per_s)
    assert not over.is_served and math.isinf(over.tpot_s)


def test_the_capacity_within_an_slo_just_keeps_it(model: CostModel):
    field = MeanField(model, Mix.of([1000], [200]), 256)
    limit_s = field.at(0.5 * field.capacity_per_s).tpot_s
    found = field.capacity_within(tpot_s=limit_s)
    assert found == pytest.approx(0.5 * field.capacity_per_s, rel=0.02)
    assert field.capacity_within() == field.capacity_per_s
    assert field.capacity_within(tpot_s=1e-6) == 0.0


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_simulator_agrees(model: CostModel, drafts: int):
    alpha, share = 0.7, 0.5
    tokens = sum(alpha**j for j in range(drafts + 1))
    field = MeanField(model, Mix.of([800], [120]), 64, Drafts.chain(drafts), tokens)
    rate = share * field.capacity_per_s
    speculation = {"name": "fixed", "max_drafts": drafts} if drafts else {"name": "off"}
    replica = ReplicaSpec(
        SchedulerConfig(max_num_seqs=64, num_blocks=8192, max_num_batched_tokens=8192),
        model,
        speculation=speculation,
        acceptance={"name": "constant", "alpha": alpha},
    )
    source = SyntheticSource(Poisson(rate), FixedLengths(800, 120), 400, 0)
    summary = simulate(source, ClusterSpec.of(replica)).summary
    assert field.at(rate).tpot_s == pytest.approx(summary["latency"]["tpot_s"]["mean"], rel=0.08)


def test_break_even_is_where_the_curves_cross(model: CostModel):
    mix = Mix.of([200], [400])
    plain = MeanField(model, mix, 256)
    good, bad = (MeanField(model, mix, 256, Drafts.chain(3), tokens) for tokens in (2.5, 1.0))
    assert break_even_rate(plain, bad) == 0.0
    small = MeanField(model, mix, 256, Drafts.chain(8), 1.9)
    even = break_even_rate(plain, small)
    if 0.0 < even < math.inf:
        assert small.at(0.9 * even).tpot_s < plain.at(0.9 * even).tpot_s
        assert small.at(1.05 * even).tpot_s >= plain.at(1.05 * even).tpot_s
    assert even < break_even_rate(plain, good)


def test_perturbed_models_differ_as_much_as_they_say(model: CostModel):
    plain = StepFeatures(8.0, 8.0, 8.0, 8.0, 8000.0, *[0.0] * 5)
    truth = model.predict_scalar(plain)
    others = [perturbed(model, np.random.default_rng(seed)).predict_scalar(plain) for seed in range(60)]
    ratios = np.log([other.total_s / truth.total_s for other in others])
    assert 0.5 * truth.relative_std < ratios.std() < 1.7 * truth.relative_std
    again = perturbed(model, np.random.default_rng(3)).predict_scalar(plain)
    assert again.total_s == others[3].total_s
    without = roofline_cost_model(load_hardware("h100"), TARGET)
    same = perturbed(without, np.random.default_rng(3)).predict_scalar(plain)
    assert same.verify_s == pytest.approx(again.verify_s)  # a drafter changes no other operator's error
