"""Write a loaded model as a Hugging Face directory, so that other engines can run the very same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from specdec.model.weights import LoadedModel

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_PARTS = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_PARTS |= {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
_PARTS |= {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkvo"}
_TOP = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}


def export_hf(model: LoadedModel, directory: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``directory``.

    Raises:
        ValueError: a family, or a feature of it, that has no plain Hugging Face form here.
    """
    config = model.config
    if config.family not in ARCHITECTURES or any(scaling is not None for scaling in config.rope_scaling):
        raise ValueError(
            f"cannot export {config.family} with this rotary scaling: use the original checkpoint"
        )
    kind, architecture = ARCHITECTURES[config.family]
    fields: dict[str, Any] = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_model_len,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "rope_theta": config.rope_theta[0],
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta[0]},
        "eos_token_id": list(config.eos_token_ids),
        "bos_token_id": config.bos_token_id,
        "dtype": str(model.weights["embed"].dtype).removeprefix("torch."),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    weights = {_hf_name(name): tensor.contiguous() for name, tensor in model.weights.items()}
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, index, part = name.split(".")
    return f"model.layers.{index}.{_PARTS[part]}"
