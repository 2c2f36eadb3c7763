"""What a request gives back, and where its text ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from specdec.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one output position, of the model's raw distribution (natural logarithm).

    Attributes:
        token_id, logprob: the chosen token.
        top: the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The finished output of one request.

    Attributes:
        request_id: the engine's number of the request.
        prompt_token_ids: the prompt as the model saw it.
        token_ids: generated tokens, including a final end-of-sequence token.
        text: their text, without special tokens, cut before a stop string.
        finish_reason: "stop" (end-of-sequence, stop token or stop string) or "length" (``max_tokens``).
        num_drafted, num_accepted: draft tokens verified and accepted.
        num_steps: target steps that emitted; ``len(token_ids) / num_steps`` is τ.
        num_cached: prompt tokens that came from the prefix cache.
        num_preemptions: times it was sent back to the queue.
        ttft_s: arrival to first token, seconds.
        tpot_s: mean time per output token after the first, seconds; ``nan`` for a single token.
        e2e_s: arrival to last token, seconds.
        logprobs: one entry per generated token if asked for.
    """

    request_id: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    num_drafted: int
    num_accepted: int
    num_steps: int
    num_cached: int
    num_preemptions: int
    ttft_s: float
    tpot_s: float
    e2e_s: float
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """New tokens of one request, handed to the streaming callback after each step.

    Attributes:
        text: text that became certain; a character whose bytes are still incomplete is held back, and so is
            whatever might turn out to be the start of a stop string.
        finish_reason: set on the last event.
    """

    request_id: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None


OnToken = Callable[[StreamEvent], None]


@dataclass(slots=True)
class TextStream:
    """Incremental text of one request, with stop strings.

    Text is decoded from a window of recent tokens, so the cost per token does not grow with the output. A
    window whose text ends in U+FFFD is in the middle of a character and is not emitted yet.
    """

    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()
    text: str = ""
    sent: int = 0
    _ids: list[int] = field(default_factory=list)
    _window: int = 0
    _read: int = 0

    def push(self, token_id: int) -> bool:
        """Add a token; true if a stop string now ends the text, which is then cut before it."""
        self._ids.append(token_id)
        before = self.tokenizer.decode(self._ids[self._window : self._read])
        after = self.tokenizer.decode(self._ids[self._window :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return False
        seen = len(self.text)
        self.text += after[len(before) :]
        self._window, self._read = self._read, len(self._ids)
        return self._cut_at_stop(seen)

    def _cut_at_stop(self, seen: int) -> bool:
        hits = [self.text.find(stop, max(0, seen - len(stop) + 1)) for stop in self.stop]
        hits = [hit for hit in hits if hit >= 0]
        if hits:
            self.text = self.text[: min(hits)]
        return bool(hits)

    def finish(self, *, stopped_by_text: bool) -> None:
        """Flush bytes that never became a character."""
        if not stopped_by_text:
            before = self.tokenizer.decode(self._ids[self._window : self._read])
            self.text += self.tokenizer.decode(self._ids[self._window :])[len(before) :]

    def take(self, *, final: bool) -> str:
        """Text not handed out yet; all of it when ``final``."""
        end = len(self.text) if final else len(self.text) - self._possible_stop_prefix()
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def _possible_stop_prefix(self) -> int:
        """Length of the longest tail of the text that begins a stop string."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stop if len(stop) > length):
                return length
        return 0
