"""Numbers, choices of two and objects that callers give."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from typing import Any

__all__ = ["as_python", "check_kind", "flag", "is_one_of", "real_number", "whole_number"]


def check_kind(kind: type, **values: Any) -> None:
    """Raise unless all arguments are of a class.

    Examples
    --------
    >>> from momentkv import AttentionState
    >>> check_kind(AttentionState, retained=(1, 2))
    Traceback (most recent call last):
    TypeError: retained is a tuple; use AttentionState
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; use {kind.__name__}")


def flag(name: str, value: Any) -> bool:
    """True or False, or an error that names the argument: a word such as "no" would pass for True.

    Examples
    --------
    >>> flag("static", "no")
    Traceback (most recent call last):
    TypeError: static is 'no'; use True or False
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; use True or False")
    return value


def is_one_of(choices: Collection[float], value: Any) -> bool:
    """Whether a value of any kind is one of some numbers; an array, which ``in`` would ask element by element, is none.

    Examples
    --------
    >>> is_one_of((0, 1, 2), 2), is_one_of((0, 1, 2), [2])
    (True, False)
    """
    return isinstance(value, numbers.Real) and value in choices


def real_number(name: str, value: Any) -> float:
    """A number as it was given, or an error that names the argument.

    Examples
    --------
    >>> real_number("share", None)
    Traceback (most recent call last):
    TypeError: share is None, a NoneType; use a number
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; use a number")
    return value  # type: ignore[return-value]


def as_python(value: Any) -> Any:
    """Numbers and sequences of Python's in place of any library's.

    Examples
    --------
    >>> import numpy as np
    >>> as_python(np.int64(2)), as_python(np.asarray([2, 3])), as_python([np.float32(0.5)]), as_python("2")
    (2, [2, 3], [0.5], '2')
    """
    if isinstance(value, (list, tuple)):
        return list(map(as_python, value))
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def whole_number(name: str, value: Any) -> int:
    """An int of any library's integer, or an error that names the argument.

    Examples
    --------
    >>> whole_number("budget", 64.5)
    Traceback (most recent call last):
    TypeError: budget is 64.5, a float; use a whole number
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; use a whole number")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; use a whole number") from None
