"""How far the tokens of a set reach: what error bounds need to know besides moments, and can be kept as tokens stream.

Moments say where tokens are on average. A bound must also know how far the farthest one is. Distances are measured from
*fixed* anchors: their maximum over a union is then the maximum of the parts', with nothing lost, however often sets are
merged. Sums in floating point err, too; three counters say by how much at most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from momentkv._array import Array, array_namespace, concrete, device, nbytes

__all__ = ["Extent"]


@dataclasses.dataclass(frozen=True)
class Extent:
    r"""Reach of a weighted set of tokens, batched over leading axes; part of `momentkv.statistics.moments.Moments`.

    Attributes
    ----------
    key_anchor, value_anchor : array, shape (..., d) and (..., dv)
        Fixed points $c_k, c_v$. A head without tokens has none yet, and takes those of what is added first.
    key_radius, value_radius : array, shape (...)
        $\rho_k = \max_j \lVert k_j - c_k \rVert$ and $\rho_v$ likewise, over tokens of positive weight.
    least_weight : array, shape (...)
        A lower bound of the positive weights, ``inf`` for the empty set.
    value_trace : array, shape (...)
        $\sum_j w_j \lVert v_j - \mu_v \rVert^2$, the trace of the co-moment of values.
    terms : array, shape (...)
        Tokens in the longest plain sum that the moments were added up from.
    merges : array, shape (...)
        Merges on the longest way from tokens to the state.
    mixing : array, shape (...)
        Largest sum of $W_A W_B / W^2$ along such a way: how far merges can pass errors of means on.

    Notes
    -----
    Costs ``d + dv + 7`` numbers for each head. Radii are exact maxima under `merge`. When tokens are taken away they
    stay valid, but may be larger than needed. Derivation: docs/derivations/bounds.md.
    """

    key_anchor: Array
    value_anchor: Array
    key_radius: Array
    value_radius: Array
    least_weight: Array
    value_trace: Array
    terms: Array
    merges: Array
    mixing: Array

    @classmethod
    def of_tokens(
        cls, k: Array, v: Array, w: Array, key_mean: Array, value_mean: Array, *, like: Extent | None = None
    ) -> Extent:
        """Extent of tokens, in their accumulation dtype and finite also where ``w`` is zero.

        Parameters
        ----------
        k, v : array, shape (..., n, d) and (..., n, dv)
        w : array, shape (..., n)
            Zero leaves a token out.
        key_mean, value_mean : array, shape (..., d) and (..., dv)
            Of these tokens; the anchors of heads that have none.
        like : Extent, optional
            Whose anchors to use, where it has tokens.
        """
        xp = array_namespace(k, v)
        zero = xp.zeros_like(key_mean[..., 0])
        present = w > 0
        some = xp.any(present, axis=-1)
        key_anchor, value_anchor = key_mean, value_mean
        if like is not None:
            held = like.occupied[..., None]
            key_anchor = xp.where(held, like.key_anchor, key_anchor)
            value_anchor = xp.where(held, like.value_anchor, value_anchor)
        # An empty set has no anchors, so that `Moments.empty` is one state and the identity of merge to the last bit.
        key_anchor, value_anchor = (xp.where(some[..., None], x, xp.zeros_like(x)) for x in (key_anchor, value_anchor))

        def reach(x: Array, anchor: Array) -> Array:
            if x.shape[-2] == 0:
                return zero
            distance = xp.linalg.vector_norm(x - anchor[..., None, :], axis=-1)
            return xp.max(xp.where(present, distance, xp.zeros_like(distance)), axis=-1)

        least = xp.full_like(zero, math.inf)
        if k.shape[-2]:
            least = xp.min(xp.where(present, w, xp.full_like(w, math.inf)), axis=-1)
        off = v - value_mean[..., None, :]
        return cls(
            key_anchor=key_anchor,
            value_anchor=value_anchor,
            key_radius=reach(k, key_anchor),
            value_radius=reach(v, value_anchor),
            least_weight=least,
            value_trace=xp.sum(w * xp.sum(off * off, axis=-1), axis=-1),
            terms=xp.where(some, xp.full_like(zero, k.shape[-2]), zero),
            merges=zero,
            mixing=zero,
        )

    @property
    def occupied(self) -> Array:
        """Which heads have tokens, bool, shape (...)."""
        return array_namespace(self.least_weight).isfinite(self.least_weight)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(nbytes(x) for x in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The arrays by field name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def map(self, function: Callable[[Array], Array]) -> Extent:
        """Apply a function to every array.

        Raises
        ------
        ValueError
            If it changes the dtype: errors are counted in the roundoff of the one that the moments were summed in.
        """
        changed = Extent(**{name: function(x) for name, x in self.arrays().items()})
        before, after = self.key_radius, changed.key_radius
        if array_namespace(before).finfo(before.dtype).eps != array_namespace(after).finfo(after.dtype).eps:
            raise ValueError(
                f"moments with an extent were summed in {before.dtype}, and so their errors are counted, but map() "
                f"makes them {after.dtype}; build them anew from tokens, or drop the extent with "
                "dataclasses.replace(moments, extent=None)"
            )
        return changed

    def merge(self, other: Extent, *, share: Array, between: Array, step: Array) -> Extent:
        """Extent of the union of two disjoint sets.

        Parameters
        ----------
        share, between : array, shape (...)
            ``W_B / W`` and ``W_A W_B / W`` of the weights merged.
        step : array, shape (..., dv)
            Difference of the value means.

        Raises
        ------
        ValueError
            If a head has tokens on both sides with different anchors: distances from different points do not combine.
        """
        xp = array_namespace(self.key_radius, other.key_radius)
        mine, both = self.occupied, self.occupied & other.occupied
        # An anchor that is not a number is that of tokens that are none; they combine to what is none.
        same = ~xp.any(differ(self.key_anchor, other.key_anchor), axis=-1)
        same = same & ~xp.any(differ(self.value_anchor, other.value_anchor), axis=-1)
        if concrete(same, both) and not bool(xp.all(same | ~both)):
            raise ValueError(
                "cannot merge extents with other anchors; measure both from the same ones, with "
                "Moments.from_tokens(..., extent=first.extent), or add tokens with update"
            )
        joined = xp.astype(both, share.dtype)
        return Extent(
            key_anchor=xp.where(mine[..., None], self.key_anchor, other.key_anchor),
            value_anchor=xp.where(mine[..., None], self.value_anchor, other.value_anchor),
            key_radius=xp.maximum(self.key_radius, other.key_radius),
            value_radius=xp.maximum(self.value_radius, other.value_radius),
            least_weight=xp.minimum(self.least_weight, other.least_weight),
            value_trace=self.value_trace + other.value_trace + between * xp.sum(step * step, axis=-1),
            terms=xp.maximum(self.terms, other.terms),
            merges=xp.maximum(self.merges, other.merges) + joined,
            mixing=xp.maximum(self.mixing, other.mixing) + joined * share * (1 - share),
        )

    def downdate(self, part: Extent, *, left: Array, share: Array, between: Array, step: Array) -> Extent:
        """Extent after tokens were taken away: radii and least weight stay valid, errors grow by the weight ratio.

        Parameters
        ----------
        part : Extent
            Of the removed tokens, with the same anchors.
        left, share, between : array, shape (...)
            Weight that is left, removed over left weight, and their product over the weight before.
        step : array, shape (..., dv)
            Difference of the value means of removed and left tokens.
        """
        xp = array_namespace(self.key_radius, part.key_radius)
        trace = self.value_trace - part.value_trace - between * xp.sum(step * step, axis=-1)
        growth = 1 + 2 * share
        changed = dataclasses.replace(
            self,
            value_trace=xp.maximum(trace, xp.zeros_like(trace)),
            terms=growth * xp.maximum(self.terms, part.terms),
            merges=growth * (xp.maximum(self.merges, part.merges) + 1),
            mixing=growth * (xp.maximum(self.mixing, part.mixing) + 1),
        )
        return changed.only(left > 0)

    def rotate(self, transposed: Array) -> Extent:
        """Extent after ``k -> Q k`` for an orthogonal ``Q``, given transposed: anchors turn, radii stay.

        Raises
        ------
        ValueError
            If ``Q`` is not orthogonal to rounding; other matrices change distances.
        """
        xp = array_namespace(self.key_anchor, transposed)
        d = transposed.shape[-1]
        check_orthogonal(
            transposed,
            "which changes distances to the anchors; use an orthogonal matrix, or drop the extent with "
            "dataclasses.replace(moments, extent=None)",
        )
        turned = xp.matmul(self.key_anchor[..., None, :], transposed)[..., 0, :]
        # Rounding of the products and departure from orthogonality, in units that `terms` are counted in.
        steps = xp.where(self.occupied, xp.full_like(self.terms, 34.0 * d**2), xp.zeros_like(self.terms))
        return dataclasses.replace(self, key_anchor=turned, terms=self.terms + steps)

    def decay(self, gamma: Any, left: Array) -> Extent:
        """Extent after every weight was multiplied by ``gamma``; ``left`` is the weight after it."""
        return dataclasses.replace(
            self, least_weight=self.least_weight * gamma, value_trace=self.value_trace * gamma, merges=self.merges + 1
        ).only(left > 0)

    def only(self, some: Array) -> Extent:
        """The empty extent where ``some``, bool of shape (...), is False."""
        xp = array_namespace(self.key_radius, some)

        def keep(name: str, x: Array) -> Array:
            empty = xp.full_like(x, math.inf) if name == "least_weight" else xp.zeros_like(x)
            return xp.where(some[..., None] if x.ndim > some.ndim else some, x, empty)

        return Extent(**{name: keep(name, x) for name, x in self.arrays().items()})


def check_orthogonal(matrix: Array, consequence: str) -> None:
    """Raise unless a rotation is orthogonal to rounding."""
    if not concrete(matrix):
        return
    xp = array_namespace(matrix)
    d = matrix.shape[-1]
    eye = xp.eye(d, dtype=matrix.dtype, device=device(matrix))
    error = float(xp.max(xp.abs(xp.matmul(xp.matrix_transpose(matrix), matrix) - eye)))
    if not error <= 16 * d * xp.finfo(matrix.dtype).eps:
        raise ValueError(f"rotation is off orthogonal by {error:g}, {consequence}")


def differ(a: Array, b: Array) -> Array:
    """Where two arrays hold different numbers; nowhere where one of them is not a number."""
    return (a < b) | (a > b)
