"""Tiny random models on disk, in Hugging Face form, one for each supported family.

>>> path = tiny_model_dir("qwen3", tmp_path)
>>> model = load_model(path, dtype=torch.float32)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "eos_token_id": EOS_TOKEN_ID,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 12,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"head_dim": 16, "sliding_window": 7},
    "qwen2": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "qwen3": {"head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 20.0,
    },
}


def tiny_model_dir(family: str, tmp_path: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of ``family`` with its tokenizer; the directory.

    Args:
        seed: of the weights; equal seeds and options give equal weights.
        overrides: options of the family's configuration class, such as ``num_hidden_layers=2``.
    """
    model = tiny_transformers_model(family, seed, **overrides)
    path = tmp_path / f"tiny-{family}-{seed}"
    model.save_pretrained(path)
    write_tiny_tokenizer(path)
    return path


def tiny_transformers_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model itself, float32; every weight is random, so none can be ignored unnoticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**SHAPE, **FAMILY_OPTIONS[family], **overrides}
    if "layer_types" in options and len(options["layer_types"]) != options["num_hidden_layers"]:
        options["layer_types"] = (options["layer_types"] * options["num_hidden_layers"])[
            : options["num_hidden_layers"]
        ]
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            values = torch.randn(weight.shape, generator=noise)
            if weight.ndim == 2:
                weight.copy_(values / weight.shape[1] ** 0.5)
            else:
                # Norm weights start at one, or at zero where the model adds one; biases at zero.
                weight.add_(0.2 * values)
    return model


def write_tiny_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of ``VOCAB_SIZE`` entries with a chat template."""
    path.mkdir(parents=True, exist_ok=True)
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [(left, right) for left in "Ġaeiost" for right in "aehinorst"][: VOCAB_SIZE - len(tokens)]
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
