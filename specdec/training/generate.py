"""The target's own questions and answers, with what heads learn from taken from the very steps that made them.

Distilling on text that the target wrote matters: a draft is asked to continue such text, not that of its training data
(arXiv 2310.08461, section 4; 2401.15077, section 4.1).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafter.base import Draft, DraftHost, Verified
from specdec.llm import LLM
from specdec.output import RequestOutput
from specdec.scheduler import SamplingParams
from specdec.scheduler.plan import StepOutcome, StepPlan
from specdec.training.corpus import Answer, Corpus, Taught
from specdec.training.teacher import most_likely


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt of a corpus: its key (unique), token ids, kind, and whether its answer is held out."""

    key: str
    prompt: tuple[int, ...]
    task: str
    held_out: bool


@dataclass(slots=True)
class _Kept:
    """One running request: hidden states of runs of tokens, and likely tokens of what it emitted."""

    hidden: list[tuple[int, Tensor]] = field(default_factory=list)
    tops: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)


class Recorder:
    """A drafter that drafts nothing and keeps what it is shown."""

    name = "recorder"

    def __init__(self, layers: Sequence[int], top_k: int) -> None:
        self.captures: Sequence[int] = tuple(layers)
        self._top_k = top_k
        self._kept: dict[int, _Kept] = {}

    def bind(self, host: DraftHost) -> None:
        self._kept.clear()

    def propose(self, plan: StepPlan) -> Draft:
        return Draft.none(plan.rows.size)

    def observe(self, plan: StepPlan, outcome: StepOutcome, verified: Verified) -> None:
        assert verified.hidden is not None
        hidden = verified.hidden.to("cpu", torch.bfloat16)
        emitting = np.flatnonzero(plan.emits)
        ids, probs = most_likely(verified.logits, self._top_k) if emitting.size else (None, None)
        for index, request_id in enumerate(plan.request_ids.tolist()):
            kept = self._kept.setdefault(request_id, _Kept())
            start, end = verified.query_start[index : index + 2].tolist()
            kept.hidden.append((int(plan.context[index]), hidden[:, start:end]))
            if plan.emits[index]:
                assert ids is not None and probs is not None
                at = slice(int(verified.logit_start[index]), int(verified.logit_start[index]) + 1)
                kept.tops.append((ids[at], probs[at]))

    def take(self, output: RequestOutput) -> Taught:
        """What was kept of a finished request, which is forgotten."""
        kept = self._kept.pop(output.request_id)
        count = len(output.prompt_token_ids) + len(output.token_ids)
        layers, _, size = kept.hidden[0][1].shape
        hidden = torch.zeros(layers, count, size, dtype=torch.bfloat16)
        for start, part in kept.hidden:  # what was computed again after a preemption comes again
            hidden[:, start : start + part.shape[1]] = part
        ids, probs = zip(*kept.tops, strict=True)
        return Taught(hidden, np.concatenate(ids), np.concatenate(probs))


def generate_answers(
    llm: LLM,
    corpus: Corpus,
    questions: Iterable[Question],
    params: SamplingParams,
    *,
    seconds_left: Callable[[], float],
    on_answer: Callable[[Answer], None],
) -> None:
    """Answer the ``questions`` that the corpus has no answer to, until the time is up.

    As many are in work as the engine runs at once; each that ends lets the next one in, and the last ones may end a
    little late.

    Args:
        llm: configured to decode plainly, without prefix cache. A prompt must leave room for an answer.
        seconds_left: of the time for this.
        on_answer: called with every answer that was stored.
    """
    known = {answer.key for answer in corpus.answers}
    waiting = iter([question for question in questions if question.key not in known])
    engine = llm.engine
    running: dict[int, Question] = {}
    recorder = Recorder(corpus.layers, corpus.top_k)

    def admit() -> None:
        question = next(waiting, None) if seconds_left() > 0 else None
        if question is not None:
            own = replace(params, seed=zlib.crc32(question.key.encode()))
            running[engine.add_request(np.array(question.prompt, np.int32), own)] = question

    def store(output: RequestOutput) -> None:
        question = running.pop(output.request_id)
        tokens = (*output.prompt_token_ids, *output.token_ids)
        answer = Answer(
            tokens=tokens,
            num_prompt=len(output.prompt_token_ids),
            key=question.key,
            task=question.task,
            held_out=question.held_out,
        )
        corpus.append(answer, recorder.take(output))
        on_answer(answer)
        admit()

    engine.drafter = recorder
    try:
        for _ in range(engine.loop.config.max_num_seqs):
            admit()
        engine.run(store)
    finally:
        engine.drafter = None
        engine.abandon()


def ask_questions(
    llm: LLM,
    opening: Sequence[int],
    params: SamplingParams,
    numbers: Iterable[int],
    *,
    seconds_left: Callable[[], float],
    on_question: Callable[[int, str | None], None],
) -> None:
    """Let the target write what users ask, until the time is up.

    A model that was trained on conversations goes on with the user's words when it is given all that stands before
    them (Magpie, Xu et al., arXiv 2406.08464). So prompts of the kind that it is used to need no data.

    Args:
        llm: configured to decode plainly.
        opening: token ids up to the user's words.
        params: how it is sampled; ``max_tokens`` is the longest question. Each has a seed of its own.
        numbers: of the questions to ask.
        on_question: called with a question's number and text; ``None`` if it is empty or did not end.
    """
    waiting, engine, running = iter(numbers), llm.engine, dict[int, int]()
    prompt = np.array(opening, np.int32)

    def admit() -> None:
        number = next(waiting, None) if seconds_left() > 0 else None
        if number is not None:
            own = replace(params, seed=zlib.crc32(f"question/{number}".encode()) ^ (params.seed or 0))
            running[engine.add_request(prompt, own)] = number

    def store(output: RequestOutput) -> None:
        text = output.text.strip() if output.finish_reason == "stop" else ""
        on_question(running.pop(output.request_id), text or None)
        admit()

    try:
        for _ in range(engine.loop.config.max_num_seqs):
            admit()
        engine.run(store)
    finally:
        engine.abandon()
