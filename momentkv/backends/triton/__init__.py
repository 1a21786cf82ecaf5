"""Triton kernels, each beside what launches it."""
