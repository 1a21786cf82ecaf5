"""The array libraries that every law is checked on, and how to go from NumPy to each and back."""

from __future__ import annotations

import contextlib
import dataclasses
from types import ModuleType
from typing import Any

import array_api_strict
import jax
import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Library:
    """One array library: `asarray` from NumPy, `numpy` back (floats as float64, which loses no bit)."""

    name: str
    xp: ModuleType
    compiles: bool = False  # every operation anew for every shape, so that laws are shown few cases of few shapes

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, the library has float64 and int64; JAX has neither unless told."""
        return jax.enable_x64(True) if self.name == "jax" else contextlib.nullcontext()

    def asarray(self, x: np.ndarray | None, dtype: str | None = None) -> Any:
        """An array of this library that shares no memory with ``x``; None stays None."""
        if x is None:
            return None
        if self.name == "torch":
            array = torch.from_numpy(np.array(x))
            return array if dtype is None else array.to(getattr(torch, dtype))
        array = self.xp.asarray(np.array(x))
        return array if dtype is None else self.xp.astype(array, getattr(self.xp, dtype))

    def numpy(self, x: Any) -> np.ndarray:
        array = x.double().numpy() if self.name == "torch" and x.is_floating_point() else np.asarray(x)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def dtype(self, x: Any) -> str:
        return str(x.dtype).rpartition(".")[2]


LIBRARIES = {
    "numpy": Library("numpy", np),
    "array-api-strict": Library("array-api-strict", array_api_strict),
    "torch": Library("torch", torch),
    "jax": Library("jax", jax.numpy, compiles=True),
}
