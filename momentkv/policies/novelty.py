"""Keep what recent queries attend to, and what the moments of all tokens do not explain."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace, device
from momentkv.moments import positive
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.snapkv import pool_neighbours

__all__ = ["Balanced", "mahalanobis"]

# Part of the mean variance that is added in every direction: few tokens, or equal ones, leave some without any.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Balanced(Policy):
    r"""Two rankings taken in turn: attention to values that stand out, and novelty.

    .. math:: a_j = p_j\, \lVert v_j - \bar v \rVert, \qquad
              n_j = (k_j - \bar k)^\top C_{kk}^{-1} (k_j - \bar k) \; (v_j - \bar v)^\top C_{vv}^{-1} (v_j - \bar v)

    with means and covariances over the tokens at hand. Of every ``1 / novelty`` tokens retained, one is the most novel
    of those left, the others are those with the largest ``a_j``. A token that attention has not met yet may be what a
    later question asks for; what moments explain well is better evicted, for the correction brings it back.

    Parameters
    ----------
    novelty : float
        Share of the budget for novelty, from 0 (attention alone) to 1.
    kernel : int
        Odd width of an average of ``a_j`` over neighbouring positions, as in `SnapKV`; 1 for none.

    Notes
    -----
    ``p_j`` is the attention of the observation window, as in `SnapKV`. Covariances are full matrices with a ridge of
    a thousandth of their mean eigenvalue; they are computed at each eviction and not stored.
    """

    name: ClassVar[str] = "balanced"
    observes: int | None = 32
    novelty: float = 0.25
    kernel: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.novelty <= 1:
            raise ValueError(f"novelty is {self.novelty}; use a share of the budget from 0 to 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; use an odd width of at least 1")

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys, tokens.values)
        keys, values = accumulate(xp, tokens.keys, tokens.values)
        real = tokens.positions >= 0
        off = centred(values, real)
        attention = tokens.score * xp.linalg.vector_norm(off, axis=-1)
        if self.kernel > 1:
            attention = pool_neighbours(attention, tokens.positions, self.kernel)
        if self.novelty == 0:
            return attention
        novelty = mahalanobis(centred(keys, real), real) * mahalanobis(off, real)
        if self.novelty == 1:
            return novelty
        # A token's turn comes at the place that either ranking gives it, whichever is first.
        turn = xp.minimum(ranks(attention, real) / (1 - self.novelty), ranks(novelty, real) / self.novelty)
        return -turn


def centred(x: Array, real: Array) -> Array:
    """Vectors less their mean, over real slots; zero elsewhere."""
    xp = array_namespace(x)
    weight = xp.astype(real, x.dtype)[..., None]
    x = xp.where(real[..., None], x, xp.zeros_like(x))
    number = positive(xp, xp.sum(weight, axis=-2, keepdims=True))
    return weight * (x - xp.sum(x, axis=-2, keepdims=True) / number)


def mahalanobis(off: Array, real: Array) -> Array:
    """Squared Mahalanobis distance of centred vectors, shape (..., n), under their own covariance with a ridge.

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
    covariance = xp.matmul(xp.matrix_transpose(off), off) / number[..., None, None]
    mean = xp.sum(off * off, axis=(-2, -1)) / number / d
    identity = xp.eye(d, dtype=off.dtype, device=device(off))
    covariance = covariance + (RIDGE * positive(xp, mean))[..., None, None] * identity
    solved = xp.matmul(off, xp.linalg.inv(covariance))
    return xp.sum(solved * off, axis=-1)


def ranks(x: Array, real: Array) -> Array:
    """1 for the largest of the real slots, 2 for the next; empty slots come last."""
    xp = array_namespace(x)
    order = xp.argsort(xp.where(real, x, -xp.inf * xp.ones_like(x)), axis=-1, descending=True, stable=True)
    return xp.astype(xp.argsort(order, axis=-1, stable=True) + 1, x.dtype)
