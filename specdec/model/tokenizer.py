"""Text to token ids and back, with the model's chat template.

Backed by the ``tokenizers`` library, so that start-up does not pay for importing transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A tokenizer and what the model that owns it says about its special tokens.

    Args:
        backend: a ``tokenizers.Tokenizer``.
        eos_token_ids: tokens that end a text.
        chat_template: Jinja source, or ``None`` for a model without one.
        special_tokens: names such as ``bos_token`` to their text, for the template.
    """

    def __init__(
        self,
        backend: Backend,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_directory(cls, path: Path, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a model directory.

        Raises:
            ValueError: no ``tokenizer.json``, or one that cannot be read.
        """
        file = path / "tokenizer.json"
        if not file.exists():
            raise ValueError(
                f"{path} has no tokenizer.json: save it once with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} cannot be read ({error}): fetch it again") from error
        settings = path / "tokenizer_config.json"
        config = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
        special = {name: _content(config[name]) for name in SPECIAL_NAMES if config.get(name)}
        return cls(backend, eos_token_ids, _chat_template(path, config), special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def vocab_fingerprint(self) -> str:
        """SHA-256 over (id, token) in order of id: equal exactly when ids mean the same."""
        digest = sha256()
        for token, token_id in sorted(
            self.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]
        ):
            digest.update(f"{token_id}\0{token}\0".encode())
        return digest.hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Special tokens written out in the text are recognised, as in transformers.

        Args:
            add_special_tokens: add what the model expects around a text (a start token for Llama and Gemma,
                nothing for SmolLM2 and Qwen).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; incomplete UTF-8 becomes U+FFFD."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's answer.

        Args:
            messages: ``{"role": …, "content": …}``, in order.
            add_generation_prompt: end with the header of an assistant message.
            variables: further variables of the template, such as ``tools``.

        Raises:
            ValueError: the model has no template, or the template refuses the messages.
        """
        text = self.render_chat(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as text; see :meth:`apply_chat_template`."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template (is it a base model?): give plain text prompts")
        try:
            return (
                _environment()
                .from_string(self.chat_template)
                .render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    **{"tools": None, "documents": None, **self.special_tokens, **variables},
                )
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for training; here it is transparent."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - declared so by jinja

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates come with downloaded models, so they run in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own filter this does not escape HTML, which templates do not expect."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The default template, from whichever of the three places holds it."""
    if (path / "chat_template.jinja").exists():
        return (path / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template")
    if template is None and (path / "chat_template.json").exists():
        template = json.loads((path / "chat_template.json").read_text("utf-8"))["chat_template"]
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template
