"""Write a tiny model as a GGUF file, in the layouts that llama.cpp's converter gives its tensors."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch

from specdec.model.names import GGUF_LAYER_NAMES, GGUF_TOP_NAMES
from specdec.model.weights import LoadedModel

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
F32 = gguf.GGMLQuantizationType.F32


def write_tiny_gguf(
    path: Path, model: LoadedModel, quantization: gguf.GGMLQuantizationType | None = None
) -> dict[str, torch.Tensor]:
    """Write ``model`` to ``path``; its weights as the file holds them, by our names.

    Matrices are quantised to ``quantization`` if given; norms and biases stay float32.
    """
    config = model.config
    architecture = ARCHITECTURES[config.family]
    writer = gguf.GGUFWriter(path, architecture)
    _write_settings(writer, model)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in model.weights.items():
        kind = quantization if quantization is not None and weight.ndim == 2 else F32
        stored[name] = _through(weight, kind)
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(
            name.split(".")[-1].removesuffix("_bias"), 0
        )
        values = weight.numpy()
        if architecture == "llama" and heads:
            values = interleave(values, heads)
        if architecture == "gemma3" and name.endswith("norm"):
            values = values + 1
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Row order for a rotation of neighbouring pairs, as q and k of the llama architecture are stored."""
    return (
        rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def gguf_name(name: str) -> str:
    if name.startswith("layers."):
        _, number, part = name.split(".")
        return f"blk.{number}." + next(theirs for theirs, ours in GGUF_LAYER_NAMES.items() if ours == part)
    return next(theirs for theirs, ours in GGUF_TOP_NAMES.items() if ours == name)


def _through(weight: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    values = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    return torch.from_numpy(np.array(values, np.float32))


def _write_settings(writer: gguf.GGUFWriter, model: LoadedModel) -> None:
    config = model.config
    writer.add_context_length(config.max_model_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(max(config.rope_theta))
    windows = [window for window in config.sliding_window if window]
    if windows:
        writer.add_sliding_window(windows[0])
    backend = json.loads(model.tokenizer.backend.to_str())
    vocab = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    special = {token["content"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in special else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    assert model.tokenizer.chat_template is not None
    writer.add_chat_template(model.tokenizer.chat_template)
