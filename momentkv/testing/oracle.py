"""What the library should compute, in plain float64 NumPy straight from the definitions.

Shares no code with the library. Arrays have its shapes: ``q`` (..., q_head, q_len, d), ``k`` (..., kv_head, n, d).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INF = math.inf


class State(NamedTuple):
    out: NDArray[Any]
    lse: NDArray[Any]


class Sums(NamedTuple):
    weight: NDArray[Any]
    key_mean: NDArray[Any]
    value_mean: NDArray[Any]
    value_key: NDArray[Any]


def f64(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(x, dtype=np.float64)


def to_query_heads(x: NDArray[Any], q_heads: int, axis: int) -> NDArray[Any]:
    """Repeat what each KV head holds for the query heads of its group."""
    return np.repeat(x, q_heads // x.shape[axis], axis=axis)


def logits(
    q: NDArray[Any], k: NDArray[Any], scale: float | None = None, mask: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Shape (..., q_head, q_len, n); ``mask`` as the library takes it, (..., kv_head, group, q_len, n)."""
    q, k = f64(q), f64(k)
    scale = 1 / math.sqrt(k.shape[-1]) if scale is None else scale
    q_heads, kv_heads = q.shape[-3], k.shape[-3]
    products = scale * np.einsum("...hid,...hjd->...hij", q, to_query_heads(k, q_heads, -3))
    if mask is None:
        return products
    grouped = (*products.shape[:-3], kv_heads, q_heads // kv_heads, *products.shape[-2:])
    seen = np.broadcast_to(mask, grouped).reshape(products.shape)
    return np.where(seen, products, -INF)


def softmax(products: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights and log-sum-exp over the last axis; zero and -inf where all logits are -inf."""
    top = np.max(products, axis=-1, keepdims=True, initial=-INF)
    shift = np.where(top == -INF, 0.0, top)
    powers = np.exp(products - shift)
    total = powers.sum(axis=-1, keepdims=True)
    some = total > 0
    lse = np.where(some, np.log(np.where(some, total, 1.0)) + shift, -INF)
    return powers / np.where(some, total, 1.0), lse[..., 0]


def attend(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scale: float | None = None, mask: NDArray[Any] | None = None
) -> State:
    weights, lse = softmax(logits(q, k, scale, mask))
    return State(np.einsum("...hij,...hjd->...hid", weights, to_query_heads(f64(v), q.shape[-3], -3)), lse)


def merge(*states: State) -> State:
    """Union of any number of disjoint sets."""
    weights, lse = softmax(np.stack([f64(state.lse) for state in states], axis=-1))
    outs = np.stack([f64(state.out) for state in states], axis=-1)
    return State((outs * weights[..., None, :]).sum(axis=-1), lse)


def moments(k: NDArray[Any], v: NDArray[Any], w: NDArray[Any] | None = None) -> Sums:
    """Weight, means and centred co-moment, head by head and token by token."""
    k, v = f64(k), f64(v)
    w = np.ones(k.shape[:-1]) if w is None else np.broadcast_to(f64(w), k.shape[:-1])
    weight = np.zeros(k.shape[:-2])
    key_mean, value_mean = np.zeros((*weight.shape, k.shape[-1])), np.zeros((*weight.shape, v.shape[-1]))
    value_key = np.zeros((*weight.shape, v.shape[-1], k.shape[-1]))
    for head in np.ndindex(weight.shape):
        used = w[head] > 0
        keys, values, shares = k[head][used], v[head][used], w[head][used]
        if not used.any():
            continue
        weight[head] = math.fsum(shares)
        shares = shares / weight[head]
        # Twice: the second pass removes the rounding of the first mean.
        for mean, x in ((key_mean, keys), (value_mean, values)):
            mean[head] = shares @ x
            mean[head] += shares @ (x - mean[head])
        for share, key, value in zip(shares, keys, values, strict=True):
            value_key[head] += share * weight[head] * np.outer(value - value_mean[head], key - key_mean[head])
    return Sums(weight, key_mean, value_mean, value_key)


def estimate(q: NDArray[Any], sums: Sums, order: int = 1, scale: float | None = None) -> State:
    """Paper, eq. 9: ``mu_v + (s / W) S_vk q`` and ``log W + s q . mu_k``."""
    q = f64(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weight, key_mean, value_mean, value_key = (
        to_query_heads(x, q.shape[-3], axis) for x, axis in zip(sums, (-1, -2, -2, -3), strict=True)
    )
    some = weight > 0
    safe = np.where(some, weight, 1.0)
    lse = np.where(some, np.log(safe), -INF)[..., None] + scale * np.einsum("...hid,...hd->...hi", q, key_mean)
    out = np.broadcast_to(value_mean[..., None, :], (*q.shape[:-1], value_mean.shape[-1]))
    if order == 1:
        out = out + scale * np.einsum("...hvd,...hid->...hiv", value_key, q) / safe[..., None, None]
    return State(np.where(some[..., None, None], out, 0.0), lse)


def causal_weights(q: NDArray[Any], k: NDArray[Any], scale: float | None = None) -> NDArray[Any]:
    """Attention matrix (..., q_head, q_len, n) where the queries are those of the last tokens."""
    q_len, n = q.shape[-2], k.shape[-2]
    return softmax(logits(q, k, scale, np.tril(np.ones((q_len, n), dtype=bool), n - q_len)))[0]


def knorm(keys: NDArray[Any]) -> NDArray[Any]:
    return -np.sqrt((f64(keys) ** 2).sum(axis=-1))


def keydiff(keys: NDArray[Any], valid: NDArray[Any]) -> NDArray[Any]:
    """Minus the cosine to the mean direction of the keys that are there."""
    importance = np.zeros(valid.shape)
    for head in np.ndindex(valid.shape[:-1]):
        directions = [k / np.linalg.norm(k) if np.linalg.norm(k) else k for k in f64(keys[head][valid[head]])]
        mean = sum(directions) / max(len(directions), 1)
        length = np.linalg.norm(mean)
        importance[head][valid[head]] = [-(u @ mean) / length if length else 0.0 for u in directions]
    return importance


def snapkv(score: NDArray[Any], positions: NDArray[Any], kernel: int) -> NDArray[Any]:
    """Sum over the tokens within ``kernel // 2`` positions, divided by ``kernel``; empty slots give nothing."""
    pooled = np.zeros(score.shape)
    for head in np.ndindex(score.shape[:-1]):
        for j, own in enumerate(positions[head]):
            if own >= 0:
                near = (positions[head] >= 0) & (np.abs(positions[head] - own) <= kernel // 2)
                pooled[head][j] = f64(score[head])[near].sum() / kernel
    return pooled


def momentkv(score: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], sums: Sums, scale: float) -> NDArray[Any]:
    """``alpha_j ||v_j - mu_v - (s / n) S_vk k_j||``, and ``alpha_j ||v_j||`` while nothing is evicted."""
    importance = np.zeros(score.shape)
    for head in np.ndindex(score.shape[:-1]):
        for j in range(score.shape[-1]):
            residual = f64(values[head][j])
            if sums.weight[head] > 0:
                slope = sums.value_key[head] / sums.weight[head]
                residual = residual - sums.value_mean[head] - scale * slope @ f64(keys[head][j])
            importance[head][j] = score[head][j] * np.linalg.norm(residual)
    return importance


def value_aware(score: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """``p ||v - mean||`` of each token of one head."""
    return score * np.linalg.norm(f64(values) - f64(values).mean(axis=0), axis=-1)


def novelty(keys: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Squared Mahalanobis distance of each token of one head, in keys times in values, with a ridge."""

    def distance(x: NDArray[Any]) -> NDArray[Any]:
        off = f64(x) - f64(x).mean(axis=0)
        covariance = off.T @ off / len(off)
        ridge = np.trace(covariance) / x.shape[-1] / 1000
        return np.einsum("ni,ni->n", off, np.linalg.solve(covariance + ridge * np.eye(x.shape[-1]), off.T).T)

    return distance(keys) * distance(values)


def balanced(first: NDArray[Any], second: NDArray[Any], share: float) -> NDArray[Any]:
    """Minus the turn of each token of one head: the earlier of its places in two rankings, each by its share."""

    def places(x: NDArray[Any]) -> NDArray[Any]:
        place = np.empty(len(x))
        place[np.argsort(-x, kind="stable")] = np.arange(1, len(x) + 1)
        return place

    return -np.minimum(places(first) / (1 - share), places(second) / share)


def retained_slots(
    importance: NDArray[Any], positions: NDArray[Any], budget: int, sinks: int, window: int
) -> list[int]:
    """Slots that one head retains: sinks, window, then the most important, earlier ones first among equals."""
    held = [j for j, position in enumerate(positions) if position >= 0]
    first = held[:sinks]
    last = [j for j in held[max(len(held) - window, 0) :] if j not in first]
    rest = [j for j in held if j not in first and j not in last]
    rest.sort(key=lambda j: (-importance[j], positions[j]))
    room = max(budget - len(first) - len(last), 0)
    return sorted(first + last + rest[:room])
