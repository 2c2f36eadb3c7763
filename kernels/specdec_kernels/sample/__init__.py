"""Drawing tokens from logits: temperature, top-k, top-p and min-p, by inverse CDF or with Gumbel noise."""

from specdec_kernels.sample.reference import filtered_probs, sample, sample_gumbel, uniforms

__all__ = ["filtered_probs", "sample", "sample_gumbel", "uniforms"]
