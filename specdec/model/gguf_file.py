"""GGUF files: configuration and tensors, read one at a time and dequantised piece by piece.

The ``gguf`` package parses and dequantises; here are the names, the layouts and the metadata. Parsing a large
vocabulary takes it seconds, so :func:`read_gguf` runs once and its result is kept in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.model.names import from_gguf_name

# GGUF architecture -> Hugging Face model_type.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# Elements dequantised at a time: bounds the temporary memory to a few of these in float32.
PIECE_ELEMENTS = 4 << 20
# Facts of Gemma 3 that its GGUF files leave to the reader.
GEMMA_LOCAL_ROPE_THETA, GEMMA_WINDOW_PATTERN, GEMMA_27B_LAYERS = 10_000.0, 6, 62


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in a GGUF file.

    Attributes:
        name: ours, see ``specdec.model.names``.
        kind: GGML type number.
        shape: [outputs, inputs] or [size].
        offset, num_bytes: of its data in the file.
        permuted_heads: heads whose rows the converter interleaved for its rotation, 0 if none.
        shift: added after dequantising (−1 for Gemma norms, which are stored with 1 added).
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    permuted_heads: int = 0
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class GgufModel:
    """Everything of a GGUF file but its data.

    Attributes:
        hf_config: the configuration in ``config.json`` form.
        metadata: the file's own key-value pairs.
    """

    hf_config: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    metadata: dict[str, Any]


def read_gguf(path: Path) -> GgufModel:
    """Parse a GGUF file.

    Raises:
        ValueError: not a GGUF file, or an unsupported architecture.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}): fetch it again") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"unsupported architecture {architecture!r} in {path}: supported are {', '.join(ARCHITECTURES)}"
        )
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    hf_config = _hf_config(metadata, by_name)
    heads = {"q": hf_config["num_attention_heads"], "k": hf_config["num_key_value_heads"]}
    tensors = []
    for tensor in by_name.values():
        if tensor.name == "rope_freqs.weight":
            continue
        name = from_gguf_name(tensor.name)
        permuted = (
            heads.get(name.rsplit(".", 1)[-1].removesuffix("_bias"), 0) if architecture == "llama" else 0
        )
        tensors.append(
            GgufTensor(
                name=name,
                kind=int(tensor.tensor_type),
                shape=tuple(int(size) for size in reversed(tensor.shape)),
                offset=int(tensor.data_offset),
                num_bytes=int(tensor.n_bytes),
                permuted_heads=permuted,
                shift=-1.0 if architecture == "gemma3" and name.endswith("norm") else 0.0,
            )
        )
    return GgufModel(hf_config, tuple(tensors), metadata)


def _hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the model; context length and norm epsilon come from the metadata."""
    architecture = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"the GGUF file lacks {architecture}.{key}: convert the model again")
        return value

    heads = get("attention.head_count")
    hf: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get(
            "attention.key_length", get("rope.dimension_count", get("embedding_length") // heads)
        ),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "eos_token_id": _stop_tokens(metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "rope_scaling": _rope_scaling(architecture, metadata, tensors),
    }
    if architecture == "gemma3":
        is_27b = hf["num_hidden_layers"] == GEMMA_27B_LAYERS
        hf |= {
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window": get("attention.sliding_window"),
            "sliding_window_pattern": GEMMA_WINDOW_PATTERN,
            "rope_local_base_freq": GEMMA_LOCAL_ROPE_THETA,
            "query_pre_attn_scalar": hf["hidden_size"] // heads if is_27b else hf["head_dim"],
        }
    return hf


def _rope_scaling(
    architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        factors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        return {"rope_type": "frequency_factors", "factors": factors.tolist()}
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": metadata.get(f"{architecture}.rope.scaling.factor", 1.0)}


def _stop_tokens(metadata: Mapping[str, Any]) -> list[int]:
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return sorted({int(token) for token in ids if token is not None})


def _shortest(value: float) -> float:
    """The shortest decimal of a number stored in float32, such as 1e-05 for 9.999999747e-06."""
    return float(str(np.float32(value)))


def dequantize(data: NDArray[np.uint8], tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    """One tensor in ``dtype``, in the row order of Hugging Face weights.

    Args:
        data: uint8, the whole file (a memory map).
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_rows

    width = tensor.shape[-1]
    rows = prod(tensor.shape) // width
    raw = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(rows, -1)
    kind = GGMLQuantizationType(tensor.kind)
    raw = raw.view({kind.F32: np.float32, kind.F16: np.float16}.get(kind, np.uint8))
    out = torch.empty((rows, width), dtype=dtype)
    step = max(1, PIECE_ELEMENTS // width)
    for start in range(0, rows, step):
        piece = dequantize_rows(raw[start : start + step], kind).astype(np.float32, copy=False)
        out[start : start + step] = torch.from_numpy(piece + np.float32(tensor.shift))
    out = out.view(tensor.shape)
    if tensor.permuted_heads:
        # Stored as pairs within a head, wanted as the first halves of all pairs, then the second ones.
        out = out.unflatten(0, (tensor.permuted_heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    return out


def dump_index(tensors: tuple[GgufTensor, ...]) -> str:
    """JSON of the tensors' places, for :func:`load_index`."""
    return json.dumps([asdict(tensor) for tensor in tensors])


def load_index(text: str) -> tuple[GgufTensor, ...]:
    """The tensors :func:`dump_index` wrote."""
    return tuple(GgufTensor(**{**entry, "shape": tuple(entry["shape"])}) for entry in json.loads(text))
