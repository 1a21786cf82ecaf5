"""The estimate of evicted tokens in the one form that every statistic gives and every backend reads."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from momentkv._array import Array, array_namespace, check_arrays
from momentkv.attention import AttentionState, group_queries, scale_of, softmax_state, ungroup_queries

__all__ = ["Expandable", "Expansion", "estimate_expansion"]


class Expansion(NamedTuple):
    r"""An attention state that depends on the query, expanded around an anchor, for every batch row and KV head.

    With $x = s\,q - a$: $\ell_c = \log W_c + x \cdot \mu_c$,
    $\mathrm{lse} = \log \sum_c e^{\ell_c} + \min(\tfrac\alpha2\, x^\top D\, x, \kappa)$ and
    $\mathrm{out} = \sum_c \frac{e^{\ell_c}}{\sum e^\ell}\, \nu_c + B\, x$; the empty state where all
    $\log W_c$ are ``-inf``.

    Attributes
    ----------
    log_weight : array, shape (..., m)
        Natural log of $W_c$.
    key_mean, value_mean : array, shape (..., m, d) and (..., m, dv)
        $\mu_c$ and $\nu_c$.
    anchor : array, shape (..., d), or None
        $a$, a scaled query; None is the zero query, the paper's.
    slope : array, shape (..., d, dv), or None
        $B^\top$. A kernel reads it fastest if memory has the axis of values last, as here.
    slope_left, slope_right : array, shape (..., dv, r) and (..., r, d), or None
        $B$ of low rank.
    variance : array, shape (..., d) or (..., d, d), or None
        $D$, diagonal or full.
    strength, cap : array, shape (...), or None
        $\alpha$ and $\kappa$; both are given where ``variance`` is.

    Notes
    -----
    Leading axes are (batch..., kv_head). Evaluated by `estimate_expansion`. Except for slope and variance, the groups
    are tokens with a `bias`: docs/derivations/summaries.md#pseudo-tokens.
    """

    log_weight: Array
    key_mean: Array
    value_mean: Array
    anchor: Array | None = None
    slope: Array | None = None
    slope_left: Array | None = None
    slope_right: Array | None = None
    variance: Array | None = None
    strength: Array | None = None
    cap: Array | None = None

    @property
    def bias(self) -> Array:
        r"""What turns each group into a token: $\ell_c = s\, q \cdot \mu_c + b_c$, shape (..., m).

        $b_c = \log W_c - a \cdot \mu_c$: with keys $\mu_c$, values $\nu_c$ and this bias on their
        logits, which no query changes, the groups may stand beside retained tokens in one attention call.
        """
        if self.anchor is None:
            return self.log_weight
        xp = array_namespace(self.anchor, self.key_mean)
        return self.log_weight - xp.matmul(self.key_mean, self.anchor[..., None])[..., 0]

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        """Itself, so that it can stand where statistics can.

        Raises
        ------
        ValueError
            If an order or a strength is given: both were chosen when the expansion was made.
        """
        if order is not None or strength is not None:
            raise ValueError(
                f"order is {order} and strength {strength}, but an Expansion has both already; leave them out, or make "
                "another one of the moments: moments.expansion(order=..., strength=...)"
            )
        return self


class Expandable(Protocol):
    """What stands for evicted tokens: `Moments`, `Summaries`, an `Expansion`, or a state of a correction of yours."""

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        """The estimate; None takes the order and the strength that the state has by itself."""


def estimate_expansion(q: Array, expansion: Expansion, *, scale: float | None = None) -> AttentionState:
    """The attention state that an expansion gives for queries.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    expansion : Expansion
        With leading axes ``(..., kv_head)``.
    scale : float, optional
        Factor ``s`` on ``q . k``; ``1 / sqrt(d)`` by default.

    Returns
    -------
    AttentionState
        In the dtype of ``key_mean``. An estimate, not a bound; ``out = 0`` and ``lse = -inf`` where nothing was
        evicted.

    Raises
    ------
    ValueError
        If shapes do not fit, the queries are not of floating point, or ``scale`` is no positive, finite number.
    TypeError
        If queries and expansion are of several libraries, or no arrays.

    Examples
    --------
    >>> import numpy as np
    >>> one = Expansion(np.zeros((1, 1)), np.asarray([[[1.0, 0.0]]]), np.asarray([[[5.0]]]))
    >>> state = estimate_expansion(np.asarray([[[2.0, 0.0]]]), one, scale=1.0)
    >>> state.out.tolist(), state.lse.tolist()
    ([[[5.0]]], [[2.0]])
    """
    xp = check_arrays(q=q, moments=expansion.log_weight)
    d = expansion.key_mean.shape[-1]
    if q.ndim < 3 or q.shape[-1] != d:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (..., q_head, q_len, {d}), as the evicted keys")
    dtype = expansion.key_mean.dtype
    q_heads, q_len = q.shape[-3], q.shape[-2]
    kv_heads = expansion.log_weight.shape[-2] if expansion.log_weight.ndim > 1 else 0
    x = group_queries(xp.astype(q, dtype, copy=False), kv_heads) * scale_of(scale, d)
    if expansion.anchor is not None:
        x = x - expansion.anchor[..., None, :]
    logits = expansion.log_weight[..., None, :] + xp.matmul(x, xp.matrix_transpose(expansion.key_mean))
    # softmax_state counts each KV head's queries as one query head of its own.
    (out, lse), _ = softmax_state(logits[..., None, :, :], expansion.value_mean)
    if expansion.slope is not None:
        out = out + xp.matmul(x, xp.astype(expansion.slope, dtype, copy=False))
    if expansion.slope_left is not None and expansion.slope_right is not None:
        step = xp.matmul(x, xp.matrix_transpose(expansion.slope_right))
        out = out + xp.matmul(step, xp.matrix_transpose(expansion.slope_left))
    empty = lse == -float("inf")
    if expansion.variance is not None and expansion.strength is not None and expansion.cap is not None:
        spread = xp.astype(expansion.variance, dtype, copy=False)
        diagonal = spread.ndim == expansion.log_weight.ndim
        moved = x * spread[..., None, :] if diagonal else xp.matmul(x, spread)
        gain = 0.5 * expansion.strength[..., None] * xp.sum(moved * x, axis=-1)
        lse = xp.where(empty, lse, lse + xp.minimum(gain, expansion.cap[..., None]))
    out = xp.where(empty[..., None], xp.zeros_like(out), out)
    return AttentionState(ungroup_queries(out, q_heads, q_len), ungroup_queries(lse[..., None], q_heads, q_len)[..., 0])
