"""Dense matrix product whose rows do not depend on how many there are."""

from specdec_kernels.linear.reference import linear

__all__ = ["linear"]
