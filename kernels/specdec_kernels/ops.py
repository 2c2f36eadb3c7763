"""The ops that a decoder step is made of, from torch or from Triton, under one set of names.

>>> ops = load_ops("triton" if device.type == "cuda" else "torch")
>>> normed, total = ops.rms_norm(x, weight, 1e-5, 0.0, residual)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from specdec_kernels.compact_kv import compact_kv
from specdec_kernels.fp8_matmul import fp8_matmul, quantize_fp8
from specdec_kernels.paged_attention import paged_attention
from specdec_kernels.rms_norm import rms_norm
from specdec_kernels.rope_store_kv import rope_store_kv
from specdec_kernels.silu_mul import gelu_mul, silu_mul
from specdec_kernels.wna16_matmul import wna16_matmul

OPS = ("torch", "triton")


@dataclass(frozen=True, slots=True)
class Ops:
    """Each as the ``reference.py`` of its folder documents it; ``linear`` as ``torch.nn.functional.linear``.

    Those that are ``None`` in torch's ops are for results that stay on a GPU; on a CPU the host verifies.
    """

    name: str
    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope_store_kv: Callable[..., Any]
    paged_attention: Callable[..., Any]
    silu_mul: Callable[..., Any]
    gelu_mul: Callable[..., Any]
    compact_kv: Callable[..., Any]
    wna16_matmul: Callable[..., Any]
    quantize_fp8: Callable[..., Any]
    fp8_matmul: Callable[..., Any]
    filtered_probs: Callable[..., Any] | None = None
    verify: Callable[..., Any] | None = None
    verify_greedy: Callable[..., Any] | None = None


TORCH = Ops(
    "torch",
    F.linear,
    rms_norm,
    rope_store_kv,
    paged_attention,
    silu_mul,
    gelu_mul,
    compact_kv,
    wna16_matmul,
    quantize_fp8,
    fp8_matmul,
)


def triton_reason() -> str:
    """Why Triton's kernels cannot run here; empty if they can.

    They need a GPU, or ``TRITON_INTERPRET=1`` in the environment from the start: then they are interpreted on the CPU,
    which is for tests and slower by orders of magnitude.
    """
    try:
        from triton import knobs
    except ImportError:
        return "the package triton is not installed"
    if torch.cuda.is_available() or knobs.runtime.interpret:
        return ""
    return (
        "there is no GPU; set TRITON_INTERPRET=1 to interpret the kernels on the CPU (for tests: it is slow)"
    )


def load_ops(name: str, *, batch_invariant: bool = False) -> Ops:
    """The ops called ``name``.

    Args:
        batch_invariant: a token's results do not depend, to the bit, on what else is in the step. Costs speed; Triton
            only, as torch's matrix products choose their method by the number of rows.

    Raises:
        ValueError: an unknown name, Triton where it cannot run, or batch invariance asked of torch.
    """
    if name not in OPS:
        raise ValueError(f"ops {name!r} do not exist: choose from {list(OPS)}")
    if name == "torch":
        if batch_invariant:
            raise ValueError(
                "batch_invariant=True needs ops 'triton': torch's matrix products depend on the batch"
            )
        return TORCH
    if reason := triton_reason():
        raise ValueError(f"ops 'triton' cannot run: {reason}")
    from specdec_kernels.compact_kv import triton as compact
    from specdec_kernels.fp8_matmul import triton as fp8
    from specdec_kernels.linear import triton as linear
    from specdec_kernels.paged_attention import triton as attention
    from specdec_kernels.rms_norm import triton as norm
    from specdec_kernels.rope_store_kv import triton as store
    from specdec_kernels.sample import triton as sample
    from specdec_kernels.silu_mul import triton as activations
    from specdec_kernels.verify import triton as verify
    from specdec_kernels.wna16_matmul import triton as wna16

    return Ops(
        "triton",
        linear.linear if batch_invariant else F.linear,
        norm.rms_norm,
        store.rope_store_kv,
        partial(attention.paged_attention, batch_invariant=batch_invariant),
        activations.silu_mul,
        activations.gelu_mul,
        compact.compact_kv,
        partial(wna16.wna16_matmul, batch_invariant=batch_invariant),
        fp8.quantize_fp8,
        partial(fp8.fp8_matmul, batch_invariant=batch_invariant),
        sample.filtered_probs,
        verify.verify,
        verify.verify_greedy,
    )
