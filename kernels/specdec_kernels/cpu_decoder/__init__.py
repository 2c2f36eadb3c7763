"""A whole decoder step in one C++ call on an x86-64 CPU: AMX tiles, AVX-512 or AVX2, the best it has; batch-invariant.

Weights are bfloat16, sums float32.

A token's logits depend, to the bit, on its own context alone: not on the other rows of the step, nor on whether it
was computed in a prefill chunk, a decode step or the verification of a chain or a tree. Greedy speculative decoding
therefore equals greedy plain decoding exactly, in bfloat16.

    decoder = CpuDecoder(spec, weights)
    cache = decoder.new_kv_cache(num_blocks=512, block_size=16)
    logits = decoder.forward(token_ids, positions, query_start, context_lens, block_tables, slots, logit_rows, cache)
"""

from specdec_kernels.cpu_decoder.build import is_available
from specdec_kernels.cpu_decoder.decoder import (
    MAX_TOP,
    CpuDecoder,
    CpuKVCache,
    DecoderSpec,
    bytes_per_block,
    supports,
    top,
    top_log_probs,
)

__all__ = [
    "MAX_TOP",
    "CpuDecoder",
    "CpuKVCache",
    "DecoderSpec",
    "bytes_per_block",
    "is_available",
    "supports",
    "top",
    "top_log_probs",
]
