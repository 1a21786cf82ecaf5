"""A GPU in ten minutes: ``python -m momentkv.testing.gpu`` proves the kernels right and measures them.

Parts run one after the other, most valuable first, each in a process of its own with a time limit, so that one that
fails costs only itself. After each the results are written as JSON; at the end one page is printed. It needs PyTorch,
Triton and NumPy alone; what needs more is skipped by name. ``--rehearse`` does the same on a CPU, on tiny sizes, with
the kernels in Triton's interpreter: that shows that the command works, and is no timing.
"""
