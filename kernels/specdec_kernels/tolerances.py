"""How far results may be from their references, in one place, the same everywhere.

Errors are divided by the standard deviation of the reference, so that a bound means the same for any scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

# By the dtype that activations are rounded to before they are multiplied. About three times the worst seen on small
# random models (2.2e-3 and 2.1e-2) against a reference that rounds at the same places.
LOGITS = {torch.float32: 6e-3, torch.bfloat16: 6e-2}


def scaled_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error in standard deviations of ``expected``; NaN if either has one."""
    return float((actual - expected).abs().max() / expected.std())
