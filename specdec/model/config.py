"""What a decoder is made of, read from a Hugging Face ``config.json``.

``ModelConfig.from_hf`` resolves everything that differs between the families (Llama, Mistral, Qwen2, Qwen3
and Gemma 3 text) into explicit values, so that decoder and kernels never ask for a family's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Json = Mapping[str, Any]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "frequency_factors")
# What a family's own configuration class assumes where config.json is silent.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma3_text": {
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How inverse frequencies are stretched for long contexts.

    Attributes:
        kind: "linear" (divide by ``factor``), "llama3" (divide the low ones, blend in between), or
            "frequency_factors" (divide each by its own factor, as GGUF files store the llama3 rule).
        factors: one per frequency, for "frequency_factors" only.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    factors: tuple[float, ...] = ()

    def apply(self, inv_freq: Tensor) -> Tensor:
        """Scaled inverse frequencies, float32 [head_dim / 2] in and out."""
        if self.kind == "linear":
            return inv_freq / self.factor
        if self.kind == "frequency_factors":
            return inv_freq / torch.tensor(self.factors)
        wavelength = 2 * math.pi / inv_freq
        longest, shortest = (
            self.original_max_len / self.low_freq_factor,
            self.original_max_len / self.high_freq_factor,
        )
        blend = (self.original_max_len / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        middle = (1 - blend) * inv_freq / self.factor + blend * inv_freq
        scaled = torch.where(wavelength > longest, inv_freq / self.factor, middle)
        return torch.where(wavelength < shortest, inv_freq, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's architecture, with every family difference spelled out.

    Attributes:
        family: one of ``FAMILIES``, for messages only.
        activation: "silu" or "gelu_tanh".
        norm_offset: added to every norm weight (1.0 for Gemma, else 0.0).
        max_model_len: most tokens of a sequence.
        qkv_bias, o_bias: the attention projections have biases.
        qk_norm: queries and keys are normalised per head before rotation.
        post_norms: attention and MLP outputs are normalised before they are added to the residual.
        embedding_scale: token embeddings are multiplied by it.
        attention_scale: attention scores are multiplied by it.
        rope_theta, rope_scaling, sliding_window: one entry per layer; a window counts the token itself.
        logit_softcap: logits are squashed to ``cap * tanh(logits / cap)``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    norm_eps: float
    norm_offset: float
    max_model_len: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    post_norms: bool
    embedding_scale: float
    attention_scale: float
    rope_theta: tuple[float, ...]
    rope_scaling: tuple[RopeScaling | None, ...]
    sliding_window: tuple[int | None, ...]
    logit_softcap: float | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_hf(cls, hf: Json) -> ModelConfig:
        """Build from a parsed ``config.json``, in transformers 4 or 5 form.

        Raises:
            ValueError: unsupported architecture, activation, rope type or option, or a missing key.
        """
        family, fields = _family_fields(hf)
        num_layers, num_heads = int(fields["num_hidden_layers"]), int(fields["num_attention_heads"])
        head_dim = int(fields.get("head_dim") or fields["hidden_size"] // num_heads)
        gemma, attention_bias = family == "gemma3_text", bool(fields.get("attention_bias", False))
        kinds = _layer_kinds(family, fields, num_layers)
        ropes = [_rope(fields, kind, gemma) for kind in kinds]
        window = fields.get("sliding_window")
        return cls(
            family=family,
            vocab_size=int(fields["vocab_size"]),
            hidden_size=int(fields["hidden_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(fields.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            intermediate_size=int(fields["intermediate_size"]),
            activation=_activation(fields),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            norm_offset=1.0 if gemma else 0.0,
            max_model_len=int(fields["max_position_embeddings"]),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family != "qwen2" and attention_bias,
            qk_norm=family in ("qwen3", "gemma3_text"),
            post_norms=gemma,
            embedding_scale=math.sqrt(fields["hidden_size"]) if gemma else 1.0,
            attention_scale=float(fields["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
            rope_theta=tuple(theta for theta, _ in ropes),
            rope_scaling=tuple(scaling for _, scaling in ropes),
            sliding_window=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            logit_softcap=fields.get("final_logit_softcapping"),
            eos_token_ids=_token_ids(fields.get("eos_token_id")),
            bos_token_id=fields.get("bos_token_id"),
        )

    def inv_freq(self, layer: int) -> Tensor:
        """Inverse rotary frequencies of ``layer``, radians per position, float32 [head_dim / 2]."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        inv_freq = 1.0 / (self.rope_theta[layer] ** exponents)
        scaling = self.rope_scaling[layer]
        return inv_freq if scaling is None else scaling.apply(inv_freq)


def _family_fields(hf: Json) -> tuple[str, dict[str, Any]]:
    """The family's name and its text configuration, defaults filled in."""
    family = hf.get("model_type")
    if family == "gemma3" and "text_config" in hf:
        # The wrapper of image-and-text checkpoints keeps the token ids to itself.
        tokens = {key: hf[key] for key in ("eos_token_id", "bos_token_id") if key in hf}
        family, hf = "gemma3_text", {**hf["text_config"], **tokens}
    if family not in FAMILIES:
        raise ValueError(
            f"unsupported architecture {family!r} (model_type in config.json): "
            f"supported are {', '.join(FAMILIES)}"
        )
    aliases = {"hidden_act": hf.get("hidden_activation") or hf.get("hidden_act")}
    given = {key: value for key, value in {**hf, **aliases}.items() if value is not None}
    fields = {"rms_norm_eps": 1e-6, "hidden_act": "silu", **FAMILY_DEFAULTS[family], **given}
    for key in ("sliding_window", "head_dim"):
        if key in hf and hf[key] is None:
            fields.pop(key, None)
    required = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    missing = [key for key in required if key not in fields]
    if missing:
        raise ValueError(f"config.json of a {family} model lacks {', '.join(missing)}: is it complete?")
    _reject_unsupported(family, fields)
    return family, fields


def _reject_unsupported(family: str, fields: Json) -> None:
    """Refuse options that would silently change the result."""
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method")
        raise ValueError(
            f"weights quantised with {method!r} are not supported: load the original safetensors or a GGUF"
        )
    for option in ("mlp_bias", "use_bidirectional_attention", "attn_logit_softcapping"):
        if fields.get(option):
            raise ValueError(f"{option}={fields[option]!r} in a {family} config.json is not supported")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={fields['partial_rotary_factor']} is not supported: it must be 1"
        )


def _activation(fields: Json) -> str:
    name = fields["hidden_act"]
    if name not in ACTIVATIONS:
        raise ValueError(f"unsupported activation {name!r}: supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _layer_kinds(family: str, fields: Json, num_layers: int) -> list[str]:
    """For each layer "sliding_attention" or "full_attention"."""
    if family == "llama" or fields.get("sliding_window") is None:
        return ["full_attention"] * num_layers
    if family in ("qwen2", "qwen3") and not fields.get("use_sliding_window", False):
        return ["full_attention"] * num_layers
    if "layer_types" in fields:
        kinds = list(fields["layer_types"])
        unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
        if unknown or len(kinds) != num_layers:
            raise ValueError(
                f"layer_types needs {num_layers} entries of sliding_attention or full_attention, "
                f"got {len(kinds)} with {unknown or 'known names'}"
            )
        return kinds
    if family == "gemma3_text":
        pattern = int(fields["sliding_window_pattern"])
        sliding = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    else:
        first = int(fields.get("max_window_layers", 28)) if family != "mistral" else 0
        sliding = [layer >= first for layer in range(num_layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def _rope(fields: Json, kind: str, gemma: bool) -> tuple[float, RopeScaling | None]:
    """Base and scaling of one layer of ``kind``, from either form of the configuration."""
    parameters = fields.get("rope_parameters")
    local = gemma and kind == "sliding_attention"
    default_theta = 10_000.0 if local else fields.get("rope_theta", 10_000.0)
    if parameters is None:
        # Gemma's local layers have a base of their own and are never stretched.
        theta = fields.get("rope_local_base_freq", 10_000.0) if local else default_theta
        return float(theta), None if local else _scaling(fields.get("rope_scaling"), fields)
    parameters = parameters.get(kind, parameters)
    return float(parameters.get("rope_theta") or default_theta), _scaling(parameters, fields)


def _scaling(parameters: Json | None, fields: Json) -> RopeScaling | None:
    if parameters is None:
        return None
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"unsupported rope scaling type {kind!r}: supported are {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported")
    if kind == "default":
        return None
    if kind == "frequency_factors":
        return RopeScaling(kind=kind, factors=tuple(parameters["factors"]))
    if kind == "linear":
        return RopeScaling(kind=kind, factor=float(parameters["factor"]))
    original = parameters.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    return RopeScaling(
        kind=kind,
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_len=int(original),
    )


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
