"""Parts of train_draft: collecting answers, choosing what is trained, and the loop around the trainer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from experiments import common
from experiments.rows_file import appended, read_rows
from specdec.config import Config
from specdec.config_training import TrainDraftConfig
from specdec.heads.borrowed import Borrowed
from specdec.heads.eagle import EagleHead, EagleShape
from specdec.heads.files import rotary_of, save_head
from specdec.heads.medusa import MedusaHeads
from specdec.llm import LLM
from specdec.model.config import ModelConfig
from specdec.model.weights import LoadedModel
from specdec.scheduler import SamplingParams
from specdec.tracking import Run, write_json
from specdec.training.batches import Batches
from specdec.training.corpus import Answer, Corpus, stored_layers
from specdec.training.generate import ask_questions, generate_answers
from specdec.training.learners import EagleLearner, Learner, MedusaLearner, acceptance
from specdec.training.questions import make_questions, opening_of_user_turn, text_windows, training_prompts
from specdec.training.student import Student, StudentLearner, save_student
from specdec.training.teacher import Teacher
from specdec.training.trainer import Recipe, Trainer, bfloat16_is_faster, step_seconds, stored_recipe
from specdec.workload import PromptItem

SELF = "self"
ASKING_SHARE = 0.2
"""Of the time for answers, what questions may take."""
CALIBRATION_TOKENS = 8192
CURVE_TOKENS = 2048


class Budget:
    """Seconds of wall clock over all runs that share a file."""

    def __init__(self, path: Path, total_s: float) -> None:
        self._path, self._total_s = path, total_s
        self._before_s: float = json.loads(path.read_text())["spent_s"] if path.exists() else 0.0
        self._start_s = time.perf_counter()

    @property
    def spent_s(self) -> float:
        return self._before_s + time.perf_counter() - self._start_s

    @property
    def left_s(self) -> float:
        return self._total_s - self.spent_s

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"spent_s": self.spent_s})


def layers_of(options: TrainDraftConfig, target: ModelConfig, corpus: Path) -> tuple[int, ...]:
    """The target's layers whose outputs are kept; the last one serves all but eagle3.

    Medusa heads and students also take the answers of a ``corpus`` that keeps others before the last.
    """
    stored = stored_layers(corpus)
    if stored and options.kind in ("medusa", "student") and stored[-1] == target.num_layers - 1:
        return stored
    variant = "eagle3" if options.kind == "eagle3" else "eagle1"
    return EagleShape.of(target, variant, options.layers).layers


def training_items(
    config: Config, run: Run, llm: LLM, work: Path, budget: Budget, may_ask: bool
) -> list[PromptItem]:
    """The prompts of ``experiment.prompts`` in their order; the target's own questions only grow if ``may_ask``."""
    items: list[PromptItem] = []
    for source in config.experiment.prompts:
        items += (
            _self_asked(config, run, llm, work, budget, may_ask)
            if source == SELF
            else training_prompts(source)
        )
    return items


def _self_asked(
    config: Config, run: Run, llm: LLM, work: Path, budget: Budget, may_ask: bool
) -> list[PromptItem]:
    """What the target asks in the user's place; in ``questions.jsonl`` as they come, those without a text too."""
    options: TrainDraftConfig = config.experiment
    work.mkdir(parents=True, exist_ok=True)
    path = work / "questions.jsonl"
    texts: dict[int, str | None] = {row["number"]: row["text"] for row in read_rows(path)}
    opening = opening_of_user_turn(llm.tokenizer)
    longest = options.max_len - options.max_tokens - 2 * len(opening)
    if longest < 1:
        raise ValueError(
            f"experiment.max_len={options.max_len} leaves no room for questions beside max_tokens={options.max_tokens}"
        )
    params = SamplingParams(max_tokens=longest, temperature=1.0, top_p=0.95, seed=config.seed)
    missing = [number for number in range(options.num_self) if number not in texts] if may_ask else []
    stop_s = budget.left_s - ASKING_SHARE * options.generate_share * options.budget_s
    with common.progress(run) as bar, appended(path) as add:
        task = bar.add_task("questions", total=options.num_self, completed=len(texts))

        def on_question(number: int, text: str | None) -> None:
            texts[number] = text
            add({"number": number, "text": text})
            bar.update(task, advance=1)
            budget.save()

        ask_questions(
            llm,
            opening,
            params,
            missing,
            seconds_left=lambda: budget.left_s - stop_s,
            on_question=on_question,
        )
    distinct = dict.fromkeys(text for _, text in sorted(texts.items()) if text)
    return [PromptItem(prompt=[{"role": "user", "content": text}], task=SELF) for text in distinct]


def collect(
    config: Config,
    run: Run,
    llm: LLM,
    corpus: Corpus,
    teacher: Teacher,
    budget: Budget,
    items: Sequence[PromptItem],
) -> dict[str, float]:
    """Fill the corpus: generate answers to ``items``, or teach the text. Tokens per second of what was done."""
    options: TrainDraftConfig = config.experiment
    limit = corpus.num_tokens if options.num_tokens is None else options.num_tokens
    start_s, before = time.perf_counter(), corpus.num_tokens

    def seconds_left() -> float:
        if options.num_tokens is not None and corpus.num_tokens >= limit:
            return 0.0
        return budget.left_s - (1.0 - options.generate_share) * options.budget_s

    with common.progress(run) as bar:
        task = bar.add_task("answers", total=None)

        def on_answer(answer: Answer) -> None:
            bar.update(task, advance=1, description=f"answers, {corpus.num_tokens:,} tokens")
            budget.save()

        if options.text:
            known = {answer.key for answer in corpus.answers}
            for window in text_windows(options.text, llm.tokenizer, options.max_len, options.num_held_out):
                if window.key not in known and seconds_left() > 0:
                    corpus.append(window, teacher.teach(window))
                    on_answer(window)
        else:
            questions = make_questions(
                items,
                llm.tokenizer,
                rounds=options.rounds,
                max_prompt=options.max_len - options.max_tokens,
                num_held_out=options.num_held_out,
                seed=config.seed,
            )
            greedy = SamplingParams(max_tokens=options.max_tokens)
            sampled = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
            for params, some in (
                (greedy, [question for question in questions if question.key.endswith("/0")]),
                (sampled, [question for question in questions if not question.key.endswith("/0")]),
            ):
                generate_answers(llm, corpus, some, params, seconds_left=seconds_left, on_answer=on_answer)
    seconds, count = time.perf_counter() - start_s, corpus.num_tokens - before
    return {"teach_tok_s" if options.text else "generate_tok_s": count / seconds} if count else {}


def make_learner(
    options: TrainDraftConfig,
    model: LoadedModel,
    borrowed: Borrowed,
    corpus: Corpus,
    indices: Sequence[int],
    teacher: Teacher,
    seed: int,
) -> Learner:
    """What ``options.kind`` trains, at its start."""
    config = model.config
    if options.kind == "student":
        return StudentLearner(Student(model, options.num_layers), borrowed, sharpness=options.sharpness)
    if options.kind == "medusa":
        heads = MedusaHeads(options.num_heads, config.hidden_size)
        decay = 0.8 if options.decay is None else options.decay
        return MedusaLearner(heads, borrowed, decay=decay, sharpness=options.sharpness)
    head = EagleHead(
        EagleShape.of(config, options.kind, options.layers, options.intermediate_size), rotary_of(config)
    )
    head.reset(seed)
    head.calibrate(_some_hidden(corpus, indices, teacher))
    return EagleLearner(
        head,
        borrowed,
        unroll_steps=options.unroll_steps,
        anchor_share=options.anchor_share,
        decay=0.5 if options.decay is None else options.decay,
        sharpness=options.sharpness,
        unknown_share=options.unknown_share,
        regression=options.regression,
    )


def _some_hidden(corpus: Corpus, indices: Sequence[int], teacher: Teacher) -> torch.Tensor:
    """Hidden states float32 [L, T, H] of the first answers, without their first and last tokens."""
    parts: list[torch.Tensor] = []
    for index in indices:
        hidden = corpus.hidden(index)
        hidden = teacher.hidden(corpus.answers[index]) if hidden is None else hidden
        parts.append(hidden[:, 1:-1].float())
        if sum(part.shape[1] for part in parts) >= CALIBRATION_TOKENS:
            break
    return torch.cat(parts, dim=1)


def plan_recipe(
    options: TrainDraftConfig, learner: Learner, batches: Batches, budget: Budget, checkpoint: Path, seed: int
) -> Recipe:
    """The recipe: as many steps as fit the budget, which a checkpoint has decided already."""
    stored = stored_recipe(checkpoint)
    if stored is not None:
        num_steps, autocast = stored.num_steps, stored.autocast
    else:
        hidden_size = batches.corpus.hidden_size
        autocast = options.dtype == "bfloat16" or (
            options.dtype == "auto" and bfloat16_is_faster(hidden_size, options.tokens_per_step)
        )
        num_steps = options.num_steps or _steps_in(options, learner, batches, budget, autocast)
    return Recipe(
        num_steps=num_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        autocast=autocast,
        seed=seed,
    )


def _steps_in(
    options: TrainDraftConfig, learner: Learner, batches: Batches, budget: Budget, autocast: bool
) -> int:
    most = options.epochs * len(batches.epoch(0))
    step_s = step_seconds(learner, batches, autocast)
    # A margin for the optimiser, evaluations and checkpoints.
    return max(1, min(most, int(0.85 * budget.left_s / step_s)))


def first_answers(corpus: Corpus, indices: Sequence[int]) -> list[int]:
    """As many of ``indices`` as evaluations during training look at."""
    chosen: list[int] = []
    for index in indices:
        if chosen and sum(corpus.answers[i].num_answer for i in chosen) >= CURVE_TOKENS:
            break
        chosen.append(index)
    return chosen


def fit(run: Run, options: TrainDraftConfig, trainer: Trainer, held_out: Batches, budget: Budget) -> None:
    """Train until the schedule or the time ends, with evaluations and checkpoints."""
    progress, num_steps = trainer.progress, trainer.recipe.num_steps
    every = max(1, num_steps // options.num_evals)
    saved_s = time.perf_counter()

    def evaluate() -> None:
        found = acceptance(trainer.learner, held_out, options.num_drafts)
        point = {"step": progress.step, "tokens": progress.tokens, **asdict(found)}
        progress.curve.append(point)
        run.log_metrics(flat(point), step=progress.step)

    with common.progress(run) as bar:
        task = bar.add_task("training", total=num_steps, completed=progress.step)
        if not progress.curve:
            evaluate()
        while not trainer.is_done and (options.num_steps is not None or budget.left_s > 0):
            loss = trainer.step()
            bar.update(
                task, advance=1, description=f"training, loss {loss:.2f}, τ {progress.curve[-1]['tau']:.2f}"
            )
            run.log_metrics({"loss": loss, "tokens": progress.tokens}, step=progress.step)
            if progress.step % every == 0:
                evaluate()
            if time.perf_counter() - saved_s > options.checkpoint_s:
                trainer.save()
                budget.save()
                saved_s = time.perf_counter()
    if progress.curve[-1]["step"] < progress.step:
        evaluate()
    trainer.save()
    budget.save()


def flat(point: Mapping[str, Any]) -> dict[str, float]:
    """One evaluation as scalars."""
    rates = {f"greedy_{i + 1}": rate for i, rate in enumerate(point["greedy"])}
    sampled = {f"sampled_{i + 1}": rate for i, rate in enumerate(point["sampled"])}
    return {"step": point["step"], "tokens": point["tokens"], "tau": point["tau"], **rates, **sampled}


def save_learner(
    output: Path, learner: Learner, borrowed: Borrowed, model: LoadedModel, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what was trained; the options of the drafter that runs it."""
    if isinstance(learner, StudentLearner):
        save_student(output, learner.student, model, about)
        return {"name": "draft_model", "model": str(output)}
    assert isinstance(learner, EagleLearner | MedusaLearner)
    head = learner.head if isinstance(learner, EagleLearner) else learner.heads
    save_head(output, head, borrowed.token_ids, model, about)
    return {"name": "eagle" if isinstance(learner, EagleLearner) else "medusa", "path": str(output)}


def coverage(corpus: Corpus, indices: Sequence[int], borrowed: Borrowed) -> float:
    """Share of the answers' tokens that can be drafted."""
    tokens = [token for i in indices for token in corpus.answers[i].tokens[corpus.answers[i].num_prompt :]]
    return float((borrowed.places[torch.tensor(tokens)] >= 0).float().mean())


def command(options: TrainDraftConfig, seed: int) -> str:
    """The command that makes the same, with files by their names alone."""
    words = [f"python -m specdec.run +experiment=train_draft seed={seed}"]
    default = TrainDraftConfig()
    for item in fields(options):
        value = getattr(options, item.name)
        if value == getattr(default, item.name) or item.name in ("output", "work"):
            continue
        if item.name == "prompts":
            value = [Path(source).name for source in value]
        if item.name == "text":
            value = Path(str(value)).name
        words.append(f"experiment.{item.name}={str(value).replace(' ', '')}")
    return " ".join(words)
