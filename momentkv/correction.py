"""The closed-form estimate of attention over evicted tokens, and its merge with attention over the retained ones."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, overload

from momentkv._array import Array, check_arrays
from momentkv._numbers import check_kind, flag
from momentkv._typing import ArrayObject
from momentkv.attention import AttentionState, check_alike, merge
from momentkv.bounds import output_error
from momentkv.statistics.expansion import Expandable, estimate_expansion
from momentkv.statistics.moments import Moments

__all__ = ["Certified", "correct", "estimate"]


class Certified(NamedTuple):
    """A corrected state and how far its output is at most from exact attention.

    Attributes
    ----------
    state : AttentionState
    bound : array, shape (..., q_head, q_len)
        Bound of the Euclidean error of ``state.out``. It is proved, and includes the rounding of moments and bound.
    """

    state: AttentionState
    bound: Array


def estimate(
    q: ArrayObject,
    moments: Expandable,
    *,
    order: int | None = None,
    scale: float | None = None,
    strength: float | None = None,
) -> AttentionState:
    r"""Estimate attention over the tokens that the moments stand for.

    $$ \widehat{\mathrm{lse}} = \log W + s\, q \cdot \mu_k, \qquad
       \widehat{\mathrm{out}} = \mu_v + \tfrac{s}{W} S_{vk}\, q \quad (\text{order } 0: \mu_v) $$

    Order 2 adds $\tfrac{\alpha}{2 W} s^2\, q^\top S_{kk}\, q$ to the lse. Around an anchor $a$, ``s q`` is
    $s\, q - a$.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    moments : Moments, Summaries, Expansion or another Expandable
        With leading axes ``(..., kv_head)``. The formula above is that of `Moments`; every other has its own.
    order : {0, 1, 2}, optional
        0 takes the value mean; 1 adds the first-order change with the query (the paper's method); 2 also adds the gain
        in mass from the variance of the logits. By default 1, or 0 where the moments are of order 0.
    scale : float, optional
        Factor ``s`` on ``q . k``; ``1 / sqrt(d)`` by default. Must be the one that attention uses.
    strength : float, optional
        Share of that gain that is credited, from 0 (order 1) to 1, the default (exact where logits are Gaussian).

    Returns
    -------
    AttentionState
        An estimate, not a bound. ``out = 0`` and ``lse = -inf`` where nothing was evicted.

    Raises
    ------
    ValueError
        If shapes do not fit, ``order`` is higher than the moments' own, ``strength`` or ``scale`` is out of range, or
        an argument is given that the statistics have already.
    TypeError
        If ``moments`` stand for no tokens, or ``strength`` is no number.

    Notes
    -----
    ``out`` is the first-order Taylor expansion of exact attention around the zero query: exact for one token, for
    equal keys, and to $O(\lVert q \rVert^2)$ in general. ``lse`` of orders 0 and 1 never exceeds the truth
    (Jensen's inequality); that of order 2 may.
    Source: MomentKV (arXiv 2606.01563), eq. 9. Derivation: docs/derivations/correction.md; of the mass and what it
    misses, docs/derivations/mass.md.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv import Moments
    >>> k, v = np.array([[[1.0, 0.0]]]), np.array([[[5.0]]])
    >>> state = estimate(np.array([[[2.0, 0.0]]]), Moments.from_tokens(k, v), scale=1.0)
    >>> state.out.tolist(), state.lse.tolist()
    ([[[5.0]]], [[2.0]])
    """
    if not callable(getattr(moments, "expansion", None)):
        raise TypeError(
            f"moments is a {type(moments).__name__}; use Moments, Summaries or another state that has an expansion"
        )
    return estimate_expansion(q, moments.expansion(order=order, strength=strength), scale=scale)


@overload
def correct(
    retained: AttentionState,
    q: ArrayObject,
    moments: Expandable,
    *,
    order: int | None = None,
    scale: float | None = None,
    strength: float | None = None,
    certify: Literal[False] = False,
) -> AttentionState: ...


@overload
def correct(
    retained: AttentionState,
    q: ArrayObject,
    moments: Moments,
    *,
    order: int | None = None,
    scale: float | None = None,
    strength: float | None = None,
    certify: Literal[True],
) -> Certified: ...


@overload
def correct(
    retained: AttentionState,
    q: ArrayObject,
    moments: Moments,
    *,
    order: int | None = None,
    scale: float | None = None,
    strength: float | None = None,
    certify: bool,
) -> AttentionState | Certified: ...


def correct(
    retained: AttentionState,
    q: ArrayObject,
    moments: Expandable,
    *,
    order: int | None = None,
    scale: float | None = None,
    strength: float | None = None,
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
        Whether to return a bound of the error, too. Needs `Moments` with an extent.

    Returns
    -------
    AttentionState or Certified
        Equal to ``retained``, bit for bit, where nothing was evicted.

    Raises
    ------
    ValueError
        As `estimate`, or if ``retained`` is of other shapes, or a bound is wanted and the moments have no extent.
    TypeError
        As `estimate`, or if ``retained`` is no `AttentionState`, or ``certify`` neither True nor False.

    Notes
    -----
    Source: MomentKV (arXiv 2606.01563). Derivation: docs/derivations/correction.md.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv import Moments, attend
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(1, 1, 8)), 0.3 * rng.normal(size=(1, 64, 8)), rng.normal(size=(1, 64, 8))
    >>> exact, retained = attend(q, k, v).out, attend(q, k[:, :8], v[:, :8])
    >>> corrected = correct(retained, q, Moments.from_tokens(k[:, 8:], v[:, 8:])).out
    >>> float(np.linalg.norm(corrected - exact)) < 0.1 * float(np.linalg.norm(retained.out - exact))
    True
    """
    check_kind(AttentionState, retained=retained)
    if flag("certify", certify) and getattr(moments, "extent", None) is None:
        raise ValueError(
            f"certify is True, but the {type(moments).__name__} given as moments have no extent, without which nothing "
            "bounds the error; use Moments.from_tokens(..., extent=True), or leave certify out"
        )
    evicted = estimate(q, moments, order=order, scale=scale, strength=strength)
    check_arrays(**{"retained.out": retained.out, "retained.lse": retained.lse, "moments": evicted.lse})
    check_alike(retained=retained, estimate=evicted)
    state = merge(retained, evicted)
    if not certify:
        return state
    return Certified(state, output_error(retained, q, cast("Moments", moments), state.out, scale=scale))
