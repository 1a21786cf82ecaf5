"""Places in a ranking, and in two rankings taken in turn."""

from __future__ import annotations

from momentkv._array import Array, array_namespace
from momentkv._rows import inverse_permutation

__all__ = ["in_turn", "ranks"]


def ranks(x: Array, real: Array) -> Array:
    """1 for the largest of the real slots, 2 for the next; empty slots come last."""
    xp = array_namespace(x)
    order = xp.argsort(xp.where(real, x, -xp.inf), axis=-1, descending=True, stable=True)
    return xp.astype(inverse_permutation(order) + 1, x.dtype)


def in_turn(first: Array, share: float, second: Array, rest: float, real: Array) -> Array:
    """Minus the turn at which a token comes when two rankings are taken in turn, each as often as its share says.

    At every budget each ranking then has its share of it.

    Parameters
    ----------
    first, second : array, shape (..., n)
        Two importances.
    share, rest : float
        Of the one and of the other, above 0.
    real : bool array, shape (..., n)
        False for slots that hold no token.

    Examples
    --------
    >>> import numpy as np
    >>> first, second = np.array([9.0, 5.0, 1.0, 0.0]), np.array([0.0, 1.0, 5.0, 9.0])
    >>> in_turn(first, 0.5, second, 0.5, np.ones(4, dtype=bool)).tolist()
    [-2.0, -4.0, -4.0, -2.0]
    """
    xp = array_namespace(first, second)
    places = ranks(xp.stack([first, second]), real)
    # Turns may tie, and rounding says of which. So they are divided by arrays: by a number, PyTorch's division on CUDA
    # is a product with its reciprocal, which rounds otherwise, and other tokens would stay there than on a CPU.
    one, other = (places[i, ...] / xp.full_like(places[i, ...], part) for i, part in enumerate((share, rest)))
    return -xp.minimum(one, other)
