"""A workload as arrays: what a simulator needs to know of N requests, in the order of arrival.

>>> requests = Requests.build(arrival_s=[0.0, 0.5], prompt_len=[100, 7], output_len=[20, 300])
>>> requests.scale_rate(2.0).arrival_s
array([0.  , 0.25])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.workload.arrivals import FloatArray
from specdec.workload.hashing import split_hashes

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """N requests in the order of arrival. :meth:`build` fills in what is not given.

    Attributes:
        arrival_s: float64 [N], seconds, rising.
        prompt_len: int32 [N], tokens, >= 1.
        output_len: int32 [N], tokens until the end of sequence, >= 1: the truth, which no scheduler may see.
        max_tokens: int32 [N], the limit that a scheduler sees, >= ``output_len``.
        task: int16 [N], index into ``tasks``.
        priority: int16 [N], smaller runs earlier.
        deadline_s: float64 [N], on the clock of ``arrival_s``; ``inf`` is none.
        session: int64 [N], requests of one conversation share it; -1 is none.
        tasks: names of the task classes.
        hash_block_size: tokens per hashed block; 0 if there are no hashes.
        hash_start: int64 [N + 1]; the hashes of request i are ``hashes[hash_start[i] : hash_start[i + 1]]``.
        hashes: uint64 [sum], not 0, chained hashes of the leading full blocks of a request's tokens, prompt
            then output: equal hashes mean equal prefixes. All of them may be given to the scheduler, which
            looks up only as many blocks as it has tokens; :meth:`num_prompt_hashes` lie in the prompt.
    """

    arrival_s: FloatArray
    prompt_len: IntArray
    output_len: IntArray
    max_tokens: IntArray
    task: NDArray[np.int16]
    priority: NDArray[np.int16]
    deadline_s: FloatArray
    session: NDArray[np.int64]
    tasks: tuple[str, ...]
    hash_block_size: int
    hash_start: NDArray[np.int64]
    hashes: NDArray[np.uint64]

    @classmethod
    def build(
        cls,
        arrival_s: ArrayLike,
        prompt_len: ArrayLike,
        output_len: ArrayLike,
        *,
        max_tokens: ArrayLike | None = None,
        task: ArrayLike = 0,
        priority: ArrayLike = 0,
        deadline_s: ArrayLike = math.inf,
        session: ArrayLike = -1,
        tasks: Sequence[str] = ("",),
        hash_block_size: int = 0,
        hash_start: ArrayLike | None = None,
        hashes: ArrayLike = (),
    ) -> Requests:
        """Checked requests from arrays, lists, or numbers that hold for all of them.

        By default a request's limit is its true length, it has one unnamed task, no deadline, session or hashes.

        Raises:
            ValueError: see :meth:`validate`; also a length that is not whole or does not fit its type.
        """
        times_s = np.array(arrival_s, np.float64, ndmin=1)
        size = times_s.size
        output = _whole("output_len", output_len, np.int32, size)
        requests = cls(
            arrival_s=times_s,
            prompt_len=_whole("prompt_len", prompt_len, np.int32, size),
            output_len=output,
            max_tokens=output if max_tokens is None else _whole("max_tokens", max_tokens, np.int32, size),
            task=_whole("task", task, np.int16, size),
            priority=_whole("priority", priority, np.int16, size),
            deadline_s=_filled("deadline_s", np.asarray(deadline_s, np.float64), size),
            session=_whole("session", session, np.int64, size),
            tasks=tuple(tasks),
            hash_block_size=hash_block_size,
            hash_start=np.zeros(size + 1, np.int64)
            if hash_start is None
            else np.asarray(hash_start, np.int64),
            hashes=np.asarray(hashes, np.uint64),
        )
        requests.validate()
        return requests

    def __len__(self) -> int:
        return self.arrival_s.size

    @property
    def mean_rate_per_s(self) -> float:
        """Mean rate between the first and the last arrival; ``inf`` if they coincide, ``nan`` below two."""
        if len(self) < 2:
            return math.nan
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0.0 else math.inf

    @property
    def num_prompt_hashes(self) -> NDArray[np.int64]:
        """int64 [N]: how many of each request's hashes are of blocks of its prompt alone."""
        counts = np.diff(self.hash_start)
        return np.minimum(counts, self.prompt_len // self.hash_block_size) if self.hash_block_size else counts

    def hashes_of(self, index: int) -> NDArray[np.uint64]:
        """Hashes of one request, a view."""
        return self.hashes[self.hash_start[index] : self.hash_start[index + 1]]

    def slice(self, start: int, stop: int) -> Requests:
        """Requests ``start`` to ``stop``, as ``[start:stop]`` means it; the arrays are views."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        bounds = self.hash_start[start : stop + 1]
        return replace(
            self,
            **{name: getattr(self, name)[start:stop] for name in _PER_REQUEST},
            hash_start=bounds - bounds[0],
            hashes=self.hashes[bounds[0] : bounds[-1]],
        )

    def head(self, num: int) -> Requests:
        """The first ``num``, or all if there are fewer.

        Raises:
            ValueError: ``num`` < 0.
        """
        if num < 0:
            raise ValueError(f"num={num} must be >= 0")
        return self.slice(0, num)

    def take(self, indices: ArrayLike) -> Requests:
        """The requests at ``indices``, in that order, which the caller keeps rising in time."""
        rows = np.asarray(indices, np.int64)
        counts = np.diff(self.hash_start)[rows]
        hash_start = np.concatenate(([0], np.cumsum(counts)))
        source = np.repeat(self.hash_start[rows] - hash_start[:-1], counts) + np.arange(hash_start[-1])
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in _PER_REQUEST},
            hash_start=hash_start,
            hashes=self.hashes[source],
        )

    def with_arrivals(self, arrival_s: ArrayLike) -> Requests:
        """The same requests at other times; a deadline keeps its distance from the arrival.

        Args:
            arrival_s: float64 [N], seconds, rising.

        Raises:
            ValueError: see :meth:`validate`.
        """
        times_s = np.asarray(arrival_s, np.float64)
        if times_s.shape != (len(self),):
            raise ValueError(f"arrival_s has the shape {times_s.shape}, not ({len(self)},)")
        moved = replace(self, arrival_s=times_s, deadline_s=times_s + (self.deadline_s - self.arrival_s))
        moved.validate()
        return moved

    def scale_rate(self, factor: float) -> Requests:
        """``factor`` times as many requests per second: times are divided by it, deadlines keep their distance.

        Raises:
            ValueError: a ``factor`` that is not positive and finite.
        """
        if not 0.0 < factor < math.inf:
            raise ValueError(f"factor={factor} must be a finite number > 0")
        return self.with_arrivals(self.arrival_s / factor)

    def with_max_tokens(self, limit: int) -> Requests:
        """Under one limit for all, which also cuts longer outputs.

        Raises:
            ValueError: ``limit`` < 1.
        """
        if limit < 1:
            raise ValueError(f"max_tokens={limit} must be >= 1")
        limits = np.full(len(self), limit, np.int32)
        return replace(self, max_tokens=limits, output_len=np.minimum(self.output_len, limits))

    def with_hash_block_size(self, block_size: int) -> Requests:
        """Hashes for smaller blocks, as a cache with ``block_size`` needs them.

        Two prompts that part inside one block of the old size share none of its smaller blocks.

        Raises:
            ValueError: there are hashes, and their block size is not a multiple of ``block_size``.
        """
        if self.hash_block_size in (0, block_size):
            return self
        if block_size < 1 or self.hash_block_size % block_size:
            raise ValueError(
                f"hashes of {self.hash_block_size} tokens cannot be split into blocks of {block_size}: give a divisor"
            )
        factor = self.hash_block_size // block_size
        return replace(
            self,
            hash_block_size=block_size,
            hash_start=self.hash_start * factor,
            hashes=split_hashes(self.hashes, factor),
        )

    @staticmethod
    def concat(parts: Sequence[Requests]) -> Requests:
        """One after the other. Task names are united; sessions with one number are one session.

        Raises:
            ValueError: no parts, different hash block sizes, or a part that starts before the last one's end.
        """
        joined = _joined(parts)
        _check_rising(joined.arrival_s)
        return joined

    @staticmethod
    def merge(parts: Sequence[Requests]) -> Requests:
        """All parts in the order of arrival; of equal times the earlier part's goes first.

        Raises:
            ValueError: no parts, or different hash block sizes.
        """
        joined = _joined(parts)
        return joined.take(np.argsort(joined.arrival_s, kind="stable"))

    def validate(self) -> None:
        """Check everything that the attributes promise.

        Raises:
            ValueError: naming the attribute, the first request that breaks it and its value.
        """
        for name in _PER_REQUEST:
            if (shape := getattr(self, name).shape) != (len(self),):
                raise ValueError(f"{name} has the shape {shape}, not ({len(self)},)")
        _check(
            "arrival_s",
            self.arrival_s,
            np.isfinite(self.arrival_s) & (self.arrival_s >= 0),
            "finite and >= 0",
        )
        _check_rising(self.arrival_s)
        _check("prompt_len", self.prompt_len, self.prompt_len >= 1, ">= 1 token")
        _check("output_len", self.output_len, self.output_len >= 1, ">= 1 token")
        _check("max_tokens", self.max_tokens, self.max_tokens >= self.output_len, ">= output_len")
        known = (self.task >= 0) & (self.task < len(self.tasks))
        _check("task", self.task, known, f"an index into tasks={self.tasks}")
        _check("deadline_s", self.deadline_s, ~np.isnan(self.deadline_s), "a number, inf for none")
        _check("session", self.session, self.session >= -1, ">= 0, or -1 for none")
        self._validate_hashes()

    def _validate_hashes(self) -> None:
        size, counts = self.hash_block_size, np.diff(self.hash_start)
        if self.hash_start.shape != (len(self) + 1,) or self.hash_start[0] != 0 or (counts < 0).any():
            raise ValueError(f"hash_start must be {len(self) + 1} rising numbers from 0")
        if self.hashes.shape != (self.hash_start[-1],):
            raise ValueError(
                f"hashes has the shape {self.hashes.shape}, hash_start ends at {self.hash_start[-1]}"
            )
        if size < 0 or (size == 0 and self.hashes.size):
            raise ValueError(f"hash_block_size={size} must be >= 1 where there are hashes, or 0 for none")
        num_tokens = self.prompt_len.astype(np.int64) + self.output_len
        _check("hash count", counts, counts * size <= num_tokens, "of full blocks of prompt and output only")
        if not self.hashes.all():
            raise ValueError("hashes must not be 0, which stands for no parent")


_PER_REQUEST = "arrival_s prompt_len output_len max_tokens task priority deadline_s session".split()


def _joined(parts: Sequence[Requests]) -> Requests:
    if not parts:
        raise ValueError("no requests to join: give at least one part")
    if len(parts) == 1:
        return parts[0]
    sizes = sorted({part.hash_block_size for part in parts if part.hash_block_size})
    if len(sizes) > 1:
        raise ValueError(f"the parts have hashes of blocks of {sizes} tokens: see with_hash_block_size")
    tasks = tuple(dict.fromkeys(name for part in parts for name in part.tasks))
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_REQUEST
    }
    if any(part.tasks != tasks for part in parts):
        index_of = [np.array([tasks.index(name) for name in part.tasks], np.int16) for part in parts]
        columns["task"] = np.concatenate(
            [index[part.task] for index, part in zip(index_of, parts, strict=True)]
        )
    counts = np.concatenate([np.diff(part.hash_start) for part in parts])
    return Requests(
        **columns,
        tasks=tasks,
        hash_block_size=sizes[0] if sizes else 0,
        hash_start=np.concatenate(([0], np.cumsum(counts))),
        hashes=np.concatenate([part.hashes for part in parts]),
    )


def _whole(name: str, values: ArrayLike, dtype: Any, size: int) -> NDArray[Any]:
    """``values`` in ``dtype``, [size], without wrapping or truncating."""
    given = np.asarray(values)
    if given.size == 0 and size == 0:
        return np.empty(0, dtype)
    if given.dtype.kind not in "iu" and not (given.dtype.kind == "f" and (given == np.floor(given)).all()):
        raise ValueError(f"{name} must be whole numbers, got {given.dtype} {given.ravel()[:3]}")
    info = np.iinfo(dtype)
    fits = (given >= info.min) & (given <= info.max)
    _check(name, np.atleast_1d(given), np.atleast_1d(fits), f"in [{info.min}, {info.max}]")
    return _filled(name, given.astype(dtype), size)


def _filled(name: str, values: NDArray[Any], size: int) -> NDArray[Any]:
    if values.ndim == 0:
        return np.full(size, values)
    if values.shape != (size,):
        raise ValueError(f"{name} has the shape {values.shape}, not ({size},)")
    return values


def _check(name: str, values: NDArray[Any], good: NDArray[np.bool_], rule: str) -> None:
    if not good.all():
        index = int(np.argmin(good))
        raise ValueError(f"{name}={values[index]} of request {index} must be {rule}")


def _check_rising(arrival_s: FloatArray) -> None:
    falls = np.flatnonzero(np.diff(arrival_s) < 0)
    if falls.size:
        index = int(falls[0]) + 1
        raise ValueError(
            f"arrival_s={arrival_s[index]} of request {index} is before its predecessor's "
            f"{arrival_s[index - 1]}: sort by time, or see merge"
        )
