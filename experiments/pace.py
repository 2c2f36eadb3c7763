"""How fast the machine is just now: the same few passes of the target, timed before and after what is measured.

Processors change their clock, and the memory of a shared machine is faster at some hours than at others. Two runs some
minutes apart then differ by per cents although nothing else does, and near a server's capacity a per cent of a step is
ten of a queue. What these passes take tells such drift from an error of the prediction.

A decoding batch waits for memory and a chunk of prompt computes, so they have a pace each (``sim.recorded_run.Pace``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments.device_passes import DevicePasses, Size
from sim.recorded_run import Pace

if TYPE_CHECKING:
    from specdec import LLM

_ROUNDS = 8
_CONTEXT = 256


def measured_pace(llm: LLM) -> Pace:
    """Seconds of a full decoding batch and of a chunk of prompt, each the median of a few passes that take turns. The
    engine must be idle; what its KV cache holds is lost."""
    limits = llm.engine.loop.config
    passes = DevicePasses(llm.engine.runner, limits)
    context = min(_CONTEXT, passes.longest - 1)
    chunk = min(limits.max_num_batched_tokens, passes.longest, 128)
    sizes = (Size("decode", limits.max_num_seqs, 1, context), Size("prefill", 1, chunk, 0))
    taken = np.array([[passes.size_s(size) for size in sizes] for _ in range(_ROUNDS)])
    return Pace(*np.median(taken, axis=0).tolist())
