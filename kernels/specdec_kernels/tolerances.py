"""How far results may be from their references, in one place, the same everywhere.

Errors are divided by what the reference's size is, so that a bound means the same for any scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

# By the dtype that activations are rounded to before they are multiplied. About twice the worst seen in 144 random
# sequences of each (3.1e-3 and 3.3e-2) against a reference that rounds at the same places. Most are below 1e-3; the
# worst are numbers that one of the two rounds up and the other down. float8 (linear layers alone, all else in float32)
# is for one decoder layer: 8.8e-3 was the worst there and 1.4e-1 with three, for 1.3e-6 where all are rounded alike.
LOGITS = {torch.float32: 6e-3, torch.bfloat16: 6e-2, torch.float8_e4m3fn: 2e-2}

# Of one Triton op, by the dtype of its output, as ``op_error`` counts. float32 differs by the order of sums alone. The
# interpreter cuts numbers to bfloat16 where a GPU rounds them: up to 2**-7, once for an input of a matrix product
# and once for the output.
OPS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def scaled_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error in standard deviations of ``expected``; NaN if either has one."""
    return float((actual - expected).abs().max() / expected.std())


def op_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error against a float64 ``expected``, in units of its standard deviation plus the number itself."""
    expected = expected.double()
    return float(((actual.double() - expected).abs() / (expected.std() + expected.abs())).max())
