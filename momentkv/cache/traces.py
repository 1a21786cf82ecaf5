"""A cache under JAX's transformations: it changes with every step, and a traced function may change nothing outside."""

from __future__ import annotations

from typing import Any

from momentkv._array import Array, array_namespace, concrete, is_jax_array, trace_now

__all__ = ["check_trace", "hides_nothing"]


def check_trace(cache: Any, x: Array) -> None:
    """Raise where JAX traces another function than the one that a cache was made in, or cannot trace the cache.

    Parameters
    ----------
    cache : LayerCache
        That is about to change.
    x : array
        What it is to take, or holds; where that is of another library, JAX traces nothing of it.
    """
    if not is_jax_array(x):
        return
    now, made_in, config = trace_now(), cache.trace, cache.config
    if now is None and made_in is None:
        return
    if now is None:
        raise RuntimeError(
            "the cache was made in a function that JAX has traced, and holds no numbers; return arrays from that "
            "function, and make the cache of what is to go on outside of it"
        )
    if now != made_in:
        raise RuntimeError(
            "the cache was made outside of the function that JAX traces now (jit, grad, vmap, scan): it would keep "
            "arrays of that function, and not change when it runs again; make the cache in that function, or a "
            "copy.deepcopy of it, or call the cache outside"
        )
    for name, value in (("static", config.static or None), ("tolerance", config.tolerance)):
        if value is not None:
            raise RuntimeError(
                f"{name} is {value}, for which a cache asks for numbers that JAX does not have while it traces a "
                f"function; leave {name} out, or call the cache outside of the function"
            )


def hides_nothing(valid: Array) -> bool:
    """Whether a mask is True everywhere, or an error where JAX traces it.

    Examples
    --------
    >>> import numpy as np
    >>> hides_nothing(np.asarray([True, False]))
    False
    """
    every = array_namespace(valid).all(valid)
    if not concrete(every):
        raise RuntimeError(
            "valid is given while JAX traces a function, in which nothing says which tokens are padding; leave it out, "
            "or call the cache outside of the function"
        )
    return bool(every)
