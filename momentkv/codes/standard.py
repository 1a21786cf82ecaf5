"""Mean and deviation of each channel, by which the tokens of a head are standardised before they are coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from momentkv._array import Array, accumulate, accumulation_dtype, array_namespace

__all__ = ["Standard"]

# A channel's deviation is taken for at least this share of its mean, and this share of the largest of all channels:
# less would be rounding, and a channel that never varied may do so later.
LEAST_OF_MEAN, LEAST_OF_ALL = 2.0**-10, 2.0**-14


class Standard(NamedTuple):
    """Where the tokens of a head lie, channel by channel.

    Attributes
    ----------
    mean, deviation : array, shape (..., d)
        The deviation is positive.
    """

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, x: Array, mask: Array | None = None) -> Standard:
        """Of the tokens ``x``, shape (..., n, d), those where ``mask`` (..., n) is True; in the dtype of ``x``.

        Without a token, mean 0 and deviation 1; without variation, the deviation is what rounding would make of it.
        """
        xp = array_namespace(x)
        (wide,) = accumulate(xp, x)
        real = xp.ones_like(wide[..., 0]) if mask is None else xp.astype(mask, wide.dtype)
        if mask is not None:
            wide = xp.where(mask[..., None], wide, xp.zeros_like(wide))
        count = xp.sum(real, axis=-1)[..., None]
        count = xp.maximum(count, xp.ones_like(count))
        mean = xp.sum(wide / count[..., None, :], axis=-2)
        # What is read is what tokens are coded by, rounded to the dtype that it is stored in.
        mean = xp.astype(mean, x.dtype)
        off = (wide - xp.astype(mean, wide.dtype)[..., None, :]) * real[..., None]
        most = xp.max(xp.abs(off), axis=-2, keepdims=True) if x.shape[-2] else xp.zeros_like(mean)[..., None, :]
        most = xp.where(most > 0, most, xp.ones_like(most))
        # Divided first, so that no square overflows.
        squares = xp.sum((off / most) ** 2, axis=-2) / count
        deviation = most[..., 0, :] * xp.sqrt(squares)
        size = xp.abs(xp.astype(mean, wide.dtype))
        deviation = xp.maximum(deviation, LEAST_OF_MEAN * size)
        deviation = xp.maximum(deviation, LEAST_OF_ALL * xp.max(deviation, axis=-1, keepdims=True))
        deviation = xp.astype(deviation, x.dtype)
        return cls(mean, xp.where(deviation > 0, deviation, xp.ones_like(deviation)))

    def map(self, function: Callable[[Array], Array]) -> Standard:
        """The images of mean and deviation."""
        return Standard(function(self.mean), function(self.deviation))

    def standardise(self, x: Array) -> Array:
        """Tokens (..., n, d) in deviations from the mean."""
        xp = array_namespace(x)
        mean, deviation = self.wide(x)
        return (xp.astype(x, mean.dtype) - mean) / deviation

    def restore(self, z: Array) -> Array:
        """The inverse of `standardise`."""
        xp = array_namespace(z)
        mean, deviation = self.wide(z)
        return mean + deviation * xp.astype(z, mean.dtype)

    def wide(self, x: Array) -> tuple[Array, Array]:
        """Mean and deviation (..., 1, d), to compute with tokens ``x``."""
        xp = array_namespace(x)
        dtype = accumulation_dtype(xp, x.dtype, self.mean.dtype)
        return xp.astype(self.mean, dtype)[..., None, :], xp.astype(self.deviation, dtype)[..., None, :]
