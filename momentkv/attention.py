"""Attention over a set of tokens as an algebra: states ``(out, lse)`` that merge exactly.

Softmax attention over a set of tokens is known completely by its output and the log of its softmax sum. The states of
two disjoint sets merge into the state of their union, so a cache may attend to its parts in any order. Everything in
momentkv, the estimate of evicted tokens included, is such a state. Logs are natural.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

from momentkv._array import Array, accumulate, array_namespace, check_arrays, check_computed, check_mask, device
from momentkv._numbers import check_kind
from momentkv._typing import ArrayObject

__all__ = ["AttentionState", "attend", "group_queries", "logits", "merge", "softmax_state", "ungroup_queries"]


class AttentionState(NamedTuple):
    """Attention restricted to a set of tokens.

    Attributes
    ----------
    out : array, shape (..., q_head, q_len, dv)
        Softmax-weighted mean of the set's values; zero for the empty set.
    lse : array, shape (..., q_head, q_len)
        Natural log of the sum of ``exp(logit)`` over the set; ``-inf`` for the empty set.
    """

    out: Array
    lse: Array


def group_queries(q: ArrayObject, kv_heads: int) -> Array:
    """Fold each KV head's group of query heads into the query axis.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    kv_heads : int

    Returns
    -------
    array, shape (..., kv_head, group * q_len, d)

    Raises
    ------
    ValueError
        If the number of query heads is no multiple of ``kv_heads``.
    """
    *batch, q_heads, q_len, d = q.shape
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(
            f"q has {q_heads} query heads, which is no multiple of the {kv_heads} KV heads of k and v; "
            "pass q_head = kv_head * group"
        )
    return array_namespace(q).reshape(q, (*batch, kv_heads, q_heads // kv_heads * q_len, d))


def ungroup_queries(x: ArrayObject, q_heads: int, q_len: int) -> Array:
    """Undo `group_queries` for an array whose axes ``kv_head, group * q_len`` stand at -3 and -2."""
    *batch, _, _, last = x.shape
    return array_namespace(x).reshape(x, (*batch, q_heads, q_len, last))


def logits(q: ArrayObject, k: ArrayObject, *, scale: float | None = None, mask: ArrayObject | None = None) -> Array:
    """Scaled query-key products, ``-inf`` where masked.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    k : array, shape (..., kv_head, n, d)
    scale : float, optional
        Factor on ``q . k``; ``1 / sqrt(d)`` by default.
    mask : bool array, optional
        True where a query may see a token; broadcastable to ``(..., kv_head, group, q_len, n)``.

    Returns
    -------
    array, shape (..., kv_head, group, q_len, n)
        In the accumulation dtype (float32, or float64 if an input is).
    """
    xp = check_keys(q, k)
    q, k = accumulate(xp, q, k)
    kv_heads, n, d = k.shape[-3:]
    q_heads, q_len = q.shape[-3], q.shape[-2]
    products = xp.matmul(group_queries(q, kv_heads) * scale_of(scale, d), xp.matrix_transpose(k))
    return masked(xp.reshape(products, (*products.shape[:-2], q_heads // kv_heads, q_len, n)), mask)


def masked(products: ArrayObject, mask: ArrayObject | None) -> Array:
    """Logits (..., kv_head, group, q_len, n), ``-inf`` where a mask that broadcasts to them is False."""
    if mask is None:
        return products
    xp = array_namespace(products)
    check_mask("mask", mask, products.shape, products)
    return xp.where(mask, products, xp.asarray(-math.inf, dtype=products.dtype, device=device(products)))


def softmax_state(products: ArrayObject, v: ArrayObject) -> tuple[AttentionState, Array]:
    """Attention state and attention weights of given logits.

    Parameters
    ----------
    products : array, shape (..., kv_head, group, q_len, n)
        Logits, ``-inf`` where masked.
    v : array, shape (..., kv_head, n, dv)
        Masked values must be finite (their weight is zero, and zero times NaN is NaN).

    Returns
    -------
    state : AttentionState
        Shapes ``(..., kv_head * group, q_len, dv)`` and ``(..., kv_head * group, q_len)``.
    weights : array, shape (..., kv_head, group, q_len, n)
        Softmax over the last axis; all zero for a query that sees no token.
    """
    xp = check_computed(products=products, v=v)
    products, v = accumulate(xp, products, v)
    *batch, kv_heads, group, q_len, n = products.shape
    heads = (*batch, kv_heads * group, q_len)
    weights, lse = softmax_weights(products)
    out = xp.matmul(xp.reshape(weights, (*batch, kv_heads, group * q_len, n)), v)
    return AttentionState(xp.reshape(out, (*heads, v.shape[-1])), xp.reshape(lse, heads)), weights


def softmax_weights(products: ArrayObject) -> tuple[Array, Array]:
    """Attention weights (..., n) of given logits, all zero for a query that sees no token, and their lse (...)."""
    xp = array_namespace(products)
    if products.shape[-1] == 0:
        return products, log_sum_exp(products)
    weights, total, top = exponentials(products)
    safe = xp.where(total == 0, xp.ones_like(total), total)
    return weights / safe, log_of(total, top)


def log_sum_exp(products: ArrayObject) -> Array:
    """Log of the sum of exponentials over the last axis; ``-inf`` of none, NaN where any is."""
    xp = array_namespace(products)
    if products.shape[-1] == 0:
        return xp.full(products.shape[:-1], -math.inf, dtype=products.dtype, device=device(products))
    return log_of(*exponentials(products)[1:])


def exponentials(products: ArrayObject) -> tuple[Array, Array, Array]:
    """Exponentials of logits less their largest, the sum of them, and the largest, over the last axis, which stays."""
    xp = array_namespace(products)
    top = xp.max(products, axis=-1, keepdims=True)
    # A row that is masked everywhere has top = -inf; any finite shift keeps its weights at exp(-inf) = 0. NaN stays: it
    # must not pass for the empty set.
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    weights = xp.exp(products - top)
    return weights, xp.sum(weights, axis=-1, keepdims=True), top


def log_of(total: Array, top: Array) -> Array:
    """Of a sum of `exponentials`, without their axis."""
    xp = array_namespace(total)
    safe = xp.where(total == 0, xp.ones_like(total), total)
    return xp.where(total == 0, xp.full_like(top, -math.inf), xp.log(safe) + top)[..., 0]


def attend(
    q: ArrayObject, k: ArrayObject, v: ArrayObject, *, scale: float | None = None, mask: ArrayObject | None = None
) -> AttentionState:
    r"""Exact softmax attention of queries over a set of tokens.

    $$ \mathrm{lse} = \log \sum_j e^{s\, q \cdot k_j}, \qquad
       \mathrm{out} = \sum_j e^{s\, q \cdot k_j - \mathrm{lse}}\, v_j $$

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    k : array, shape (..., kv_head, n, d)
    v : array, shape (..., kv_head, n, dv)
    scale : float, optional
        Factor on ``q . k``; ``1 / sqrt(d)`` by default.
    mask : bool array, optional
        True where a query may see a token; broadcastable to ``(..., kv_head, group, q_len, n)``.

    Returns
    -------
    AttentionState
        In the accumulation dtype: float64 if an input is float64, otherwise float32.

    Raises
    ------
    ValueError
        If head counts or dimensions do not fit each other, an array is not of floating point, a mask not bool, or
        ``scale`` is no positive, finite number.
    TypeError
        If arguments are arrays of several libraries, or no arrays.

    Notes
    -----
    Exact up to rounding. A query that sees no token (``n = 0`` or fully masked) gets ``out = 0``, ``lse = -inf``,
    the identity of `merge`. All logits are held at once: ``q_len * n`` numbers for each query head.
    Derivation: docs/derivations/attention-algebra.md.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1, 2)), np.zeros((1, 4, 2)), np.arange(4.0).reshape(1, 4, 1)
    >>> state = attend(q, k, v)
    >>> float(state.out[0, 0, 0]), round(float(np.exp(state.lse[0, 0])), 6)
    (1.5, 4.0)
    """
    check_values(k, v)
    return softmax_state(logits(q, k, scale=scale, mask=mask), v)[0]


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    r"""State of the union of two disjoint token sets.

    $$ \mathrm{lse} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
       \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}}\,\mathrm{out}_a
       + e^{\mathrm{lse}_b - \mathrm{lse}}\,\mathrm{out}_b $$

    Associative (to rounding), commutative (exactly); ``lse = -inf`` is the identity, to the last bit.

    Parameters
    ----------
    a, b : AttentionState
        Of the same queries, broadcastable shapes.

    Returns
    -------
    AttentionState

    Raises
    ------
    TypeError
        If one of them is no `AttentionState`.
    ValueError
        If shapes do not fit.

    Notes
    -----
    Derivation: docs/derivations/attention-algebra.md. The rule is that of FlashAttention (arXiv 2205.14135) and of
    recursive attention in FlashInfer (arXiv 2501.01005).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 10, 8)), rng.normal(size=(2, 10, 4))
    >>> whole = attend(q, k, v)
    >>> parts = merge(attend(q, k[:, :4], v[:, :4]), attend(q, k[:, 4:], v[:, 4:]))
    >>> bool(np.allclose(whole.out, parts.out) and np.allclose(whole.lse, parts.lse))
    True
    """
    check_kind(AttentionState, a=a, b=b)
    xp = check_arrays(**{"a.out": a.out, "a.lse": a.lse, "b.out": b.out, "b.lse": b.lse})
    check_alike(a=a, b=b)
    out_a, lse_a, out_b, lse_b = accumulate(xp, a.out, a.lse, b.out, b.lse)
    top = xp.maximum(lse_a, lse_b)
    shift = xp.where(top > -math.inf, top, xp.zeros_like(top))
    weight_a, weight_b = xp.exp(lse_a - shift), xp.exp(lse_b - shift)
    total = weight_a + weight_b
    safe = xp.where(total > 0, total, xp.ones_like(total))
    out = (weight_a[..., None] * out_a + weight_b[..., None] * out_b) / safe[..., None]
    # Adding 0 * out_b would already be exact for finite out_b; the choice makes the identity hold for any.
    out = xp.where((weight_b == 0)[..., None], out_a, xp.where((weight_a == 0)[..., None], out_b, out))
    return AttentionState(out, xp.where(total > 0, xp.log(safe) + shift, top))


def default_scale(d: int) -> float:
    """``1 / sqrt(d)``."""
    if d == 0:
        raise ValueError("the head dimension is 0, of which 1 / sqrt(d) is no number; give scale=, or longer keys")
    return 1.0 / math.sqrt(d)


def check_scale(scale: Any) -> None:
    """Raise unless a factor on ``q . k`` is None or a positive, finite number."""
    # Compared as it is: converted, a number that torch.compile has as a symbol would be compiled for each value.
    if scale is not None and not (isinstance(scale, numbers.Real) and 0 < scale < math.inf):  # type: ignore[operator]
        raise ValueError(f"scale is {scale!r}; use a positive, finite factor on q . k, or None for 1 / sqrt(d)")


def scale_of(scale: float | None, d: int) -> float:
    """The factor on ``q . k``, checked: `default_scale` where none is given."""
    check_scale(scale)
    return default_scale(d) if scale is None else 1.0 * scale  # of a fraction, say


def check_alike(**states: AttentionState) -> None:
    """Raise unless two states are of the same queries: values of one dimension, and shapes that broadcast."""
    (name, one), (other_name, other) = states.items()
    for of, state in states.items():
        if state.out.shape[:-1] != state.lse.shape:
            raise ValueError(
                f"{of}.out has shape {tuple(state.out.shape)} but {of}.lse has {tuple(state.lse.shape)}; they must be "
                "(..., q_head, q_len, dv) and (..., q_head, q_len)"
            )
    if one.out.shape != other.out.shape and (
        one.out.shape[-1] != other.out.shape[-1] or not broadcastable(one.lse.shape, other.lse.shape)
    ):
        raise ValueError(
            f"{name}.out has shape {tuple(one.out.shape)} but {other_name}.out has {tuple(other.out.shape)}; both must "
            "be of the same queries and of values of one dimension, (..., q_head, q_len, dv)"
        )


def broadcastable(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether arrays of two shapes broadcast together."""
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other), strict=False))


def check_keys(q: ArrayObject, k: ArrayObject) -> Any:
    """Raise unless queries and keys are floats, share ``d`` and have head and token axes; returns their namespace."""
    xp = check_computed(q=q, k=k)
    if q.ndim < 3 or k.ndim < 3:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; both need at least the axes (head, token, d)"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]} but k has {k.shape[-1]}; they must be equal")
    return xp


def check_values(k: ArrayObject, v: ArrayObject) -> Any:
    """Raise unless keys and values are floats and every key has a value; returns their namespace."""
    xp = check_computed(k=k, v=v)
    if k.ndim < 2 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; all axes but the last must be equal, "
            "(..., kv_head, n, d) and (..., kv_head, n, dv)"
        )
    return xp
