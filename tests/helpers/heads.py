"""Tiny draft heads: a corpus of a tiny target's answers, and heads trained on it for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from specdec import LLM, SamplingParams
from specdec.heads.borrowed import Borrowed, frequent_tokens
from specdec.heads.eagle import EagleHead, EagleShape
from specdec.heads.files import rotary_of, save_head
from specdec.heads.medusa import MedusaHeads
from specdec.model.batch import Captured
from specdec.rows import RowState, StepInput
from specdec.runner import EagerRunner
from specdec.training.batches import Batches
from specdec.training.corpus import Corpus
from specdec.training.generate import Question, generate_answers
from specdec.training.learners import EagleLearner, Learner, MedusaLearner, acceptance
from specdec.training.teacher import Teacher
from specdec.training.trainer import Recipe, Trainer

TOP_K = 16


def tiny_prompts(count: int, seed: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 25, 4 + index % 9).tolist() for index in range(count)]


def plain_llm(model_dir: Path, **options) -> LLM:
    options = {"dtype": "float32", "max_model_len": 128, "prefix_caching": False, **options}
    return LLM(str(model_dir), **options)


def tiny_corpus(
    llm: LLM, directory: Path, layers: Sequence[int], count: int = 12, budget_bytes: int = 1 << 24
) -> Corpus:
    """Greedy answers of 24 tokens; the last quarter is held out."""
    config = llm.runner.config
    corpus = Corpus(directory, layers, config.hidden_size, TOP_K, budget_bytes, llm.runner.model.source)
    questions = [
        Question(key=str(index), prompt=tuple(prompt), task="tiny", held_out=4 * index >= 3 * count)
        for index, prompt in enumerate(tiny_prompts(count))
    ]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    generate_answers(llm, corpus, questions, params, seconds_left=lambda: 1.0, on_answer=lambda answer: None)
    return corpus


def teacher_of(llm: LLM, corpus: Corpus) -> Teacher:
    return Teacher(llm.runner, llm.num_blocks, llm.block_size, corpus.layers, TOP_K)


def make_batches(corpus: Corpus, borrowed: Borrowed, held_out: bool = False, tokens: int = 128) -> Batches:
    indices = [index for index, answer in enumerate(corpus.answers) if answer.held_out == held_out]
    return Batches(corpus, indices, borrowed.places, None, tokens)


def borrowed_of(llm: LLM, corpus: Corpus, size: int = 200) -> Borrowed:
    answers = [answer.tokens[answer.num_prompt :] for answer in corpus.answers]
    return Borrowed(llm.runner.model, frequent_tokens(answers, size))


def tiny_eagle(llm: LLM, variant: str, seed: int = 0) -> EagleHead:
    config = llm.runner.config
    head = EagleHead(EagleShape.of(config, variant), rotary_of(config))
    head.reset(seed)
    return head


def train(learner: Learner, batches: Batches, directory: Path, num_steps: int) -> Trainer:
    recipe = Recipe(num_steps=num_steps, learning_rate=3e-3, weight_decay=0.0)
    trainer = Trainer(learner, batches, recipe, directory / "state.safetensors")
    while not trainer.is_done:
        trainer.step()
    return trainer


def trained_eagle_dir(model_dir: Path, directory: Path, variant: str = "eagle3", num_steps: int = 40) -> Path:
    """A head that a tiny target often, but not always, agrees with."""
    llm = plain_llm(model_dir)
    head = tiny_eagle(llm, variant)
    corpus = tiny_corpus(llm, directory / "corpus", head.shape.layers)
    borrowed = borrowed_of(llm, corpus)
    learner = EagleLearner(head, borrowed, anchor_share=0.5)
    train(learner, make_batches(corpus, borrowed), directory, num_steps)
    save_head(directory / "head", head, borrowed.token_ids, llm.runner.model, {})
    corpus.close()
    return directory / "head"


def trained_medusa_dir(model_dir: Path, directory: Path, num_steps: int = 40) -> Path:
    """Medusa heads with their measured acceptance."""
    llm = plain_llm(model_dir)
    config = llm.runner.config
    corpus = tiny_corpus(llm, directory / "corpus", [config.num_layers - 1])
    borrowed = borrowed_of(llm, corpus)
    learner = MedusaLearner(MedusaHeads(3, config.hidden_size), borrowed)
    train(learner, make_batches(corpus, borrowed), directory, num_steps)
    found = acceptance(learner, make_batches(corpus, borrowed, held_out=True), 3, num_ranks=4)
    about = {"acceptance": {"ranks": found.ranks}}
    save_head(directory / "head", learner.heads, borrowed.token_ids, llm.runner.model, about)
    corpus.close()
    return directory / "head"


def drafter_of(llm: LLM):
    drafter = llm.engine.drafter
    assert drafter is not None
    return drafter


def packed_hidden(llm: LLM, tokens: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
    """The target's outputs float32 [L, n, H] at every one of ``tokens``, from one pass over a cache of its own."""
    model = llm.runner.model
    runner = EagerRunner(model, torch.float32, len(tokens) // 16 + 1, 16, torch.device("cpu"))
    state = RowState(1, len(tokens), 0)
    state.tokens[0, : len(tokens)] = tokens
    blocks = np.arange(len(tokens) // 16 + 1, dtype=np.int32)[None]
    sizes = (np.array([value], np.int32) for value in (0, len(tokens), 0))
    captured = Captured.empty(tuple(layers), len(tokens), model.config.hidden_size)
    runner.forward(StepInput(state, blocks, 16, np.zeros(1, np.int64), *sizes), captured=captured)
    return captured.hidden
