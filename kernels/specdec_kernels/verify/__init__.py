"""Verification of draft chains and trees: which drafts are accepted and which token follows them."""

from specdec_kernels.verify.reference import verify, verify_greedy

__all__ = ["verify", "verify_greedy"]
