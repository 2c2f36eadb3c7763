"""What draft heads learn from: the target's own answers with its hidden states and likely next tokens, on disk.

``answers.jsonl`` has one line per answer, written when all else of that answer is; ``hidden.bin`` and ``teacher.bin``
hold numbers that the lines point into. An interrupted run loses no finished answer: what no line points to is cut off.
Hidden states are read when they are wanted, and the operating system keeps in memory what fits. Those of answers beyond
the budget are not stored; who needs them computes them again (``teacher.py``).

Legend: n tokens of an answer, m of them after its prompt, L layers, H hidden size, K likely tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HEADER = "corpus.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sequence.

    Attributes:
        tokens: prompt and answer, n ids.
        num_prompt: of these, the prompt's; n − ``num_prompt`` = m >= 1.
        key: says which prompt and which round it is.
        task: its prompt's kind.
        held_out: for evaluation, never trained on.
        start: its place in ``hidden.bin``, tokens; ``None`` if its hidden states are not stored.
    """

    tokens: tuple[int, ...]
    num_prompt: int
    key: str
    task: str = ""
    held_out: bool = False
    start: int | None = None

    @property
    def num_answer(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Taught:
    """What the target makes of one sequence.

    Attributes:
        hidden: bfloat16 [L, n, H], outputs of some layers at every token; the last one's are zero, as nobody pairs
            them with a next token.
        top_ids: int32 [m, K], the most likely tokens at each place of the answer, best first.
        top_probs: float32 [m, K], their probabilities at temperature 1.
    """

    hidden: Tensor
    top_ids: NDArray[np.int32]
    top_probs: NDArray[np.float32]


def stored_layers(directory: Path) -> tuple[int, ...] | None:
    """The target's layers whose outputs a corpus in ``directory`` keeps; ``None`` if there is none."""
    header = directory / _HEADER
    return tuple(json.loads(header.read_text())["layers"]) if header.exists() else None


class Corpus:
    """Answers in a directory, grown by :meth:`append`.

    Args:
        directory: made if need be; what it holds already is continued.
        layers: of the target, whose outputs are kept.
        hidden_size: H.
        top_k: K.
        budget_bytes: most that stored hidden states take.
        source: the target's name.

    Raises:
        ValueError: the directory holds answers of another target, other layers or another K.
    """

    def __init__(
        self,
        directory: Path,
        layers: Sequence[int],
        hidden_size: int,
        top_k: int,
        budget_bytes: int,
        source: str,
    ) -> None:
        self.directory, self.layers, self.top_k = directory, tuple(layers), top_k
        self.hidden_size = hidden_size
        self._token_bytes = 2 * len(self.layers) * hidden_size
        self._budget_tokens = budget_bytes // self._token_bytes
        self.answers: list[Answer] = []
        self._teacher_start: list[int] = []
        self._num_stored = self._num_taught = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._check_header(
            {"target": source, "layers": list(self.layers), "hidden": hidden_size, "top_k": top_k}
        )
        self._read_lines()
        self._lines = (directory / "answers.jsonl").open("ab")
        self._hidden = self._open("hidden.bin", self._num_stored * self._token_bytes)
        self._teacher = self._open("teacher.bin", self._num_taught * top_k * 8)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_tokens(self) -> int:
        """Answer tokens, prompts not counted."""
        return sum(answer.num_answer for answer in self.answers)

    def _check_header(self, header: dict[str, Any]) -> None:
        path = self.directory / _HEADER
        if not path.exists():
            path.write_text(json.dumps(header))
        found = json.loads(path.read_text())
        if found != header:
            raise ValueError(
                f"{self.directory} holds answers for {found}, not {header}: give another directory"
            )

    def _read_lines(self) -> None:
        """Take every whole line; cut off what an interrupt left behind them."""
        path = self.directory / "answers.jsonl"
        path.touch()
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self._add(Answer(**{**record, "tokens": tuple(record["tokens"])}))

    def _add(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._teacher_start.append(self._num_taught)
        self._num_taught += answer.num_answer
        if answer.start is not None:
            self._num_stored += len(answer.tokens)

    def _open(self, name: str, num_bytes: int) -> Any:
        file = (self.directory / name).open("ab")
        if file.tell() < num_bytes:
            raise ValueError(f"{file.name} is shorter than its answers say: delete {self.directory}")
        file.truncate(num_bytes)
        file.seek(0, 2)
        return file

    def append(self, answer: Answer, taught: Taught) -> None:
        """Add an answer and what was taught of it. Its hidden states are stored if the budget allows."""
        assert taught.top_ids.shape == taught.top_probs.shape == (answer.num_answer, self.top_k)
        assert taught.hidden.shape == (len(self.layers), len(answer.tokens), self.hidden_size)
        start = None
        if self._num_stored + len(answer.tokens) <= self._budget_tokens:
            start = self._num_stored
            by_token = taught.hidden.to(torch.bfloat16).transpose(0, 1).contiguous()
            self._hidden.write(by_token.view(torch.int16).numpy().tobytes())
        self._teacher.write(taught.top_ids.astype(np.int32).tobytes())
        self._teacher.write(taught.top_probs.astype(np.float32).tobytes())
        self._hidden.flush()
        self._teacher.flush()
        stored = Answer(**{**asdict(answer), "start": start})
        self._lines.write(json.dumps(asdict(stored)).encode() + b"\n")
        self._lines.flush()
        self._add(stored)

    def hidden(self, index: int) -> Tensor | None:
        """bfloat16 [L, n, H] of an answer; ``None`` if they were not stored."""
        answer = self.answers[index]
        if answer.start is None:
            return None
        count = len(answer.tokens)
        values = np.fromfile(
            self.directory / "hidden.bin",
            np.int16,
            count * self._token_bytes // 2,
            offset=answer.start * self._token_bytes,
        )
        by_token = torch.from_numpy(values).view(torch.bfloat16)
        return by_token.view(count, len(self.layers), self.hidden_size).transpose(0, 1)

    def teacher(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Likely tokens int32 [m, K] of an answer and their probabilities float32 [m, K]."""
        size = self.answers[index].num_answer * self.top_k
        path, offset = self.directory / "teacher.bin", self._teacher_start[index] * self.top_k * 8
        ids = np.fromfile(path, np.int32, size, offset=offset)
        probs = np.fromfile(path, np.float32, size, offset=offset + size * 4)
        return ids.reshape(-1, self.top_k), probs.reshape(-1, self.top_k)

    def close(self) -> None:
        for file in (self._hidden, self._teacher, self._lines):
            file.close()
