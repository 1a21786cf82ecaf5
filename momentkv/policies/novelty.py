"""Keep what the means and covariances of all tokens do not explain."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from momentkv._array import Array, array_namespace, device, inverse_factor
from momentkv._rows import plus_product, real_rows
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.snapkv import check_kernel, pool_neighbours
from momentkv.statistics.weights import positive

__all__ = ["Novelty", "centred", "mahalanobis"]

# Part of the mean variance that is added in every direction: with few or equal tokens, some directions have none.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Novelty(Policy):
    r"""Squared Mahalanobis distance of a token from the others, in keys times in values.

    $$ n_j = (k_j - \bar k)^\top C_{kk}^{-1} (k_j - \bar k) \; (v_j - \bar v)^\top C_{vv}^{-1} (v_j - \bar v) $$

    with means and covariances over the stored tokens. A later question may ask for a token that nothing has attended to
    yet. Tokens that moments explain well can be evicted, because the correction gives them back.

    Parameters
    ----------
    kernel : int
        Odd width of an average of $n_j$ over neighbouring positions, as in `SnapKV`; 1 for none. A fact is a few
        tokens long, and useful only as a whole.

    Notes
    -----
    Observes no attention. Covariances are full matrices with a ridge of a thousandth of their mean eigenvalue; they
    are computed at each eviction from the tokens at hand and not stored: after a prefill in one piece these are all
    tokens, in chunks and while decoding those retained and the new ones. Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "novelty"
    kernel: int = 1

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    def importance(self, tokens: Tokens) -> Array:
        stacked, real = tokens.stacked, tokens.positions >= 0
        if stacked is not None:
            both = mahalanobis(from_mean(stacked, real), real)
            novelty = both[0, ...] * both[1, ...]
        else:
            of_key, of_value = (mahalanobis(from_mean(x, real), real) for x in tokens.vectors)
            novelty = of_key * of_value
        return pool_neighbours(novelty, tokens.positions, self.kernel) if self.kernel > 1 else novelty


def centred(x: Array, real: Array) -> Array:
    """Vectors less their mean, over real slots; zero elsewhere."""
    return from_mean(real_rows(x, real), real)


def from_mean(x: Array, real: Array) -> Array:
    """`centred` of vectors that are zero already where nothing is real."""
    xp = array_namespace(x)
    weight = xp.astype(real, x.dtype)[..., None]
    number = positive(xp, xp.sum(weight, axis=-2, keepdims=True))
    return plus_product(x, -weight, xp.sum(x, axis=-2, keepdims=True) / number)


def mahalanobis(off: Array, real: Array) -> Array:
    """Squared Mahalanobis distance of centred vectors, shape (..., n), under their own covariance with a ridge.

    NaN for all of a set with a vector that is not finite, or whose square is not, and for no other set.

    Examples
    --------
    >>> import numpy as np
    >>> off = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> mahalanobis(off, np.ones(4, dtype=bool)).round(1).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    xp = array_namespace(off)
    d = off.shape[-1]
    number = positive(xp, xp.sum(xp.astype(real, off.dtype), axis=-1))
    covariance = off.mT @ off / number[..., None, None]
    mean = xp.linalg.trace(covariance) / d
    identity = xp.eye(d, dtype=off.dtype, device=device(off))
    ridge = RIDGE * positive(xp, mean)
    # Of vectors whose squares are hardly numbers, as much as has an inverse.
    ridge = xp.maximum(ridge, xp.full_like(ridge, xp.finfo(off.dtype).smallest_normal))
    covariance = covariance + ridge[..., None, None] * identity
    # A matrix that is not finite may stop the inversion of all. No entry of a covariance is above its diagonal's.
    finite = xp.isfinite(mean)[..., None]
    whitened = off @ inverse_factor(xp.where(finite[..., None], covariance, identity)).mT
    distance = xp.linalg.vector_norm(whitened, axis=-1) ** 2  # whitened * whitened would be as large as the tokens
    return xp.where(finite, distance, xp.full_like(distance, math.nan))
