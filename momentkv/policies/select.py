"""From importances to retained tokens: the one place that knows budget, sinks and window."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace, check_broadcast, concrete, device, library, mixed
from momentkv._numbers import whole_number
from momentkv._typing import ArrayObject

__all__ = ["Selection", "check_budget", "kept", "retain"]

MOST = 2**31 - 1  # as positions and counts have


class Selection(NamedTuple):
    """Which tokens stay.

    Attributes
    ----------
    indices : int array, shape (..., kv_head, width)
        Slots to keep, rising; ``width`` is the largest number kept by any head. While JAX traces, it cannot depend on
        values, and is the budget or ``n``, whichever is less; ``n`` where the budget is an array.
    filled : bool array, shape (..., kv_head, width)
        False where a head keeps fewer than ``width`` (its index then repeats a slot and means nothing).
    evicted : bool array, shape (..., kv_head, n)
        True for tokens that go. Empty slots are neither retained nor evicted.
    """

    indices: Array
    filled: Array
    evicted: Array


def retain(
    importance: ArrayObject, positions: ArrayObject, *, budget: int | Array, sinks: int, window: int
) -> Selection:
    """Choose the tokens to retain.

    Always the first ``sinks`` and the last ``window`` tokens of each row; then the most important, earlier ones first
    among equals; never an empty slot.

    Parameters
    ----------
    importance : array, shape (..., kv_head, n)
    positions : int array, shape (..., kv_head, n)
        Rising along the last axis where not negative; negative for an empty slot.
    budget : int, or int array broadcastable to (..., kv_head)
        Tokens to retain, sinks and window included. A head with fewer tokens keeps them all.
    sinks, window : int
        Counted in each row's own tokens, wherever empty slots lie.

    Returns
    -------
    Selection

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, ``sinks`` or ``window`` is negative, or a budget less than what always stays.
    TypeError
        If the budget is neither a whole number nor an array of them, ``sinks`` or ``window`` is no whole number, or the
        arrays are of several libraries.

    Examples
    --------
    >>> import numpy as np
    >>> chosen = retain(np.array([[0.0, 1.0, 9.0, 2.0, 0.0]]), np.array([[0, 1, 2, 3, 4]]),
    ...                 budget=3, sinks=1, window=1)
    >>> chosen.indices.tolist(), chosen.evicted.tolist()
    ([[0, 2, 4]], [[False, True, False, True, False]])
    """
    xp = check_ranked(importance, positions)
    check_protected(sinks, window)
    if isinstance(budget, numbers.Integral):
        budget = whole_number("budget", budget)
        least = budget
    elif hasattr(budget, "shape"):
        least = least_of(budget, positions, otherwise=sinks + window)
    else:
        raise TypeError(f"budget is {budget!r}, a {type(budget).__name__}; use a whole number, or an array of them")
    if least < sinks + window:
        raise ValueError(f"budget is {least}, less than sinks and window, {sinks} + {window}, which always stay")
    valid = positions >= 0
    n = positions.shape[-1]
    retained = kept(importance, positions, budget, sinks=sinks, window=window)
    counts = xp.sum(xp.astype(retained, xp.int32), axis=-1)
    # What is enough for any values; no wider than these need, where one can look at them.
    width = min(budget, n) if isinstance(budget, int) else n
    if n and concrete(counts):
        width = int(xp.max(counts))
    slots = xp.arange(n, device=device(counts))
    # Retained slots first, in order; the others follow and are cut off or marked unfilled.
    indices = xp.argsort(xp.where(retained, slots, slots + n), axis=-1, stable=True)[..., :width]
    filled = xp.arange(width, device=device(counts)) < counts[..., None]
    return Selection(indices, filled, valid & ~retained)


def least_of(budget: Array, positions: Array, *, otherwise: int) -> int:
    """The least of an array of budgets, one for each head; ``otherwise`` where there is none, or JAX traces."""
    if library(budget) != library(positions):
        raise TypeError(mixed({"budget": budget, "positions": positions}))
    xp = array_namespace(budget, positions)
    if not xp.isdtype(budget.dtype, "integral"):
        raise TypeError(f"budget is {budget.dtype} of shape {tuple(budget.shape)}; use whole numbers")
    check_broadcast("budget", budget, positions.shape[:-1])
    return int(xp.min(budget)) if concrete(budget) and 0 not in budget.shape else otherwise


def check_ranked(importance: Any, positions: Any) -> Any:
    """Raise unless each importance has a position, a whole number; returns their namespace."""
    try:
        xp = array_namespace(importance, positions)
    except TypeError:
        raise TypeError(mixed({"importance": importance, "positions": positions})) from None
    if not importance.ndim or importance.shape != positions.shape:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)} and positions {tuple(positions.shape)}; both must be "
            "(..., kv_head, n)"
        )
    if not xp.isdtype(positions.dtype, "integral"):
        raise ValueError(f"positions is {positions.dtype}; use whole numbers, negative for empty slots")
    return xp


def ranking(importance: ArrayObject, positions: ArrayObject, *, sinks: int, window: int) -> Array:
    """Slots in the order in which a growing budget retains them, shape (..., n); arguments as in `retain`.

    Examples
    --------
    >>> import numpy as np
    >>> ranking(np.array([0.0, 1.0, 9.0, 2.0, 0.0]), np.arange(5), sinks=1, window=1).tolist()
    [0, 4, 2, 3, 1]
    """
    xp = array_namespace(importance, positions)
    order = xp.argsort(importance, axis=-1, descending=True, stable=True)
    # Then sorted by class, stably: as importances, protected and empty slots could tie with infinite ones.
    always = protected(positions, sinks=sinks, window=window)
    kinds = xp.astype(~always, xp.int32) + xp.astype(positions < 0, xp.int32)
    by_kind = xp.argsort(xp.take_along_axis(kinds, order, axis=-1), axis=-1, stable=True)
    return xp.take_along_axis(order, by_kind, axis=-1)


def kept(importance: ArrayObject, positions: ArrayObject, limits: int | Array, *, sinks: int, window: int) -> Array:
    """Which tokens a budget retains, shape (..., n): the first ``limits`` of `ranking`, without sorting slots.

    Examples
    --------
    >>> import numpy as np
    >>> kept(np.array([0.0, 1.0, 9.0, 2.0, 0.0]), np.arange(5), 3, sinks=1, window=1).tolist()
    [True, False, True, False, True]
    """
    xp = array_namespace(importance, positions)
    real, always = positions >= 0, protected(positions, sinks=sinks, window=window)
    if importance.shape[-1] == 0:
        return real
    held = xp.sum(xp.astype(always, xp.int32), axis=-1, keepdims=True)
    free = (limits if isinstance(limits, int) else xp.astype(limits, held.dtype)[..., None]) - held
    choice, lowest = real & ~always, -xp.inf
    if xp.isdtype(importance.dtype, "integral"):
        lowest = xp.iinfo(importance.dtype).min
    else:  # NaN is above all, as where it is sorted
        importance = xp.where(importance == importance, importance, xp.inf)
    score = xp.where(choice, importance, lowest)
    # The least important token that stays; those above it; and of its equals, the first.
    place = xp.clip(free - 1, 0, score.shape[-1] - 1)
    last = xp.take_along_axis(xp.sort(score, axis=-1, descending=True), place, axis=-1)
    above, level = score > last, choice & (score == last)
    ties = free - xp.sum(xp.astype(above, xp.int32), axis=-1, keepdims=True)
    return always | above | (level & (xp.cumulative_sum(xp.astype(level, xp.int32), axis=-1) <= ties))


def protected(positions: ArrayObject, *, sinks: int, window: int) -> Array:
    """Which slots are retained whatever their importance: the first and the last tokens of each row.

    Examples
    --------
    >>> import numpy as np
    >>> protected(np.array([-1, 0, 1, 2, 3, -1]), sinks=1, window=1).tolist()
    [False, True, False, False, True, False]
    """
    xp = array_namespace(positions)
    valid = positions >= 0
    held = xp.astype(valid, xp.int32)
    order = xp.cumulative_sum(held, axis=-1)
    total = xp.sum(held, axis=-1, keepdims=True, dtype=order.dtype)
    return valid & ((order <= sinks) | (order > total - window))


def check_protected(sinks: int, window: int) -> None:
    """Raise unless the tokens that always stay are numbers of tokens."""
    for name, value in (("sinks", sinks), ("window", window)):
        if whole_number(name, value) < 0:
            raise ValueError(f"{name} is {value}; it cannot be negative")


def check_budget(budget: int, sinks: int, window: int) -> None:
    """Raise unless a budget leaves room for at least one token beside sinks and window."""
    check_protected(sinks, window)
    if budget > MOST:
        raise ValueError(f"budget is {budget}, but positions have 32 bits; use at most {MOST}, which keeps every token")
    if budget < sinks + window + 1:
        raise ValueError(
            f"budget is {budget}, but sinks ({sinks}) and window ({window}) are always retained and one more token "
            f"must fit; use budget >= {sinks + window + 1}, or fewer sinks or a shorter window"
        )
