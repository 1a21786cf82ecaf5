"""Mean and deviation of each channel, by which the tokens of a head are standardised before they are coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from momentkv._array import Array, accumulate, accumulation_dtype, array_namespace

__all__ = ["Standard"]

# The deviation of a channel is at least the first share of its mean, and the second share of the largest deviation of
# all channels. Less would be rounding, and a channel that never varied may do so later.
LEAST_OF_MEAN, LEAST_OF_ALL = 2.0**-10, 2.0**-14


class Standard(NamedTuple):
    """Where the tokens of a head lie, channel by channel.

    Attributes
    ----------
    mean : array, shape (..., d), or None
        None for zero.
    deviation : array, shape (..., d)
        Root of the mean square of the distance from that mean; positive.
    """

    mean: Array | None
    deviation: Array

    @classmethod
    def of(cls, x: Array, mask: Array | None = None, *, centred: bool = True) -> Standard:
        """Of the tokens ``x``, shape (..., n, d), those where ``mask`` (..., n) is True; in the dtype of ``x``.

        Distances are from zero unless ``centred``. Without a token, or where all are zero, the deviation is 1. Where
        they do not vary, it is the deviation that rounding would cause.
        """
        xp = array_namespace(x)
        if not xp.isdtype(x.dtype, "real floating"):
            raise TypeError(f"x is {x.dtype}; means and deviations are of floating-point tokens")
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
        deviation = xp.astype(deviation, x.dtype)
        return cls(mean, xp.where(deviation > 0, deviation, xp.ones_like(deviation)))

    def map(self, function: Callable[[Array], Array]) -> Standard:
        """The images of mean and deviation."""
        return Standard(None if self.mean is None else function(self.mean), function(self.deviation))

    def where(self, mask: Array, other: Standard) -> Standard:
        """Mean and deviation from here where a mask (..., 1) is True, and another's elsewhere."""
        xp = array_namespace(mask)
        mean = self.mean
        if mean is not None and other.mean is not None:
            mean = xp.where(mask, mean, other.mean)
        return Standard(mean, xp.where(mask, self.deviation, other.deviation))

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
        wide = self.map(lambda y: xp.astype(y, dtype)[..., None, :])
        return wide.mean, wide.deviation
