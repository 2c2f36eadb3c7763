"""What a user asks for (:class:`SamplingParams`) and what the scheduler tracks of it (:class:`Request`)."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. ``temperature=0`` is greedy decoding.

    Args:
        temperature: divides the logits; 0 takes the argmax.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches ``top_p`` (nucleus sampling).
        min_p: drop tokens less likely than ``min_p`` times the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the
            prompt or the output (CTRL, arXiv 1909.05858, section 4.1).
        presence_penalty: subtracted from the logits of tokens already in the output.
        max_tokens: most tokens to generate.
        stop: strings that end the output; they are cut from ``text``.
        stop_token_ids: tokens that end the output, besides the model's own end-of-sequence tokens.
        ignore_eos: go on after an end-of-sequence token.
        seed: seed of this request's noise; ``None`` derives one from the engine's seed and the request id.
        logprobs: return this many most likely tokens, and the chosen one, with log-probabilities.

    Raises:
        ValueError: naming the field, its value and the allowed range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = (
            ("temperature", 0.0 <= self.temperature < math.inf, "a finite number >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 keeps all tokens)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1] (1 keeps all tokens)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1] (0 keeps all tokens)"),
            (
                "repetition_penalty",
                0.0 < self.repetition_penalty < math.inf,
                "a finite number > 0 (1 is off)",
            ),
            ("presence_penalty", abs(self.presence_penalty) < math.inf, "a finite number (0 is off)"),
            ("max_tokens", self.max_tokens >= 1, "an integer >= 1"),
            ("stop", all(self.stop), "non-empty strings"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "None or an integer in [0, 2**64)"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "None or an integer >= 0"),
        )
        for name, valid, allowed in checks:
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class RequestState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class Request:
    """One request as the scheduler sees it: lengths, times and block hashes, never token values.

    Args:
        request_id: unique and >= 0.
        prompt_len: prompt tokens, >= 1.
        max_tokens: most tokens that will be generated, >= 1.
        arrival_s: when it arrives, on the clock that is handed to ``StepLoop.begin``.
        priority: smaller runs earlier under the ``priority`` order.
        deadline_s: used by the ``edf`` order.
        predicted_tokens: predicted output length, used by ``sjf`` (``max_tokens`` when ``None``).
        block_hashes: chained hashes of the prompt's full blocks; grows with the output's full blocks.
        task: a label for reports.

    The remaining fields are written by the scheduler and are the same on hardware and in simulation.
    ``num_swapped`` counts tokens whose KV waits in host memory.
    """

    request_id: int
    prompt_len: int
    max_tokens: int
    arrival_s: float = 0.0
    priority: int = 0
    deadline_s: float = math.inf
    predicted_tokens: int | None = None
    block_hashes: list[int] = field(default_factory=lambda: list[int]())
    task: str = ""

    state: RequestState = RequestState.WAITING
    num_generated: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_rejected: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    num_swapped: int = 0
    first_scheduled_s: float = math.nan
    first_token_s: float = math.nan
    finish_s: float = math.nan

    def __post_init__(self) -> None:
        if self.request_id < 0:
            raise ValueError(f"request_id={self.request_id} must be >= 0")
        if self.prompt_len < 1:
            raise ValueError(f"request {self.request_id} has an empty prompt: give at least one token")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_tokens={self.max_tokens} must be >= 1")

    @property
    def num_known(self) -> int:
        """Tokens whose values are known: the prompt and what was generated."""
        return self.prompt_len + self.num_generated
