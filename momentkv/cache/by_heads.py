"""An eviction's work on many tokens, a few heads at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from momentkv._array import Array, array_namespace
from momentkv._rows import chosen_first, take_rows_of
from momentkv.backends import get_backend
from momentkv.cache.packing import View
from momentkv.policies import Policy, Tokens
from momentkv.statistics.corrections import Correction
from momentkv.statistics.window import QueryWindow

__all__ = ["by_heads", "calibrated", "folded", "gathered", "images", "importance_by_heads", "name_of"]


def gathered(view: View, gone: Array, most: int) -> tuple[Array, Array, Array]:
    """Keys and values of the tokens that go, at most ``most`` of any row and head, and which slots hold one."""
    xp = array_namespace(gone)
    if 2 * most >= gone.shape[-1]:
        return view.keys, view.values, gone
    index = chosen_first(gone)[..., :most]
    k, v = take_rows_of(index, view.keys, view.values)
    return k, v, xp.take_along_axis(gone, index, axis=-1)


def folded(correction: Correction, evicted: Any, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> Any:
    """`Correction.fold`, by heads as `by_heads` says."""

    def fold(own: Any, k: Array, v: Array, mask: Array, *window: Array) -> Any:
        return correction.fold(own, k, v, mask=mask, window=QueryWindow(*window) if window else None)

    return by_heads(correction, evicted, fold, k, v, mask, *(window or ()))


def calibrated(correction: Correction, evicted: Any, q: Array, k: Array, *, scale: float, mask: Array) -> Any:
    """`Correction.calibrate`, by heads as `by_heads` says."""

    def calibrate(own: Any, k: Array, q: Array, mask: Array) -> Any:
        return correction.calibrate(own, q, k, scale=scale, mask=mask)

    return by_heads(correction, evicted, calibrate, k, q, mask)


def by_heads(correction: Correction, evicted: Any, change: Callable[..., Any], k: Array, *others: Array) -> Any:
    """Statistics that ``change`` makes of statistics and arrays, of as many heads at once as `sizes_of` says.

    Heads that a correction couples stay together.
    """
    sizes = sizes_of(k)
    if len(sizes) == 1 or correction.couples_heads:
        return change(evicted, k, *others)
    given = [parts(x, sizes, k) for x in (k, *others)]
    after = [images(change(own, *arrays)) for own, *arrays in zip(mapped(evicted, sizes, k), *given, strict=True)]
    whole = iter([array_namespace(k).concat(list(each), axis=k.ndim - 3) for each in zip(*after, strict=True)])
    return evicted.map(lambda _: next(whole))


def importance_by_heads(policy: Policy, tokens: Tokens) -> Array:
    """`Policy.importance`, of as many heads at once as `sizes_of` says, where heads do not depend on each other.

    Raises
    ------
    ValueError
        If the policy gives anything but a number for each token.
    """
    k, sizes = tokens.keys, sizes_of(tokens.keys)
    if len(sizes) == 1 or policy.couples_heads:
        return checked(policy, tokens)
    arrays = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    split = {
        name: parts(x, sizes, k, lead=k.ndim - 3 + (name == "both"))
        for name, x in arrays.items()
        if x is not None and name not in ("moments", "scale")
    }
    split["moments"] = mapped(tokens.moments, sizes, k)
    each = (dict(zip(split, own, strict=True)) for own in zip(*split.values(), strict=True))
    return array_namespace(k).concat([checked(policy, dataclasses.replace(tokens, **own)) for own in each], axis=-2)


def checked(policy: Policy, tokens: Tokens) -> Array:
    """`Policy.importance`, or an error where it is of another shape than tokens are."""
    importance = policy.importance(tokens)
    check_given(policy, "importance", importance, tokens.positions.shape)
    return importance


def check_given(policy: Policy, method: str, x: Any, expected: Sequence[int]) -> None:
    """Raise unless a method of a policy gave an array of that shape."""
    shape = getattr(x, "shape", None)
    if shape is None or tuple(shape) != tuple(expected):
        given = type(x).__name__ if shape is None else f"an array of shape {tuple(shape)}"
        raise ValueError(
            f"policy {name_of(policy)!r} gave {given} as {method}; it must give an array of shape {tuple(expected)}, a "
            "number for each token"
        )


def name_of(policy: Policy) -> str:
    """What errors call a policy."""
    return policy.name or type(policy).__name__


def sizes_of(k: Array) -> list[int]:
    """Numbers of heads that are worked on at once, given keys (..., kv_head, n, d): see `ArrayBackend.at_once`.

    What an eviction does with many tokens makes arrays as large as their keys. Those of all heads leave a CPU's caches,
    and the system hands out new memory of that size page by page: see docs/decoding.md#speed.
    """
    heads, each = k.shape[-3], 2 * 4 * math.prod(k.shape) // max(1, k.shape[-3])
    some = max(1, get_backend(k).at_once(k) // max(1, each))
    return [min(some, heads - start) for start in range(0, heads, some)] or [0]


def parts(x: Array, sizes: Sequence[int], k: Array, *, lead: int | None = None) -> list[Array]:
    """An array by numbers of heads, whose axis is ``lead``, by default that of ``k``; each has several queries."""
    lead = k.ndim - 3 if lead is None else lead
    several = x.shape[lead] // k.shape[-3]
    return get_backend(k).split(x, [size * several for size in sizes], axis=lead, copy=False)


def mapped(statistics: Any, sizes: Sequence[int], k: Array) -> list[Any]:
    """Statistics by numbers of heads."""
    held = zip(*(parts(x, sizes, k) for x in images(statistics)), strict=True)
    each = [iter(own) for own in held]
    return [statistics.map(lambda _, own=own: next(own)) for own in each]


def images(statistics: Any) -> list[Any]:
    """Every array that statistics are made of, in the order in which they map them."""
    arrays: list[Any] = []

    def noted(x: Any) -> Any:
        arrays.append(x)
        return x

    statistics.map(noted)
    return arrays
