"""How many drafted tokens a simulated verification accepts.

A law is a survival function: S_j is the chance that the first j drafts of a step are all accepted. One uniform
u per row and step gives the count by inverse CDF, the number of positions j <= num_drafts with u < S_j, so
runs with the same uniforms differ only by their laws. For a tree, positions are depths.

A model serves one replica: it holds parameters and state for each row of that replica's request table.

>>> model = make_acceptance("constant", alpha=0.8)
>>> rows, num_drafts = np.arange(3), np.full(3, 4, np.int32)
>>> model.draw(rows, num_drafts, np.array([0.1, 0.5, 0.9]))
array([4, 3, 0], dtype=int32)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, cast

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from sim.closed_form import FloatArray, beta_survival, k_ary_tree, tree_from_paths, tree_survival
from specdec.metrics import acceptance_by_position, decode_rows
from specdec.scheduler.plan import IntArray, LongArray

MAX_DRAFTS = 256
"""Positions of a law's table: of a longer draft, a model may accept no more than these."""

_TINY = float(np.finfo(np.float64).tiny)
# The logarithms of u and α round. This shrinks their ratio by more, so that u = α^j is not taken for u < α^j.
_TIE = 1.0 - 2.0**-51


class AcceptanceModel(Protocol):
    """Rows are unique within a call, uniforms in [0, 1). Only ``advance`` changes what is drawn next."""

    @property
    def is_alike(self) -> bool:
        """Whether all steps of all requests follow one law, independently of each other."""
        ...

    def survival(self, k: int) -> FloatArray:
        """S_1 … S_k of a request of which nothing is known, float64 [k]."""
        ...

    def bind(self, max_rows: int) -> None:
        """Make room for the rows 0 … max_rows − 1 of a request table."""

    def enter(self, row: int, request_id: int, task: str, seed: int) -> None:
        """Give ``row`` to a request.

        What is drawn for it here depends on the model's ``seed`` and ``request_id`` alone, both in [0, 2**64),
        not on the schedule: it is the same when the request comes back from a preemption.
        """

    def draw(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        """Accepted drafts of one step, int32 [n], from int64, int32 and float64 [n]."""
        ...

    def draw_many(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        """The next m steps of the same rows and lengths, int32 [m, n], from uniforms float64 [m, n].

        Step i is what ``draw`` gives after ``advance`` by the steps before it.
        """
        ...

    def advance(self, rows: LongArray, uniforms: FloatArray) -> None:
        """The j steps drawn with these uniforms, float64 [j, n], did happen."""


class _Memoryless:
    """A model whose steps are independent; ``law`` is the survival where nothing else is known of a request."""

    is_alike = False

    def __init__(self, law: FloatArray) -> None:
        self.law = law

    def survival(self, k: int) -> FloatArray:
        """S_1 … S_k in a step of a request of which nothing is known, float64 [k]."""
        if not 0 <= k <= MAX_DRAFTS:
            raise ValueError(f"k={k} must be in [0, {MAX_DRAFTS}]: it counts draft positions")
        return self.law[:k].copy()

    def draw(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        raise NotImplementedError

    def draw_many(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        return self.draw(rows, num_drafts, uniforms)

    def advance(self, rows: LongArray, uniforms: FloatArray) -> None:
        """Nothing to move on."""


class _RowAlpha(_Memoryless):
    """One rate α per row, S_j = α^j: the count is floor(log u / log α)."""

    def __init__(self, law: FloatArray) -> None:
        super().__init__(law)
        self._inverse_logs = np.empty(0)

    def alpha_of(self, request_id: int, task: str, seed: int) -> float:
        raise NotImplementedError

    def bind(self, max_rows: int) -> None:
        self._inverse_logs = np.zeros(max_rows)

    def enter(self, row: int, request_id: int, task: str, seed: int) -> None:
        self._inverse_logs[row] = _inverse_log(self.alpha_of(request_id, task, seed))

    def draw(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        # _TINY vanishes beside any uniform but 0, whose logarithm it makes finite.
        counts = np.log(uniforms + _TINY) * self._inverse_logs.take(rows)
        return np.minimum(counts, num_drafts).astype(np.int32)


class ConstantAcceptance(_RowAlpha):
    """Every draft is accepted with probability ``alpha`` if those before it were."""

    is_alike = True

    def __init__(self, alpha: float) -> None:
        super().__init__(_survival([alpha], "alpha"))
        self.alpha = float(alpha)
        self._inverse_log = _inverse_log(self.alpha)

    def alpha_of(self, request_id: int, task: str, seed: int) -> float:
        return self.alpha

    def draw(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        return np.minimum(np.log(uniforms + _TINY) * self._inverse_log, num_drafts).astype(np.int32)


class BetaAcceptance(_RowAlpha):
    """Each request has an α of its own, Beta distributed: see :func:`sim.closed_form.beta_survival`."""

    def __init__(self, mean: float, concentration: float) -> None:
        super().__init__(beta_survival(mean, concentration, MAX_DRAFTS))
        self.mean, self.concentration = float(mean), float(concentration)
        self._noise = RequestNoise()

    def alpha_of(self, request_id: int, task: str, seed: int) -> float:
        if self.mean in (0.0, 1.0):
            return self.mean
        accepted = self.mean * self.concentration
        return self._noise.at(seed, request_id).beta(accepted, self.concentration - accepted)


class _AlphaByTask(_RowAlpha):
    def __init__(self, models: Mapping[str, _RowAlpha], default: _RowAlpha) -> None:
        super().__init__(default.law)
        self._models, self._default = models, default

    def alpha_of(self, request_id: int, task: str, seed: int) -> float:
        return self._models.get(task, self._default).alpha_of(request_id, task, seed)


class _Tabulated(_Memoryless):
    """Laws in one table, drawn from in a single search. Every row follows one of them.

    Args:
        laws: float64 [L, MAX_DRAFTS], survival by position.
        tasks: whose rows follow the laws from the second on; all others follow the first.
        edges: more uniforms at which cells of the table are to begin.
    """

    def __init__(self, laws: FloatArray, tasks: Sequence[str] = (), edges: ArrayLike = ()) -> None:
        super().__init__(laws[0])
        self._num_laws, self._law_of = len(laws), {task: number for number, task in enumerate(tasks, 1)}
        self._edges = np.unique(np.append(laws, edges))
        self._lowest = np.insert(self._edges, 0, -np.inf)  # of the uniforms in each of the G cells
        # int32 [L, G], positions with u < S_j. The edges hold every S_j, so all u of a cell have one count.
        below = np.stack([law[::-1].searchsorted(self._lowest, "right") for law in laws])
        self._counts = (MAX_DRAFTS - below).astype(np.int32)
        self._first_cells = np.empty(0, np.intp)  # of each row's law

    def bind(self, max_rows: int) -> None:
        self._first_cells = np.zeros(max_rows, np.intp)

    def enter(self, row: int, request_id: int, task: str, seed: int) -> None:
        self._first_cells[row] = self._law_of.get(task, 0) * self._lowest.size

    def draw(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        cells = self._edges.searchsorted(uniforms, "right")
        if self._num_laws > 1:
            cells += self._first_cells.take(rows)
        return np.minimum(self._counts.take(cells), num_drafts)


class PositionalAcceptance(_Tabulated):
    """Rates by position, c_j = P(draft j is accepted | all before it were); the last serves all later ones."""

    is_alike = True

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__(_survival(rates, "rates")[None])


class TreeAcceptance(_Tabulated):
    """A draft tree of fixed shape, of whose children the b-th is the accepted one with probability p_b.

    ``num_drafts`` caps the depth, so with the size of the whole tree it has no effect. See
    :func:`sim.closed_form.tree_survival` for the arguments and errors.
    """

    is_alike = True

    def __init__(self, parents: Sequence[int], ranks: Sequence[int], rank_rates: ArrayLike) -> None:
        law = tree_survival(parents, ranks, rank_rates)
        if law.size > MAX_DRAFTS:
            raise ValueError(f"the tree is {law.size} levels deep: at most {MAX_DRAFTS} are supported")
        super().__init__(np.pad(law, (0, MAX_DRAFTS - law.size))[None])

    @classmethod
    def k_ary(cls, arity: int, depth: int, rank_rates: ArrayLike) -> TreeAcceptance:
        """See :func:`sim.closed_form.k_ary_tree`."""
        return cls(*k_ary_tree(arity, depth), rank_rates)

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]], rank_rates: ArrayLike) -> TreeAcceptance:
        """See :func:`sim.closed_form.tree_from_paths`."""
        return cls(*tree_from_paths(paths), rank_rates)


class MarkovAcceptance(_Tabulated):
    """Bursts: each row is in a good or a bad state, which may switch after every step.

    One uniform drives both: its place within the interval of the count that it chose is uniform too, and
    independent of the count, so the low end of every interval switches. A request begins in a state drawn from
    the stationary law, and in that same state when it comes back from a preemption.

    Args:
        alpha_good, alpha_bad: acceptance rate of a draft, by state.
        good_to_bad, bad_to_good: probability of a switch after a step; not both 0.
    """

    def __init__(self, alpha_good: float, alpha_bad: float, good_to_bad: float, bad_to_good: float) -> None:
        laws = np.stack([_survival([alpha_good], "alpha_good"), _survival([alpha_bad], "alpha_bad")])
        switch = [_survival([good_to_bad], "good_to_bad")[:1], _survival([bad_to_good], "bad_to_good")[:1]]
        if not np.any(switch):
            raise ValueError("good_to_bad and bad_to_good must not both be 0: for one state use 'constant'")
        # Count a is drawn by the uniforms in [S_{a+1}, S_a), the largest count by [0, S_MAX_DRAFTS).
        above, below = np.insert(laws, 0, 1.0, axis=1), np.insert(laws, MAX_DRAFTS, 0.0, axis=1)
        ends = np.maximum(above * switch + below * np.subtract(1.0, switch), below)
        super().__init__(laws, edges=ends)
        self.share_good = bad_to_good / (good_to_bad + bad_to_good)
        self.law = self.share_good * laws[0] + (1.0 - self.share_good) * laws[1]
        is_switch = self._lowest < np.take_along_axis(ends, self._counts, axis=1)
        here = np.array([[0], [self._lowest.size]])
        self._next_cells = np.where(is_switch, here[::-1], here)
        self._noise = RequestNoise()

    def enter(self, row: int, request_id: int, task: str, seed: int) -> None:
        is_good = self._noise.at(seed, request_id).random() < self.share_good
        self._first_cells[row] = 0 if is_good else self._lowest.size

    def draw_many(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        return np.minimum(self._counts.take(self._walk(rows, uniforms)[0]), num_drafts)

    def advance(self, rows: LongArray, uniforms: FloatArray) -> None:
        self._first_cells[rows] = self._walk(rows, uniforms)[1]

    def _walk(self, rows: LongArray, uniforms: FloatArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The cells of the steps, [m, n], and the first cells of the rows' states after them, [n]."""
        cells, state = self._edges.searchsorted(uniforms, "right"), self._first_cells.take(rows)
        for step in cells:
            step += state
            state = self._next_cells.take(step)
        return cells, state


ModelOrOptions = AcceptanceModel | Mapping[str, Any]
Rates = Sequence[float]


class TaskAcceptance:
    """A model for each task.

    Models that all have a rate per request (constant, beta), or all a table (positional, tree), are drawn from
    as one, which is several times faster than a mixture of both.

    Args:
        models: by task, each a model or the options of :func:`make_acceptance` for one, its ``name`` included.
        default: for the tasks not named.
    """

    is_alike = False

    def __init__(self, models: Mapping[str, ModelOrOptions], default: ModelOrOptions) -> None:
        built = [make_acceptance(**m) if isinstance(m, Mapping) else m for m in (default, *models.values())]
        merged = _merge(list(models), built)
        self._models = built if merged is None else [merged]
        self._model_of = {task: number for number, task in enumerate(models, 1)} if merged is None else {}
        self._chosen = np.empty(0, np.intp)

    def survival(self, k: int) -> FloatArray:
        """Of a request of a task that has no law of its own."""
        return self._models[0].survival(k)

    def bind(self, max_rows: int) -> None:
        self._chosen = np.zeros(max_rows, np.intp)
        for model in self._models:
            model.bind(max_rows)

    def enter(self, row: int, request_id: int, task: str, seed: int) -> None:
        self._chosen[row] = chosen = self._model_of.get(task, 0)
        self._models[chosen].enter(row, request_id, task, seed)

    def draw(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        if len(self._models) == 1:
            return self._models[0].draw(rows, num_drafts, uniforms)
        return self.draw_many(rows, num_drafts, uniforms[None])[0]

    def draw_many(self, rows: LongArray, num_drafts: IntArray, uniforms: FloatArray) -> IntArray:
        if len(self._models) == 1:
            return self._models[0].draw_many(rows, num_drafts, uniforms)
        accepted = np.empty(uniforms.shape, np.int32)
        for model, own in self._parts(rows):
            accepted[:, own] = model.draw_many(rows[own], num_drafts[own], uniforms[:, own])
        return accepted

    def advance(self, rows: LongArray, uniforms: FloatArray) -> None:
        if len(self._models) == 1:
            return self._models[0].advance(rows, uniforms)
        for model, own in self._parts(rows):
            model.advance(rows[own], uniforms[:, own])

    def _parts(self, rows: LongArray) -> Iterator[tuple[AcceptanceModel, NDArray[np.intp]]]:
        """The models that some of ``rows`` follow, and where those rows are."""
        chosen = self._chosen.take(rows)
        for number, model in enumerate(self._models):
            own = np.flatnonzero(chosen == number)
            if own.size:
                yield model, own


class EmpiricalAcceptance(TaskAcceptance):
    """Rates by position as a trace shows them, of all requests or by task.

    Args:
        rates: see :class:`PositionalAcceptance`; to go on behind the trace's longest draft is a guess.
        task_rates: others for the tasks named.
    """

    def __init__(self, rates: Rates, task_rates: Mapping[str, Rates] | None = None) -> None:
        self.rates, self.task_rates = rates, dict(task_rates or {})
        by_task = {task: PositionalAcceptance(own) for task, own in self.task_rates.items()}
        super().__init__(by_task, PositionalAcceptance(rates))

    @classmethod
    def from_trace(cls, steps: pl.DataFrame, requests: pl.DataFrame, *, by_task: bool = False) -> Self:
        """The rates of a run that ``specdec.trace`` recorded, by task too for the tasks that drafted anything.

        Raises:
            ValueError: the trace has no drafts.
        """
        rows = decode_rows(steps)
        rates = _measured_rates(rows)
        if not rates:
            raise ValueError("the trace has no drafted tokens: record a run with speculation on")
        rows = rows.join(requests.select("request_id", "task"), on="request_id")
        tasks = cast("list[str]", rows["task"].unique().sort().to_list()) if by_task else []
        measured = {task: _measured_rates(rows.filter(pl.col("task") == task)) for task in tasks}
        return cls(rates, {task: own for task, own in measured.items() if own})

    def survival(self, k: int) -> FloatArray:
        """S_1 … S_k over all requests of the trace, float64 [k]."""
        return PositionalAcceptance(self.rates).survival(k)


def _merge(tasks: Sequence[str], models: Sequence[AcceptanceModel]) -> AcceptanceModel | None:
    """One model that draws as ``models`` do, the first for all tasks but ``tasks``, if they are of one kind."""
    rates = [model for model in models if isinstance(model, _RowAlpha)]
    if len(rates) == len(models):
        return _AlphaByTask(dict(zip(tasks, rates[1:], strict=True)), rates[0])
    tables = [m for m in models if isinstance(m, _Tabulated) and not isinstance(m, MarkovAcceptance)]
    if len(tables) == len(models):
        return _Tabulated(np.stack([model.law for model in tables]), tasks)
    return None


class RequestNoise:
    """A generator that starts afresh for each (seed, request), several times faster than making one.

    Args:
        tag: tells independent uses of the same seed apart, in [0, 2**64).
    """

    def __init__(self, tag: int = 0xACCE97) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state
        # Clear of the low counters, where another user of Philox with the same key would begin.
        self._start["state"]["counter"][3] = tag

    def at(self, seed: int, request_id: int) -> np.random.Generator:
        self._start["state"]["key"][:] = seed, request_id
        self._bits.state = self._start
        return self._generator


ACCEPTANCE: dict[str, Callable[..., AcceptanceModel]] = {
    "constant": ConstantAcceptance,
    "positional": PositionalAcceptance,
    "beta": BetaAcceptance,
    "markov": MarkovAcceptance,
    "task": TaskAcceptance,
    "empirical": EmpiricalAcceptance,
    "tree": TreeAcceptance,
    "tree_k_ary": TreeAcceptance.k_ary,
    "tree_paths": TreeAcceptance.from_paths,
}


def make_acceptance(name: str, **options: Any) -> AcceptanceModel:
    """The acceptance model called ``name``, e.g. ``make_acceptance("constant", alpha=0.8)``.

    Raises:
        ValueError: unknown name (with the nearest ones), wrong option, or value out of range.
    """
    if name not in ACCEPTANCE:
        near = difflib.get_close_matches(name, ACCEPTANCE, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown acceptance model {name!r}: {hint}known: {', '.join(sorted(ACCEPTANCE))}")
    try:
        return ACCEPTANCE[name](**options)
    except TypeError as error:
        raise ValueError(f"acceptance {name!r} does not take these options: {options} ({error})") from None


def _inverse_log(alpha: float) -> float:
    """1 / log α, a hair nearer to 0; for α = 0 it is that of a rate too small to accept any uniform."""
    return -math.inf if alpha == 1.0 else _TIE / math.log(alpha or 5e-324)


def _survival(rates: ArrayLike, name: str) -> FloatArray:
    """S_1 … S_MAX_DRAFTS from conditional rates, of which the last goes on."""
    values = np.asarray(rates, np.float64)
    if values.ndim != 1 or not 1 <= values.size <= MAX_DRAFTS or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name}={rates} must be in [0, 1]: give 1 to {MAX_DRAFTS} probabilities")
    return np.asarray(np.cumprod(np.pad(values, (0, MAX_DRAFTS - values.size), "edge")), np.float64)


def _measured_rates(rows: pl.DataFrame) -> list[float]:
    """Conditional rates of the positions that some verification reached."""
    return acceptance_by_position(rows).filter(pl.col("num_reached") > 0)["conditional_rate"].to_list()
