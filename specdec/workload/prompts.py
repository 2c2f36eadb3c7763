"""What is asked: built-in prompts, prompts from files, synthetic prompts.

Built-in prompts are this project's own text, of six kinds chosen for how differently they speculate: a
summary or a rewrite copies from its prompt, a chat does not. Files may be Spec-Bench's ``question.jsonl``
(Xia et al., arXiv 2401.07851) or JSON lines with a ``prompt``.

>>> items = prompt_items("builtin", num_prompts=12)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from specdec.names import unknown_name
from specdec.workload.hashing import pair_hash, random_tokens
from specdec.workload.requests import Requests

TASKS = ("chat", "summarise", "translate", "code", "maths", "rewrite")
# Spec-Bench's thirteen categories; any other category is its own task.
_TASK_OF_CATEGORY = {
    "writing": "chat",
    "roleplay": "chat",
    "reasoning": "chat",
    "extraction": "chat",
    "stem": "chat",
    "humanities": "chat",
    "coding": "code",
    "math": "maths",
    "math_reasoning": "maths",
    "translation": "translate",
    "summarization": "summarise",
}

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptItem:
    """One prompt.

    Attributes:
        prompt: chat messages (``{"role": …, "content": …}``), or text to be continued as it stands.
        task: coarse kind, by which results are grouped.
        category: as the source names it.
        reference: a good answer, if the source has one.
    """

    prompt: str | Messages
    task: str
    category: str = ""
    reference: str | None = None


def prompt_items(
    source: str | Path = "builtin", *, tasks: Sequence[str] | None = None, num_prompts: int | None = None
) -> list[PromptItem]:
    """Prompts of a run: the built-in ones or a file's, of some tasks, at most ``num_prompts``.

    Raises:
        ValueError: see :func:`load_prompts` and :func:`choose`.
    """
    items = builtin_prompts(tasks) if str(source) == "builtin" else load_prompts(source)
    return choose(items, tasks=tasks, num_prompts=num_prompts)


def builtin_prompts(tasks: Sequence[str] | None = None, per_task: int | None = None) -> list[PromptItem]:
    """The prompts that come with the package, as chat messages; by default of the six kinds in ``TASKS``.

    There is a seventh, ``"repetitive"`` (copy a list, a table, a verse), for benchmarks of prompt lookup.

    Raises:
        ValueError: unknown task, with the nearest ones, or ``per_task`` < 1.
    """
    resource = files("specdec").joinpath("prompts/builtin.jsonl")
    items = _parse_lines(resource.read_bytes(), "builtin.jsonl", chat=True)
    return choose(items, tasks=TASKS if tasks is None else tasks, per_task=per_task)


def load_prompts(path: str | Path, *, chat: bool = True) -> list[PromptItem]:
    """Read JSON lines, one prompt each, of either form; blank lines are skipped.

    Spec-Bench: ``{"category": …, "turns": [text, …], "reference": …}``, of which the first turn is used, as a
    later one needs the answer to the first. Simple: ``{"prompt": text or messages, "task": …, "reference":
    …}``.

    Args:
        path: of the file.
        chat: make a text one user's message, to be put into the model's chat template; else keep it as text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken line, named by file and line number, or a file without any prompt.
    """
    return _parse_lines(Path(path).read_bytes(), str(path), chat)


def choose(
    items: Sequence[PromptItem],
    *,
    tasks: Sequence[str] | None = None,
    per_task: int | None = None,
    num_prompts: int | None = None,
) -> list[PromptItem]:
    """Some of ``items``: only ``tasks``, at most ``per_task`` of each, at most ``num_prompts`` evenly over
    tasks.

    The first ones of each task are taken, and ``num_prompts`` takes one of each task in turn; the order of
    ``items`` is kept, so a choice is always the same.

    Raises:
        ValueError: a task that no item has, with the nearest ones, or a count < 1.
    """
    for name, count in (("per_task", per_task), ("num_prompts", num_prompts)):
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be >= 1, or None for all")
    known = list(dict.fromkeys(item.task for item in items))
    for task in tasks or ():
        if task not in known:
            raise unknown_name("task", task, known)
    if tasks is not None and len(tasks) == 0:
        raise ValueError(f"tasks is empty: give None for all, or some of {', '.join(known)}")
    by_task = {task: [i for i, item in enumerate(items) if item.task == task] for task in tasks or known}
    # Sorting by the rank within its task deals one item of each task in turn.
    dealt = sorted(
        (rank, index)
        for indices in by_task.values()
        for rank, index in enumerate(indices)
        if per_task is None or rank < per_task
    )
    return [items[index] for index in sorted(index for _, index in dealt[:num_prompts])]


def synthetic_prompts(num: int, length: int, vocab_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Prompts of uniformly random token ids, for timing a step and nothing else.

    Random tokens say nothing about acceptance: speculation measured on them is not that of real text. Report
    them as synthetic.

    Args:
        num, length: of prompts and of each prompt, in tokens; length >= 1.
        vocab_size: ids are in [0, vocab_size).
        rng: for the ids.

    Raises:
        ValueError: ``num`` < 0, ``length`` < 1 or ``vocab_size`` < 1.
    """
    if num < 0 or length < 1 or vocab_size < 1:
        raise ValueError(f"num={num} must be >= 0, length={length} and vocab_size={vocab_size} >= 1")
    return rng.integers(vocab_size, size=(num, length)).tolist()


def prompt_token_ids(requests: Requests, index: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Random token ids for the prompt of one request, such that prompts share what their hashes say.

    So a trace with prefix blocks can be replayed on the engine. Blocks of an answer are another matter: the
    engine's answer is not the one that the next turn of a session contains.

    Args:
        requests: with or without hashes.
        index: of the request.
        vocab_size: ids are in [0, vocab_size).
        seed: for all tokens.

    Raises:
        ValueError: ``vocab_size`` < 1.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be >= 1")
    shared = requests.hashes_of(index)[: int(requests.num_prompt_hashes[index])]
    seeds = np.array([seed], np.uint64)
    blocks = random_tokens(pair_hash(seeds, shared), requests.hash_block_size, vocab_size).ravel()
    own = pair_hash(pair_hash(seeds, np.zeros(1, np.uint64)), np.array([index], np.uint64))
    rest = random_tokens(own, int(requests.prompt_len[index]) - blocks.size, vocab_size).ravel()
    return [*blocks.tolist(), *rest.tolist()]


def _parse_lines(content: bytes, name: str, chat: bool) -> list[PromptItem]:
    items: list[PromptItem] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(_parse_item(json.loads(line.decode()), chat))
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
            raise ValueError(f"{name}, line {number}: {error}") from error
    if not items:
        raise ValueError(f"{name} has no prompts: give one JSON object per line, with 'turns' or 'prompt'")
    return items


def _parse_item(record: Any, chat: bool) -> PromptItem:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if "prompt" in record:
        prompt = record["prompt"]
    elif "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"'turns' must be a list of at least one text, got {turns!r}")
        prompt = turns[0]
    else:
        raise ValueError(f"neither 'turns' (Spec-Bench) nor 'prompt' among the keys {sorted(record)}")
    category = _text(record, "category") or ""
    task = _text(record, "task") or _TASK_OF_CATEGORY.get(category, category) or "unknown"
    return PromptItem(
        prompt=_check_prompt(prompt, chat), task=task, category=category, reference=_reference(record)
    )


def _check_prompt(prompt: Any, chat: bool) -> str | Messages:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return [{"role": "user", "content": prompt}] if chat else prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"the prompt must be a text or a list of chat messages, got {prompt!r}")
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise ValueError(f"a chat message needs the texts 'role' and 'content', got {message!r}")
    if not any(message["content"].strip() for message in prompt):
        raise ValueError("the prompt is empty")
    return prompt


def _reference(record: dict[str, Any]) -> str | None:
    """Spec-Bench gives one entry per turn, and for some tasks several good answers in an entry: the first."""
    reference = record.get("reference")
    while isinstance(reference, list):
        reference = reference[0] if reference else None
    return None if reference is None else str(reference)


def _text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, got {value!r}")
    return value
