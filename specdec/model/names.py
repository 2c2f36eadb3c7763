"""The names weights go by here, and what Hugging Face and GGUF call them.

``embed``, ``final_norm``, ``lm_head`` (absent when tied to the embedding) and, for layer i, ``layers.{i}.``
with ``attn_norm q k v o q_bias k_bias v_bias o_bias q_norm k_norm mlp_norm gate up down post_attn_norm
post_mlp_norm``; what a family does not have is absent. Matrices are [outputs, inputs].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from specdec.model.config import ModelConfig

_HF_TOP = {"embed_tokens.weight": "embed", "norm.weight": "final_norm", "lm_head.weight": "lm_head"}
_HF_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_feedforward_layernorm.weight": "post_mlp_norm",
}
_HF_LAYER |= {f"self_attn.{name}_proj.weight": name for name in "qkvo"}
_HF_LAYER |= {f"self_attn.{name}_proj.bias": f"{name}_bias" for name in "qkvo"}
GGUF_TOP_NAMES = {
    "token_embd.weight": "embed",
    "output_norm.weight": "final_norm",
    "output.weight": "lm_head",
}
GGUF_LAYER_NAMES = {
    "attn_norm.weight": "attn_norm",
    "attn_output.weight": "o",
    "attn_output.bias": "o_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "post_attention_norm.weight": "post_attn_norm",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
    "post_ffw_norm.weight": "post_mlp_norm",
}
GGUF_LAYER_NAMES |= {f"attn_{name}.weight": name for name in "qkv"}
GGUF_LAYER_NAMES |= {f"attn_{name}.bias": f"{name}_bias" for name in "qkv"}
# Parts of checkpoints that a text decoder does not use.
_IGNORED = re.compile(r"vision_tower|vision_model|multi_modal_projector|rotary_emb\.inv_freq")
_HF_PREFIX = re.compile(r"^(language_model\.)?(model\.)?(language_model\.)?")


def from_hf_name(name: str, config: ModelConfig) -> str | None:
    """Our name of a Hugging Face tensor; ``None`` where a text decoder has no use for it.

    Raises:
        ValueError: a tensor this architecture does not have.
    """
    if _IGNORED.search(name):
        return None
    short = _HF_PREFIX.sub("", name)
    if short == "lm_head.weight" and config.tie_embeddings:
        return None
    if short in _HF_TOP:
        return _HF_TOP[short]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", short)
    if layer:
        number, part = layer.groups()
        if part == "post_attention_layernorm.weight":
            return f"layers.{number}.{'post_attn_norm' if config.post_norms else 'mlp_norm'}"
        if part in _HF_LAYER:
            return f"layers.{number}.{_HF_LAYER[part]}"
    raise ValueError(
        f"unexpected tensor {name!r} in a {config.family} checkpoint: is its config.json the right one?"
    )


def from_gguf_name(name: str) -> str:
    """Our name of a GGUF tensor.

    Raises:
        ValueError: a tensor no supported architecture has.
    """
    if name in GGUF_TOP_NAMES:
        return GGUF_TOP_NAMES[name]
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if layer and layer.group(2) in GGUF_LAYER_NAMES:
        return f"layers.{layer.group(1)}.{GGUF_LAYER_NAMES[layer.group(2)]}"
    raise ValueError(f"unexpected tensor {name!r} in the GGUF file: its architecture is not supported")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of ``config``."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_size, hidden),
        "k": (kv_size, hidden),
        "v": (kv_size, hidden),
        "o": (hidden, q_size),
        "mlp_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    if config.qkv_bias:
        layer |= {"q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,)}
    if config.o_bias:
        layer |= {"o_bias": (hidden,)}
    if config.qk_norm:
        layer |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    if config.post_norms:
        layer |= {"post_attn_norm": (hidden,), "post_mlp_norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, hidden), "final_norm": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """Compare a checkpoint's tensors with what ``config`` asks for.

    Raises:
        ValueError: missing, surplus or wrongly shaped tensors, with the first few named.
    """
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    if missing or surplus:
        raise ValueError(
            f"{source} does not fit its configuration: missing {_some(missing)}, "
            f"unexpected {_some(surplus)}; fetch it again or correct config.json"
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ValueError(
                f"{source}: tensor {name} is {tuple(shapes[name])}, config.json asks for {shape}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"
