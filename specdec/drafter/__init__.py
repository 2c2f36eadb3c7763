"""Drafters: who proposes the tokens that the target verifies.

Life of a drafter: ``bind`` once to an engine, then for every step ``propose`` before the target runs and
``observe`` after it. Whatever a drafter does, the output's law is the target's; a bad one is only slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specdec.drafter.base import Draft, Drafter, DraftHost
from specdec.drafter.draft_model import DraftModelDrafter
from specdec.drafter.eagle import EagleDrafter
from specdec.drafter.layer_skip import LayerSkipDrafter
from specdec.drafter.medusa import MedusaDrafter
from specdec.drafter.merged import LEAST, SURE, MergedDrafter
from specdec.drafter.ngram import NgramDrafter
from specdec.drafter.recycling import RecyclingDrafter
from specdec.drafter.suffix import SuffixDrafter
from specdec.drafter.synthetic import SyntheticDrafter
from specdec.names import unknown_name


def _merged(
    drafters: Sequence[str | Mapping[str, Any]] = ("suffix", "recycling"),
    step_tokens: int | None = None,
    sure: float = SURE,
    least: float = LEAST,
) -> Drafter:
    """A merged drafter of those that ``drafters`` name."""
    if isinstance(drafters, str | Mapping):
        raise ValueError(f"merged: drafters={drafters!r} must be a list of drafters")
    sources = [source for spec in drafters if (source := make_drafter(spec)) is not None]
    if len(sources) < len(drafters):
        raise ValueError(f"merged: drafters={list(drafters)} must not name 'none'")
    if any(isinstance(source, SyntheticDrafter) for source in sources):
        raise ValueError("merged: 'synthetic' drafts alone, it needs the target's output beforehand")
    return MergedDrafter(sources, step_tokens, sure, least)


DRAFTERS: dict[str, Callable[..., Drafter]] = {
    "draft_model": DraftModelDrafter,
    "eagle": EagleDrafter,
    "layer_skip": LayerSkipDrafter,
    "medusa": MedusaDrafter,
    "merged": _merged,
    "ngram": NgramDrafter,
    "recycling": RecyclingDrafter,
    "suffix": SuffixDrafter,
    "synthetic": SyntheticDrafter,
}

__all__ = ["DRAFTERS", "Draft", "DraftHost", "Drafter", "make_drafter"]


def make_drafter(spec: str | Mapping[str, Any] | None) -> Drafter | None:
    """The drafter that ``spec`` names: ``"ngram"``, ``{"name": "ngram", "max_ngram": 4}``, ``None`` or ``"none"``.

    A merged one may name its own: ``{"name": "merged", "drafters": ["suffix", {"name": "ngram", "max_ngram": 4}]}``.

    Raises:
        ValueError: unknown name (with the nearest ones), an option that the drafter does not have, or a
            value out of range.
    """
    options = {"name": spec} if isinstance(spec, str) or spec is None else dict(spec)
    name = options.pop("name", None)
    if name is None or name == "none":
        if options:
            raise ValueError(f"drafter 'none' takes no options, got {options}")
        return None
    if name not in DRAFTERS:
        raise unknown_name("drafter", name, [*DRAFTERS, "none"])
    try:
        return DRAFTERS[name](**options)
    except TypeError as error:
        raise ValueError(f"drafter {name!r} does not take these options: {options} ({error})") from None
