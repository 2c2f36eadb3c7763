"""Draws against their laws, exactly and by chi-square, and against the closed forms."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sim.acceptance import (
    ACCEPTANCE,
    MAX_DRAFTS,
    AcceptanceModel,
    BetaAcceptance,
    ConstantAcceptance,
    EmpiricalAcceptance,
    MarkovAcceptance,
    PositionalAcceptance,
    TaskAcceptance,
    TreeAcceptance,
    make_acceptance,
)
from sim.closed_form import (
    expected_tokens,
    expected_tokens_beta,
    expected_tokens_from_rates,
    expected_tokens_of_tree,
    tree_from_paths,
)
from specdec.metrics import acceptance_by_position, decode_rows
from specdec.trace import TraceWriter, read_requests, read_steps
from tests.helpers.traced_run import traced_run

TASKS = ("chat", "code", "maths")
PATHS = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]
MODELS: dict[str, Callable[[], AcceptanceModel]] = {
    "constant": lambda: ConstantAcceptance(0.8),
    "positional": lambda: PositionalAcceptance([0.9, 0.5, 0.7]),
    "beta": lambda: BetaAcceptance(0.7, 4.0),
    "markov": lambda: MarkovAcceptance(0.9, 0.3, 0.1, 0.25),
    "tree": lambda: TreeAcceptance.from_paths(PATHS, [0.6, 0.2, 0.1]),
    "empirical": lambda: EmpiricalAcceptance([0.8, 0.6], {"code": [0.95], "maths": [0.4, 0.9]}),
    "task rates": lambda: TaskAcceptance({"code": ConstantAcceptance(0.9)}, BetaAcceptance(0.5, 2.0)),
    "task mixture": lambda: TaskAcceptance(
        {"code": MarkovAcceptance(0.9, 0.1, 0.3, 0.3), "maths": PositionalAcceptance([0.5])},
        BetaAcceptance(0.6, 3.0),
    ),
}
NUM_ROWS = 12


def seated(model: AcceptanceModel, num_rows: int = NUM_ROWS, seed: int = 5, first_id: int = 0):
    """``model`` with a request in each row, the tasks in turn."""
    model.bind(num_rows)
    for row in range(num_rows):
        model.enter(row, first_id + row, TASKS[row % len(TASKS)], seed)
    return model


def draw(model: AcceptanceModel, uniforms, num_drafts) -> np.ndarray:
    """One step of rows 0, 1, …, one for each uniform."""
    u = np.asarray(uniforms, np.float64)
    lengths = np.broadcast_to(np.asarray(num_drafts, np.int32), u.shape)
    accepted = model.draw(np.arange(u.size), lengths, u)
    assert accepted.dtype == np.int32 and accepted.shape == u.shape
    return accepted


def counts_law(survival: np.ndarray) -> np.ndarray:
    """P(0), …, P(k) accepted from S_1 … S_k."""
    return -np.diff(np.concatenate([[1.0], survival, [0.0]]))


def chi_square(accepted: np.ndarray, survival: np.ndarray) -> float:
    """p-value of the accepted counts under a law of k drafts."""
    observed = np.bincount(accepted, minlength=survival.size + 1)
    return float(stats.chisquare(observed, counts_law(survival) * accepted.size).pvalue)


EXACT = {
    "constant": (ConstantAcceptance(0.8), [Fraction(4, 5) ** j for j in range(1, 7)]),
    "positional": (
        PositionalAcceptance([0.9, 0.5]),
        [Fraction(9, 10) * Fraction(1, 2) ** j for j in range(6)],
    ),
    "tree": (
        TreeAcceptance.k_ary(2, 3, [0.6, 0.2]),
        [Fraction(4, 5), Fraction(16, 25), Fraction(64, 125), *[Fraction(0)] * 3],
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("size", [1000, 777])
def test_a_grid_of_uniforms_gives_exact_counts(name: str, size: int):
    model, law = EXACT[name]
    seated(model, size)
    accepted = draw(model, (np.arange(size) + 0.5) / size, 6)
    at_least = [sum(Fraction(2 * i + 1, 2 * size) < s for i in range(size)) for s in law]
    assert [int((accepted >= j).sum()) for j in range(1, 7)] == at_least


@given(
    rates=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9, 1.0]), min_size=1, max_size=6),
    u=st.floats(0.0, 1.0, exclude_max=True),
    num_drafts=st.integers(0, 12),
)
def test_a_table_is_the_definition_at_and_beside_every_step(rates: list[float], u: float, num_drafts: int):
    model = PositionalAcceptance(rates)
    law = model.survival(num_drafts)
    points = np.concatenate([[u, 0.0], law, np.nextafter(law, 0.0)])
    points = points[points < 1.0]
    expected = (points[:, None] < law).sum(axis=1)
    assert draw(model, points, num_drafts).tolist() == expected.tolist()


def test_a_rate_is_the_definition_where_powers_are_exact():
    law = 0.5 ** np.arange(1, 31)
    points = np.concatenate([law, law * (1 - 2.0**-40), [0.0, 1 - 2.0**-53]])
    expected = (points[:, None] < law).sum(axis=1).tolist()
    assert draw(ConstantAcceptance(0.5), points, 30).tolist() == expected
    by_row = seated(TaskAcceptance({}, ConstantAcceptance(0.5)), points.size)
    assert draw(by_row, points, 30).tolist() == expected


@pytest.mark.parametrize("name", ["constant", "positional", "beta", "markov"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_certain_rates(name: str, rate: float, recwarn: pytest.WarningsRecorder):
    options = {
        "constant": {"alpha": rate},
        "positional": {"rates": [rate]},
        "beta": {"mean": rate, "concentration": 3.0},
        "markov": {"alpha_good": rate, "alpha_bad": rate, "good_to_bad": 0.5, "bad_to_good": 0.5},
    }[name]
    model = seated(make_acceptance(name, **options))
    lengths = np.array([0, 4, 4, 4, 7], np.int32)
    accepted = draw(model, [0.0, 0.0, 0.5, 1 - 2.0**-53, 0.0], lengths)
    assert accepted.tolist() == (lengths * rate).tolist()
    assert not recwarn.list


@pytest.mark.parametrize("name", MODELS)
def test_nothing_drafted_nothing_accepted(name: str):
    model = seated(MODELS[name]())
    assert not draw(model, np.linspace(0.0, 0.9, NUM_ROWS), 0).any()
    assert draw(model, [], []).size == 0


def one_step_each(model: AcceptanceModel, num: int, k: int, seed: int = 3) -> np.ndarray:
    """One step each of ``num`` requests, whose counts are therefore independent."""
    return draw(seated(model, num), np.random.default_rng(seed).random(num), k)


@pytest.mark.parametrize("name", ["constant", "positional", "beta", "markov", "tree"])
def test_counts_follow_the_law(name: str):
    model = MODELS[name]()
    accepted = one_step_each(model, 20_000, 3)
    assert chi_square(accepted, model.survival(3)) > 1e-3


def test_the_chi_square_rejects_another_law():
    accepted = one_step_each(ConstantAcceptance(0.8), 20_000, 3)
    assert chi_square(accepted, ConstantAcceptance(0.82).survival(3)) < 1e-6
    # The right mean of α without its spread.
    spread = one_step_each(BetaAcceptance(0.7, 4.0), 20_000, 3)
    assert chi_square(spread, ConstantAcceptance(0.7).survival(3)) < 1e-6


# Of five drafts: the tokens per step, and the survival that they are the sum of.
J = np.arange(1, 6)
CLOSED_FORMS = {
    "constant": (expected_tokens(0.8, 5), 0.8**J),
    "positional": (
        expected_tokens_from_rates([0.9, 0.5, 0.7, 0.7, 0.7]),
        [0.9, 0.45, 0.315, 0.2205, 0.15435],
    ),
    "beta": (expected_tokens_beta(0.7, 4.0, 5), [stats.beta(2.8, 1.2).moment(int(j)) for j in J]),
    "markov": (
        (5 * expected_tokens(0.9, 5) + 2 * expected_tokens(0.3, 5)) / 7,
        (5 * 0.9**J + 2 * 0.3**J) / 7,
    ),
    "tree": (
        expected_tokens_of_tree(*tree_from_paths(PATHS), [0.6, 0.2, 0.1]),
        [0.9, 0.6 * 0.6 + 0.6 * 0.2 + 0.2 * 0.6, 0.6 * 0.6 * (0.6 + 0.2), 0.0, 0.0],
    ),
    "empirical": (expected_tokens_from_rates([0.8, 0.6, 0.6, 0.6, 0.6]), 0.8 * 0.6 ** (J - 1)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_tokens_per_step_are_the_closed_form(name: str):
    tokens, survival = CLOSED_FORMS[name]
    model, num = MODELS[name](), 30_000
    np.testing.assert_allclose(model.survival(5), survival, rtol=1e-10)
    assert float(tokens) == pytest.approx(1.0 + np.sum(survival), rel=1e-10)
    model.bind(num)
    for row in range(num):
        model.enter(row, row, "chat", 1)
    accepted = draw(model, np.random.default_rng(11).random(num), 5)
    variance = np.sum((2 * J - 1) * survival) - np.sum(survival) ** 2
    assert abs(1.0 + accepted.mean() - float(tokens)) < 3.0 * np.sqrt(variance / num)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25)
@given(data=st.data())
def test_many_steps_are_the_steps_one_by_one(name: str, data: st.DataObject):
    rows = np.array(data.draw(st.lists(st.integers(0, NUM_ROWS - 1), unique=True, max_size=8)), np.int64)
    lengths = np.array([data.draw(st.integers(0, 7)) for _ in rows], np.int32)
    uniforms = np.random.default_rng(data.draw(st.integers(0, 2**32))).random((6, rows.size))
    at_once, one_by_one, partly = (seated(MODELS[name]()) for _ in range(3))
    many = at_once.draw_many(rows, lengths, uniforms)
    assert many.dtype == np.int32 and many.shape == uniforms.shape
    np.testing.assert_array_equal(many, at_once.draw_many(rows, lengths, uniforms))
    for step, u in enumerate(uniforms):
        np.testing.assert_array_equal(one_by_one.draw(rows, lengths, u), many[step])
        one_by_one.advance(rows, u[None])
    at_once.advance(rows, uniforms)
    done = data.draw(st.integers(0, 6))
    partly.advance(rows, uniforms[:done])
    np.testing.assert_array_equal(partly.draw_many(rows, lengths, uniforms[done:]), many[done:])
    partly.advance(rows, uniforms[done:])
    everybody = np.random.default_rng(1).random(NUM_ROWS)
    states = [draw(model, everybody, 7).tolist() for model in (at_once, one_by_one, partly)]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("name", ["beta", "markov", "task rates", "task mixture"])
def test_a_request_is_the_same_whatever_the_schedule(name: str):
    uniforms = np.linspace(0.01, 0.99, NUM_ROWS)
    first = draw(seated(MODELS[name]()), uniforms, 9)
    other = MODELS[name]()
    other.bind(2 * NUM_ROWS)
    for row in reversed(range(NUM_ROWS)):  # other rows, another order, a row that others had before
        other.enter(NUM_ROWS + row, 1000 + row, "chat", 5)
        other.enter(NUM_ROWS + row, row, TASKS[row % len(TASKS)], 5)
    rows = np.arange(NUM_ROWS, 2 * NUM_ROWS)
    lengths = np.full(NUM_ROWS, 9, np.int32)
    np.testing.assert_array_equal(other.draw(rows, lengths, uniforms), first)
    other.advance(rows, np.random.default_rng(0).random((5, NUM_ROWS)))
    for row in range(NUM_ROWS):  # back from a preemption
        other.enter(NUM_ROWS + row, row, TASKS[row % len(TASKS)], 5)
    np.testing.assert_array_equal(other.draw(rows, lengths, uniforms), first)
    assert (draw(seated(MODELS[name](), seed=6), uniforms, 9) != first).any()
    assert (draw(seated(MODELS[name](), first_id=NUM_ROWS), uniforms, 9) != first).any()


def test_rates_of_requests_are_beta_distributed():
    model = BetaAcceptance(0.7, 4.0)
    alphas = [model.alpha_of(request_id, "", 2) for request_id in range(4000)]
    assert stats.kstest(alphas, stats.beta(2.8, 1.2).cdf).pvalue > 1e-3
    assert stats.kstest(alphas, stats.beta(3.0, 1.2).cdf).pvalue < 1e-3
    assert abs(np.corrcoef(alphas[:-1], alphas[1:])[0, 1]) < 3 / np.sqrt(4000)


def test_switches_follow_their_rate_and_ignore_the_count():
    leave_good, leave_bad, num = 0.2, 0.5, 40_000
    model = seated(MarkovAcceptance(0.9, 0.1, leave_good, leave_bad), num)
    reveal = np.full(num, 0.5)  # the good state accepts it, the bad one does not
    was_good = draw(model, reveal, 1) == 1
    assert was_good.mean() == pytest.approx(leave_bad / (leave_good + leave_bad), abs=0.01)
    uniforms = np.random.default_rng(0).random(num)
    accepted = draw(model, uniforms, 40)
    model.advance(np.arange(num), uniforms[None])
    switched = was_good != (draw(model, reveal, 1) == 1)
    for is_good, rate in ((True, leave_good), (False, leave_bad)):
        for count in range(3):
            chosen = switched[(was_good == is_good) & (accepted == count)]
            error = np.sqrt(rate * (1 - rate) / chosen.size)
            assert abs(chosen.mean() - rate) < 3.5 * error, (is_good, count)


def test_bursts_have_the_covariance_of_the_chain():
    model, num, steps = seated(MarkovAcceptance(0.9, 0.3, 0.1, 0.25), 2000), 2000, 30
    rows, lengths = np.arange(num), np.full(num, 4, np.int32)
    accepted = model.draw_many(rows, lengths, np.random.default_rng(8).random((steps, num)))
    share = 0.25 / 0.35
    gap = float(expected_tokens(0.9, 4) - expected_tokens(0.3, 4))
    centred = accepted - (share * expected_tokens(0.9, 4) + (1 - share) * expected_tokens(0.3, 4) - 1)
    for lag in (1, 2, 5):
        per_row = (centred[:-lag] * centred[lag:]).mean(axis=0)
        expected = share * (1 - share) * gap**2 * (1 - 0.1 - 0.25) ** lag
        assert abs(per_row.mean() - expected) < 3.5 * per_row.std() / np.sqrt(num)
    assert chi_square(accepted[-1], model.survival(4)) > 1e-3


@pytest.mark.parametrize(
    ("models", "default"),
    [
        ({"code": ConstantAcceptance(0.2), "maths": BetaAcceptance(0.9, 5.0)}, ConstantAcceptance(0.7)),
        (
            {"code": PositionalAcceptance([0.2]), "maths": TreeAcceptance.k_ary(1, 2, [0.9])},
            PositionalAcceptance([0.7]),
        ),
        ({"code": PositionalAcceptance([0.2])}, MarkovAcceptance(0.95, 0.05, 0.5, 0.5)),
        ({"code": {"name": "positional", "rates": [0.9, 0.1]}}, {"name": "constant", "alpha": 0.6}),
    ],
    ids=["merged rates", "merged tables", "bursts", "mixture"],
)
def test_each_task_draws_from_its_own_model(models: dict[str, Any], default: Any):
    uniforms = np.random.default_rng(4).random(NUM_ROWS)
    accepted = draw(seated(TaskAcceptance(models, default)), uniforms, 6)
    for row in range(NUM_ROWS):
        own = models.get(TASKS[row % len(TASKS)], default)
        alone = seated(make_acceptance(**own) if isinstance(own, dict) else own)
        assert accepted[row] == draw(alone, uniforms, 6)[row], row


def test_a_tree_is_a_walk_down_its_children():
    rates, num = np.array([0.5, 0.25, 0.1]), 8000
    nodes = {tuple(path) for path in PATHS}
    rng = np.random.default_rng(12)
    depths = np.zeros(num, np.int64)
    for walk in range(num):
        path: tuple[int, ...] = ()
        while (child := (*path, int(np.searchsorted(np.cumsum(rates), rng.random(), "right")))) in nodes:
            path = child
        depths[walk] = len(path)
    tree = TreeAcceptance.from_paths(PATHS, rates)
    assert chi_square(depths, tree.survival(3)) > 1e-3
    assert chi_square(depths, TreeAcceptance.k_ary(3, 3, rates).survival(3)) < 1e-6
    assert draw(tree, [0.0], 8) == [3]  # as deep as the tree, not as many as its nodes
    assert tree.survival(5)[3:].tolist() == [0.0, 0.0]


def test_a_tree_of_one_branch_is_a_chain():
    chain = TreeAcceptance.k_ary(1, 4, [0.7])
    np.testing.assert_allclose(chain.survival(4), ConstantAcceptance(0.7).survival(4))


def test_rates_of_a_trace(tmp_path: Path):
    with TraceWriter(tmp_path) as trace:
        traced_run(trace, num_requests=30, num_drafts=4, alpha=0.7)
    steps, requests = read_steps(tmp_path), read_requests(tmp_path)
    rows = decode_rows(steps)
    model = EmpiricalAcceptance.from_trace(steps, requests, by_task=True)
    np.testing.assert_allclose(model.survival(4), acceptance_by_position(rows)["survival"].to_numpy())
    assert set(model.task_rates) == {"chat", "code"}
    ids = requests.filter(requests["task"] == "code")["request_id"]
    of_code = acceptance_by_position(rows.filter(rows["request_id"].is_in(ids.implode())))
    assert list(model.task_rates["code"]) == of_code["conditional_rate"].to_list()
    assert model.rates[0] == pytest.approx(0.7, abs=0.1)
    assert EmpiricalAcceptance.from_trace(steps, requests).task_rates == {}


def test_a_trace_without_drafts(tmp_path: Path):
    with TraceWriter(tmp_path) as trace:
        traced_run(trace, num_requests=2, num_drafts=0)
    with pytest.raises(ValueError, match="no drafted tokens"):
        EmpiricalAcceptance.from_trace(read_steps(tmp_path), read_requests(tmp_path))


BAD: list[tuple[str, dict[str, object], str]] = [
    ("constant", {"alpha": 1.2}, r"alpha=\[1.2\] must be in \[0, 1\]"),
    ("constant", {"alpha": float("nan")}, r"alpha=\[nan\]"),
    ("constant", {"rate": 0.5}, "'constant' does not take these options: {'rate': 0.5}"),
    ("constant", {}, "missing 1 required positional argument: 'alpha'"),
    ("constnat", {"alpha": 0.5}, "unknown acceptance model 'constnat': did you mean constant"),
    ("positional", {"rates": []}, r"rates=\[\] must be in"),
    ("positional", {"rates": [0.5, -0.1]}, r"rates=\[0.5, -0.1\] must be in \[0, 1\]"),
    ("positional", {"rates": [0.5] * (MAX_DRAFTS + 1)}, "give 1 to 256 probabilities"),
    ("beta", {"mean": -0.1, "concentration": 2.0}, "mean=-0.1 must be in"),
    ("beta", {"mean": 0.5, "concentration": 0.0}, "concentration=0.0 must be finite and > 0"),
    ("markov", {"alpha_good": 0.9, "alpha_bad": 2, "good_to_bad": 0, "bad_to_good": 1}, "alpha_bad="),
    ("markov", {"alpha_good": 0.9, "alpha_bad": 0, "good_to_bad": -1, "bad_to_good": 1}, "good_to_bad="),
    ("markov", {"alpha_good": 0.9, "alpha_bad": 0, "good_to_bad": 0, "bad_to_good": 0}, "not both be 0"),
    ("task", {"models": {"chat": {"name": "nope"}}, "default": {"name": "constant", "alpha": 1}}, "'nope'"),
    ("task", {"models": {}, "default": {"name": "constant", "alpha": 7}}, r"alpha=\[7\]"),
    ("tree", {"parents": [-1, -1], "ranks": [0, 1], "rank_rates": [0.7, 0.4]}, "of sum <= 1"),
    ("tree", {"parents": [*range(-1, 256)], "ranks": [0] * 257, "rank_rates": [0.5]}, "257 levels deep"),
    ("tree_k_ary", {"arity": 0, "depth": 2, "rank_rates": [0.5]}, "arity=0"),
    ("tree_paths", {"paths": [[0, 1]], "rank_rates": [0.5, 0.1]}, r"path \[0, 1\] .* needs its parent \[0\]"),
    ("empirical", {"rates": [0.5], "task_rates": {"chat": [3.0]}}, r"rates=\[3.0\] must be in"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_input_is_named(name: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        make_acceptance(name, **options)


def test_the_registry_is_complete():
    assert set(ACCEPTANCE) >= {"constant", "positional", "beta", "markov", "task", "empirical", "tree"}
    assert isinstance(make_acceptance("tree_k_ary", arity=2, depth=2, rank_rates=[0.5, 0.1]), TreeAcceptance)
    with pytest.raises(ValueError, match=r"k=257 must be in \[0, 256\]"):
        ConstantAcceptance(0.5).survival(MAX_DRAFTS + 1)
