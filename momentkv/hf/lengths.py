"""The length that a cache gives: what it leaves of an input must be something."""

from __future__ import annotations

from typing import Any

__all__ = ["LONGER", "Read", "Short"]

# How to go on with a cache.
LONGER = (
    "give it those and at least one new token, or, if the history was edited or shortened, a new cache: ids are "
    "counted and not compared"
)


class Read(int):
    """Tokens that a cache has read.

    ``generate`` computes the number of new tokens as the length of its input less this one, and takes that many from
    the end: ``input_ids[:, -(n - read) :]``. If the cache has read as many as there are, or more, this takes all of
    them, or some from the middle, once more. No cache sees the ids, and not every model tells its attention of
    positions; but a difference without new tokens can refuse to be used so.

    Examples
    --------
    >>> 45 - Read(41), 40 - Read(41), -(45 - Read(41))
    (4, -1, -4)
    >>> -(40 - Read(41))
    Traceback (most recent call last):
        ...
    ValueError: the input has 40 tokens and the cache has read 41; give it those and at least one new token, ...
    """

    def __rsub__(self, other: Any) -> Any:
        left = int.__rsub__(self, other)
        return left if left is NotImplemented or left > 0 else Short(left, other, self)


class Short(int):
    """A number of new tokens that is none or less, which says so where it is taken from the end."""

    tokens: int
    read: int

    def __new__(cls, left: int, tokens: int, read: int) -> Short:
        """The difference of the two."""
        self = super().__new__(cls, left)
        self.tokens, self.read = int(tokens), int(read)
        return self

    def __neg__(self) -> int:
        raise ValueError(f"the input has {self.tokens} tokens and the cache has read {self.read}; {LONGER}")
