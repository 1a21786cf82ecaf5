"""Keep the tokens that the observation window attends to, with their neighbours."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace, device
from momentkv._numbers import whole_number
from momentkv._rows import chosen_first
from momentkv.policies.base import Policy, Tokens

__all__ = ["SnapKV", "check_kernel", "pool_neighbours"]


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the observation window, averaged over neighbouring positions.

    ``importance_j = (1 / kernel) sum over |i - j| <= kernel // 2 of sum over the window's queries of p_i``, averaged
    over the group. Needs the attention of the last ``observes`` queries; while decoding, of the queries since the
    last eviction.

    Parameters
    ----------
    kernel : int
        Odd width of the average over positions; 1 for none.
    observes : int
        Length of the observation window in queries.

    Notes
    -----
    Source: SnapKV (arXiv 2404.14469), which compresses once, after prefill, with average or max pooling. Its code
    leaves the window's own tokens out before it averages; here they count, so that the ``kernel // 2`` tokens before
    the window take part of what the window gives itself. A policy does not know which tokens the cache keeps anyway.
    """

    name: ClassVar[str] = "snapkv"
    observes: int | None = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    def importance(self, tokens: Tokens) -> Array:
        return pool_neighbours(tokens.attention, tokens.positions, self.kernel)


def check_kernel(kernel: int) -> None:
    """Raise unless a width over positions is odd and positive."""
    if whole_number("kernel", kernel) < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}; use an odd width of at least 1")


def pool_neighbours(score: Array, positions: Array, kernel: int) -> Array:
    """Average scores over ``kernel`` neighbouring positions; a position that is not retained counts as zero.

    Parameters
    ----------
    score, positions : array, shape (..., n)
        ``positions`` rises along the last axis where not negative; negative for an empty slot.
    kernel : int
        Odd width.

    Examples
    --------
    >>> import numpy as np
    >>> pool_neighbours(np.array([3.0, 6.0, 9.0]), np.array([0, 1, 7]), 3).tolist()
    [3.0, 3.0, 3.0]
    """
    xp = array_namespace(score, positions)
    half, n = kernel // 2, score.shape[-1]
    # Empty slots may lie between neighbours; moved to the end, they no longer do.
    real = positions >= 0
    order = chosen_first(real)
    score = xp.take_along_axis(xp.where(real, score, 0.0), order, axis=-1)
    place = xp.take_along_axis(positions, order, axis=-1)

    def shifted(x: Array) -> list[Array]:
        """By -half to half slots, each of shape (..., n); zeros come in."""
        edge = xp.zeros((*x.shape[:-1], half), dtype=x.dtype, device=device(x))
        wide = xp.concat([edge, x, edge], axis=-1)
        return [wide[..., shift : shift + n] for shift in range(kernel)]

    # One after the other: the order of a sum along an axis depends on how rows lie, and would break ties by it.
    pooled = xp.zeros_like(score)
    for own, other in zip(shifted(score), shifted(place), strict=True):
        pooled = pooled + xp.where(xp.abs(other - place) <= half, own, 0.0)
    pooled = pooled / kernel
    # A token is where as many real ones precede it.
    back = xp.cumulative_sum(xp.astype(real, order.dtype), axis=-1, include_initial=True)[..., :-1]
    return xp.where(real, xp.take_along_axis(pooled, back, axis=-1), 0.0)
