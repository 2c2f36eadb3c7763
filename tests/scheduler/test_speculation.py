"""How many drafts a controller asks for, and how they are cut to a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.scheduler import Request, RequestTable, SchedulerConfig, make_controller, make_policy
from specdec.scheduler.speculation import fit_drafts
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

    def per_second(lengths: tuple[int, ...]) -> float:
        alphas = [(accepted + 2) / (accepted + rejected + 3) for accepted, rejected in counts]
        tokens = sum(sum(a**j for j in range(k + 1)) for a, k in zip(alphas, lengths, strict=True))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
