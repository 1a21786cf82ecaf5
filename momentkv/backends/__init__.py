"""Backends: the attention primitives of one array library each, chosen by array type and loaded when first used."""

from __future__ import annotations

import importlib
import sys
from functools import cache, partial

from array_api_compat import is_jax_array, is_numpy_array, is_torch_array

from momentkv._array import AT_FIRST, Array
from momentkv.backends.base import ArrayBackend

__all__ = ["BACKENDS", "ArrayBackend", "get_backend"]

BACKENDS = {
    "array-api": ("momentkv.backends.base", "ArrayBackend"),
    "numpy": ("momentkv.backends.numpy", "NumpyBackend"),
    "torch": ("momentkv.backends.torch", "TorchBackend"),
    "jax": ("momentkv.backends.jax", "JaxBackend"),
}


def get_backend(choice: Array | str | ArrayBackend) -> ArrayBackend:
    """The backend of an array, of a name, or the given one.

    Parameters
    ----------
    choice : array, str or ArrayBackend
        An array picks the backend of its library, ``array-api`` where it has none of its own.

    Raises
    ------
    ValueError
        If no backend has that name.
    ImportError
        If its library is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> get_backend(np.zeros(3)).name, get_backend("array-api").name
    ('numpy', 'array-api')
    """
    if isinstance(choice, ArrayBackend):
        return choice
    if isinstance(choice, str):
        if choice not in BACKENDS:
            raise ValueError(f"backend is {choice!r}; use one of {', '.join(BACKENDS)}, or an ArrayBackend object")
        return load(choice)
    if is_torch_array(choice):
        return load("torch")
    if is_jax_array(choice):
        return load("jax")
    return load("numpy" if is_numpy_array(choice) else "array-api")


@cache
def load(name: str) -> ArrayBackend:
    """Import a backend and make its one instance."""
    module, attribute = BACKENDS[name]
    backend = getattr(importlib.import_module(module), attribute)()
    if not isinstance(backend, ArrayBackend):
        raise TypeError(f"{module}.{attribute} is no ArrayBackend")
    return backend


# JAX has to be told that statistics are arguments and results of its transformations, before they are: at once if it is
# there, as it mostly is when momentkv is imported.
if sys.modules.get("jax"):
    load("jax")
else:
    AT_FIRST["jax.numpy"] = partial(load, "jax")
