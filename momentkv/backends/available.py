"""Which compilers of kernels are installed; where one is not, what is lost is said once."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

__all__ = ["has_numba", "has_triton"]


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    if importlib.util.find_spec("triton") is not None:
        return True
    say(
        "Triton is not installed: momentkv.backends.torch decodes on CUDA by plain PyTorch operators, which is slower "
        "and reads more memory than its fused kernel; run pip install triton"
    )
    return False


@cache
def has_numba() -> bool:
    """Whether Numba is installed, takes the NumPy beside it, and compiles."""
    slower = "on a CPU, momentkv.backends.torch decodes by plain PyTorch operators, which is slower, most in few bits"
    try:
        import numba
    except (ImportError, OSError) as error:  # OSError: a library of its own that does not load
        say(f"Numba cannot be imported ({error}): {slower}; run pip install numba")
        return False
    if numba.config.DISABLE_JIT:
        say(f"NUMBA_DISABLE_JIT is set, so that Numba compiles nothing: {slower}; unset it")
        return False
    return True


def say(message: str) -> None:
    """A warning, as from the step that asked."""
    warnings.warn(message, RuntimeWarning, stacklevel=5)
