"""Arguments of the theorems: what is no array, fits no other, or cannot be what it stands for is refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from momentkv._array import Array, array_namespace, check_arrays, concrete
from momentkv._numbers import check_kind

__all__ = ["Rule", "checked", "unchecked"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Rule(NamedTuple):
    """What an argument of a theorem is.

    Attributes
    ----------
    vector : bool
        Whether it has an axis of values after those of the queries.
    low, high : float or None
        The least and greatest that its numbers may be; of an interval, that its lower end and its upper end may be.
    interval : bool
        Whether it has two ends, in order.
    between : float or None
        What both ends of an interval have between them.
    """

    vector: bool = False
    low: float | None = None
    high: float | None = None
    interval: bool = False
    between: float | None = None


NUMBER, VECTOR, POSITIVE = Rule(), Rule(vector=True), Rule(low=0)
# Logits have mean 0.
LOGITS, MASS, SHARE = Rule(interval=True, between=0), Rule(interval=True, low=0), Rule(interval=True, low=0, high=1)


def checked(kind: type, **rules: Rule) -> Callable[[Function], Function]:
    """Decorate a theorem so that it refuses by name what its arguments cannot be.

    Numbers are looked at, which waits for a device, so the certificates, whose own numbers fit, call it `unchecked`.
    NaN is no number, and passes: no bound of it is one.

    Parameters
    ----------
    kind : type
        That of intervals.
    **rules : Rule
        By argument.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            check_kind(kind, **{name: x for name, x in given.items() if rules[name].interval})
            arrays: dict[str, Array] = {}
            for name, x in given.items():
                ends = {f"{name}.low": x.low, f"{name}.high": x.high} if rules[name].interval else {name: x}
                arrays |= ends
            check_arrays(**arrays)
            check_shapes(arrays, {name: rules[name.partition(".")[0]].vector for name in arrays})
            if concrete(*arrays.values()):
                for name, x in given.items():
                    check_values(name, x, rules[name])
            return function(*args, **kwargs)

        checks: Any = call
        return checks

    return decorate


def unchecked(function: Function) -> Function:
    """A theorem as it is called with numbers that are known to fit."""
    wrapped: Function = inspect.unwrap(function)
    return wrapped


def check_shapes(arrays: dict[str, Array], vector: dict[str, bool]) -> None:
    """Raise unless arrays of one number a query broadcast, and vectors of them have one length."""
    known: dict[int, tuple[int, str]] = {}
    for name, x in arrays.items():
        shape = tuple(x.shape)
        if vector[name]:
            if not shape:
                raise ValueError(f"{name} has shape (); it must have a last axis, of the values")
            length, first = known.setdefault(0, (shape[-1], name))
            if length != shape[-1]:
                raise ValueError(_apart(name, arrays, first, "their last axes, of the values, must be as long"))
            shape = shape[:-1]
        for place, n in enumerate(reversed(shape), start=1):
            length, first = known.setdefault(place, (n, name)) if n != 1 else (1, name)
            if n not in (1, length):
                raise ValueError(_apart(name, arrays, first, "both must be of the same queries, or broadcast"))


def _apart(name: str, arrays: dict[str, Array], first: str, must: str) -> str:
    """The message for two arrays that do not fit."""
    mine, other = (tuple(arrays[x].shape) for x in (name, first))
    return f"{name} has shape {mine}, but {first} has {other}; {must}"


def check_values(name: str, x: Any, rule: Rule) -> None:
    """Raise where a number is below or above what it may be."""
    low, high = (x.low, x.high) if rule.interval else (x, x)
    xp = array_namespace(low, high)
    if rule.interval and bool(xp.any(low > high)):
        raise ValueError(f"{name} has ends in the other order: low is above high; use low <= high")
    least, most = rule.low, rule.high
    if rule.between is not None and bool(xp.any(low > rule.between) | xp.any(high < rule.between)):
        raise ValueError(f"{name} lies on one side of {rule.between}, which is the mean; use low <= 0 <= high")
    if least is not None and bool(xp.any(low < least)):
        value = float(xp.min(xp.where(low < least, low, xp.full_like(low, least))))
        raise ValueError(f"{name} is {value:g} somewhere; use {least:g} or more")
    if most is not None and bool(xp.any(high > most)):
        value = float(xp.max(xp.where(high > most, high, xp.full_like(high, most))))
        raise ValueError(f"{name} is {value:g} somewhere; use {most:g} or less")
