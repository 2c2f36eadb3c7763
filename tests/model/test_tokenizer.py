"""Tokenizers: round trips, splitting, chat templates, building from GGUF metadata."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.model.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED, build_tokenizer
from specdec.model.tokenizer import Tokenizer
from specdec.model.weights import LoadedModel
from tests.helpers.models import SPECIAL_TOKENS, VOCAB_SIZE, write_tiny_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "12345 + 678",
    "  two  spaces\n\n\nand\ttabs \r\n",
    "naïve café — Ångström ﬁ",
    "日本語とหลายภาษา и русский",
    "👩‍👩‍👧‍👦 🇨🇭 🙂",
    "\x00\x7f\u200b\ufeff",
    "def f(x):\n    return x**2  # 0xFF",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And <b>30</b>?"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(path)
    return Tokenizer.from_directory(path, [2])


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tiny: Tokenizer, smollm2_float32: LoadedModel, text: str) -> None:
    for tokenizer in (tiny, smollm2_float32.tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2_splits_every_digit(smollm2_float32: LoadedModel) -> None:
    tokenizer = smollm2_float32.tokenizer
    pieces = [tokenizer.id_to_token(token) for token in tokenizer.encode("12345 + 678")]
    assert pieces == ["1", "2", "3", "4", "5", "Ġ+", "Ġ", "6", "7", "8"]


def test_smollm2_special_tokens(smollm2_float32: LoadedModel) -> None:
    tokenizer = smollm2_float32.tokenizer
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.encode("<|im_start|>user") == [1, tokenizer.token_to_id("user")]
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.decode([1, 2], skip_special_tokens=False) != ""


def test_chat_template_equals_transformers(smollm2_float32: LoadedModel) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = smollm2_float32.tokenizer
    reference = PreTrainedTokenizerFast(tokenizer_object=ours.backend, **ours.special_tokens)
    reference.chat_template = ours.chat_template
    for messages in (MESSAGES, MESSAGES[1:]):
        for prompt in (True, False):
            expected = reference.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert ours.render_chat(messages, add_generation_prompt=prompt) == expected
    assert ours.apply_chat_template(MESSAGES)[:2] == [1, ours.token_to_id("system")]


def test_chat_template_runs_in_a_sandbox(tiny: Tokenizer) -> None:
    unsafe = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="chat template refuses"):
        Tokenizer(tiny.backend, chat_template=unsafe).render_chat(MESSAGES)
    with pytest.raises(ValueError, match="no system role"):
        Tokenizer(tiny.backend, chat_template="{{ raise_exception('no system role') }}").render_chat(MESSAGES)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(tiny.backend).apply_chat_template(MESSAGES)


def test_chat_template_places(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    named = '[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "from a list"}]'
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {named}}}')
    assert Tokenizer.from_directory(tmp_path).render_chat(MESSAGES) == "from a list"
    (tmp_path / "chat_template.jinja").write_text("{% generation %}{{ messages|tojson }}{% endgeneration %}")
    assert '"And <b>30</b>?"' in Tokenizer.from_directory(tmp_path).render_chat(MESSAGES)


def test_fingerprint_tells_vocabularies_apart(tiny: Tokenizer, tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    same = Tokenizer.from_directory(tmp_path)
    assert same.vocab_fingerprint == tiny.vocab_fingerprint
    assert tiny.vocab_size == VOCAB_SIZE
    text = (tmp_path / "tokenizer.json").read_text("utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace(SPECIAL_TOKENS[0], "<|other|>"), "utf-8")
    assert Tokenizer.from_directory(tmp_path).vocab_fingerprint != tiny.vocab_fingerprint


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠĠ", "Ġdays"]),
        ("gpt-2", ["It", "'s", "Ġ1234", "ĠĠ", "Ġdays"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠĠ", "Ġdays"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "ĠĠ", "Ġdays"]),
    ],
)
def test_splitting_rules(rule: str, pieces: list[str]) -> None:
    split = PRE_TOKENIZERS[rule]().pre_tokenize_str("It's 1234   days")
    assert [piece for piece, _ in split] == pieces


def test_sentencepiece_merges_best_score_first() -> None:
    entries = [
        ("<unk>", 2, 0.0),
        ("<bos>", CONTROL, 0.0),
        *[(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)],
    ]
    entries += [(piece, NORMAL, score) for piece, score in [("▁", -9), ("a", -9), ("b", -9), ("c", -9)]]
    entries += [
        ("ab", NORMAL, -2.0),
        ("bc", NORMAL, -1.0),
        ("▁▁", USER_DEFINED, -1000.0),
        ("▁a", NORMAL, -0.5),
    ]
    tokens, types, scores = (list(column) for column in zip(*entries, strict=True))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    backend, settings = build_tokenizer(metadata)
    assert settings["bos_token"] == "<bos>"
    # "bc" beats "ab"; a user-defined piece beats every score; an unknown character falls back to bytes.
    assert backend.encode("abc", add_special_tokens=False).tokens == ["a", "bc"]
    assert backend.encode("  ab").tokens == ["<bos>", "▁▁", "ab"]
    assert backend.encode("é", add_special_tokens=False).tokens == ["<0xC3>", "<0xA9>"]
    assert backend.decode(backend.encode(" ab é").ids) == " ab é"


def test_unsupported_gguf_tokenizers_are_named() -> None:
    with pytest.raises(ValueError, match="unsupported GGUF tokenizer 'bert'"):
        build_tokenizer({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": []})
    with pytest.raises(ValueError, match=r"unsupported GGUF pre-tokenizer 'tekken'.*smollm"):
        build_tokenizer(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken", "tokenizer.ggml.tokens": []}
        )
