r"""How well the standard that tokens are coded by still fits them."""

from __future__ import annotations

from momentkv._array import Array, array_namespace
from momentkv.codes.standard import Standard

__all__ = ["misfit"]


def misfit(x: Array, standard: Standard, mask: Array | None = None) -> Array:
    r"""How many times as far off tokens are in records by this standard as by one of their own.

    $$ \sqrt{\frac{\sum_t \max_c z_{tc}^2}{\sum_t \max_c z_{tc}'^2} \cdot
       \frac1d \sum_c \frac{\sigma_c^2}{\sigma_c'^2}} $$

    the ratio of the root mean squares of half a step in every channel, in deviations $\sigma'$ of the tokens' own
    standard. It is the same for any number of bits.

    Parameters
    ----------
    x : array, shape (..., n, d)
    standard : Standard
        Of shape (..., d), around a mean or around zero; that of the tokens' own is made alike.
    mask : bool array, shape (..., n), optional
        Which are tokens.

    Returns
    -------
    array, shape (...)
        1 where the standard is as good as their own, or there is no token.

    Notes
    -----
    Below 1 it hardly falls: their own standard is not quite the best for the largest step. Derivation:
    docs/derivations/codes.md.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1000, 8))
    >>> standard = Standard.of(x)
    >>> [round(float(misfit(x + away, standard)), 1) for away in (0, 4, 16)]
    [1.0, 2.9, 9.5]
    """
    xp, standard = array_namespace(x), standard.even()
    own = Standard.of(x, mask, centred=standard.mean is not None)
    largest = []
    for one in (standard, own):
        top = xp.max(xp.abs(one.standardise(x)), axis=-1)
        largest.append(xp.sum(top**2 if mask is None else xp.where(mask, top**2, xp.zeros_like(top)), axis=-1))
    none = largest[1] == 0
    ratio = xp.where(none, xp.ones_like(none, dtype=largest[0].dtype), largest[0]) / xp.where(
        none, xp.ones_like(none, dtype=largest[1].dtype), largest[1]
    )
    wide = [xp.astype(one.deviation, ratio.dtype) for one in (standard, own)]
    spread = xp.mean((wide[0] / wide[1]) ** 2, axis=-1)
    return xp.where(none, xp.ones_like(ratio), xp.sqrt(ratio * spread))
