"""How many drafts a controller asks for, and how they are cut to a budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.scheduler import Request, RequestTable, SchedulerConfig, make_controller, make_policy
from specdec.scheduler.speculation import fit_drafts
from specdec.scheduler.tree_worth import TreeWorth
from specdec.tree import best_expected_tokens
from tests.scheduler.traffic import Driver, Job, Traffic

REPEATABLE = settings(derandomize=True, deadline=None, database=None)


def a_table(counts: list[tuple[int, int]]) -> RequestTable:
    """Rows with these numbers of accepted and rejected drafts."""
    table = RequestTable(len(counts), 4, 16)
    for request_id, (accepted, rejected) in enumerate(counts):
        request = Request(request_id=request_id, prompt_len=1, max_tokens=9)
        request.num_accepted, request.num_rejected, request.num_steps = accepted, rejected, 1
        table.insert(request, np.empty(0, np.int32), 0)
    return table


def best_length(alpha: float, cost_ratio: float, max_drafts: int) -> int:
    """The k that maximises (1 - α^(k+1)) / ((1 - α)(1 + c k)), by trying all."""
    speeds = [(1 - alpha ** (k + 1)) / ((1 - alpha) * (1 + cost_ratio * k)) for k in range(max_drafts + 1)]
    return int(np.argmax(speeds))


def test_off_and_fixed() -> None:
    table = a_table([(0, 0), (5, 5)])
    assert make_controller("off").num_drafts(table, table.active, 0.0).tolist() == [0, 0]
    assert make_controller("off").max_drafts == 0
    assert make_controller("fixed", max_drafts=3).num_drafts(table, table.active, 0.0).tolist() == [3, 3]


@REPEATABLE
@given(st.integers(0, 400), st.integers(0, 400), st.sampled_from((0.01, 0.05, 0.2, 1.0)), st.integers(0, 10))
def test_adaptive_takes_the_best_length_of_the_formula(
    accepted: int, rejected: int, cost_ratio: float, max_drafts: int
) -> None:
    table = a_table([(accepted, rejected)])
    controller = make_controller("adaptive", max_drafts=max_drafts, cost_ratio=cost_ratio)
    alpha = (accepted + 2) / (accepted + rejected + 3)
    assert controller.num_drafts(table, table.active, 0.0)[0] == best_length(alpha, cost_ratio, max_drafts)


def adaptive_run(acceptance: float, max_tokens: int, **options: float) -> Driver:
    config = SchedulerConfig(
        num_blocks=256, block_size=16, max_model_len=max_tokens + 2, max_num_batched_tokens=4096
    )
    request = Request(request_id=0, prompt_len=1, max_tokens=max_tokens)
    traffic = Traffic(seed=5, acceptance=acceptance, short_drafts=0.0)
    controller = make_controller("adaptive", **options)
    return Driver(config, make_policy("continuous"), controller, traffic, [Job(request, [0])]).run()


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
def test_adaptive_converges_to_the_optimum_of_the_true_rate(acceptance: float) -> None:
    driver = adaptive_run(acceptance, 3000, cost_ratio=0.1)
    request = driver.jobs[0].request
    estimate = request.num_accepted / (request.num_accepted + request.num_rejected)
    assert estimate == pytest.approx(acceptance, abs=0.03)
    late = [int(plan.num_drafts[0]) for plan in driver.plans[-60:-20]]
    assert np.mean(late) == pytest.approx(best_length(acceptance, 0.1, 8), abs=1.0)


def test_adaptive_probes_when_drafting_does_not_pay() -> None:
    driver = adaptive_run(0.0, 200, cost_ratio=1.0, probe_every=16)
    drafts = np.array([int(plan.num_drafts[0]) for plan in driver.plans])
    assert drafts.max() == 1
    probes = np.flatnonzero(drafts[40:-2])
    assert probes.size >= 9 and (np.diff(probes) == 16).all()


def test_adaptive_recovers_through_probes() -> None:
    table = a_table([(0, 30)])
    controller = make_controller("adaptive", cost_ratio=0.5, probe_every=2)
    lengths: list[int] = []
    for step in range(400):
        table.num_steps[0] = step
        lengths.append(int(controller.num_drafts(table, table.active, 0.0)[0]))
        table.num_accepted[0] += lengths[-1]
    assert 0 in lengths[:20] and min(lengths[-20:]) > 5


def test_adaptive_judges_each_request_by_itself() -> None:
    table = a_table([(90, 10), (10, 90)])
    lengths = make_controller("adaptive", cost_ratio=0.2).num_drafts(table, table.active, 0.0)
    assert lengths[0] > 2 and lengths[1] == 0


def test_the_load_threshold_turns_drafting_off_beyond_it() -> None:
    controller = make_controller("load_threshold", max_drafts=3, max_running=2)
    for size, expected in ((1, 3), (2, 3), (3, 0)):
        table = a_table([(0, 0)] * size)
        assert controller.num_drafts(table, table.active, 0.0).tolist() == [expected] * size


PLATEAUS = {"step_tokens": (1, 4, 5, 8, 9, 16), "step_s": (1.0, 1.02, 1.4, 1.42, 2.2, 2.3)}


@REPEATABLE
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=3),
    st.sampled_from((0.0, 0.03, 0.4)),
)
def test_goodput_finds_the_best_of_all_combinations_of_lengths(
    counts: list[tuple[int, int]], draft_step_s: float
) -> None:
    """Brute force over every number of drafts of every row, on step times with plateaus and cliffs."""
    controller = make_controller("goodput", max_drafts=3, draft_step_s=draft_step_s, **PLATEAUS)
    table = a_table(counts)

    def accepted_through(row: int, drafts: int) -> float:
        """The mean of α^drafts over the Beta law of a row, a quotient of Beta functions."""
        a, b = counts[row][0] + 2.0, counts[row][1] + 1.0
        others = [sum(column) for column in zip(*(c for i, c in enumerate(counts) if i != row), strict=True)]
        if others and sum(others):
            share = min(1.0, controller.pool_weight / sum(others))
            a, b = a + share * others[0], b + share * others[1]
        return math.exp(
            math.lgamma(a + drafts) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(a + b + drafts)
        )

    def per_second(lengths: tuple[int, ...]) -> float:
        tokens = sum(
            1.0 + sum(accepted_through(row, j) for j in range(1, k + 1)) for row, k in enumerate(lengths)
        )
        seconds = np.interp(len(counts) + sum(lengths), PLATEAUS["step_tokens"], PLATEAUS["step_s"])
        return tokens / (seconds + draft_step_s * max(lengths))

    chosen = tuple(controller.num_drafts(table, table.active, 0.0).tolist())
    best = max(per_second(lengths) for lengths in itertools.product(range(4), repeat=len(counts)))
    assert per_second(chosen) >= best * (1.0 - 1e-12)


def test_goodput_drafts_less_the_fuller_the_batch() -> None:
    controller = make_controller(
        "goodput", max_drafts=4, step_tokens=(1.0, 32.0, 256.0), step_s=(0.01, 0.0102, 0.08)
    )
    lengths = []
    for size in (1, 4, 8, 16, 32, 64):
        table = a_table([(20, 8)] * size)
        lengths.append(controller.num_drafts(table, table.active, 0.0).mean())
    assert lengths[0] == 4 and lengths[-1] == 0
    assert lengths == sorted(lengths, reverse=True)


def test_goodput_ignores_rows_that_compute_their_prompt() -> None:
    table = a_table([(20, 1), (20, 1)])
    table.num_computed[1] = table.num_known[1] - 2
    lengths = make_controller("goodput", max_drafts=2, **PLATEAUS).num_drafts(table, table.active, 0.0)
    assert lengths.tolist() == [2, 0]


def test_goodput_counts_what_every_step_costs_anyway() -> None:
    """The longer a step is without drafts, the more they are worth."""
    lengths = []
    for overhead_s in (0.0, 0.5, 5.0):
        options = {"overhead_s": overhead_s / 2, "overhead_row_s": overhead_s / 4}
        controller = make_controller("goodput", max_drafts=4, **PLATEAUS, **options)
        lengths.append(int(controller.num_drafts(a_table([(3, 4)] * 2), np.arange(2), 0.0).sum()))
    assert lengths[0] < lengths[-1] and lengths == sorted(lengths)


def test_goodput_leaves_out_rows_that_are_not_worth_their_drafting() -> None:
    table = a_table([(50, 2), (2, 20)])
    for row_s, expected in ((0.0, [4, 1]), (0.2, [4, 0]), (9.0, [0, 0])):
        controller = make_controller(
            "goodput",
            max_drafts=4,
            step_tokens=(1, 64),
            step_s=(1.0, 1.01),
            draft_row_s=row_s,
            pool_weight=0.0,
        )
        lengths = controller.num_drafts(table, table.active, 0.0)
        assert (lengths > 0).tolist() == [count > 0 for count in expected], row_s


def test_goodput_drafts_less_behind_long_contexts_where_attending_to_them_takes_time() -> None:
    table, lengths = a_table([(20, 8)] * 4), []
    for context in (0, 40, 1000):
        table.num_computed[:4] = context
        table.num_known[:4] = context + 1
        controller = make_controller("goodput", max_drafts=4, verify_context_token_s=1e-3, **PLATEAUS)
        lengths.append(int(controller.num_drafts(table, table.active, 0.0).sum()))
    assert lengths[0] > lengths[1] > lengths[2] == 0


def test_one_early_rejection_does_not_silence_a_row_while_others_do_well() -> None:
    options = {"max_drafts": 4, "step_tokens": (1, 2), "step_s": (1.0, 1.1), "probe_every": 1000}
    table = a_table([(0, 2), *[(40, 18)] * 7])
    for pool_weight, drafts in ((0.0, False), (12.0, True)):
        controller = make_controller("goodput", pool_weight=pool_weight, **options)
        assert (controller.num_drafts(table, table.active, 0.0)[0] > 0) == drafts
    hopeless = a_table([(2, 40), *[(40, 18)] * 7])
    assert make_controller("goodput", **options).num_drafts(hopeless, hopeless.active, 0.0)[0] == 0
    alone = a_table([(0, 2)])
    counts = [
        make_controller("goodput", pool_weight=weight, **options).num_drafts(alone, alone.active, 0.0)[0]
        for weight in (0.0, 12.0)
    ]
    assert counts[0] == counts[1], "there are no others"


def test_goodput_probes_rows_whose_estimate_fell_while_drafting_pays_for_others() -> None:
    slope = {"step_tokens": (1, 2), "step_s": (1.0, 1.2)}
    controller = make_controller("goodput", max_drafts=4, **slope, probe_every=8)
    table = a_table([(0, 50)])
    drafts = []
    for step in range(1, 33):
        table.num_steps[0] = step
        drafts.append(int(controller.num_drafts(table, table.active, 0.0)[0]))
    assert drafts == [int(step % 8 == 0) for step in range(1, 33)]
    steep = {"step_tokens": (1, 2), "step_s": (1.0, 2.0)}
    dear = make_controller("goodput", max_drafts=4, **steep, probe_every=1)
    assert dear.num_drafts(table, table.active, 0.0).tolist() == [0], "nobody would draft here"


@REPEATABLE
@given(
    st.lists(st.floats(0.02, 1.0), min_size=1, max_size=4),
    st.floats(0.1, 1.0),
    st.integers(1, 12),
)
def test_the_worth_of_a_trees_nodes_adds_up_to_the_best_trees(
    weights: list[float], total: float, size: int
) -> None:
    rates = sorted((np.array(weights) / sum(weights) * total).tolist(), reverse=True)
    worth = TreeWorth(rates, size)
    best = best_expected_tokens(rates, size, size)
    assert np.allclose(1.0 + np.cumsum(worth.products), best[1:], rtol=1e-12)
    assert worth.levels.tolist() == [max(worth.depths[: n + 1].tolist()) for n in range(size)]
    # With nothing known of a row, its nodes are worth what the rates say.
    nothing = np.zeros(1, np.int32)
    assert np.allclose(worth.worth(nothing, nothing, np.zeros(1), 3.0)[:, 0], worth.products)


def test_a_row_that_does_better_than_the_rates_makes_its_nodes_worth_more() -> None:
    rates, size = (0.4, 0.1), 6
    tree = TreeWorth(rates, size)
    records = np.array([[0, 40], [16, 24], [40, 0]], np.int32)  # levels accepted and rejected
    worth = tree.worth(records[:, 0], records[:, 1], np.full(3, 1.0), 3.0)
    assert (np.diff(worth, axis=0) <= 0).all() and (worth <= 1.0).all()
    assert (np.diff(worth, axis=1) > 0).all()
    # Trees of one node accept as the first rank does, so 16 of 40 is what the rates say.
    assert np.allclose(worth[:, 1], tree.products)
    # A larger tree accepts more of the same drafter, so the same record means less.
    wide = tree.worth(records[:, 0], records[:, 1], np.full(3, 6.0), 3.0)
    assert (wide <= worth).all() and wide[0, 1] < worth[0, 1]


def test_goodput_drafts_more_nodes_where_ranks_are_known() -> None:
    flat = {"step_tokens": (1, 64), "step_s": (1.0, 1.7)}
    table = a_table([(6, 9)])
    table.num_drafted[0] = 8
    chain = make_controller("goodput", max_drafts=32, **flat)
    tree = make_controller("goodput", max_drafts=32, **flat, rank_rates=(0.35, 0.15, 0.08, 0.05, 0.04))
    lengths = [int(one.num_drafts(table, table.active, 0.0)[0]) for one in (chain, tree)]
    assert 0 < lengths[0] < lengths[1] <= 32
    with_passes = make_controller(
        "goodput", max_drafts=32, **flat, rank_rates=(0.35, 0.15, 0.08, 0.05, 0.04), draft_step_s=0.2
    )
    assert int(with_passes.num_drafts(table, table.active, 0.0)[0]) < lengths[1]


@pytest.mark.parametrize("rates", [(0.2, 0.3), (0.6, 0.5), (0.5, 0.0), (-0.1,)])
def test_rank_rates_that_are_none(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rank_rates="):
        make_controller("goodput", **PLATEAUS, rank_rates=rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**PLATEAUS, "overhead_s": -1.0}, "overhead_s=-1.0"),
        ({**PLATEAUS, "probe_every": 0}, "probe_every=0"),
        ({}, "goodput needs step times: step_tokens has 0 entries"),
        ({"step_tokens": (1, 2), "step_s": (1.0,)}, "step_s 1"),
        ({"step_tokens": (2, 1), "step_s": (1.0, 2.0)}, "must rise"),
        ({"step_tokens": (1, 2), "step_s": (2.0, 1.0)}, "must not fall"),
        ({**PLATEAUS, "draft_step_s": -1.0}, "draft_step_s=-1.0"),
        ({**PLATEAUS, "prior_rejected": 0.0}, "prior_rejected=0.0"),
    ],
)
def test_goodput_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_controller("goodput", **options)


@REPEATABLE
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 60))
def test_drafts_are_cut_to_the_budget_longest_first(wanted: list[int], budget: int) -> None:
    drafts = np.array(wanted, np.int32)
    cut = fit_drafts(drafts, budget)
    assert (cut <= drafts).all() and (cut >= 0).all()
    assert cut.sum() == min(budget, drafts.sum())
    shortened = cut < drafts
    if shortened.any():
        assert cut.max() - cut[shortened].min() <= 1, "somebody keeps more than an even share"


@pytest.mark.parametrize("name", ["fixed", "adaptive", "load_threshold", "goodput"])
def test_a_negative_number_of_drafts(name: str) -> None:
    with pytest.raises(ValueError, match=r"k=-1 must be >= 0 \(0 turns speculation off\)"):
        make_controller(name, max_drafts=-1)


def test_an_unknown_controller_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown speculation controller 'adaptiv': did you mean adaptive\?"
    ):
        make_controller("adaptiv")


@pytest.mark.parametrize(
    ("name", "options"), [("off", {"max_drafts": 2}), ("fixed", {"k": 2}), ("fixed", {"is_constant": False})]
)
def test_an_option_that_a_controller_does_not_have(name: str, options: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=f"speculation '{name}' does not take these options.*{next(iter(options))}"
    ):
        make_controller(name, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cost_ratio": 0.0}, "cost_ratio=0.0"),
        ({"prior_accepted": float("nan")}, "prior_accepted=nan"),
        ({"prior_rejected": -1.0}, "prior_rejected=-1.0"),
        ({"probe_every": 0}, "probe_every=0"),
    ],
)
def test_adaptive_options_out_of_range(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_controller("adaptive", **options)
