"""How the tokens that a cache stores lie in memory, and the tokens themselves as a backend attends to them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from momentkv._array import Array, array_namespace
from momentkv.codes import Coded, Coding

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Layout", "Recent", "Tiers"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of a layer lie: numbers that the host knows, the same for every row.

    Attributes
    ----------
    sinks : int
        First slots of the recent tier, never passed on.
    recent : int
        Slots of the recent tier of each KV head: sinks, window and block.
    widths : tuple of int
        Slots of retained tokens of each KV head, packed in this order.
    bits : tuple of int, or None
        Of a number of a retained token's key and value; None where retained tokens are vectors as they came.
    """

    sinks: int
    recent: int
    widths: tuple[int, ...]
    bits: tuple[int, int] | None = None

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.widths)

    @cached_property
    def width(self) -> int:
        """Slots of the head that has the most."""
        return max(self.widths)

    @cached_property
    def equal(self) -> bool:
        """Whether all heads have equally many slots."""
        return min(self.widths) == self.width

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First slot of each head."""
        return tuple(sum(self.widths[:head]) for head in range(self.heads))

    @cached_property
    def spread(self) -> np.ndarray[Any, Any]:
        """For each slot of a rectangle (kv_head, width), the packed slot that it shows; any where it shows none."""
        import numpy as np  # when first needed: importing momentkv loads no array library

        places = np.arange(self.width, dtype=np.int32)
        last = max(sum(self.widths) - 1, 0)
        return np.minimum(np.asarray(self.starts, dtype=np.int32)[:, None] + places, np.int32(last))

    @cached_property
    def real(self) -> np.ndarray[Any, Any]:
        """Which slots of that rectangle there are."""
        import numpy as np

        return np.arange(self.width) < np.asarray(self.widths)[:, None]

    @cached_property
    def packed(self) -> np.ndarray[Any, Any]:
        """For each packed slot, its place in that rectangle, flattened."""
        import numpy as np

        return np.flatnonzero(self.real).astype(np.int32)

    @cached_property
    def placed(self) -> dict[Any, Any]:
        """Arrays computed from the layout, and layouts of several layers, by the key that finds them."""
        return {}

    @cached_property
    def spread_out(self) -> np.ndarray[Any, Any]:
        """`spread`, flattened."""
        return self.spread.reshape(-1)

    def beside(self, x: Array, name: str) -> Array:
        """One of these index arrays in the library and on the device of ``x``."""
        from momentkv.backends import get_backend  # which imports this module

        return get_backend(x).index_of(self, name, x)

    def rectangle(self, x: Array, *, vectors: bool, fill: float | None = None) -> Array:
        """Packed slots (..., slots) or (..., slots, d) as (..., kv_head, width) or (..., kv_head, width, d).

        Nothing is copied if all heads have equally many slots. Slots that a head does not have hold ``fill``, or
        anything.
        """
        xp = array_namespace(x)
        lead, last = (x.shape[:-2], x.shape[-1:]) if vectors else (x.shape[:-1], ())
        if self.equal:
            return xp.reshape(x, (*lead, self.heads, self.width, *last))
        index = self.beside(x, "spread_out")
        wide = xp.reshape(xp.take(x, index, axis=-2 if vectors else -1), (*lead, self.heads, self.width, *last))
        if fill is None:
            return wide
        real = self.beside(x, "real")
        return xp.where(real[..., None] if vectors else real, wide, xp.full_like(wide, fill))

    def pack(self, x: Array) -> Array:
        """The inverse of `rectangle` for numbers: (..., kv_head, width) as (..., slots)."""
        xp = array_namespace(x)
        flat = xp.reshape(x, (*x.shape[:-2], self.heads * self.width))
        return flat if self.equal else xp.take(flat, self.beside(x, "packed"), axis=-1)


class Recent(NamedTuple):
    """Recent tokens alone: `Tiers.recent`."""

    keys: Array
    values: Array
    valid: Array | None


class Tiers(NamedTuple):
    """Stored tokens of a layer, all of which precede the queries that attend to them.

    Attributes
    ----------
    recent_keys, recent_values : array, shape (..., kv_head, m, d) and (..., kv_head, m, dv)
    recent_valid : bool array, shape (..., kv_head, m), or None
        False for a slot that holds no token; None where all do.
    keys, values : array, shape (..., slots, d) and (..., slots, dv)
        Packed, as the layout says; codes, uint8 (..., slots, bytes), where there is a coding.
    valid : bool array, shape (..., kv_head, width), or None
        As a rectangle, see `Layout.rectangle`.
    layout : Layout
    coding : Coding or None
        How the records of retained tokens are read.
    """

    recent_keys: Array
    recent_values: Array
    recent_valid: Array | None
    keys: Array
    values: Array
    valid: Array | None
    layout: Layout
    coding: Coding | None = None

    @property
    def recent(self) -> Recent:
        """Recent tokens alone."""
        return Recent(self.recent_keys, self.recent_values, self.recent_valid)

    @property
    def retained(self) -> Tiers:
        """Retained tokens alone."""
        keys, values = (x[..., :0, :] for x in (self.recent_keys, self.recent_values))
        return self._replace(recent_keys=keys, recent_values=values, recent_valid=None)

    def vectors(self, head: int | None = None) -> tuple[Array, Array]:
        """Keys and values (..., kv_head, n, d) of one head's slots, or of all heads', which must then be equal."""
        layout = self.layout
        if head is None:
            keys, values = (layout.rectangle(x, vectors=True) for x in (self.keys, self.values))
        else:
            slots = slice(layout.starts[head], layout.starts[head] + layout.widths[head])
            keys, values = (x[..., None, slots, :] for x in (self.keys, self.values))
        return keys, values

    def records(self, coding: Coding, head: int | None = None) -> Coded:
        """The same of codes."""
        layout, (keys, values) = self.layout, self.vectors(head)
        steps, standards = (coding.key_step, coding.value_step), (coding.key_standard, coding.value_standard)
        if head is None:
            of_key, of_value = (layout.rectangle(x, vectors=False) for x in steps)
            return Coded(coding.bits, keys, values, of_key, of_value, *standards)
        slots = slice(layout.starts[head], layout.starts[head] + layout.widths[head])
        of_key, of_value = (x[..., None, slots] for x in steps)
        key, value = (standard.map(lambda x: x[..., head : head + 1, :]) for standard in standards)
        return Coded(coding.bits, keys, values, of_key, of_value, key, value)

    @classmethod
    def of(cls, k: Array, v: Array, valid: Array | None = None) -> Tiers:
        """All tokens in one tier, of keys (..., kv_head, n, d), values and ``valid`` (..., kv_head, n)."""
        return cls(k, v, valid, k[..., 0, :0, :], v[..., 0, :0, :], None, Layout(0, k.shape[-2], (0,) * k.shape[-3]))
