"""Triton kernels, one file each; `reference` is the definition of every operation."""
