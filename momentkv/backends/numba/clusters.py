"""Groups of points on a CPU by a compiled kernel, where Numba is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from momentkv.backends.flash import differentiated
from momentkv.backends.numba.decode import LANES, NARROWEST, may_compile, numbers, run_shared

__all__ = ["cluster_compiled"]

# Features are keys and values side by side.
WIDEST = 512


def cluster_compiled(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor | None:
    """`momentkv.statistics.clustering.cluster`; None where the kernel does not take these points."""
    *lead, n, f = x.shape
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and f % LANES == 0 and n > 0
    if not (fits and NARROWEST <= f <= WIDEST and not differentiated(x, weight) and may_compile()):
        return None
    from momentkv.backends.numba.clusters_kernel import kernel

    sets = math.prod(lead)
    member: Any = np.zeros((sets, n, groups), np.float32)
    arguments = numbers(x).reshape(sets, n, f), numbers(weight.expand(*lead, n)).reshape(sets, n), member
    run_shared(kernel(f), arguments, sets, x.numel() * groups)
    return torch.from_numpy(member).reshape(*lead, n, groups)
