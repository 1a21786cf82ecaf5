"""Kernels for a CPU, compiled by Numba where it is installed."""
