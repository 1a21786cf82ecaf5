"""Moment statistics of a set of tokens, and their algebra.

A `Moments` stands for a (weighted) set of tokens per KV head: weight, key mean, value mean, the centred value-key
co-moment and, where wanted, that of the keys and what bounds need. Sets can be joined (`merge`, `update`), reduced
(`downdate`), moved (`rotate`) and faded (`decay`) without the tokens. Co-moments are always centred: raw second moments
lose all digits if the mean is large against the spread.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from momentkv._array import (
    Array,
    accumulate,
    accumulate_as,
    array_namespace,
    check_arrays,
    check_broadcast,
    check_mask,
    nbytes,
)
from momentkv.attention import check_values
from momentkv.statistics.checks import check_content, check_estimate, check_fits, check_rotation, checked_decay
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.extent import Extent, check_orthogonal
from momentkv.statistics.weights import (
    attended,
    check_sum,
    common_scale,
    outer,
    positive,
    remainder,
    weighted,
    weighted_mean,
)

__all__ = ["Moments"]

FIELDS = ("weight", "key_mean", "value_mean", "value_key", "key_key", "anchor", "log_scale")


@dataclasses.dataclass(frozen=True)
class Moments:
    r"""Weighted moments of a set of tokens, batched over leading axes (usually batch, kv_head).

    $$ W = \sum_j w_j, \quad \mu_k = \tfrac1W \sum_j w_j k_j, \quad \mu_v = \tfrac1W \sum_j w_j v_j, \quad
       S_{vk} = \sum_j w_j (v_j - \mu_v)(k_j - \mu_k)^\top $$

    $$ S_{kk} = \sum_j w_j (k_j - \mu_k)(k_j - \mu_k)^\top $$

    Attributes
    ----------
    weight : array, shape (...)
        Total weight; the number of tokens when all weights are one.
    key_mean : array, shape (..., d)
        Zero for the empty set.
    value_mean : array, shape (..., dv)
        Zero for the empty set.
    value_key : array, shape (..., dv, d), or None
        Centred co-moment (a sum, not a mean); None for moments of order 0, which keep the means only.
    key_key : array, shape (..., d, d), or None
        Centred co-moment of the keys, a sum too; None below order 2.
    extent : Extent, or None
        How far the tokens reach, for `momentkv.bounds`; None by default.
    anchor : array, shape (..., d), or None
        Scaled query $a$ (with the factor ``s``) whose attention the tokens are weighted by:
        $w_j e^{a \cdot k_j}$; None for the zero query, the paper's.
    log_scale : array, shape (...), or None
        Given with an anchor: natural log of a factor of all weights, ``-inf`` for the empty set.

    Notes
    -----
    Immutable: every operation returns a new object. Accumulated in float64 if an input is float64, else in float32
    (unit weights are counted exactly up to 2**24 tokens a head in float32). Merging: Chan, Golub, LeVeque (1983), *The
    American Statistician* 37. Derivation: docs/derivations/moments.md; of the anchor, docs/derivations/mass.md.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 6, 3))
    >>> whole = Moments.from_tokens(k, v)
    >>> parts = Moments.from_tokens(k[:, :2], v[:, :2]).update(k[:, 2:], v[:, 2:])
    >>> bool(np.allclose(whole.value_key, parts.value_key)), whole.weight.tolist()
    (True, [6.0, 6.0])
    >>> from momentkv import attend, estimate
    >>> q = rng.normal(size=(2, 1, 4))
    >>> anchored = Moments.from_tokens(k, v, anchor=q[:, 0] / 2)
    >>> bool(np.allclose(estimate(q, anchored).out, attend(q, k, v).out))  # exact at the anchor
    True
    """

    weight: Array
    key_mean: Array
    value_mean: Array
    value_key: Array | None = None
    key_key: Array | None = None
    extent: Extent | None = None
    anchor: Array | None = None
    log_scale: Array | None = None

    @classmethod
    def from_tokens(
        cls,
        k: Array,
        v: Array,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        order: int = 1,
        extent: bool | Extent = False,
        anchor: Array | None = None,
    ) -> Moments:
        """Moments of the given tokens.

        Parameters
        ----------
        k : array, shape (..., n, d)
        v : array, shape (..., n, dv)
        mask : bool array, broadcastable to (..., n), optional
            False leaves a token out, whatever it holds (NaN included). Each head may leave out others.
        weights : array, broadcastable to (..., n), optional
            Finite and not negative; one by default.
        order : {0, 1, 2}
            0 keeps the means only, 1 the value-key co-moment too, 2 also that of the keys.
        extent : bool or Extent
            Whether to keep how far the tokens reach; given an `Extent`, measured from its anchors.
        anchor : array, broadcastable to (..., d), optional
            Scaled query, by whose attention tokens are weighted.

        Returns
        -------
        Moments

        Raises
        ------
        ValueError
            If shapes do not fit, ``order`` is not 0, 1 or 2, or logits at the anchor are not finite, or spread so far
            that the dtype would lose a weight beside the largest.
        TypeError
            If ``extent`` is neither True, False nor an `Extent`, or the arrays are of several libraries.
        """
        check_content(order, extent)
        xp = check_values(k, v)
        if anchor is None:
            k, v = accumulate(xp, k, v)
        else:
            check_arrays(k=k, anchor=anchor)
            k, v, anchor = accumulate(xp, k, v, anchor)
        w = xp.ones_like(k[..., 0]) if weights is None else weighted(xp, weights, k)
        if mask is not None:
            check_mask("mask", mask, k.shape[:-1], k)
            w = xp.where(mask, w, xp.zeros_like(w))
            # Left-out slots may hold anything; times zero would keep their NaN and infinities.
            k = xp.where(mask[..., None], k, xp.zeros_like(k))
            v = xp.where(mask[..., None], v, xp.zeros_like(v))
        log_scale = None
        if anchor is not None:
            check_broadcast("anchor", anchor, (*k.shape[:-2], k.shape[-1]))
            anchor = xp.broadcast_to(anchor, (*k.shape[:-2], k.shape[-1]))
            log_scale, w = attended(k, w, anchor)
        total = xp.sum(w, axis=-1)
        safe = positive(xp, total)[..., None]
        key_mean, value_mean = weighted_mean(w, k, safe), weighted_mean(w, v, safe)
        like = extent if isinstance(extent, Extent) else None
        reach = None if extent is False else Extent.of_tokens(k, v, w, key_mean, value_mean, like=like)
        if order == 0:
            return cls(total, key_mean, value_mean, extent=reach, anchor=anchor, log_scale=log_scale)
        deviations = w[..., None] * (v - value_mean[..., None, :])
        off = k - key_mean[..., None, :]
        value_key = xp.matmul(xp.matrix_transpose(deviations), off)
        key_key = xp.matmul(xp.matrix_transpose(w[..., None] * off), off) if order == 2 else None
        return cls(total, key_mean, value_mean, value_key, key_key, reach, anchor, log_scale)

    @classmethod
    def empty(cls, k: Array, v: Array, *, order: int = 1, extent: bool = False, anchor: Array | None = None) -> Moments:
        """The empty set, the identity of `merge`, for tokens shaped and typed like ``k`` and ``v`` (none are read)."""
        return cls.from_tokens(k[..., :0, :], v[..., :0, :], order=order, extent=extent, anchor=anchor)

    @property
    def order(self) -> int:
        """0 if only means are kept, 1 with the value-key co-moment, 2 with that of the keys too."""
        return 0 if self.value_key is None else 1 if self.key_key is None else 2

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        """The estimate of the tokens, as `momentkv.correction.estimate` evaluates it.

        Parameters
        ----------
        order : {0, 1, 2}
            By default the highest of 0 and 1 that the moments have; see `momentkv.correction.estimate`.
        strength : float
            Share of the gain of order 2 that is credited, 1 by default.

        Raises
        ------
        ValueError
            If ``order`` is higher than the moments' own, or ``strength`` is not within 0 and 1.
        """
        order, strength = min(1, self.order) if order is None else order, 1.0 if strength is None else strength
        check_estimate(order, strength, self.order)
        xp = array_namespace(self.weight)
        weight = positive(xp, self.weight)
        # A decayed-away head keeps its means; without weight it must be the empty state all the same.
        log_weight = xp.log(weight) if self.log_scale is None else xp.log(weight) + self.log_scale
        log_weight = xp.where(self.weight > 0, log_weight, xp.full_like(weight, -math.inf))
        slope = variance = full = None
        if order >= 1 and self.value_key is not None:
            slope = xp.matrix_transpose(self.value_key / weight[..., None, None])
        if order == 2 and self.key_key is not None:
            variance = self.key_key / weight[..., None, None]
            full = xp.full_like(weight, strength)
        return Expansion(
            log_weight[..., None],
            self.key_mean[..., None, :],
            self.value_mean[..., None, :],
            anchor=self.anchor,
            slope=slope,
            variance=variance,
            strength=full,
            cap=None if variance is None else xp.full_like(weight, math.inf),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(nbytes(x) for x in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The arrays that make up the state, by field name; those of the extent as ``extent.key_radius`` and so on."""
        arrays = {name: x for name in FIELDS if (x := getattr(self, name)) is not None}
        if self.extent is not None:
            arrays |= {f"extent.{name}": x for name, x in self.extent.arrays().items()}
        return arrays

    def map(self, function: Callable[[Array], Array]) -> Moments:
        """Apply a function to every array: to move it to a device, or to select, repeat or reorder leading axes."""
        own: dict[str, Any] = {name: function(x) for name in FIELDS if (x := getattr(self, name)) is not None}
        return dataclasses.replace(self, **own, extent=None if self.extent is None else self.extent.map(function))

    def update(self, k: Array, v: Array, *, mask: Array | None = None, weights: Array | None = None) -> Moments:
        """Add tokens: `merge` with the moments of ``k, v`` (arguments as in `from_tokens`), in the dtype there is."""
        k, v = accumulate_as(self.weight, "moments", k=k, v=v)
        extent = False if self.extent is None else self.extent
        new = Moments.from_tokens(k, v, mask=mask, weights=weights, order=self.order, extent=extent, anchor=self.anchor)
        check_sum(weights, self.weight, new.weight)
        return self.merge(new)

    def merge(self, other: Moments) -> Moments:
        r"""Moments of the union of two disjoint sets.

        $$ \mu = \mu_A + \tfrac{W_B}{W} \delta, \qquad
           S = S_A + S_B + \tfrac{W_A W_B}{W}\, \delta_v \delta_k^\top, \qquad \delta = \mu_B - \mu_A $$

        Associative and commutative to rounding; `empty` is the identity, to the last bit.

        Raises
        ------
        ValueError
            If the two differ in shape, order, anchor or the anchors of their extents, or the weights of one would
            vanish beside those of the other.
        """
        check_fits(FIELDS, self, other)
        xp = array_namespace(self.weight, other.weight)
        if self.log_scale is not None and other.log_scale is not None:
            top, *factors = common_scale(self.weight, self.log_scale, other.weight, other.log_scale)
            self, other = (
                dataclasses.replace(x if factor is None else x.decay(factor), log_scale=top)
                for x, factor in zip((self, other), factors, strict=True)
            )
        total = self.weight + other.weight
        share = other.weight / positive(xp, total)
        dk, dv = other.key_mean - self.key_mean, other.value_mean - self.value_mean
        between = self.weight * share
        value_key = key_key = extent = None
        if self.value_key is not None and other.value_key is not None:
            value_key = self.value_key + other.value_key + between[..., None, None] * outer(dv, dk)
        if self.key_key is not None and other.key_key is not None:
            key_key = self.key_key + other.key_key + between[..., None, None] * outer(dk, dk)
        if self.extent is not None and other.extent is not None:
            extent = self.extent.merge(other.extent, share=share, between=between, step=dv)
        return dataclasses.replace(
            self,
            weight=total,
            key_mean=self.key_mean + share[..., None] * dk,
            value_mean=self.value_mean + share[..., None] * dv,
            value_key=value_key,
            key_key=key_key,
            extent=extent,
        )

    def downdate(self, k: Array, v: Array, *, mask: Array | None = None, weights: Array | None = None) -> Moments:
        r"""Remove tokens that had been added: the inverse of `update`.

        Parameters
        ----------
        k, v, mask, weights
            As in `from_tokens`, and as they were added.

        Returns
        -------
        Moments
            Heads from which everything is removed are then exactly empty.

        Raises
        ------
        ValueError
            If a head would be left with less than no weight, or with an extent and what may be all rounding, of which
            bounds would be too small; or if the moments have an anchor.

        Notes
        -----
        Exact in exact arithmetic. In floating point the error grows like the removed over the remaining weight, so use
        it to take back a small part. With an anchor, weights are exponentials, and rounding may leave nothing of them.
        """
        if self.anchor is not None:
            raise ValueError(
                "cannot downdate moments with an anchor: what is left of exponential weights may be lost in rounding; "
                "gather the moments of the remaining tokens anew"
            )
        k, v = accumulate_as(self.weight, "moments", k=k, v=v)
        like = False if self.extent is None else self.extent
        part = Moments.from_tokens(k, v, mask=mask, weights=weights, order=self.order, extent=like)
        check_fits(FIELDS, self, part)
        xp = array_namespace(self.weight, part.weight)
        left = remainder(self.weight, part.weight, bounded=self.extent is not None, counts=weights is None)
        share = xp.where(left > 0, part.weight / positive(xp, left), xp.zeros_like(left))
        remains = xp.astype(left > 0, left.dtype)
        key_mean = remains[..., None] * (self.key_mean + share[..., None] * (self.key_mean - part.key_mean))
        value_mean = remains[..., None] * (self.value_mean + share[..., None] * (self.value_mean - part.value_mean))
        dk, dv = part.key_mean - key_mean, part.value_mean - value_mean
        between = left * part.weight / positive(xp, self.weight)
        value_key = key_key = extent = None
        if self.value_key is not None and part.value_key is not None:
            value_key = self.value_key - part.value_key - between[..., None, None] * outer(dv, dk)
        if self.key_key is not None and part.key_key is not None:
            key_key = self.key_key - part.key_key - between[..., None, None] * outer(dk, dk)
        value_key, key_key = (None if x is None else remains[..., None, None] * x for x in (value_key, key_key))
        if self.extent is not None and part.extent is not None:
            extent = self.extent.downdate(part.extent, left=left, share=share, between=between, step=dv)
        return Moments(left, key_mean, value_mean, value_key, key_key, extent)

    def rotate(self, rotation: Array) -> Moments:
        """Moments after ``k -> rotation @ k`` for every key (RoPE moved to other positions, say).

        Parameters
        ----------
        rotation : array, shape (..., d, d)
            Any matrix; an orthogonal one leaves estimates unchanged for queries rotated alike. An anchor turns too.

        Raises
        ------
        ValueError
            If it does not fit the keys, or is not orthogonal although there is an extent or an anchor.
        """
        check_rotation(rotation, self.key_mean)
        xp = array_namespace(self.key_mean, rotation)
        transposed = xp.matrix_transpose(xp.astype(rotation, self.key_mean.dtype, copy=False))
        key_mean = xp.matmul(self.key_mean[..., None, :], transposed)[..., 0, :]
        value_key = None if self.value_key is None else xp.matmul(self.value_key, transposed)
        key_key = None
        if self.key_key is not None:
            key_key = xp.matmul(xp.matmul(xp.matrix_transpose(transposed), self.key_key), transposed)
        extent = None if self.extent is None else self.extent.rotate(transposed)
        anchor = self.anchor
        if anchor is not None:
            check_orthogonal(transposed, "which changes the logits at the anchor; use an orthogonal matrix")
            anchor = xp.matmul(anchor[..., None, :], transposed)[..., 0, :]
        return dataclasses.replace(
            self, key_mean=key_mean, value_key=value_key, key_key=key_key, extent=extent, anchor=anchor
        )

    def decay(self, gamma: float | Array) -> Moments:
        """Multiply every token's weight by ``gamma`` (0 to 1; a number, or an array that broadcasts to ``weight``).

        A head that is left with less weight than 1e-31 (float32; 1e-292 in float64) is empty from then on.

        Raises
        ------
        ValueError
            If a factor is not between 0 and 1, or the array does not broadcast.
        """
        gamma = checked_decay(gamma, self.weight)
        both = self.value_key, self.key_key
        value_key, key_key = (None if x is None else x * gamma[..., None, None] for x in both)
        weight = self.weight * gamma
        extent = None if self.extent is None else self.extent.decay(gamma, weight)
        return dataclasses.replace(self, weight=weight, value_key=value_key, key_key=key_key, extent=extent)
