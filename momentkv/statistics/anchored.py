"""Moments weighted by the attention of one query, the anchor: `Moments` whose weights are known by their logarithm.

Expanded around a recent query instead of the zero query, the logits of the evicted tokens vary less, and with them the
error. The weights are exponentials, so only their ratios are stored as numbers; their scale is a logarithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from momentkv._array import Array, accumulate, array_namespace, nbytes
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.extent import Extent
from momentkv.statistics.moments import Moments, check_broadcast

__all__ = ["AnchoredMoments"]


@dataclasses.dataclass(frozen=True)
class AnchoredMoments:
    r"""Moments of tokens weighted by :math:`w_j = e^{a \cdot k_j}`, batched over leading axes (usually batch, kv_head).

    Attributes
    ----------
    anchor : array, shape (..., d)
        Scaled query :math:`a` (with the factor ``s``).
    log_scale : array, shape (...)
        Natural log of the factor that all weights in ``moments`` have yet to be multiplied by; ``-inf`` for the empty
        set. The largest stored weight of a set gathered at once is 1.
    moments : Moments
        With the weights :math:`e^{a \cdot k_j - \text{log\_scale}}`.

    Notes
    -----
    With anchor zero, ordinary moments of unit weights. Takes part in `momentkv.correction.estimate`, `correct` and
    `momentkv.bounds` as `Moments` do. Derivation: docs/derivations/bounds.md; why an anchor, docs/derivations/mass.md.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv import attend, estimate
    >>> from momentkv.statistics.anchored import AnchoredMoments
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(1, 1, 8)), rng.normal(size=(1, 64, 8)), rng.normal(size=(1, 64, 8))
    >>> anchored = AnchoredMoments.from_tokens(k, v, q[:, 0] / np.sqrt(8))
    >>> bool(np.allclose(estimate(q, anchored).out, attend(q, k, v).out))  # exact at the anchor
    True
    """

    anchor: Array
    log_scale: Array
    moments: Moments

    @classmethod
    def from_tokens(
        cls,
        k: Array,
        v: Array,
        anchor: Array,
        *,
        mask: Array | None = None,
        order: int = 1,
        extent: bool | Extent = False,
    ) -> AnchoredMoments:
        """Anchored moments of the given tokens.

        Parameters
        ----------
        k, v, mask, order, extent
            As in `Moments.from_tokens`.
        anchor : array, shape (..., d)

        Raises
        ------
        ValueError
            If a weight would vanish beside the largest one: logits at the anchor spread too far for the dtype.
        """
        xp = array_namespace(k, v)
        wide, values, anchor = accumulate(xp, k, v, anchor)
        if mask is not None:
            check_broadcast("mask", mask, k.shape[:-1])
            wide = xp.where(mask[..., None], wide, xp.zeros_like(wide))
        logits = xp.matmul(wide, anchor[..., None])[..., 0]
        hidden = xp.full_like(logits, -math.inf)
        logits = logits if mask is None else xp.where(mask, logits, hidden)
        top = xp.max(logits, axis=-1) if k.shape[-2] else xp.full_like(anchor[..., 0], -math.inf)
        shift = xp.where(top > -math.inf, top, xp.zeros_like(top))
        below = logits - shift[..., None]
        check_spread(xp.where(below > -math.inf, below, xp.zeros_like(below)))
        moments = Moments.from_tokens(k, values, mask=mask, weights=xp.exp(below), order=order, extent=extent)
        return cls(anchor, top, moments)

    @classmethod
    def empty(cls, k: Array, v: Array, anchor: Array, *, order: int = 1, extent: bool = False) -> AnchoredMoments:
        """The empty set, the identity of `merge`, for tokens shaped and typed like ``k`` and ``v`` (none are read)."""
        return cls.from_tokens(k[..., :0, :], v[..., :0, :], anchor, order=order, extent=extent)

    @property
    def order(self) -> int:
        """That of the moments."""
        return self.moments.order

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        """The estimate of the tokens, around the anchor; arguments as in `Moments.expansion`."""
        plain = self.moments.expansion(order=order, strength=strength)
        xp = array_namespace(self.log_scale)
        some = plain.log_weight > -math.inf
        log_weight = xp.where(some, plain.log_weight + self.log_scale[..., None], plain.log_weight)
        return plain._replace(log_weight=log_weight, anchor=self.anchor)

    @property
    def extent(self) -> Extent | None:
        """That of the moments."""
        return self.moments.extent

    @property
    def weight(self) -> Array:
        """Stored weight, in units of ``exp(log_scale)``; positive exactly where there are tokens."""
        return self.moments.weight

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(nbytes(x) for x in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The arrays that make up the state, by name."""
        return {"anchor": self.anchor, "log_scale": self.log_scale} | self.moments.arrays()

    def map(self, function: Callable[[Array], Array]) -> AnchoredMoments:
        """Apply a function to every array: to move it to a device, or to select, repeat or reorder leading axes."""
        return AnchoredMoments(function(self.anchor), function(self.log_scale), self.moments.map(function))

    def update(self, k: Array, v: Array, *, mask: Array | None = None) -> AnchoredMoments:
        """Add tokens: `merge` with their anchored moments."""
        extent = self.moments.extent if self.moments.extent is not None else False
        new = AnchoredMoments.from_tokens(k, v, self.anchor, mask=mask, order=self.order, extent=extent)
        return self.merge(new)

    def merge(self, other: AnchoredMoments) -> AnchoredMoments:
        """Anchored moments of the union of two disjoint sets.

        Raises
        ------
        ValueError
            If anchors, shapes or orders differ, or one set would vanish beside the other.
        """
        xp = array_namespace(self.anchor, other.anchor)
        if tuple(self.anchor.shape) != tuple(other.anchor.shape) or not bool(xp.all(self.anchor == other.anchor)):
            raise ValueError("cannot merge moments with other anchors; gather both around the same one")
        top = xp.maximum(self.log_scale, other.log_scale)
        shift = xp.where(top > -math.inf, top, xp.zeros_like(top))
        one = xp.ones_like(shift)

        def scaled(x: AnchoredMoments) -> Moments:
            below = x.log_scale - shift
            some = below > -math.inf
            check_spread(xp.where(some, below, xp.zeros_like(below)))
            # A head that is empty keeps the factor 1, and one that sets the scale has it: identity to the last bit.
            return x.moments.decay(xp.where(some, xp.exp(below), one))

        return AnchoredMoments(self.anchor, top, scaled(self).merge(scaled(other)))

    def rotate(self, rotation: Array) -> AnchoredMoments:
        """State after an orthogonal ``rotation``, shape (..., d, d), of every key and of the anchor."""
        xp = array_namespace(self.anchor, rotation)
        turn = xp.matrix_transpose(xp.astype(rotation, self.anchor.dtype, copy=False))
        anchor = xp.matmul(self.anchor[..., None, :], turn)[..., 0, :]
        return AnchoredMoments(anchor, self.log_scale, self.moments.rotate(rotation))


def check_spread(below: Array) -> None:
    """Raise where a weight ``exp(below)``, relative to the largest, would leave the normal numbers of its dtype."""
    if below.shape[-1:] == (0,):
        return
    xp = array_namespace(below)
    least, limit = float(xp.min(below)), 0.95 * math.log(float(xp.finfo(below.dtype).smallest_normal))
    if least < limit:
        raise ValueError(
            f"log-weights at the anchor spread by {-least:.0f} nats, and {below.dtype} resolves {-limit:.0f}; use "
            "float64, or an anchor nearer to zero"
        )
