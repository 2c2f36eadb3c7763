"""The training loop: AdamW, a cosine schedule, gradients of packed batches, and checkpoints that resume to the bit.

What a step does depends on its number and the seed alone: the order of answers on (seed, epoch), what a learner samples
on (seed, step). So a checkpoint needs no generator's state. Checkpoints are safetensors, never pickles.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from specdec.training.batches import Batches
from specdec.training.learners import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        num_steps: of the schedule.
        learning_rate: its peak, reached after ``warmup`` of the steps and falling to 0 along a cosine.
        weight_decay: of matrices (AdamW, Loshchilov & Hutter, arXiv 1711.05101).
        max_norm: gradients are clipped to it.
        autocast: compute matrix products in bfloat16; weights stay float32.
        seed: of the order and of what learners sample.
    """

    num_steps: int
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_norm: float = 1.0
    autocast: bool = False
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warmup = max(1, round(self.warmup * self.num_steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass(slots=True)
class Progress:
    """Where training stands.

    Attributes:
        step: steps done.
        tokens: taught places seen, repeats counted.
        seconds: spent in steps, over all runs; ``load_seconds`` of them on fetching batches.
        curve: one entry per evaluation.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Improves ``learner`` on ``batches`` after a ``recipe``.

    Args:
        checkpoint: where its state is kept; if the file exists, training goes on from there.

    Raises:
        ValueError: the checkpoint is of another recipe or of other parameters.
    """

    def __init__(self, learner: Learner, batches: Batches, recipe: Recipe, checkpoint: Path) -> None:
        self.learner, self.batches, self.recipe, self.checkpoint = learner, batches, recipe, checkpoint
        self.progress = Progress()
        self._named = dict(learner.module.named_parameters())
        decayed = [weight for weight in self._named.values() if weight.ndim > 1]
        others = [weight for weight in self._named.values() if weight.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._epoch, self._first = -1, 0
        self._order: list[list[int]] = []
        if checkpoint.exists():
            self._restore()

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self.recipe.num_steps

    def step(self) -> float:
        """One step; its loss."""
        start_s = time.perf_counter()
        step, recipe = self.progress.step, self.recipe
        batch = self.batches.load(self._indices(step))
        self.progress.load_seconds += time.perf_counter() - start_s
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        generator = torch.Generator().manual_seed(_mixed(recipe.seed, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            loss = self.learner.loss(batch, generator)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._named.values(), recipe.max_norm)
        self._optimizer.step()
        self.progress.step += 1
        self.progress.tokens += batch.rows.numel()
        self.progress.seconds += time.perf_counter() - start_s
        return float(loss.detach())

    def _indices(self, step: int) -> list[int]:
        while step - self._first >= len(self._order):
            self._first += len(self._order)
            self._epoch += 1
            self._order = self.batches.epoch(_mixed(self.recipe.seed, self._epoch))
        return self._order[step - self._first]

    def save(self) -> None:
        """Write the checkpoint; the file is never half written."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._named.items()}
        for name, weight in self._named.items():
            state = self._optimizer.state.get(weight, {})
            tensors |= {f"{key}.{name}": value for key, value in state.items()}
        about = {"recipe": asdict(self.recipe), "progress": asdict(self.progress)}
        part = self.checkpoint.with_name(f"{self.checkpoint.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(part), metadata={"about": json.dumps(about)})
        part.replace(self.checkpoint)

    def _restore(self) -> None:
        with safe_open(self.checkpoint, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if about["recipe"] != asdict(self.recipe):
                raise ValueError(
                    f"{self.checkpoint} was written with {about['recipe']}, not {asdict(self.recipe)}: use the same "
                    "options, or give another directory"
                )
            names = set(file.keys())
            shapes = {name: list(weight.shape) for name, weight in self._named.items()}
            found = {
                name: file.get_slice(f"weight.{name}").get_shape()
                for name in shapes
                if f"weight.{name}" in names
            }
            if found != shapes:
                raise ValueError(f"{self.checkpoint} holds {found}, not {shapes}: give another directory")
            with torch.no_grad():
                for name, weight in self._named.items():
                    weight.copy_(file.get_tensor(f"weight.{name}"))
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names]
                    if keys:
                        self._optimizer.state[weight] = {
                            key: file.get_tensor(f"{key}.{name}") for key in keys
                        }
        self.progress = Progress(**about["progress"])


def stored_recipe(checkpoint: Path) -> Recipe | None:
    """The recipe that a checkpoint was written with; ``None`` if there is no checkpoint."""
    if not checkpoint.exists():
        return None
    with safe_open(checkpoint, framework="pt") as file:
        return Recipe(**json.loads(file.metadata()["about"])["recipe"])


def bfloat16_is_faster(hidden_size: int, num_rows: int = 512, repeats: int = 3) -> bool:
    """Whether bfloat16 matrix products, conversion included, beat float32 here; measured, so only on a quiet machine
    is it exact."""
    x, weight = torch.randn(num_rows, hidden_size), torch.randn(4 * hidden_size, hidden_size)
    seconds: dict[bool, float] = {}
    for autocast in (False, True):
        times: list[float] = []
        for _ in range(repeats + 1):
            start_s = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                F.linear(x, weight)
            times.append(time.perf_counter() - start_s)
        seconds[autocast] = min(times[1:])
    return seconds[True] < seconds[False]


def _mixed(seed: int, index: int) -> int:
    """A seed of its own for every index."""
    return (seed * 1_000_003 + index) % 2**63


def step_seconds(learner: Learner, batches: Batches, autocast: bool, num_steps: int = 2) -> float:
    """Seconds of a training step, measured without changing any weight."""
    order = batches.epoch(0)
    times: list[float] = []
    for index in range(num_steps + 1):
        batch = batches.load(order[index % len(order)])
        start_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = learner.loss(batch, torch.Generator().manual_seed(index))
        loss.backward()
        times.append(time.perf_counter() - start_s)
    learner.module.zero_grad()
    return sum(times[1:]) / num_steps
