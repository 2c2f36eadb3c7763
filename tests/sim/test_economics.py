"""Hand-computed bills, choices with ties and without a winner, and Pareto fronts against the definition."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.economics import (
    ChipPrice,
    Configuration,
    cheapest,
    cost_per_million_tokens_usd,
    cost_usd,
    energy_j,
    energy_per_token_j,
    num_chips,
    pareto_front,
    power_w,
)
from sim.streaming import RunMetrics
from specdec.metrics import Slo

CHIP = ChipPrice(price_per_hour_usd=3.0, tdp_w=700.0, idle_w=100.0)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)


def configuration(name: str, *, share: float = 1.0, good_per_s: float = 1000.0, **options) -> Configuration:
    return Configuration(
        name=name,
        price=options.pop("price", CHIP),
        slo=SLO,
        slo_share=share,
        tokens_per_s=2000.0,
        good_tokens_per_s=good_per_s,
        **options,
    )


def test_bill_by_hand():
    chips = num_chips(tensor_parallel=2, replicas=4)
    assert chips == 8
    assert cost_usd(CHIP, chips, 7200.0) == pytest.approx(8 * 2 * 3.0)
    # $24 an hour, 36 million tokens an hour
    assert cost_per_million_tokens_usd(CHIP, chips, 10_000.0) == pytest.approx(24 / 36)


def test_power_and_energy_by_hand():
    np.testing.assert_allclose(power_w(CHIP, [0.0, 0.5, 1.0]), [100.0, 400.0, 700.0])
    assert energy_j(CHIP, 8, 10.0, 0.5) == pytest.approx(8 * 10 * 400)
    assert energy_per_token_j(CHIP, 8, 1600.0, 0.5) == pytest.approx(2.0)


def test_electricity_is_added_where_it_is_extra():
    owned = dataclasses.replace(CHIP, electricity_usd_per_kwh=0.25)
    assert cost_usd(owned, 1, 3600.0, utilisation=0.5) == pytest.approx(3.0 + 0.4 * 0.25)
    assert cost_usd(owned, 1, 3600.0) == pytest.approx(3.0 + 0.7 * 0.25)


def test_costs_broadcast_and_no_tokens_cost_infinity():
    costs = cost_per_million_tokens_usd(CHIP, [[1], [2]], [0.0, 1000.0])
    np.testing.assert_allclose(costs, [[np.inf, 1 / 1.2], [np.inf, 2 / 1.2]])
    assert energy_per_token_j(CHIP, 1, 0.0, 1.0) == np.inf


def test_unknown_figures_say_how_to_give_them():
    unknown = ChipPrice(price_per_hour_usd=None, tdp_w=None, idle_w=None)
    with pytest.raises(ValueError, match=r"give ChipPrice\(price_per_hour_usd=…\).*hardware's sheet"):
        cost_usd(unknown, 1, 1.0)
    with pytest.raises(ValueError, match=r"give ChipPrice\(tdp_w=…\)"):
        power_w(unknown, 0.5)
    with pytest.raises(ValueError, match=r"give ChipPrice\(idle_w=…\); measure it, or give the chip's tdp_w"):
        power_w(dataclasses.replace(unknown, tdp_w=700.0), 0.5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"price_per_hour_usd=-1\.0 must be finite and >= 0"):
        ChipPrice(-1.0, 700.0, 100.0)
    with pytest.raises(ValueError, match=r"idle_w=800\.0 must be at most tdp_w=700\.0"):
        ChipPrice(1.0, 700.0, 800.0)
    with pytest.raises(ValueError, match="replicas=0 must be >= 1"):
        num_chips(1, 0)
    with pytest.raises(ValueError, match=r"utilisation=1\.5"):
        power_w(CHIP, 1.5)
    with pytest.raises(ValueError, match=r"tokens_per_s=-1\.0"):
        cost_per_million_tokens_usd(CHIP, 1, -1.0)
    with pytest.raises(ValueError, match=r"slo_share=1\.2 of 'a'"):
        configuration("a", share=1.2)
    with pytest.raises(ValueError, match=r"good_tokens_per_s=3000\.0"):
        configuration("a", good_per_s=3000.0)


def test_cheapest_pays_for_good_tokens_only():
    wasteful = configuration("wasteful", good_per_s=500.0, share=0.99)
    frugal = configuration("frugal", good_per_s=1500.0, share=0.995, replicas=2)
    assert wasteful.cost_per_million_tokens_usd < frugal.cost_per_million_tokens_usd
    assert wasteful.cost_at_slo_usd > frugal.cost_at_slo_usd
    choice = cheapest([wasteful, frugal], SLO)
    assert (choice.best, choice.tied, choice.nearest) == (frugal, (), None)
    assert str(choice).startswith(
        "frugal: 99.50% of the requests within the SLO at $1.111 per million tokens"
    )


def test_cheap_configurations_that_miss_the_target_are_not_chosen():
    late = configuration("late", share=0.98, good_per_s=2000.0)
    dear = configuration("dear", share=0.99, good_per_s=1000.0, tensor_parallel=8)
    assert cheapest([late, dear], SLO, min_share=0.99).best is dear
    assert cheapest([late, dear], SLO, min_share=0.95).best is late


def test_ties_go_to_fewer_chips_then_to_the_larger_share_then_to_the_first():
    wide = configuration("wide", good_per_s=2000.0, replicas=2)
    narrow = configuration("narrow", good_per_s=1000.0, share=0.99)
    safe = configuration("safe", good_per_s=1000.0, share=1.0)
    twin = configuration("twin", good_per_s=1000.0, share=1.0)
    choice = cheapest([wide, narrow, safe, twin], SLO)
    assert choice.best is safe
    assert choice.tied == (twin, narrow, wide)
    assert "as cheap: twin, narrow, wide" in str(choice)


def test_none_meets_the_slo():
    far = configuration("far", share=0.2, good_per_s=2000.0)
    near = configuration("near", share=0.9, good_per_s=10.0)
    cheaper = configuration("cheaper", share=0.9, good_per_s=20.0)
    choice = cheapest([far, near, cheaper], SLO)
    assert (choice.best, choice.tied, choice.nearest) == (None, (), cheaper)
    assert str(choice) == ("none keeps 99.00% of the requests within the SLO; nearest is cheaper with 90.00%")


def test_cheapest_bad_input():
    with pytest.raises(ValueError, match="no configurations"):
        cheapest([], SLO)
    with pytest.raises(ValueError, match=r"min_share=99 must be in \(0, 1\]"):
        cheapest([configuration("a")], SLO, min_share=99)
    with pytest.raises(ValueError, match="'a' was measured under Slo"):
        cheapest([configuration("a")], Slo(ttft_s=2.0, tpot_s=0.05))
    with pytest.raises(ValueError, match="price_per_hour_usd of the chip is unknown"):
        cheapest([configuration("a", price=ChipPrice(None, None, None))], SLO)


def test_configuration_of_a_simulated_run():
    metrics = RunMetrics(SLO, tasks=("",))
    metrics.add((0.0, 0.1, 0.5, 2.5, 100, 101, 101, 0, 0, 0, 0, 0))
    metrics.add((0.0, 0.1, 3.0, 5.0, 100, 99, 99, 0, 0, 0, 0, 0))
    found = Configuration.from_summary("run", metrics.summary(), price=CHIP, slo=SLO, tensor_parallel=2)
    assert (found.slo_share, found.chips) == (0.5, 2)
    assert (found.tokens_per_s, found.good_tokens_per_s) == pytest.approx((200 / 5.0, 101 / 5.0))
    without = RunMetrics(tasks=("",))
    without.add((0.0, 0.1, 0.5, 2.5, 100, 101, 101, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="give the run an SLO"):
        Configuration.from_summary("run", without.summary(), price=CHIP, slo=SLO)


def test_pareto_front_by_hand():
    costs = [3.0, 1.0, 2.0, 2.0, 1.0, 4.0, 0.5, np.inf]
    latencies_s = [1.0, 5.0, 2.0, 3.0, 5.0, 1.0, np.inf, 0.1]
    assert pareto_front(costs, latencies_s).tolist() == [1, 4, 2, 0]
    assert pareto_front([], []).tolist() == []
    with pytest.raises(ValueError, match="must not be nan"):
        pareto_front([np.nan], [1.0])
    with pytest.raises(ValueError, match=r"costs \(2,\) and latencies_s \(1,\)"):
        pareto_front([1.0, 2.0], [1.0])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_pareto_front_is_the_definition(points: list[tuple[int, int]]):
    beaten = {
        i
        for (i, a), (_, b) in itertools.product(enumerate(points), repeat=2)
        if b != a and b[0] <= a[0] and b[1] <= a[1]
    }
    found = pareto_front([cost for cost, _ in points], [latency for _, latency in points]).tolist()
    assert sorted(found) == [i for i in range(len(points)) if i not in beaten]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
