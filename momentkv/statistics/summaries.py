"""Several anchored summaries of a set of tokens: the recommended stand-in for what was evicted.

The paper expands attention over the evicted tokens once, around the zero query. Queries are far from zero, so most of
the evicted mass is lost. Here tokens are weighted by the attention of a recent query, the *anchor*, and divided into a
few groups that recent queries tell apart. Each group is summarised by its weight and means. One diagonal and one
low-rank matrix, which all groups share, stand for the variation within groups. With one summary and no rank these are
anchored moments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from momentkv._array import Array, accumulate, accumulate_as, array_namespace, check_arrays, check_mask, device, nbytes
from momentkv._numbers import check_kind, is_one_of, real_number, whole_number
from momentkv._rows import joined_rows
from momentkv.attention import AttentionState, check_values
from momentkv.statistics.calibration import fitted_strength, gain_cap, refitted_cap
from momentkv.statistics.checks import check_anchor, equal_anchors
from momentkv.statistics.clustering import low_rank
from momentkv.statistics.expansion import Expansion, estimate_expansion
from momentkv.statistics.grouping import part, shares, total_weights
from momentkv.statistics.moments import Moments
from momentkv.statistics.weights import positive
from momentkv.statistics.window import QueryWindow

__all__ = ["QueryWindow", "Summaries", "estimate_summaries"]


@dataclasses.dataclass(frozen=True)
class Summaries:
    r"""Anchored summaries of a set of tokens, batched over leading axes (usually batch, kv_head).

    With anchor $a$ (a scaled query), token weights $w_j = e^{a \cdot k_j}$ and a partition of the tokens
    into groups $c$: $W_c$ and the weighted means $\mu_c, \nu_c$ of keys and values of each group,
    the pooled variance $D$ of keys within groups, and the pooled value-key covariance $B$ within groups.

    Attributes
    ----------
    count : array, shape (...)
        Tokens summarised.
    anchor : array, shape (..., d)
        Scaled query around which weights are taken.
    log_weight : array, shape (..., m)
        Natural log of $W_c$; ``-inf`` for a group without tokens.
    key_mean, value_mean : array, shape (..., m, d) and (..., m, dv)
    key_variance : array, shape (..., d)
        $D$, the diagonal of the pooled covariance of keys.
    slope_left, slope_right : array, shape (..., dv, r) and (..., r, d)
        $B$ as a product of rank ``r``.
    strength : array, shape (...)
        Share of the variance gain that is credited; see `estimate_summaries`.
    cap : array, shape (...)
        Largest gain that any query is credited with, in nats.

    Notes
    -----
    Immutable. Sums in float64 if an input is float64, else in float32. Grouping keeps the total weight, the weighted
    means of all tokens and the diagonal of the covariance of their keys exactly. It loses where each token lay within
    its group, and the part of ``B`` beyond rank ``r``. At most ``m`` tokens are represented exactly.
    Derivation: docs/derivations/summaries.md.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(2, 32, 8)), rng.normal(size=(2, 500, 8)), rng.normal(size=(2, 500, 8))
    >>> window = QueryWindow.from_queries(q, kv_heads=2)
    >>> evicted = Summaries.empty(k, v, summaries=4, rank=2).update(k, v, window)
    >>> evicted.count.tolist(), evicted.key_mean.shape
    ([500.0, 500.0], (2, 4, 8))
    """

    count: Array
    anchor: Array
    log_weight: Array
    key_mean: Array
    value_mean: Array
    key_variance: Array
    slope_left: Array
    slope_right: Array
    strength: Array
    cap: Array

    @classmethod
    def empty(cls, k: Array, v: Array, *, summaries: int = 12, rank: int = 2, strength: float = 0.75) -> Summaries:
        """The empty set, for tokens shaped and typed like ``k`` and ``v`` (none are read).

        Parameters
        ----------
        k, v : array, shape (..., n, d) and (..., n, dv)
        summaries : int
            Groups to tell apart, at least 1.
        rank : int
            Rank of the shared value-key covariance; 0 for none.
        strength : float
            From 0 (order 1) to 1 (Gaussian groups); the prior of what `calibrate` fits.

        Raises
        ------
        ValueError
            If an argument is out of range or shapes do not fit.
        """
        xp = check_values(k, v)
        d, dv, lead = k.shape[-1], v.shape[-1], k.shape[:-2]
        if whole_number("summaries", summaries) < 1:
            raise ValueError(f"summaries is {summaries}; use at least 1")
        if not 0 <= whole_number("rank", rank) <= min(d, dv):
            raise ValueError(
                f"rank is {rank}; use 0 to {min(d, dv)}, the smaller dimension of keys and values; a cache takes it as "
                f"correction=AnchoredSummaries(rank={min(d, dv)})"
            )
        if not 0 <= real_number("strength", strength) <= 1:
            raise ValueError(f"strength is {strength}; use 0 (order 1) to 1")
        k, v = accumulate(xp, k, v)

        def full(*shape: int, value: float = 0.0) -> Array:
            return xp.full((*lead, *shape), value, dtype=k.dtype, device=device(k))

        return cls(
            count=full(),
            anchor=full(d),
            log_weight=full(summaries, value=-math.inf),
            key_mean=full(summaries, d),
            value_mean=full(summaries, dv),
            key_variance=full(d),
            slope_left=full(dv, rank),
            slope_right=full(rank, d),
            strength=full(value=strength),
            cap=full(),
        )

    @property
    def weight(self) -> Array:
        """Tokens summarised, under the name that `Moments` has for it."""
        return self.count

    @property
    def rank(self) -> int:
        """Rank of the shared value-key covariance."""
        return int(self.slope_right.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(nbytes(x) for x in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The arrays that make up the state, by field name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def map(self, function: Callable[[Array], Array]) -> Summaries:
        """Apply a function to every array: to move it to a device, or to select, repeat or reorder leading axes."""
        return Summaries(**{name: function(x) for name, x in self.arrays().items()})

    def update(self, k: Array, v: Array, window: QueryWindow, *, mask: Array | None = None) -> Summaries:
        """Add tokens: re-anchor at the window's mean query, then group summaries and tokens anew.

        Parameters
        ----------
        k, v : array, shape (..., n, d) and (..., n, dv)
        window : QueryWindow
            Recent queries: their mean becomes the anchor, their variance says which keys they tell apart.
        mask : bool array, broadcastable to (..., n), optional
            False leaves a token out, whatever it holds. A head that gets none stays as it is.

        Returns
        -------
        Summaries

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        check_values(k, v)
        check_kind(QueryWindow, window=window)
        xp = check_arrays(summaries=self.anchor, window=window.mean)
        for name, x, mean in (("k", k, self.key_mean), ("v", v, self.value_mean)):
            if x.shape[:-2] != mean.shape[:-2] or x.shape[-1] != mean.shape[-1]:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, but the summaries are of heads {tuple(mean.shape[:-2])} and "
                    f"dimension {mean.shape[-1]}"
                )
        k, v = accumulate_as(self.anchor, "summaries", k=k, v=v)
        moved = self.reanchor(window.mean)
        count = xp.ones(k.shape[:-1], dtype=k.dtype, device=device(k))
        if mask is not None:
            check_mask("mask", mask, k.shape[:-1], k)
            count = xp.where(mask, count, 0.0)
        # Left-out slots may hold anything; times a weight of zero would keep their NaN and infinities.
        k, v = joined_rows(moved.key_mean, k, mask), joined_rows(moved.value_mean, v, mask)
        own, added = self.log_weight.shape[-1], xp.sum(count, axis=-1)
        tokens = xp.where(count > 0, xp.matmul(k[..., own:, :], moved.anchor[..., None])[..., 0], -math.inf)
        held = xp.concat([moved.log_weight, tokens], axis=-1)
        new = moved._group(held, k, v, moved.slope, own, window, self.count + added).arrays()
        # Grouping anew would move what a head holds; a row of a batch must not feel when other rows evict.
        some = [added > 0]
        some += [some[0][..., None], some[0][..., None, None]]
        return Summaries(
            **{name: xp.where(some[x.ndim - added.ndim], new[name], x) for name, x in self.arrays().items()}
        )

    def merge(self, other: Summaries, window: QueryWindow) -> Summaries:
        """Summaries of the union of two disjoint sets of tokens; both must have one anchor (see `reanchor`).

        Raises
        ------
        ValueError
            If the anchors differ or shapes do not fit.
        """
        check_kind(Summaries, other=other)
        check_kind(QueryWindow, window=window)
        xp = check_arrays(**{"the one's anchor": self.anchor, "the other's": other.anchor})
        mine, theirs = self.anchor.dtype, other.anchor.dtype
        if mine != theirs:
            raise ValueError(f"cannot merge summaries of {mine} and of {theirs}; cast one with map()")
        alike = self.anchor.shape == other.anchor.shape and self.value_mean.shape[-1] == other.value_mean.shape[-1]
        if not alike or not equal_anchors(self.anchor, other.anchor):
            raise ValueError(
                "cannot merge summaries of different heads or anchors; bring both to one with reanchor(anchor)"
            )
        mine, theirs = total_weights(self.log_weight, other.log_weight)
        share = theirs / positive(xp, mine + theirs)
        pooled = dataclasses.replace(
            self,
            key_variance=(1 - share)[..., None] * self.key_variance + share[..., None] * other.key_variance,
            strength=(1 - share) * self.strength + share * other.strength,
        )
        slope = (1 - share)[..., None, None] * self.slope + share[..., None, None] * other.slope
        log_weight = xp.concat([self.log_weight, other.log_weight], axis=-1)
        keys = xp.concat([self.key_mean, other.key_mean], axis=-2)
        values = xp.concat([self.value_mean, other.value_mean], axis=-2)
        count, own = self.count + other.count, log_weight.shape[-1]
        return pooled._group(log_weight, keys, values, slope, own, window, count)

    def reanchor(self, anchor: Array) -> Summaries:
        r"""The same estimate, expanded around another anchor.

        With $\delta = a' - a$ and strength $\alpha$: $\log W_c$ gains
        $\delta \cdot \mu_c + \tfrac\alpha2 \delta^\top D\, \delta$, $\mu_c$ gains
        $\alpha D\, \delta$ and $\nu_c$ gains $B\, \delta$.

        Parameters
        ----------
        anchor : array, shape (..., d)
            Scaled query.

        Raises
        ------
        ValueError
            If it is not one for each KV head.

        Notes
        -----
        `estimate_summaries` is unchanged to rounding (while the cap does not bind): it is the same quadratic. So the
        new state approximates the summaries that the tokens themselves would give at that anchor, as well as the
        estimate does there. Moves do not drift; they would if only the shift of means, or of weights, were damped.
        """
        xp = check_arrays(summaries=self.anchor, anchor=anchor)
        check_anchor(anchor, self.anchor)
        anchor = xp.astype(anchor, self.anchor.dtype, copy=False)
        delta = anchor - self.anchor
        gain = self.strength[..., None] * self.key_variance * delta
        moved = xp.matmul(self.key_mean, delta[..., None])[..., 0] + 0.5 * xp.sum(gain * delta, axis=-1)[..., None]
        shift = xp.matmul(self.slope_left, xp.matmul(self.slope_right, delta[..., None]))[..., 0]
        return dataclasses.replace(
            self,
            anchor=anchor,
            log_weight=self.log_weight + moved,
            key_mean=self.key_mean + gain[..., None, :],
            value_mean=self.value_mean + shift[..., None, :],
        )

    def calibrate(self, q: Array, k: Array, *, scale: float | None = None, mask: Array | None = None) -> Summaries:
        r"""Fit the strength to queries whose true ``lse`` over the tokens is still at hand.

        $\alpha$ minimises $\sum_i (g_i - \alpha h_i)^2 + (\alpha_0 - \alpha)^2 \sum_i (h_i^2 + r_i^2)$, where
        $h_i = \tfrac12 \Delta_i^\top D \Delta_i$, $g_i$ is what the estimate of order 1 lacks of the true
        ``lse``, $r_i$ what it may have lost to rounding, and $\alpha_0$ the present strength. Clipped to [0, 1].

        Parameters
        ----------
        q : array, shape (..., kv_head * group, q_len, d)
        k : array, shape (..., kv_head, n, d)
            The tokens that were summarised.
        scale, mask
            As in `momentkv.attention.attend`; the mask is broadcastable to (..., kv_head, n).
        """
        strength = fitted_strength(self, q, k, scale=scale, mask=mask)
        return dataclasses.replace(self, strength=strength, cap=refitted_cap(self, strength, q, scale=scale))

    def pooled(self) -> Moments:
        """Weight and means of all tokens together, as moments of order 0: what policies measure novelty against."""
        xp = array_namespace(self.log_weight)
        share = shares(self.log_weight)
        return Moments(
            weight=self.count,
            key_mean=xp.matmul(share[..., None, :], self.key_mean)[..., 0, :],
            value_mean=xp.matmul(share[..., None, :], self.value_mean)[..., 0, :],
        )

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        """The estimate of the tokens, as `estimate_summaries` evaluates it.

        Parameters
        ----------
        order : {0, 1}
            0 leaves the slope out; 1, the default, includes it if there is one.
        strength : None
            Summaries have their own; see `calibrate`.

        Raises
        ------
        ValueError
            If the order is another one, or a strength is given.
        """
        if not (order is None or is_one_of((0, 1), order)) or strength is not None:
            raise ValueError(
                f"order is {order} and strength {strength}, but summaries are of order 0 or 1 and have a strength of "
                "their own; choose rank= and strength= in Summaries.empty"
            )
        ranked = self.rank > 0 and order != 0
        return Expansion(
            self.log_weight,
            self.key_mean,
            self.value_mean,
            anchor=self.anchor,
            slope_left=self.slope_left if ranked else None,
            slope_right=self.slope_right if ranked else None,
            variance=self.key_variance,
            strength=self.strength,
            cap=self.cap,
        )

    @property
    def slope(self) -> Array:
        """Pooled value-key covariance within groups, shape (..., dv, d)."""
        return array_namespace(self.slope_left).matmul(self.slope_left, self.slope_right)

    def _group(
        self, log_weight: Array, keys: Array, values: Array, slope: Array, own: int, window: QueryWindow, count: Array
    ) -> Summaries:
        """Divide weighted points into groups; the first ``own`` have ``key_variance`` and ``slope`` within."""
        xp = array_namespace(keys)
        deviation = xp.sqrt(xp.astype(window.variance, keys.dtype, copy=False))
        groups = part(
            log_weight, keys, values, deviation, self.log_weight.shape[-1], covariance=self.slope_left.shape[-1] > 0
        )
        # Share of the weight whose variance within groups is known already.
        old = xp.sum(groups.share[..., :own], axis=-1, keepdims=True)
        variance = groups.variance + old * self.key_variance
        left, right = self.slope_left, self.slope_right
        if groups.covariance is not None:
            left, right = low_rank(groups.covariance + old[..., None] * slope, deviation, self.rank)
        return dataclasses.replace(
            self,
            count=count,
            log_weight=groups.log_weight,
            key_mean=groups.key_mean,
            value_mean=groups.value_mean,
            key_variance=variance,
            slope_left=left,
            slope_right=right,
            cap=gain_cap(self.strength, variance, deviation * deviation),
        )


def estimate_summaries(q: Array, summaries: Summaries, *, scale: float | None = None) -> AttentionState:
    r"""Estimate attention over the tokens that the summaries stand for.

    With $\Delta = s q - a$, each summary attends like a token, and all share the gain of the variance within:

    $$ \ell_c = \log W_c + \Delta \cdot \mu_c, \qquad
       \widehat{\mathrm{lse}} = \log \sum_c e^{\ell_c} + \min(\tfrac\alpha2\, \Delta^\top D\, \Delta, \kappa),
       \qquad \widehat{\mathrm{out}} = \sum_c \frac{e^{\ell_c}}{\sum e^{\ell}}\, \nu_c + B\, \Delta $$

    Arguments, result and errors are those of `momentkv.statistics.expansion.estimate_expansion`, of which it is a case.

    Notes
    -----
    Exact while no more tokens were evicted than there are summaries; exact to second order at the anchor for Gaussian
    groups of one diagonal covariance when $\alpha = 1$. Derivation: docs/derivations/summaries.md.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv.attention import attend
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(1, 5, 8)), rng.normal(size=(1, 12, 8)), rng.normal(size=(1, 12, 8))
    >>> window = QueryWindow.from_queries(q, kv_heads=1)
    >>> few = Summaries.empty(k, v, summaries=12).update(k, v, window)
    >>> bool(np.allclose(estimate_summaries(q, few).out, attend(q, k, v).out))
    True
    """
    check_kind(Summaries, summaries=summaries)
    return estimate_expansion(q, summaries.expansion(), scale=scale)
