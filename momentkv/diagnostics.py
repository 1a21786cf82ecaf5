"""What eviction does to attention: how much mass goes, in which direction it pointed, what the correction mends."""

from __future__ import annotations

from typing import NamedTuple

from momentkv._array import Array, array_namespace, check_mask
from momentkv._typing import ArrayObject
from momentkv.attention import AttentionState, check_values, logits, merge, scale_of, softmax_state
from momentkv.correction import correct
from momentkv.statistics.expansion import Expandable
from momentkv.statistics.moments import Moments

__all__ = ["EvictionError", "eviction_error"]


class EvictionError(NamedTuple):
    """Effect of an eviction on each query; every array has shape (..., q_head, q_len).

    Attributes
    ----------
    evicted_mass : array
        Share of the exact attention that falls on evicted tokens, ``w_E`` in [0, 1].
    cosine : array
        ``cos(o_E, o_R)`` between the outputs of the evicted and of the retained tokens; 0 where one is zero.
    plain : array
        Relative error of plain eviction, ``||o_R - o|| / ||o||``.
    corrected : array
        The same with the correction; equal to ``plain`` where nothing was evicted.
    """

    evicted_mass: Array
    cosine: Array
    plain: Array
    corrected: Array


def eviction_error(
    q: ArrayObject,
    k: ArrayObject,
    v: ArrayObject,
    retained: ArrayObject,
    *,
    moments: Expandable | None = None,
    order: int | None = None,
    scale: float | None = None,
    mask: ArrayObject | None = None,
) -> EvictionError:
    r"""Exact attention against attention without the evicted tokens, plain and corrected.

    $$ o = w_R\, o_R + w_E\, o_E, \qquad o_R - o = w_E\, (o_R - o_E) $$

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    k, v : array, shape (..., kv_head, n, d) and (..., kv_head, n, dv)
        All tokens, retained and evicted.
    retained : bool array, broadcastable to (..., kv_head, n)
        True for retained tokens.
    moments : Moments, Summaries or Expansion, optional
        What the correction uses; by default the moments of exactly the evicted tokens.
    order, scale
        As in `momentkv.correction.estimate`.
    mask : bool array, optional
        What each query may see at all (causality), broadcastable to ``(..., kv_head, group, q_len, n)``.

    Returns
    -------
    EvictionError

    Notes
    -----
    Mean mass, cosine and plain error over heads and queries are the quantities of the paper's motivation
    (MomentKV, arXiv 2606.01563, Figure 2). Derivation: docs/derivations/gap.md.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(1, 5, 8)), 0.3 * rng.normal(size=(1, 64, 8)), rng.normal(size=(1, 64, 8))
    >>> error = eviction_error(q, k, v, np.arange(64) < 8)
    >>> bool((error.corrected < error.plain).all())
    True
    """
    xp = check_values(k, v)
    check_mask("retained", retained, k.shape[:-1], k)
    scale = scale_of(scale, k.shape[-1])
    products = logits(q, k, scale=scale, mask=mask)
    hidden = xp.full_like(products, -float("inf"))
    kept = retained[..., None, None, :]
    part_r, _ = softmax_state(xp.where(kept, products, hidden), v)
    part_e, _ = softmax_state(xp.where(kept, hidden, products), v)
    exact = merge(part_r, part_e)
    if moments is None:
        moments = Moments.from_tokens(k, v, mask=~retained)
    repaired = correct(part_r, q, moments, order=order, scale=scale)
    lengths = norm(part_e.out) * norm(part_r.out)
    inner = xp.sum(part_e.out * part_r.out, axis=-1)
    return EvictionError(
        evicted_mass=xp.exp(part_e.lse - exact.lse),
        cosine=inner / xp.where(lengths > 0, lengths, xp.ones_like(lengths)),
        plain=relative(part_r, exact),
        corrected=relative(repaired, exact),
    )


def norm(x: ArrayObject) -> Array:
    """Euclidean length along the last axis."""
    return array_namespace(x).linalg.vector_norm(x, axis=-1)


def relative(approximate: AttentionState, exact: AttentionState) -> Array:
    """``||approximate - exact|| / ||exact||`` of the outputs; 0 / 0 counts as 0."""
    xp = array_namespace(exact.out)
    error, length = norm(approximate.out - exact.out), norm(exact.out)
    ratio = error / xp.where(length > 0, length, xp.ones_like(length))
    return xp.where((length > 0) | (error == 0), ratio, xp.full_like(error, float("inf")))
