"""Load a model: configuration, weights under our names, tokenizer.

>>> model = load_model("smollm2-135m", dtype=torch.bfloat16)

Only safetensors and GGUF are read; nothing is unpickled and no code of a model runs. A GGUF file is parsed
once and its configuration and tokenizer kept in the cache, with bfloat16 weights beside them after the first
bfloat16 load, so later loads map a file. Other dtypes are dequantised afresh, since bfloat16 does not hold a
4-bit group's values exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.model.config import ModelConfig
from specdec.model.gguf_file import GgufTensor, dequantize, dump_index, load_index, read_gguf
from specdec.model.gguf_tokenizer import build_tokenizer
from specdec.model.names import check_shapes, from_hf_name
from specdec.model.safetensors_writer import write_safetensors
from specdec.model.sources import Source, default_cache_dir, locate, scratch_dir, verify_sha256
from specdec.model.tokenizer import Tokenizer

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Raise when the layout of a converted model's folder changes.
CONVERSION_VERSION = 1


@dataclass(slots=True)
class LoadedModel:
    """A model in memory; ``weights`` may be cleared once a backend has its own copy.

    Attributes:
        weights: by the names of ``specdec.model.names``; may be views of a mapped file: do not write to them.
        source: what it was asked for as.
        path: the directory or GGUF file it came from.
        checksum: "sha256:…" where it is pinned, else "".
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    source: str
    path: Path
    checksum: str = ""


def load_model(
    name_or_path: str | Path, dtype: torch.dtype = torch.bfloat16, cache_dir: Path | None = None
) -> LoadedModel:
    """Load a model onto the CPU.

    Args:
        name_or_path: a short name (``"smollm2-135m"``, ``"gemma3-270m"``), a hub id, a directory with
            safetensors, or a GGUF file.
        dtype: of the weights.
        cache_dir: default ``SPECDEC_CACHE``, else ``specdec`` in the user's cache folder.

    Raises:
        ValueError: unknown name, unsupported architecture or format, damaged or unfitting files.
        ModelUnavailableError: it could not be fetched.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    source = locate(name_or_path, cache_dir)
    if source.path.is_dir():
        config, tokenizer = _read_settings(source.path)
        weights = _read_directory(source.path, config, dtype)
    else:
        folder = _converted(source, cache_dir)
        config, tokenizer = _read_settings(folder)
        weights = _read_converted(source, folder, config, dtype)
    return LoadedModel(config, weights, tokenizer, source.label, source.path, source.checksum)


def check_same_vocabulary(target: LoadedModel, draft: LoadedModel) -> None:
    """Make sure that a token id means the same to both models.

    Raises:
        ValueError: the vocabularies differ, with the first difference.
    """
    ours, theirs = target.tokenizer, draft.tokenizer
    sizes = target.config.vocab_size, draft.config.vocab_size
    if ours.vocab_fingerprint == theirs.vocab_fingerprint and sizes[0] == sizes[1]:
        return
    ids = range(max(ours.vocab_size, theirs.vocab_size))
    differing = next((i for i in ids if ours.id_to_token(i) != theirs.id_to_token(i)), None)
    where = f"they have {sizes[0]} and {sizes[1]} entries"
    if differing is not None:
        where += (
            f"; token {differing} is {ours.id_to_token(differing)!r} and {theirs.id_to_token(differing)!r}"
        )
    raise ValueError(
        f"target {target.source!r} and draft {draft.source!r} have different vocabularies ({where}): "
        "choose a draft of the same model family, or a drafter without a model such as 'ngram'"
    )


def _read_settings(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """Configuration and tokenizer of a directory; all tokens that end a text are in the generation config."""
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} has no config.json: give a directory in Hugging Face form, or a GGUF file"
        )
    hf = json.loads((folder / "config.json").read_text("utf-8"))
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = json.loads(generation.read_text("utf-8")).get("eos_token_id")
        hf |= {} if eos is None else {"eos_token_id": eos}
    config = ModelConfig.from_hf(hf)
    return config, Tokenizer.from_directory(folder, config.eos_token_ids)


def _read_directory(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in _safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for hf_name in tensors.keys():  # noqa: SIM118 - not a mapping
                    name = from_hf_name(hf_name, config)
                    if name is not None:
                        weights[name] = _cast(tensors.get_tensor(hf_name), dtype, hf_name)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{file} cannot be read ({error}): fetch it again") from error
    check_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, config, str(folder))
    return weights


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} points outside its directory: {names}")
        return [folder / name for name in names]
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if len(files) == 1:
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code and are "
            "refused: convert them to safetensors"
        )
    raise ValueError(f"{folder} has no model.safetensors and no index of several: is the download complete?")


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"tensor {name} is {tensor.dtype}: only float32, bfloat16 and float16 weights are supported"
        )
    return tensor.to(dtype)


def _converted(source: Source, cache_dir: Path) -> Path:
    """The folder with a GGUF file's configuration, tokenizer and tensor index, made on first use."""
    if source.checksum:
        identity = source.checksum
    else:
        stat = source.path.stat()
        identity = f"{source.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    key = sha256(f"{CONVERSION_VERSION}:{identity}".encode()).hexdigest()[:16]
    folder = cache_dir / "converted" / f"{source.path.stem}-{key}"
    if folder.exists():
        return folder
    model = read_gguf(source.path)
    ModelConfig.from_hf(model.hf_config)
    backend, settings = build_tokenizer(model.metadata)
    with scratch_dir(folder.parent) as scratch:
        made = scratch / folder.name
        made.mkdir()
        _write_json(made / "config.json", model.hf_config)
        _write_json(made / "tokenizer_config.json", settings)
        (made / "gguf_tensors.json").write_text(dump_index(model.tensors), "utf-8")
        backend.save(str(made / "tokenizer.json"), pretty=False)
        try:
            made.rename(folder)
        except OSError:
            # Another process was first; what it made is the same.
            if not folder.exists():
                raise
    return folder


def _read_converted(
    source: Source, folder: Path, config: ModelConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    index = load_index((folder / "gguf_tensors.json").read_text("utf-8"))
    check_shapes({tensor.name: tensor.shape for tensor in index}, config, str(source.path))
    if dtype != torch.bfloat16:
        return dict(_dequantized(source, index, dtype))
    if not file.exists():
        with scratch_dir(folder) as scratch:
            shapes = {tensor.name: tensor.shape for tensor in index}
            write_safetensors(scratch / file.name, shapes, dtype, _dequantized(source, index, dtype))
            (scratch / file.name).replace(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return {tensor.name: tensors.get_tensor(tensor.name) for tensor in index}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): delete {folder}, it will be made again") from error


def _dequantized(
    source: Source, index: tuple[GgufTensor, ...], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor's name and values, in the order of ``index``."""
    if source.checksum:
        verify_sha256(source.path, source.checksum.removeprefix("sha256:"))
    data = np.memmap(source.path, np.uint8, mode="r")
    for tensor in index:
        yield tensor.name, dequantize(data, tensor, dtype)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}), "utf-8")
