"""Classes of requests: a mix of kinds, each with its own lengths, priority and deadline.

>>> mix = TaskMix({"chat": (0.9, FixedLengths(200, 100)), "code": (0.1, FixedLengths(2000, 30))})
>>> mix.requests(arrival_s=np.zeros(5), rng=np.random.default_rng(0)).task
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.workload.arrivals import FloatArray
from specdec.workload.lengths import LengthDistribution
from specdec.workload.requests import IntArray, Requests


class TaskClass(NamedTuple):
    """One kind of request.

    Attributes:
        weight: > 0; its share is its weight / the sum of all weights.
        lengths: of its requests.
        priority: smaller runs earlier.
        deadline_after_s: deadline, in seconds after the arrival.
    """

    weight: float
    lengths: LengthDistribution
    priority: int = 0
    deadline_after_s: float = math.inf


@dataclass(frozen=True, slots=True)
class TaskMix:
    """Independent draws of a class for each request.

    Args:
        classes: name → ``TaskClass``, or weight and lengths.

    Raises:
        ValueError: no class, a weight that is not positive and finite, or a deadline that is not positive.
    """

    classes: Mapping[str, TaskClass | tuple[float, LengthDistribution]]

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("a mix needs at least one task class")
        for name, task in zip(self.classes, self.kinds, strict=True):
            if not 0.0 < task.weight < math.inf:
                raise ValueError(f"task {name!r}: weight={task.weight} must be a finite number > 0")
            if not task.deadline_after_s > 0.0:
                raise ValueError(
                    f"task {name!r}: deadline_after_s={task.deadline_after_s} must be > 0 (inf is none)"
                )

    @property
    def kinds(self) -> tuple[TaskClass, ...]:
        """The classes without their names."""
        return tuple(
            kind if isinstance(kind, TaskClass) else TaskClass(*kind) for kind in self.classes.values()
        )

    @classmethod
    def of(cls, lengths: LengthDistribution | TaskMix) -> TaskMix:
        """``lengths`` itself if it is a mix, else a mix of one unnamed class."""
        return lengths if isinstance(lengths, TaskMix) else cls({"": TaskClass(1.0, lengths)})

    def draw_tasks(self, rng: np.random.Generator, num: int) -> NDArray[np.int16]:
        """Index of a class for each of ``num`` requests, int16 [num]."""
        weights = np.cumsum([kind.weight for kind in self.kinds])
        if weights.size == 1:
            return np.zeros(num, np.int16)
        return np.searchsorted(weights[:-1] / weights[-1], rng.random(num), side="right").astype(np.int16)

    def draw_lengths(self, rng: np.random.Generator, task: NDArray[np.int16]) -> tuple[IntArray, IntArray]:
        """Prompt and output length in tokens, int32 [N] each, of requests with the classes ``task``."""
        prompt_len, output_len = np.empty(task.size, np.int32), np.empty(task.size, np.int32)
        for index, kind in enumerate(self.kinds):
            rows = np.flatnonzero(task == index)
            prompt_len[rows], output_len[rows] = kind.lengths.sample(rng, rows.size)
        return prompt_len, output_len

    def build(
        self,
        arrival_s: FloatArray,
        task: NDArray[np.int16],
        prompt_len: ArrayLike,
        output_len: ArrayLike,
        **columns: Any,
    ) -> Requests:
        """Requests with the names, priorities and deadlines of their classes; see ``Requests.build``."""
        kinds = self.kinds
        return Requests.build(
            arrival_s,
            prompt_len,
            output_len,
            task=task,
            tasks=tuple(self.classes),
            priority=np.array([kind.priority for kind in kinds])[task],
            deadline_s=arrival_s + np.array([kind.deadline_after_s for kind in kinds])[task],
            **columns,
        )

    def requests(
        self, arrival_s: FloatArray, rng: np.random.Generator, *, max_tokens: int | None = None
    ) -> Requests:
        """Requests that arrive at ``arrival_s``, float64 [N] rising.

        Args:
            max_tokens: limit of all of them, which also cuts longer outputs; ``None``: each one's true length.

        Raises:
            ValueError: see ``Requests.validate``; ``max_tokens`` < 1.
        """
        task = self.draw_tasks(rng, arrival_s.size)
        requests = self.build(arrival_s, task, *self.draw_lengths(rng, task))
        return requests if max_tokens is None else requests.with_max_tokens(max_tokens)
