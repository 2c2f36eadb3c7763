"""Heads on disk: a directory with ``head.safetensors`` (bfloat16) and ``head.json``.

``head.json`` holds the kind, the shape, what the target must look like, and how the head was made: command, seed, data
and measured acceptance. The draft vocabulary is the tensor ``token_ids``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.heads.eagle import EagleHead, EagleShape
from specdec.heads.medusa import MedusaHeads
from specdec.model.config import ModelConfig
from specdec.model.weights import LoadedModel

KINDS = {"eagle1": "eagle", "eagle3": "eagle", "medusa": "medusa"}
"""Kinds of heads, and the drafter that runs each."""


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A head as it was read.

    Attributes:
        kind: one of ``KINDS``.
        shape: its sizes.
        token_ids: int64 [D], its draft vocabulary.
        weights: float32, by parameter name.
        target: what its target looks like.
        about: how it was made and what was measured.
        path: where it was.
    """

    kind: str
    shape: dict[str, Any]
    token_ids: Tensor
    weights: dict[str, Tensor]
    target: dict[str, Any]
    about: dict[str, Any]
    path: Path

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's layers whose outputs it reads."""
        return tuple(self.shape["layers"])


def save_head(
    directory: Path,
    module: EagleHead | MedusaHeads,
    token_ids: Tensor,
    model: LoadedModel,
    about: Mapping[str, Any],
) -> None:
    """Write ``module`` for the target ``model``; ``about`` must be plain JSON."""
    shape: dict[str, Any]
    if isinstance(module, EagleHead):
        kind, shape = module.shape.variant, asdict(module.shape)
    else:
        num_heads, hidden_size, _ = module.weight.shape
        layers = [model.config.num_layers - 1]
        kind, shape = "medusa", {"layers": layers, "num_heads": num_heads, "hidden_size": hidden_size}
    tensors = {
        name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in module.named_parameters()
    }
    tensors["token_ids"] = token_ids.to(torch.int32)
    content = {"kind": kind, "shape": shape, "target": _target(model), "about": dict(about)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(directory / "head.safetensors"), metadata={"format": "pt"})
    (directory / "head.json").write_text(json.dumps(content, indent=2) + "\n")


def shipped(path: str | Path) -> Path | None:
    """The directory ``path`` beside the packages, where heads that come with them lie; ``None`` if there is none."""
    directory = Path(__file__).parents[2] / path
    return directory if (directory / "head.json").is_file() else None


def load_head(path: str | Path, drafter: str) -> StoredHead:
    """Read the directory ``path`` for a ``drafter``, "eagle" or "medusa".

    Raises:
        ValueError: it is missing, incomplete or damaged, or made for another drafter.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        directory = shipped(path) or directory
    for name in ("head.json", "head.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(
                f"{directory} has no {name}: give the directory of a trained head, or train one with "
                "python -m specdec.run +experiment=train_draft"
            )
    try:
        content = json.loads((directory / "head.json").read_text("utf-8"))
        weights = load_file(directory / "head.safetensors")
        kind, shape, target = content["kind"], content["shape"], content["target"]
        token_ids = weights.pop("token_ids").long()
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory} holds no head that can be read ({error}): fetch or train it again"
        ) from error
    if KINDS.get(kind) != drafter:
        raise ValueError(
            f"{directory} holds a head of kind {kind!r}, not for drafter={drafter}: {_remedy(kind)}"
        )
    wide = {name: weight.float() for name, weight in weights.items()}
    return StoredHead(kind, shape, token_ids, wide, target, content.get("about", {}), directory)


def _remedy(kind: str) -> str:
    return f"use drafter={KINDS[kind]}" if kind in KINDS else f"known kinds are {', '.join(KINDS)}"


def check_target(stored: StoredHead, model: LoadedModel) -> None:
    """Make sure that a head fits a target.

    Raises:
        ValueError: another hidden size, number of layers or vocabulary, with both values.
    """
    expected, found = stored.target, _target(model)
    for key in ("hidden_size", "num_layers", "vocab_size", "vocabulary"):
        if expected.get(key) != found[key]:
            raise ValueError(
                f"the head in {stored.path} was trained for {expected.get('name')!r} with {key}={expected.get(key)}, "
                f"but the target {model.source!r} has {key}={found[key]}: use that target, or train a head for this "
                "one with python -m specdec.run +experiment=train_draft"
            )


def make_eagle(stored: StoredHead, config: ModelConfig) -> EagleHead:
    """The module of a stored EAGLE head, float32 on the CPU."""
    shape = EagleShape(**{**stored.shape, "layers": stored.layers})
    head = EagleHead(shape, rotary_of(config))
    _load(head, stored)
    return head


def make_medusa(stored: StoredHead) -> MedusaHeads:
    """The module of stored Medusa heads, float32 on the CPU."""
    heads = MedusaHeads(stored.shape["num_heads"], stored.shape["hidden_size"])
    _load(heads, stored)
    return heads


def rotary_of(config: ModelConfig) -> Tensor:
    """Rotary frequencies of a head: those of the target's last layer with full attention, or of its last."""
    full = [layer for layer in range(config.num_layers) if config.sliding_window[layer] is None]
    return config.inv_freq(full[-1] if full else config.num_layers - 1)


def _load(module: nn.Module, stored: StoredHead) -> None:
    try:
        module.load_state_dict(stored.weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {stored.path} do not fit their shape: {error}") from error


def _target(model: LoadedModel) -> dict[str, Any]:
    config = model.config
    return {
        "name": model.source,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "vocabulary": model.tokenizer.vocab_fingerprint,
    }
