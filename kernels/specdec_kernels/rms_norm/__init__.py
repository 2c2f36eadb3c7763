"""RMS normalisation with an optional residual addition."""

from specdec_kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
