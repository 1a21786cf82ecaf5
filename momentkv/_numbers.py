"""Numbers that callers give."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["whole_number"]


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
