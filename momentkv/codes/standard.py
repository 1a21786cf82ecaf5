"""Mean and deviation of each channel, by which the tokens of a head are standardised before they are coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from momentkv._array import Array, accumulate, accumulation_dtype, array_namespace, check_mask, index_dtype
from momentkv._rows import inverse_permutation, take_columns
from momentkv.codes.packing import can_grade

__all__ = ["Standard"]

# The deviation of a channel is at least the first share of its mean, and the second share of the largest deviation of
# all channels. Less would be rounding, and a channel that never varied may do so later.
LEAST_OF_MEAN, LEAST_OF_ALL = 2.0**-10, 2.0**-14
# Graded channels of the finer half have two bits more than the others: a quarter of the step.
FINER = 0.25


class Standard(NamedTuple):
    """Where the tokens of a head lie, channel by channel.

    Attributes
    ----------
    mean : array, shape (..., d), or None
        None for zero.
    deviation : array, shape (..., d)
        Root of the mean square of the distance from that mean; positive. A quarter of it in the finer half of graded
        channels, so that one step is the unit of all codes of a token.
    order : int array, shape (..., d), or None
        Where channels are graded: those of the finer half, then those of the coarser one, as they lie in a record.
    """

    mean: Array | None
    deviation: Array
    order: Array | None = None

    @classmethod
    def of(cls, x: Array, mask: Array | None = None, *, centred: bool = True) -> Standard:
        """Of the tokens ``x``, shape (..., n, d), those where ``mask`` (..., n) is True; in the dtype of ``x``.

        Distances are from zero unless ``centred``. Without a token, or where all are zero, the deviation is 1. Where
        they do not vary, it is the deviation that rounding would cause.
        """
        xp = array_namespace(x)
        if not xp.isdtype(x.dtype, "real floating"):
            raise TypeError(f"x is {x.dtype}; means and deviations are of floating-point tokens")
        if mask is not None:
            check_mask("mask", mask, x.shape[:-1], x)
        (wide,) = accumulate(xp, x)
        real = xp.ones_like(wide[..., 0]) if mask is None else xp.astype(mask, wide.dtype)
        if mask is not None:
            wide = xp.where(mask[..., None], wide, xp.zeros_like(wide))
        count = xp.sum(real, axis=-1)[..., None]
        count = xp.maximum(count, xp.ones_like(count))
        least, mean = 0.0 * count, None
        if centred:
            # What is read is what tokens are coded by, rounded to the dtype that it is stored in.
            mean = xp.astype(xp.sum(wide / count[..., None, :], axis=-2), x.dtype)
            rounded = xp.astype(mean, wide.dtype)
            wide, least = (wide - rounded[..., None, :]) * real[..., None], LEAST_OF_MEAN * xp.abs(rounded)
        most = xp.max(xp.abs(wide), axis=-2) if x.shape[-2] else xp.sum(wide, axis=-2)
        most = xp.where(most > 0, most, xp.ones_like(most))
        # Divided first, so that no square overflows.
        deviation = most * xp.sqrt(xp.sum((wide / most[..., None, :]) ** 2, axis=-2) / count)
        deviation = xp.maximum(deviation, least)
        deviation = xp.maximum(deviation, LEAST_OF_ALL * xp.max(deviation, axis=-1, keepdims=True))
        # A narrow dtype would round the least to zero.
        narrow = xp.clip(xp.astype(deviation, x.dtype), float(xp.finfo(x.dtype).smallest_normal), None)
        return cls(mean, xp.where(deviation > 0, narrow, xp.ones_like(narrow)))

    def graded(self, bits: int, queries: Array | None) -> Standard:
        """The same with more bits for the half of a key's channels in which rounding costs more, fewer for the others.

        Parameters
        ----------
        bits : int
            Of a channel, on average.
        queries : array, shape (..., d), or None
            Mean square of the queries that meet the keys. What rounding costs in a channel is that, times the square of
            its deviation. Where it is not finite, it counts as zero.

        Returns
        -------
        Standard
            As it is, where nothing is known of the queries or where there is no such code: `can_grade`.
        """
        d = self.deviation.shape[-1]
        if queries is None or not can_grade(bits, d):
            return self
        xp = array_namespace(self.deviation)
        known = xp.where(xp.isfinite(queries), queries, xp.zeros_like(queries))
        cost = xp.sqrt(known) * xp.astype(self.deviation, queries.dtype)  # its root, which does not overflow
        order = xp.argsort(-cost, axis=-1, stable=True)
        finer = inverse_permutation(order) < d // 2
        least = xp.finfo(self.deviation.dtype).smallest_normal
        fine = xp.clip(FINER * self.deviation, float(least), None)
        return Standard(
            self.mean, xp.where(finer, fine, self.deviation), xp.astype(order, xp.uint8 if d <= 256 else xp.int32)
        )

    def even(self) -> Standard:
        """The same with as many bits for every channel."""
        if self.order is None:
            return self
        xp = array_namespace(self.deviation)
        finer = inverse_permutation(self.places()) < self.deviation.shape[-1] // 2
        return Standard(self.mean, xp.where(finer, self.deviation / FINER, self.deviation))

    def places(self) -> Array:
        """The order as an index."""
        xp = array_namespace(self.order)
        return xp.astype(self.order, index_dtype(xp))

    def ordered(self, x: Array) -> Array:
        """Channels of ``x`` (..., n, d) as they lie in records."""
        if self.order is None:
            return x
        return take_columns(x, self.places())

    def disordered(self, x: Array) -> Array:
        """The inverse of `ordered`."""
        if self.order is None:
            return x
        return take_columns(x, inverse_permutation(self.places()))

    def map(self, function: Callable[[Array], Array]) -> Standard:
        """The images of its arrays."""
        return Standard(*(None if x is None else function(x) for x in self))

    def where(self, mask: Array, other: Standard) -> Standard:
        """From here where a mask (..., 1) is True, and another's elsewhere; both around a mean, and graded, or not."""
        xp = array_namespace(mask)
        return Standard(*(None if x is None else xp.where(mask, x, y) for x, y in zip(self, other, strict=True)))

    def standardise(self, x: Array) -> Array:
        """Tokens (..., n, d) in deviations from the mean."""
        xp = array_namespace(x)
        mean, deviation = self.wide(x)
        x = xp.astype(x, deviation.dtype)
        return (x if mean is None else x - mean) / deviation

    def restore(self, z: Array) -> Array:
        """The inverse of `standardise`."""
        xp = array_namespace(z)
        mean, deviation = self.wide(z)
        x = deviation * xp.astype(z, deviation.dtype)
        return x if mean is None else mean + x

    def wide(self, x: Array) -> tuple[Array | None, Array]:
        """Mean and deviation (..., 1, d), to compute with tokens ``x``."""
        xp = array_namespace(x)
        dtype = accumulation_dtype(xp, x.dtype, self.deviation.dtype)
        mean = None if self.mean is None else xp.astype(self.mean, dtype)[..., None, :]
        return mean, xp.astype(self.deviation, dtype)[..., None, :]
