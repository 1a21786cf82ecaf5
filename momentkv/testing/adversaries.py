"""Batches of small sets of tokens that try to break bounds: many heads at once, made from a seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEYS", "VALUES", "Batch", "draw"]

KEYS = ("gaussian", "heavy", "clusters", "two points", "one point", "outlier", "offset", "ties")
VALUES = ("independent", "linear", "quadratic", "sign", "constant", "tail")
# Standard deviations of logits that queries are scaled to.
DEVIATIONS = (1e-6, 1e-3, 0.05, 0.3, 1.0, 3.0, 10.0, 60.0, 500.0)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Heads of one shape, each with tokens and one query.

    Attributes
    ----------
    q : array, shape (heads, 1, d)
    k, v : array, shape (heads, n, d) and (heads, n, dv)
    w : array, shape (heads, n)
        Positive weights.
    scale : float
    dtype : str
        Every number is one of this dtype.
    unit_weights : bool
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    w: NDArray[Any]
    scale: float
    dtype: str
    unit_weights: bool


def draw(rng: np.random.Generator, heads: int, *, dtype: str = "float64") -> Batch:
    """A batch whose shape, and in each head laws of keys and values and the size of the query, are drawn."""
    n = int(rng.choice([1, 2, 3, 5, 17, 48, 150], p=[0.1, 0.2, 0.15, 0.2, 0.2, 0.1, 0.05]))
    d, dv = int(rng.choice([1, 2, 4, 16])), int(rng.choice([1, 3, 8]))
    k = np.empty((heads, n, d))
    kinds = rng.integers(len(KEYS), size=heads)
    for kind, name in enumerate(KEYS):
        rows = kinds == kind
        k[rows] = keys_of(rng, name, int(rows.sum()), n, d)
    scale = 1 / np.sqrt(d)
    q = rng.standard_normal((heads, 1, d))
    logits = scale * np.einsum("hid,hjd->hij", q, k)[:, 0]
    deviation = logits.std(axis=-1)
    target = rng.choice(DEVIATIONS, size=heads)
    usable = deviation > 1e-6 * np.abs(logits).max(axis=-1)
    q *= np.where(usable, target / np.where(usable, deviation, 1.0), 1.0)[:, None, None]
    x = (logits - logits.mean(axis=-1, keepdims=True)) / np.where(usable, deviation, 1.0)[:, None]
    v = values_of(rng, x, dv)
    unit = bool(rng.random() < 0.6)
    w = np.ones((heads, n)) if unit else np.exp(rng.uniform(-4, 0, (heads, n)))
    q, k, v, w = (a.astype(dtype) for a in (q, k, v, w))
    return Batch(q, k, v, w, float(scale), dtype, unit)


def keys_of(rng: np.random.Generator, law: str, heads: int, n: int, d: int) -> NDArray[Any]:
    """Keys of a law, shape (heads, n, d)."""
    x = rng.standard_normal((heads, n, d))
    if law == "heavy":
        return rng.standard_t(2.1, (heads, n, d))
    if law == "clusters":
        centre = 3 * rng.standard_normal((heads, 3, d))
        return np.take_along_axis(centre, rng.integers(3, size=(heads, n, 1)), axis=1) + 0.1 * x
    if law == "two points":
        side = rng.random((heads, n, 1)) < rng.uniform(0.01, 0.99, (heads, 1, 1))
        return side * x[:, :1] * rng.exponential(3, (heads, 1, 1))
    if law == "one point":
        return np.repeat(x[:, :1], n, axis=1)
    if law == "outlier":
        x *= 0.05
        x[np.arange(heads), rng.integers(n, size=heads)] += 10 * rng.standard_normal((heads, d))
        return x
    if law == "offset":
        return x + 100 * rng.standard_normal((heads, 1, d))
    if law == "ties":
        return rng.integers(-1, 2, (heads, n, d)).astype(float)
    return x * np.exp(rng.standard_normal((heads, 1, d)))


def values_of(rng: np.random.Generator, x: NDArray[Any], dv: int) -> NDArray[Any]:
    """Values that depend on standardised logits ``x``, shape (heads, n), by a law drawn for each head."""
    heads, n = x.shape
    noise, direction = rng.standard_normal((heads, n, dv)), rng.standard_normal((heads, 1, dv))
    shapes = {
        "independent": noise,
        "linear": x[..., None] * direction + 0.1 * noise,
        "quadratic": (x * x - 1)[..., None] * direction,
        "sign": np.sign(x * x - 1)[..., None] * direction,
        "constant": 3 + 0 * noise,
        "tail": (x >= np.quantile(x, 0.95, axis=-1, keepdims=True))[..., None] * direction,
    }
    kinds = rng.integers(len(VALUES), size=heads)
    v = np.stack([shapes[name] for name in VALUES])[kinds, np.arange(heads)]
    return v + 10 * rng.integers(0, 2, (heads, 1, 1)) * rng.standard_normal((heads, 1, dv))
