"""The closed-form estimate of what evicted tokens would have added to attention, and its merge with the rest."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

from momentkv._array import Array, array_namespace
from momentkv.attention import AttentionState, default_scale, group_queries, merge, ungroup_queries
from momentkv.bounds import output_error
from momentkv.statistics.anchored import AnchoredMoments
from momentkv.statistics.moments import Moments, check_order, positive

__all__ = ["Certified", "correct", "estimate"]


class Certified(NamedTuple):
    """A corrected state and how far its output is at most from exact attention.

    Attributes
    ----------
    state : AttentionState
    bound : array, shape (..., q_head, q_len)
        Of the Euclidean error of ``state.out``: proved, and rounding of moments and bound is included.
    """

    state: AttentionState
    bound: Array


def estimate(
    q: Array,
    moments: Moments | AnchoredMoments,
    *,
    order: int = 1,
    scale: float | None = None,
    strength: float = 1.0,
) -> AttentionState:
    r"""Estimate attention over the tokens that the moments stand for.

    .. math:: \widehat{\mathrm{lse}} = \log W + s\, q \cdot \mu_k, \qquad
              \widehat{\mathrm{out}} = \mu_v + \tfrac{s}{W} S_{vk}\, q \quad (\text{order } 0: \mu_v)

    Order 2 adds :math:`\tfrac{\alpha}{2 W} s^2\, q^\top S_{kk}\, q` to the lse. Around an anchor :math:`a`, ``s q`` is
    :math:`s\, q - a`.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    moments : Moments or AnchoredMoments
        With leading axes ``(..., kv_head)``.
    order : {0, 1, 2}
        0 takes the value mean; 1 adds the first-order change with the query (the paper's method); 2 the gain in mass by
        the variance of the logits.
    scale : float, optional
        Factor ``s`` on ``q . k``; ``1 / sqrt(d)`` by default. Must be the one that attention uses.
    strength : float
        Share of that gain that is credited, from 0 (order 1) to 1 (exact where logits are Gaussian).

    Returns
    -------
    AttentionState
        An estimate, not a bound. ``out = 0`` and ``lse = -inf`` where nothing was evicted.

    Raises
    ------
    ValueError
        If shapes do not fit, ``order`` is higher than the moments' own, or ``strength`` out of range.

    Notes
    -----
    ``out`` is the first-order Taylor expansion of exact attention around the zero query: exact for one token, for
    equal keys, and to :math:`O(\lVert q \rVert^2)` in general. ``lse`` of orders 0 and 1 never exceeds the truth
    (Jensen's inequality); that of order 2 may.
    Source: MomentKV (arXiv 2606.01563), eq. 9. Derivation: docs/derivations/correction.md; of the mass and what it
    misses, docs/derivations/mass.md.

    Examples
    --------
    >>> import numpy as np
    >>> k, v = np.array([[[1.0, 0.0]]]), np.array([[[5.0]]])
    >>> state = estimate(np.array([[[2.0, 0.0]]]), Moments.from_tokens(k, v), scale=1.0)
    >>> state.out.tolist(), state.lse.tolist()
    ([[[5.0]]], [[2.0]])
    """
    check_order(order)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; use 0 (no gain) to 1 (that of Gaussian logits)")
    if order > moments.order:
        raise ValueError(
            f"order is {order} but the moments are of order {moments.order}; "
            f"build them with Moments.from_tokens(..., order={order}), or estimate with order={moments.order}"
        )
    anchor = log_scale = None
    if isinstance(moments, AnchoredMoments):
        anchor, log_scale, moments = moments.anchor, moments.log_scale, moments.moments
    d = moments.key_mean.shape[-1]
    if q.ndim < 3 or q.shape[-1] != d:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (..., q_head, q_len, {d}), as the moments' keys")
    xp = array_namespace(q, moments.weight)
    q_heads, q_len = q.shape[-3], q.shape[-2]
    kv_heads = moments.weight.shape[-1] if moments.weight.ndim else 0
    scaled = group_queries(xp.astype(q, moments.key_mean.dtype, copy=False), kv_heads) * (
        default_scale(d) if scale is None else scale
    )
    if anchor is not None:
        scaled = scaled - anchor[..., None, :]
    has_tokens = moments.weight > 0
    weight = positive(xp, moments.weight)
    log_weight = xp.where(has_tokens, xp.log(weight), xp.full_like(weight, -math.inf))
    if log_scale is not None:
        log_weight = xp.where(has_tokens, log_weight + log_scale, log_weight)
    lse = log_weight[..., None] + xp.matmul(scaled, moments.key_mean[..., None])[..., 0]
    out = moments.value_mean[..., None, :] + xp.zeros_like(lse)[..., None]
    if order == 2 and moments.key_key is not None:
        spread = xp.matmul(scaled, moments.key_key / weight[..., None, None])
        lse = lse + 0.5 * strength * xp.sum(spread * scaled, axis=-1)
    if order >= 1 and moments.value_key is not None:
        slope = moments.value_key / weight[..., None, None]
        out = moments.value_mean[..., None, :] + xp.matmul(scaled, xp.matrix_transpose(slope))
    # A decayed-away head keeps its means; without weight it must be the empty state all the same.
    out = xp.where(has_tokens[..., None, None], out, xp.zeros_like(out))
    return AttentionState(ungroup_queries(out, q_heads, q_len), ungroup_queries(lse[..., None], q_heads, q_len)[..., 0])


@overload
def correct(
    retained: AttentionState,
    q: Array,
    moments: Moments | AnchoredMoments,
    *,
    order: int = 1,
    scale: float | None = None,
    strength: float = 1.0,
    certify: Literal[False] = False,
) -> AttentionState: ...


@overload
def correct(
    retained: AttentionState,
    q: Array,
    moments: Moments | AnchoredMoments,
    *,
    order: int = 1,
    scale: float | None = None,
    strength: float = 1.0,
    certify: Literal[True],
) -> Certified: ...


def correct(
    retained: AttentionState,
    q: Array,
    moments: Moments | AnchoredMoments,
    *,
    order: int = 1,
    scale: float | None = None,
    strength: float = 1.0,
    certify: bool = False,
) -> AttentionState | Certified:
    """Attention over retained tokens, corrected by the estimate of the evicted ones.

    ``merge(retained, estimate(q, moments))``: the exact rule for joining two sets, with one of them estimated.

    Parameters
    ----------
    retained : AttentionState
        Exact attention of ``q`` over the retained tokens.
    q, moments, order, scale, strength
        As in `estimate`.
    certify : bool
        Whether to return a bound of the error, too; the moments must have an extent.

    Returns
    -------
    AttentionState or Certified
        Equal to ``retained``, bit for bit, where nothing was evicted.

    Raises
    ------
    ValueError
        As `estimate`, or if a bound is wanted and the moments have no extent.

    Notes
    -----
    Source: MomentKV (arXiv 2606.01563). Derivation: docs/derivations/correction.md.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv.attention import attend
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(1, 1, 8)), 0.3 * rng.normal(size=(1, 64, 8)), rng.normal(size=(1, 64, 8))
    >>> exact, retained = attend(q, k, v).out, attend(q, k[:, :8], v[:, :8])
    >>> corrected = correct(retained, q, Moments.from_tokens(k[:, 8:], v[:, 8:])).out
    >>> float(np.linalg.norm(corrected - exact)) < 0.1 * float(np.linalg.norm(retained.out - exact))
    True
    """
    state = merge(retained, estimate(q, moments, order=order, scale=scale, strength=strength))
    if not certify:
        return state
    return Certified(state, output_error(retained, q, moments, state.out, scale=scale))
