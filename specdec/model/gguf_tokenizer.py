"""A tokenizer from the metadata of a GGUF file.

Two kinds exist: byte-level BPE (``gpt2``), whose file names but does not contain the rule that splits text
into words, and SentencePiece BPE (``llama``), whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_pattern(digits: str) -> pre_tokenizers.PreTokenizer:
    """Split by the pattern of the GPT-4 kind with ``digits`` as the repetition of a number's digits."""
    split = pre_tokenizers.Split(Regex(_CONTRACTIONS + _WORDS % digits), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# The name a file gives its splitting rule -> the rule.
PRE_TOKENIZERS = {
    "smollm": _digits_then_bytes,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": lambda: _by_pattern(""),
    "llama-bpe": lambda: _by_pattern("{1,3}"),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file and its settings, in the form of ``tokenizer_config.json``.

    Raises:
        ValueError: an unsupported kind of tokenizer or splitting rule.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types)
    else:
        raise ValueError(
            f"unsupported GGUF tokenizer {kind!r}: supported are gpt2, llama; pass a model directory"
        )
    _add_tokens(tokenizer, tokens, types)
    _add_start_token(tokenizer, metadata, tokens, default=kind == "llama")
    settings: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            settings[f"{name}_token"] = tokens[token_id]
    return tokenizer, settings


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "")
    if rule not in PRE_TOKENIZERS:
        raise ValueError(
            f"unsupported GGUF pre-tokenizer {rule!r}: supported are {', '.join(PRE_TOKENIZERS)}; "
            "pass a directory with safetensors and tokenizer.json instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    merges = _merges_by_score(tokens, metadata["tokenizer.ggml.scores"], types)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rules: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        rules.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(rules)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best result first.

    SentencePiece matches user-defined pieces before all others; their stored score is only a placeholder.
    """
    usable = {
        token: 0.0 if kind == USER_DEFINED else score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind in (NORMAL, USER_DEFINED)
    }
    ranked = []
    for piece, score in usable.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in usable and piece[cut:] in usable:
                ranked.append((score, cut, piece))
    ranked.sort(key=lambda entry: (entry[0], entry[1], len(entry[2])), reverse=True)
    return [(piece[:cut], piece[cut:]) for _, cut, piece in ranked]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are found in a text before it is split: control tokens (special) and user-defined ones."""
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _add_start_token(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], default: bool
) -> None:
    """Begin every text with the start token where the model was trained so."""
    start_id = metadata.get("tokenizer.ggml.bos_token_id")
    if start_id is None or not metadata.get("tokenizer.ggml.add_bos_token", default):
        return
    start = tokens[start_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:0", pair=f"{start}:0 $A:0 {start}:1 $B:1", special_tokens=[(start, start_id)]
    )
