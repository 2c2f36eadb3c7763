"""Student draft models: some of the target's own layers, trained to agree with it; then models like any other.

A student is trained by the very decoder that will run it (``specdec.model.decoder``), so what is exported is what was
trained. Embedding, final norm and LM head stay the target's. Legend: T tokens, V vocabulary, D draft vocabulary, S
sampled tokens of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specdec.heads.borrowed import Borrowed
from specdec.heads.linear import padded
from specdec.heads.unroll import Packed
from specdec.kv_cache import KVCache
from specdec.model.batch import ForwardBatch
from specdec.model.config import ModelConfig
from specdec.model.decoder import Decoder
from specdec.model.export import ARCHITECTURES, export_hf
from specdec.model.weights import LoadedModel
from specdec.training.batches import Batch
from specdec.training.learners import Hits, anchors_of, hits_of
from specdec.training.loss import distillation_loss

_PER_LAYER = ("rope_theta", "rope_scaling", "sliding_window")


class Student(nn.Module):
    """The first, the last and evenly spaced layers between of a target.

    Args:
        model: the target.
        num_layers: of the student, at most the target's.

    Raises:
        ValueError: a number of layers out of range, or a target that cannot be exported (see ``export_hf``).
    """

    def __init__(self, model: LoadedModel, num_layers: int) -> None:
        config = model.config
        if not 1 <= num_layers <= config.num_layers:
            raise ValueError(
                f"a student of {num_layers} layers: the target has {config.num_layers}, give 1 to so many"
            )
        if config.family not in ARCHITECTURES or any(config.rope_scaling):
            raise ValueError(
                f"students of a {config.family} target with its rotary scaling cannot be exported: train an eagle head"
            )
        super().__init__()
        taken = np.linspace(0, config.num_layers - 1, num_layers).round().astype(int).tolist()
        chosen = {name: tuple(getattr(config, name)[layer] for layer in taken) for name in _PER_LAYER}
        self.config: ModelConfig = replace(config, num_layers=num_layers, **chosen)
        self.fixed = {name: weight.float() for name, weight in model.weights.items() if "." not in name}
        for index, layer in enumerate(taken):
            prefix = f"layers.{layer}."
            for name, weight in model.weights.items():
                if name.startswith(prefix):
                    own = f"layers.{index}.{name.removeprefix(prefix)}".replace(".", "-")
                    self.register_parameter(own, nn.Parameter(weight.float().clone()))

    def weights(self) -> dict[str, Tensor]:
        """All of the model's weights, by the names of ``specdec.model.names``."""
        return {**self.fixed, **{name.replace("-", "."): weight for name, weight in self.named_parameters()}}

    def forward(self, packed: Packed) -> Tensor:
        """Hidden states [T, H] before the final norm."""
        num_tokens = packed.tokens.numel()
        missing = padded(num_tokens) - num_tokens
        if missing:  # by a sequence that nobody looks at; ``heads.linear`` says why
            filler = torch.zeros(missing, dtype=packed.tokens.dtype)
            positions = torch.cat([packed.positions, torch.arange(missing)])
            packed = Packed(torch.cat([packed.tokens, filler]), (*packed.lengths, missing), positions)
        longest, count = max(packed.lengths), len(packed.lengths)
        config, starts = self.config, torch.tensor([a for a, _ in packed.spans])
        lengths = torch.tensor(packed.lengths)
        row = torch.repeat_interleave(torch.arange(count), lengths)
        batch = ForwardBatch(
            token_ids=packed.tokens,
            positions=packed.positions,
            query_start=torch.cat([starts, lengths.sum()[None]]).int(),
            context_lens=torch.zeros(count, dtype=torch.int32),
            block_tables=torch.arange(count, dtype=torch.int32)[:, None],
            slot_mapping=row * longest + packed.positions,
            logit_rows=torch.zeros(0, dtype=torch.int64),
        )
        # One block for each sequence. The decoder copies fused weights, so each pass has its own.
        cache = KVCache(
            config.num_layers, count, longest, config.num_kv_heads, config.head_dim, torch.float32
        )
        return Decoder(config, self.weights(), torch.float32, "cpu").forward(batch, cache)[:num_tokens]


class StudentLearner:
    """Trains a student on the target's law over the draft vocabulary.

    The other V − D tokens would cost most of a step. A sample of them stands for all, each with the weight of those it
    stands for, so that the student learns not to draft them (sampled softmax, Bengio & Senécal 2008).

    Args:
        num_sampled: S.
        sharpness: see ``EagleLearner``.
    """

    def __init__(
        self, student: Student, borrowed: Borrowed, *, num_sampled: int = 1024, sharpness: float = 1.0
    ) -> None:
        self.student = student
        self.borrowed, self.sharpness = borrowed, sharpness
        self._rest = torch.nonzero(borrowed.places < 0)[:, 0]
        self._num_sampled = min(num_sampled, self._rest.numel())

    @property
    def module(self) -> nn.Module:
        return self.student

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        normed = self.borrowed.normed(self.student(batch.packed)[batch.rows])
        head, offset = self.borrowed.lm_head, None
        if self._num_sampled:
            drawn = torch.randint(self._rest.numel(), (self._num_sampled,), generator=generator)
            others = self.student.fixed.get("lm_head", self.student.fixed["embed"])[self._rest[drawn]]
            offset = torch.zeros(head.shape[0] + self._num_sampled)
            offset[head.shape[0] :] = float(np.log(self._rest.numel() / self._num_sampled))
            head = torch.cat([head, others])
        targets = batch.targets.sharpened(self.sharpness)
        cap = self.borrowed.logit_softcap
        return distillation_loss(normed, head, targets, offset=offset, softcap=cap).mean()

    def hits(self, batch: Batch, num_drafts: int, num_ranks: int) -> Iterator[Hits]:
        outputs = self.student(batch.packed)
        anchors = anchors_of(batch, num_drafts - 1)
        alive = torch.ones(anchors.numel(), dtype=torch.bool)
        for step in range(num_drafts):
            at = anchors[alive] + step
            found = hits_of(self.borrowed.logits(outputs[at]), batch.targets[batch.place_of[at]], num_ranks)
            yield found
            alive[alive.clone()] = found.agrees


def save_student(directory: Path, student: Student, model: LoadedModel, about: Mapping[str, Any]) -> None:
    """Write a student as a directory in Hugging Face form, bfloat16, with the target's tokenizer and ``about.json``."""
    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in student.weights().items()}
    export_hf(LoadedModel(student.config, weights, model.tokenizer, model.source, model.path), directory)
    tokenizer = model.tokenizer
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {**tokenizer.special_tokens}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "about.json").write_text(json.dumps(dict(about), indent=2) + "\n")
