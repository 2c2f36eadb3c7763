"""Smaller copies of a model: weights of small magnitude set to zero, or whole layers left out.

Pruned weights stay in their dense form: such a copy has the acceptance and the quality of a sparse model, not its
speed. A copy with fewer layers is faster everywhere. Prune first and quantise then: zeros are rounded to the grid like
any other weight.

>>> half = prune_model(model, {"name": "magnitude", "sparsity": 0.5})
>>> sparse = prune_model(model, {"name": "semi_structured"})  # 2 of 4
>>> short = prune_model(model, {"name": "layers", "num_drop": 5})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from specdec.model.quantize import map_linear
from specdec.model.weights import LoadedModel
from specdec.names import unknown_name

PER_LAYER = ("rope_theta", "rope_scaling", "sliding_window")
"""What a configuration holds for each layer."""


def prune_magnitude(model: LoadedModel, *, sparsity: float = 0.5) -> LoadedModel:
    """The model with the smallest weights of each linear layer at zero (Han et al., arXiv 1506.02626, layer by layer).

    Args:
        sparsity: share of each matrix that becomes zero, in [0, 1), rounded down to whole weights.

    Raises:
        ValueError: a sparsity out of range, or a model whose weights were released.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"pruning: sparsity={sparsity} must lie in [0, 1)")

    def prune(weight: Tensor) -> Tensor:
        pruned = weight.flatten().clone()
        count = int(sparsity * pruned.numel())
        pruned[pruned.abs().topk(count, largest=False, sorted=False).indices] = 0
        return pruned.view_as(weight)

    return map_linear(model, lambda _, weight: prune(weight))


def prune_semi_structured(model: LoadedModel, *, keep: int = 2, group: int = 4) -> LoadedModel:
    """The model with the ``keep`` largest of each ``group`` neighbouring inputs of a row (2:4, arXiv 2104.08378).

    Raises:
        ValueError: not 1 <= keep <= group, a matrix whose inputs do not divide into groups, or a model whose weights
            were released.
    """
    if not 1 <= keep <= group:
        raise ValueError(f"pruning: keep={keep} of group={group}: keep at least 1 and at most all of a group")

    def prune(name: str, weight: Tensor) -> Tensor:
        if weight.shape[1] % group:
            raise ValueError(
                f"pruning: {name} has {weight.shape[1]} inputs, which do not divide into groups of {group}: choose "
                "another group, or magnitude pruning"
            )
        groups = weight.unflatten(1, (-1, group))
        kept = groups.abs().topk(keep, dim=-1).indices
        return torch.zeros_like(groups).scatter(-1, kept, groups.gather(-1, kept)).flatten(1)

    return map_linear(model, prune)


def drop_layers(
    model: LoadedModel, *, num_drop: int | None = None, drop: Sequence[int] | None = None
) -> LoadedModel:
    """The model without some layers, the others renumbered.

    Args:
        num_drop: how many, from the middle.
        drop: exactly which, instead of ``num_drop``.

    Raises:
        ValueError: neither or both given, a layer that does not exist, or none left.
    """
    num_layers = model.config.num_layers
    if (num_drop is None) == (drop is None):
        raise ValueError("pruning: give num_drop or drop, and not both")
    if num_drop is not None:
        first = (num_layers - num_drop) // 2
        drop = range(first, first + num_drop)
    dropped = set(drop or ())
    kept = [layer for layer in range(num_layers) if layer not in dropped]
    if not dropped <= set(range(num_layers)) or not kept:
        raise ValueError(
            f"pruning drops layers {sorted(dropped)} of a model with {num_layers}: give indices in "
            f"0..{num_layers - 1} and keep at least one layer"
        )
    chosen = {name: tuple(getattr(model.config, name)[layer] for layer in kept) for name in PER_LAYER}
    number = {str(layer): str(place) for place, layer in enumerate(kept)}
    weights: dict[str, Tensor] = {}
    for name, weight in model.weights.items():
        parts = name.split(".")
        if len(parts) == 1:
            weights[name] = weight
        elif parts[1] in number:
            weights[".".join([parts[0], number[parts[1]], *parts[2:]])] = weight
    return replace(model, config=replace(model.config, num_layers=len(kept), **chosen), weights=weights)


PRUNERS: dict[str, Callable[..., LoadedModel]] = {
    "magnitude": prune_magnitude,
    "semi_structured": prune_semi_structured,
    "layers": drop_layers,
}


def pruner(options: Mapping[str, Any]) -> Callable[[LoadedModel], LoadedModel]:
    """What ``options`` ask for, to be applied to a model; ``name`` is one of ``PRUNERS``.

    Raises:
        ValueError: an unknown name or option.
    """
    given = dict(options)
    name = given.pop("name", None)
    if name not in PRUNERS:
        raise unknown_name("pruning", name, PRUNERS)
    known = [key for key in signature(PRUNERS[name]).parameters if key != "model"]
    for key in given:
        if key not in known:
            raise unknown_name(f"option of pruning {name!r}", key, known)
    return partial(PRUNERS[name], **given)


def prune_model(model: LoadedModel, options: Mapping[str, Any]) -> LoadedModel:
    """A pruned copy of ``model``, which stays as it is; see :func:`pruner` and the three functions above.

    Raises:
        ValueError: as they do.
    """
    return pruner(options)(model)
