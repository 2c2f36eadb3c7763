"""The target over given tokens: the hidden states and likely next tokens that heads learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.model.batch import Captured
from specdec.rows import RowState, StepInput
from specdec.runner import Runner
from specdec.training.corpus import Answer, Taught

CHUNK = 256
"""Tokens of one pass, and so most rows of logits that are in memory at once."""


class Teacher:
    """Runs a target over sequences from their start, with no scheduler.

    It writes to the first blocks of the runner's KV cache: no request may be running, and prefix caching must be off.

    Args:
        runner: the target.
        num_blocks, block_size: of its KV cache.
        layers: whose outputs are wanted.
        top_k: likely tokens to keep, at most the vocabulary.
    """

    def __init__(
        self, runner: Runner, num_blocks: int, block_size: int, layers: Sequence[int], top_k: int
    ) -> None:
        self.runner, self.layers, self.top_k = runner, tuple(layers), top_k
        self._blocks = np.arange(num_blocks, dtype=np.int32)[None]
        self._block_size = block_size

    def hidden(self, answer: Answer) -> Tensor:
        """bfloat16 [L, n, H]."""
        return self._run(answer, with_logits=False)[0]

    def teach(self, answer: Answer) -> Taught:
        """Hidden states, and likely tokens from the prompt's last token on."""
        hidden, tops = self._run(answer, with_logits=True)
        ids, probs = zip(*tops, strict=True)
        return Taught(hidden, np.concatenate(ids), np.concatenate(probs))

    def _run(
        self, answer: Answer, with_logits: bool
    ) -> tuple[Tensor, list[tuple[NDArray[np.int32], NDArray[np.float32]]]]:
        # Nobody pairs the last token's hidden state with a next token.
        count = len(answer.tokens) - 1
        state = RowState(1, count, 0)
        state.tokens[0, :count] = answer.tokens[:-1]
        parts: list[Tensor] = []
        tops: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            num_logits = min(size, max(0, start + size - answer.num_prompt + 1)) if with_logits else 0
            sizes = (np.array([value], np.int32) for value in (start, size, num_logits))
            batch = StepInput(state, self._blocks, self._block_size, np.zeros(1, np.int64), *sizes)
            captured = Captured.empty(self.layers, size, self.runner.config.hidden_size, self.runner.device)
            logits = self.runner.forward(batch, captured=captured)
            parts.append(captured.hidden.to("cpu", torch.bfloat16))
            if num_logits:
                tops.append(most_likely(logits, self.top_k))
        last = torch.zeros_like(parts[0][:, :1])
        return torch.cat([*parts, last], dim=1), tops


def most_likely(logits: Tensor, top_k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The ``top_k`` most likely tokens of logits [N, V], best first, and their probabilities at temperature 1."""
    top = logits.topk(top_k, dim=-1)
    probs = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
    return top.indices.numpy(force=True).astype(np.int32), probs.numpy(force=True)
