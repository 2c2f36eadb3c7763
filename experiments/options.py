"""Configured options as the scheduler takes them; free of heavy imports."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any


def policy_options(policy: Any) -> dict[str, Any]:
    """``policy``, which ``make_policy`` takes, ``order`` and ``ageing_s`` of a configured policy."""
    options = asdict(policy)
    order, ageing_s = options.pop("order"), options.pop("ageing_s")
    return {"policy": options, "order": order, "ageing_s": math.inf if ageing_s is None else ageing_s}


def controller_options(speculation: Any) -> dict[str, Any]:
    """A configured speculation as ``make_controller`` takes it."""
    options = {key: value for key, value in asdict(speculation).items() if value is not None}
    if "num_drafts" in options:
        options["max_drafts"] = options.pop("num_drafts")
    return options
