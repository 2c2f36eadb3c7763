"""Step times of the running device, which the goodput controller decides by: measured in a few seconds.

Method: passes of the target with no context, spread over rows as verification spreads them, and passes of single
tokens with little and with much context. All sizes are measured in turn, for as many rounds as the time budget holds,
and medians are taken. The host's share of a step and the drafter's are taken from short generations of an engine.

>>> times = measure_step_times(llm.runner, llm.engine.loop.config, max_drafts=8)
>>> llm.configure("ngram", speculation={"name": "goodput", "max_drafts": 8, **times.options()})
"""

from __future__ import annotations

import json
import logging
import operator
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specdec.drafter import make_drafter
from specdec.drafter.base import MODEL_FREE, Drafter
from specdec.engine import Engine
from specdec.model.tokenizer import Tokenizer
from specdec.rows import RowState, StepInput
from specdec.runner import Runner
from specdec.scheduler import SamplingParams, SchedulerConfig, StepLoop, StepOutcome, StepPlan, make_policy
from specdec.scheduler.plan import IntArray
from specdec.scheduler.speculation import Fixed

log = logging.getLogger(__name__)

BUDGET_S = 4.0
MAX_ROUNDS = 7
_FEW = (1, 2, 3, 4, 6, 8, 12)  # a lone row chooses among these
_TILE = (
    16  # tokens that matrix units take at once: a step of one more than a multiple may cost a whole tile more
)
_MOST_TILES = 9
MIN_SIZES = 6  # however slow the device
PROVISIONAL = {"step_tokens": (1, 2), "step_s": (1.0, 1.0)}
"""Times that stand in for those that are yet to be measured, for what checks the other options."""
_CONTEXT = 1024  # tokens of each row, where the limits allow so many
_CONTEXT_ROWS = 8
_HOST_ROWS = 8
_PROPOSALS = 6

DrafterSpec = str | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of the target's pass and of the argmax over its logits.

    Attributes:
        step_tokens: total tokens, rising; of the largest steps those that the budget allowed.
        step_s: seconds at each, not falling; without context.
        context_token_s: what reading the KV of one more cached token adds, seconds >= 0.
        verify_context_token_s: what each draft adds for each cached token of its row, seconds >= 0.
        max_tokens: the most tokens that were asked for.
        num_rounds: measurements that the medians are of.
        measured_s: what measuring took.
    """

    step_tokens: tuple[int, ...]
    step_s: tuple[float, ...]
    context_token_s: float
    verify_context_token_s: float
    max_tokens: int
    num_rounds: int
    measured_s: float

    def options(self) -> dict[str, Any]:
        """As the goodput controller takes them."""
        names = "step_tokens step_s context_token_s verify_context_token_s".split()
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Seconds of the host in a step of plain decoding: ``overhead_s`` in each, ``overhead_row_s`` for each row."""

    overhead_s: float
    overhead_row_s: float
    max_rows: int

    def options(self) -> dict[str, Any]:
        """As the goodput controller takes them."""
        return {name: getattr(self, name) for name in ("overhead_s", "overhead_row_s")}


def needs_times(options: Mapping[str, Any]) -> bool:
    """Whether these controller options are of goodput and lack the step times altogether."""
    given = [options.get(name) for name in ("step_tokens", "step_s")]
    return options.get("name") == "goodput" and all(times is None or len(times) == 0 for times in given)


class DeviceTimes:
    """What was measured on one runner, so that it is measured once.

    Args:
        runner: the target. Measuring overwrites KV blocks, so no engine may hold any.
        tokenizer: the target's.

    Attributes:
        steps, host: what was measured last; ``None`` before.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self._drafters: dict[str, tuple[dict[str, float], DrafterSpec]] = {}
        self.steps: StepTimes | None = None
        self.host: HostTimes | None = None

    def filled(
        self, options: Mapping[str, Any], drafter: DrafterSpec, limits: SchedulerConfig
    ) -> dict[str, Any]:
        """``options`` of goodput with the times that they lack; those that were given stay.

        Args:
            options: with ``max_drafts``.
            drafter: as :func:`make_drafter` takes it.
            limits: of the engine. Step times serve all limits that need no larger steps.
        """
        max_drafts = int(options["max_drafts"])
        if max_drafts == 0:
            return {**options, **PROVISIONAL}  # nothing to decide
        filled = dict(options)
        if self.steps is None or self.steps.max_tokens < _most_tokens(limits, max_drafts):
            self.steps = measure_step_times(self._runner, limits, max_drafts)
        if self.host is None or self.host.max_rows < limits.max_num_seqs:
            self.host = measure_host_times(self._runner, self._tokenizer, limits)
        measured = self.steps.options() | self.host.options()
        if filled.get("draft_step_s") is None:
            measured |= self._draft_times(drafter, limits, max_drafts, bool(options.get("rank_rates")))
        for name, value in measured.items():
            if filled.get(name) is None or name in ("step_tokens", "step_s"):
                filled[name] = value
        return filled

    def _draft_times(
        self, drafter: DrafterSpec, limits: SchedulerConfig, max_drafts: int, by_level: bool
    ) -> dict[str, float]:
        key = json.dumps([drafter, max_drafts, by_level], sort_keys=True, default=id)
        if key not in self._drafters:
            times = measure_draft_times(
                self._runner, self._tokenizer, drafter, limits, max_drafts, by_level=by_level
            )
            self._drafters[key] = times, drafter  # kept, or a loaded model's id might be given to another
        return self._drafters[key][0]


def measure_step_times(
    runner: Runner, limits: SchedulerConfig, max_drafts: int, budget_s: float = BUDGET_S
) -> StepTimes:
    """Measure the target at a few tokens, whole tiles of a matrix unit and one more, and powers of two, up to
    ``limits.max_num_seqs`` · (1 + ``max_drafts``) tokens.

    Sizes of which one pass would take more than a twelfth of ``budget_s``, or that the KV blocks cannot hold, are
    left out; the controller extends the last slope. The KV cache is overwritten.

    Args:
        runner: the target; no engine may hold KV blocks of it.
        limits: of the engine that is to be controlled.
        max_drafts: most drafts of a row, >= 1.
        budget_s: seconds that measuring may take, roughly.
    """
    assert max_drafts >= 1
    start_s = time.perf_counter()
    passes = _Passes(runner, limits, max_drafts)
    sizes = passes.sizes_within(budget_s / 12)
    measured: dict[int, list[float]] = {tokens: [] for tokens in sizes}
    contexts = passes.contexts()
    most = min(passes.per_row, max(1, sizes[-1] // passes.context_rows))
    per_row = (1, most) if most > 1 else (1,)
    behind: dict[tuple[int, int], list[float]] = {
        (tokens, context): [] for tokens in per_row for context in contexts
    }
    for _ in range(MAX_ROUNDS):
        round_s = time.perf_counter()
        for tokens in sizes:
            measured[tokens].append(passes.verify_s(tokens))
        for tokens, context in behind:
            behind[tokens, context].append(passes.decode_s(tokens, context))
        now_s = time.perf_counter()
        if now_s - start_s + now_s - round_s > budget_s:
            break
    slope = pair_s = 0.0
    if contexts:
        entries = passes.context_rows * (contexts[1] - contexts[0])
        added_s = [
            max(
                0.0,
                statistics.median(
                    map(operator.sub, behind[tokens, contexts[1]], behind[tokens, contexts[0]])
                ),
            )
            for tokens in per_row
        ]
        slope = added_s[0] / entries
        pair_s = max(0.0, added_s[-1] - added_s[0]) / (entries * max(1, most - 1))
    step_s = np.maximum.accumulate([statistics.median(measured[tokens]) for tokens in sizes])
    times = StepTimes(
        step_tokens=tuple(sizes),
        step_s=tuple(step_s.tolist()),
        context_token_s=slope,
        verify_context_token_s=pair_s,
        max_tokens=_most_tokens(limits, max_drafts),
        num_rounds=len(measured[sizes[0]]),
        measured_s=time.perf_counter() - start_s,
    )
    log.info("step times measured in %.1f s: %s", times.measured_s, times)
    return times


def measure_host_times(runner: Runner, tokenizer: Tokenizer, limits: SchedulerConfig) -> HostTimes:
    """What the host adds to steps of one row and of several, plain and greedy. The KV cache is overwritten."""
    several = min(limits.max_num_seqs, limits.num_blocks, _HOST_ROWS)
    counts = sorted({1, several})
    medians: list[float] = []
    for rows in counts:
        seen = _short_run(runner, tokenizer, None, replace(limits, max_num_seqs=rows), 0)
        medians.append(statistics.median(outcome.overhead_s for outcome in seen) if seen else 0.0)
    slope = max(0.0, medians[-1] - medians[0]) / (several - 1) if several > 1 else 0.0
    times = HostTimes(max(0.0, medians[0] - slope), slope, limits.max_num_seqs)
    log.info("host times measured: %s", times)
    return times


def measure_draft_times(
    runner: Runner,
    tokenizer: Tokenizer,
    drafter: DrafterSpec,
    limits: SchedulerConfig,
    max_drafts: int,
    *,
    by_level: bool = False,
) -> dict[str, float]:
    """What drafting ``max_drafts`` tokens takes, as options of the goodput controller; 0 without a drafter
    and of synthetic drafts.

    A fresh drafter proposes a few times (twice if that takes seconds) for one greedy request and for several, and
    medians are taken. Of one that runs a model, ``draft_token_s`` is what a further row adds, over its tokens, and
    ``draft_step_s`` the rest of a proposal's time over its levels, or over its tokens if the controller counts those: a
    tree with fewer passes than nodes then shares their time out among the nodes. Of one that runs none, all its time
    counts for the row, as ``draft_row_s``. What reading the context adds is not measured. The KV cache is overwritten.
    """
    made = make_drafter(drafter)
    nothing = {"draft_step_s": 0.0, "draft_token_s": 0.0, "draft_row_s": 0.0}
    if made is None or made.name == "synthetic":  # which knows its own prompts only
        return nothing
    seen = _short_run(runner, tokenizer, made, replace(limits, max_num_seqs=1), max_drafts)
    if not seen:
        return nothing
    names = {source.name for source in getattr(made, "sources", [made]) if source}
    if names <= MODEL_FREE:
        times = nothing | {"draft_row_s": statistics.median(outcome.draft_s for outcome in seen)}
    else:
        alone_s = statistics.median(outcome.draft_s for outcome in seen)
        token_s = _further_row_s(runner, tokenizer, drafter, limits, max_drafts, alone_s) / max_drafts
        levels = [
            max(1, int(outcome.draft_depths.max(initial=0))) if by_level else max_drafts for outcome in seen
        ]
        per_step = [
            (outcome.draft_s - token_s * max_drafts) / count
            for outcome, count in zip(seen, levels, strict=True)
        ]
        times = nothing | {"draft_step_s": max(0.0, statistics.median(per_step)), "draft_token_s": token_s}
    log.info("drafting with %s takes %s", made.name, times)
    return times


def _further_row_s(
    runner: Runner,
    tokenizer: Tokenizer,
    drafter: DrafterSpec,
    limits: SchedulerConfig,
    max_drafts: int,
    alone_s: float,
) -> float:
    """What one more row adds to a proposal that takes ``alone_s`` for one; never more than for the first."""
    several = min(limits.max_num_seqs, limits.num_blocks, _HOST_ROWS)
    if several == 1:
        return 0.0
    made = make_drafter(drafter)
    seen = _short_run(runner, tokenizer, made, replace(limits, max_num_seqs=several), max_drafts)
    if not seen:
        return 0.0
    together_s = statistics.median(outcome.draft_s for outcome in seen)
    return min(max(0.0, (together_s - alone_s) / (several - 1)), alone_s)


def _short_run(
    runner: Runner, tokenizer: Tokenizer, drafter: Drafter | None, limits: SchedulerConfig, max_drafts: int
) -> list[StepOutcome]:
    """Outcomes of the first decoding steps of ``limits.max_num_seqs`` greedy requests, without the warm-up.

    Nothing if the limits hold no prompt.
    """
    num_rows = limits.max_num_seqs
    room = min(limits.max_model_len, limits.num_blocks // num_rows * limits.block_size)
    prompt_len = min(8, room - 1)
    if prompt_len < 1:
        return []
    loop = _WatchedLoop(limits, make_policy("chunked"), Fixed(max_drafts))
    engine = Engine(runner, tokenizer, loop, drafter)
    max_tokens = min(room - prompt_len, (1 + max_drafts) * (_PROPOSALS + 1) + 1)
    prompt = np.arange(prompt_len, dtype=np.int32) % runner.config.vocab_size
    for _ in range(num_rows):
        engine.add_request(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    is_done = False
    while not is_done:
        _, finished = engine.step(engine.clock())
        is_late = engine.clock() > BUDGET_S and len(loop.decoding) >= 2
        is_done = bool(finished) or is_late or len(loop.decoding) > _PROPOSALS
    engine.abandon()
    # A drafter's first proposal computes the prompt as well.
    return loop.decoding[1:] or loop.decoding


class _WatchedLoop(StepLoop):
    """Notes the outcomes of steps in which all rows decode, as many as ever run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.decoding: list[StepOutcome] = []

    def commit(self, plan: StepPlan, outcome: StepOutcome, now_s: float) -> None:
        super().commit(plan, outcome, now_s)
        if plan.rows.size == self.config.max_num_seqs and (plan.num_new == 1).all() and plan.emits.all():
            self.decoding.append(outcome)


class _Passes:
    """Passes of the target over rows that hold KV blocks of their own."""

    def __init__(self, runner: Runner, limits: SchedulerConfig, max_drafts: int) -> None:
        self._runner, self._limits = runner, limits
        self._most = _most_tokens(limits, max_drafts)
        self.per_row = min(1 + max_drafts, limits.max_model_len)
        self._state = RowState(limits.max_num_seqs, limits.max_model_len, max_drafts)
        self.context_rows = min(limits.max_num_seqs, limits.num_blocks, _CONTEXT_ROWS)

    def sizes_within(self, longest_s: float) -> list[int]:
        """Numbers of tokens whose pass takes at most about ``longest_s``, and the smallest; they are warm then."""
        tiles = [_TILE * count + more for count in range(1, _MOST_TILES + 1) for more in (0, 1)]
        powers = [1 << power for power in range(self._most.bit_length())]
        sizes = sorted(size for size in {*_FEW, *tiles, *powers, self._most} if size <= self._most)
        chosen: list[int] = []
        last_s = 0.0
        for tokens in sizes:
            if not self._fits(tokens) or (len(chosen) >= MIN_SIZES and 2.0 * last_s > longest_s):
                break
            last_s = min(self.verify_s(tokens) for _ in range(2))
            chosen.append(tokens)
        return chosen

    def contexts(self) -> tuple[int, ...]:
        """No context and as much as the limits allow; nothing if that is none."""
        size = self._limits.block_size
        room = self._limits.num_blocks // self.context_rows * size
        longest = min(_CONTEXT, room - self.per_row, self._limits.max_model_len - self.per_row)
        if longest < 1:
            return ()
        # What nobody wrote may not be in memory yet.
        used = self.context_rows * -(-(longest + self.per_row) // size)
        copies = np.stack([np.zeros(used - 1), np.arange(1, used)], axis=1).astype(np.int32)
        self._runner.copy_blocks(copies)
        return 0, longest

    def verify_s(self, tokens: int) -> float:
        """Seconds for so many tokens, in rows of a last token and its drafts."""
        rows = -(-tokens // self.per_row)
        counts = np.full(rows, tokens // rows, np.int32)
        counts[: tokens % rows] += 1
        return self._pass_s(counts, 0)

    def decode_s(self, tokens: int, context: int) -> float:
        """Seconds for ``context_rows`` rows of so many tokens behind so much context each."""
        return self._pass_s(np.full(self.context_rows, tokens, np.int32), context)

    def _fits(self, tokens: int) -> bool:
        rows = -(-tokens // self.per_row)
        return tokens <= 2 or rows * -(-self.per_row // self._limits.block_size) <= self._limits.num_blocks

    def _pass_s(self, counts: IntArray, context: int) -> float:
        size, rows = self._limits.block_size, np.arange(counts.size)
        width = -(-(context + int(counts.max())) // size)
        table = np.arange(counts.size * width, dtype=np.int32).reshape(-1, width)
        start_s = time.perf_counter()
        start = np.full(counts.size, context, np.int32)
        batch = StepInput(self._state, table, size, rows, start, counts, counts)
        self._runner.forward(batch).argmax(dim=-1).numpy(force=True)
        return time.perf_counter() - start_s


def _most_tokens(limits: SchedulerConfig, max_drafts: int) -> int:
    return limits.max_num_seqs * (1 + max_drafts)
