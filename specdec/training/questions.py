"""Prompts to train on, from the built-in set, files of several forms, or plain text.

Which are held out depends on the prompts alone, so that a corpus that grows keeps its split.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.model.tokenizer import Tokenizer
from specdec.training.corpus import Answer
from specdec.training.generate import Question
from specdec.workload import Messages, PromptItem, builtin_prompts, load_prompts


def training_prompts(source: str) -> list[PromptItem]:
    """Prompts of ``"builtin"`` or a file of JSON lines, which may be gzipped.

    A line is of a form that ``specdec.workload.load_prompts`` reads, or Self-Instruct's: ``{"instruction": …,
    "instances": [{"input": …}]}``, of which each instance is a prompt.

    Raises:
        ValueError: no such file, or a broken line, named by file and number.
    """
    if source == "builtin":
        return builtin_prompts()
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"prompts file {source} does not exist: give JSON lines, or 'builtin'")
    if path.suffix != ".gz" and not _is_self_instruct(path.read_text("utf-8")):
        return load_prompts(path)
    content = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    items: list[PromptItem] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            items += [
                PromptItem(prompt=[{"role": "user", "content": text}], task=task)
                for text, task in _texts(json.loads(line), path.stem.partition(".")[0])
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source}, line {number}: {error!r} is no prompt") from error
    return items


def _is_self_instruct(content: str) -> bool:
    first = content.partition("\n")[0]
    return '"instruction"' in first and '"instances"' in first


def _texts(record: dict[str, Any], task: str) -> Iterator[tuple[str, str]]:
    if "instruction" in record:
        for instance in record["instances"]:
            yield "\n\n".join(filter(None, [record["instruction"], instance["input"]])), task
    else:
        text = record["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt={text!r}")
        yield text, task


def make_questions(
    items: Sequence[PromptItem],
    tokenizer: Tokenizer,
    *,
    rounds: int,
    max_prompt: int,
    num_held_out: int,
    seed: int,
) -> list[Question]:
    """Questions in a random order, round after round; prompts of more than ``max_prompt`` tokens are left out.

    At most ``num_held_out`` prompts, and a fifth of all, are held out. They come first, and in one round only, so that
    evaluation has its answers however short the time.

    Raises:
        ValueError: fewer than five prompts that are short enough.
    """
    prompts = [tuple(_encode(tokenizer, item.prompt)) for item in items]
    fitting = [index for index, prompt in enumerate(prompts) if 0 < len(prompt) <= max_prompt]
    if len(fitting) < 5:
        raise ValueError(
            f"{len(fitting)} of {len(items)} prompts have at most {max_prompt} tokens: give more of them, or raise "
            "experiment.max_len"
        )
    order = np.random.default_rng(seed).permutation(fitting).tolist()
    held_out = order[: min(num_held_out, len(order) // 5)]

    def question(index: int, round_: int) -> Question:
        return Question(
            key=f"{index}/{round_}", prompt=prompts[index], task=items[index].task, held_out=index in held_out
        )

    rest = order[len(held_out) :]
    return [question(index, 0) for index in held_out] + [
        question(index, round_) for round_ in range(rounds) for index in rest
    ]


def opening_of_user_turn(tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation up to where the user's first words stand.

    Raises:
        ValueError: the model has no chat template, or one that does not show the user's words as they are.
    """
    marker = "QUESTION"
    text = tokenizer.render_chat([{"role": "user", "content": marker}])
    opening, found, _ = text.partition(marker)
    if not found:
        raise ValueError(f"the chat template does not render the user's words as they are: {text!r}")
    return tokenizer.encode(opening, add_special_tokens=False)


def _encode(tokenizer: Tokenizer, prompt: str | Messages) -> list[int]:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt)


def text_windows(path: str, tokenizer: Tokenizer, length: int, num_held_out: int) -> list[Answer]:
    """A text file cut into windows of ``length`` tokens, to be taught as they stand; some, evenly spaced, are held out.

    Raises:
        ValueError: no such file, or a text shorter than two windows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"text file {path} does not exist")
    tokens = tokenizer.encode(file.read_text("utf-8"))
    if len(tokens) < 2 * length:
        raise ValueError(f"{path} has {len(tokens)} tokens: give a text of at least {2 * length}")
    starts = range(0, len(tokens) - length + 1, length)
    every = max(5, len(starts) // num_held_out) if len(starts) >= 5 else 2
    return [
        Answer(
            tokens=tuple(tokens[start : start + length]),
            num_prompt=1,
            key=f"text/{index}",
            task="text",
            held_out=index % every == 0,
        )
        for index, start in enumerate(starts)
    ]
