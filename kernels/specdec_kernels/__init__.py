"""Kernels with one readable torch reference per op; nothing here knows of specdec."""
