r"""Statistics as they are stored between steps: each vector as whole numbers of 16 bits and one step.

$$ x \approx \delta\, c, \qquad \delta = \max_i |x_i| / 32767, \qquad c \in \{-32767, \dots, 32767\} $$

Statistics are added up in full precision and rounded only where they are stored. Once very many tokens have been
folded, rounding to the nearest would lose what an eviction changes, each time in the same direction. So rounding is
dithered: the nearer a number is to the upper neighbour, the more often it is rounded up. A sequence driven by the
number of tokens decides.
Derivation: docs/derivations/moments.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from momentkv._array import Array, array_namespace, device, nbytes

__all__ = ["NarrowStatistics", "dither", "round_vectors"]

MOST = 32767
# Steps of additive sequences that together fill a cube evenly: powers of the root of x^5 = x + 1 (Roberts, 2018).
ROOT = 1.1673039782614187
TURNS = 1 / ROOT, 1 / ROOT**2, 1 / ROOT**3, 1 / ROOT**4
# Tokens are counted in two numbers, for the fraction of a large product is lost in float32.
TURN = 1024


@dataclasses.dataclass(frozen=True)
class NarrowStatistics:
    """A state of a correction whose vectors take 16 bits a number.

    Attributes
    ----------
    kind : Callable
        Makes the state of its arrays.
    rows : tuple of (str, tuple of int, bool)
        Of each array that is rounded: its name, its axes behind those of the heads, and whether its vectors lie along
        the last axis but one.
    exact : dict
        The other arrays, by name.
    codes : dict
        int16 arrays (..., row, length), by the length of their vectors.
    steps : dict
        Of each row, shape (..., row), likewise.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv import Moments
    >>> k, v = np.random.default_rng(0).normal(size=(2, 1, 500, 8)).astype(np.float32)
    >>> moments = Moments.from_tokens(k, v)
    >>> narrow = NarrowStatistics.of(moments, ["key_mean", "value_mean", "value_key"])
    >>> narrow.nbytes, moments.nbytes
    (204, 324)
    >>> bool((abs(narrow.restored().key_mean - moments.key_mean) <= abs(moments.key_mean).max() / 32767).all())
    True
    """

    kind: Callable[..., Any]
    rows: tuple[tuple[str, tuple[int, ...], bool], ...]
    exact: dict[str, Array]
    codes: dict[int, Array]
    steps: dict[int, Array]

    @classmethod
    def of(cls, state: Any, names: Iterable[str]) -> NarrowStatistics:
        """Of a state that is made of its `arrays`, those of these names rounded."""
        arrays = state.arrays()
        lead = state.weight.ndim
        rows, parts = [], dict[int, list[Array]]()
        for name in names:
            if name not in arrays:
                continue
            x = arrays.pop(name)
            shape = tuple(x.shape[lead:])
            turned = len(shape) > 1 and shape[-1] < shape[-2]
            rows.append((name, shape, turned))
            parts.setdefault(max(shape[-2:]), []).append(as_rows(x, lead, turned))
        codes, steps = {}, {}
        for length, each in parts.items():
            x = array_namespace(*each).concat(each, axis=-2)
            codes[length], steps[length] = round_vectors(x, dither(state.weight, *x.shape[-2:]))
        return cls(type(state), tuple(rows), arrays, codes, steps)

    def restored(self) -> Any:
        """The state in full precision."""
        wide = {}
        for length, codes in self.codes.items():
            xp, step = array_namespace(codes), self.steps[length]
            wide[length] = xp.astype(codes, step.dtype) * step[..., None]
        start = dict.fromkeys(self.codes, 0)
        arrays = dict(self.exact)
        for name, shape, turned in self.rows:
            length = max(shape[-2:])
            stop = start[length] + math.prod(shape) // length if length else start[length]
            arrays[name] = from_rows(wide[length][..., start[length] : stop, :], shape, turned)
            start[length] = stop
        return self.kind(**arrays)

    @property
    def weight(self) -> Array:
        """Tokens folded."""
        return self.exact["weight"] if "weight" in self.exact else self.exact["count"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(nbytes(x) for x in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The arrays that make up the state, by name."""
        coded = {f"codes.{length}": x for length, x in self.codes.items()}
        return self.exact | coded | {f"steps.{length}": x for length, x in self.steps.items()}

    def map(self, function: Callable[[Array], Array]) -> NarrowStatistics:
        """Apply a function to every array, in the order of `arrays`."""
        exact = {name: function(x) for name, x in self.exact.items()}
        codes, steps = ({length: function(x) for length, x in own.items()} for own in (self.codes, self.steps))
        return dataclasses.replace(self, exact=exact, codes=codes, steps=steps)

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Any:
        """That of the state in full precision."""
        return self.restored().expansion(order=order, strength=strength)


def round_vectors(x: Array, up: Array) -> tuple[Array, Array]:
    """Codes (..., row, length), int16, and steps (..., row) of vectors; the step of one that is not finite is NaN.

    ``up``, in [0, 1) and shaped like ``x``, is how much is added before a number is rounded down.
    """
    xp = array_namespace(x)
    top = xp.max(xp.abs(x), axis=-1)
    finite = xp.isfinite(top)
    step = xp.where(finite & (top > 0), top / MOST, xp.ones_like(top))
    codes = xp.floor(xp.where(finite[..., None], x, xp.zeros_like(x)) / step[..., None] + up)
    codes = xp.astype(xp.clip(codes, -MOST, MOST), xp.int16)
    return codes, xp.where(finite, step, xp.full_like(step, math.nan))


def dither(weight: Array, rows: int, length: int) -> Array:
    """What is added to each number of a head's vectors, a share of a step: shape (..., row, length).

    It changes with the number of tokens, so that what is lost at one eviction is made up for at others, and from number
    to number, so that no head is rounded to one side.
    """
    xp = array_namespace(weight)
    row, column = (xp.arange(n, dtype=weight.dtype, device=device(weight)) for n in (rows, length))
    many = xp.floor(weight / TURN)
    turns = TURNS[0] * (weight - TURN * many) + TURNS[1] * many
    turns = (turns - xp.floor(turns))[..., None, None] + TURNS[2] * row[:, None] + TURNS[3] * column
    return turns - xp.floor(turns)


def as_rows(x: Array, lead: int, turned: bool) -> Array:
    """An array's vectors as rows (..., row, length)."""
    xp = array_namespace(x)
    if x.ndim == lead + 1:
        return x[..., None, :]
    return xp.matrix_transpose(x) if turned else x


def from_rows(rows: Array, shape: tuple[int, ...], turned: bool) -> Array:
    """The inverse of `as_rows`."""
    if len(shape) == 1:
        return rows[..., 0, :]
    return rows.mT if turned else rows
