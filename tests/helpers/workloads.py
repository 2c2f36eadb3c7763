"""Comparison of workloads."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from specdec.workload import Requests


def same_requests(first: Requests, second: Requests) -> bool:
    """Whether all attributes are equal, types of the arrays included."""
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(Requests)]
    return all(
        np.array_equal(one, other) and one.dtype == other.dtype
        if isinstance(one, np.ndarray)
        else one == other
        for one, other in pairs
    )
