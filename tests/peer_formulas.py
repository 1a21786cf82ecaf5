"""Importances of policies from other papers, for one head in plain float64 loops, straight from their formulas.

Shares no code with the library. ``keys`` (n, d), ``values`` (n, dv), ``score`` (n,): real tokens in order of position.
"""

from __future__ import annotations

import math

import numpy as np

from momentkv.testing.oracle import f64, snapkv


def places(x: list[float] | np.ndarray) -> list[int]:
    """1 for the largest, then 2; earlier ones first among equals."""
    order = sorted(range(len(x)), key=lambda j: (-x[j], j))
    return [order.index(j) + 1 for j in range(len(x))]


def caote(score: np.ndarray, values: np.ndarray, fast: bool = False) -> np.ndarray:
    """``a / (1 - a) ||o - v||``; where one token has all attention, only that one counts, by the norm of its value."""
    score, values = f64(score), f64(values)
    n, total = len(score), score.sum()
    a = score / total if total > 0 else score
    center = values.mean(axis=0) if fast else sum(a[i] * values[i] for i in range(n))
    importance = []
    for j in range(n):
        rest = sum(a[i] for i in range(n) if i != j)
        if fast:
            importance.append(a[j] * np.linalg.norm(center - values[j]) / max(rest, 2.0**-52))
        elif rest == 0:
            importance.append(a[j] * np.linalg.norm(values[j]))
        else:
            importance.append(a[j] / rest * np.linalg.norm(center - (a[j] + rest) * values[j]))
    return np.array(importance)


def criticalkv(
    score: np.ndarray,
    positions: np.ndarray,
    values: np.ndarray,
    first: float = 0.5,
    epsilon: float = 1e-4,
    kernel: int = 5,
) -> np.ndarray:
    """Minus the turn of each token, or the one ranking that takes all turns."""
    a = snapkv(f64(score) / (f64(score).sum() or 1.0), positions, kernel)
    b = np.array([(a[j] + epsilon) * sum(abs(x) for x in f64(values[j])) for j in range(len(a))])
    if first in (0, 1):
        return a if first else b
    return np.array([-min(i / first, j / (1 - first)) for i, j in zip(places(a), places(b), strict=True)])


def lagkv(keys: np.ndarray, values: np.ndarray, lag: int = 32) -> np.ndarray:
    """Run by run from the end; the last one by recency."""
    n = len(keys)
    bounds = [*range(n, 0, -lag), 0][::-1]  # of runs, in order
    importance = np.zeros(n)
    importance[bounds[-2] :] = np.arange(1, n - bounds[-2] + 1)
    for start, stop, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        score = np.zeros(stop - start)
        for x in (f64(keys), f64(values)):
            low, high = x[stop:end].min(axis=0), x[stop:end].max(axis=0)
            spread = []
            for j in range(start, stop):
                scaled = [
                    (x[j, c] - low[c]) / (high[c] - low[c]) if high[c] > low[c] else 0.0 for c in range(x.shape[1])
                ]
                spread.append(np.std(scaled))
            powers = [math.exp(s - max(spread)) for s in spread]
            score = score + np.array(powers) / sum(powers)
        importance[start:stop] = [-(place - 0.5) / (stop - start) for place in places(score)]
    return importance


def leverage(keys: np.ndarray, values: np.ndarray, by_values: bool = False, centred: bool = False) -> np.ndarray:
    """``k' (K'K + ridge)^-1 k``, times that of values if asked for."""

    def of(x: np.ndarray) -> np.ndarray:
        x = f64(x) - (f64(x).mean(axis=0) if centred else 0.0)
        gram = sum(np.outer(row, row) for row in x)
        ridge = 1e-3 * np.trace(gram) / x.shape[1] * np.eye(x.shape[1])
        return np.array([row @ np.linalg.solve(gram + ridge, row) if row.any() else 0.0 for row in x])

    return of(keys) * of(values) if by_values else of(keys)


def expected_attention_of_heads(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Logarithm of expected softmax weights, mean over heads (group, m, d), times ``||v||``, all Gaussian."""
    weights = np.zeros(len(keys))
    for q in f64(queries):
        mean, covariance = q.mean(axis=0), np.cov(q.T, bias=True).reshape(q.shape[1], q.shape[1])
        logit = np.array([mean @ k + k @ covariance @ k / 2 for k in f64(keys)])
        weights += np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum() / len(queries)
    return np.log(weights * np.linalg.norm(f64(values), axis=-1))


def expected_attention(
    keys: np.ndarray, values: np.ndarray, mean: np.ndarray, variance: np.ndarray, by_values: bool = True
) -> np.ndarray:
    """Logarithm of the expectation of ``exp(q . k)`` under independent Gaussian coordinates, times ``||v||``."""
    importance = []
    for k, v in zip(f64(keys), f64(values), strict=True):
        logit = sum(m * c + s * c * c / 2 for m, s, c in zip(f64(mean), f64(variance), k, strict=True))
        norm = math.sqrt(sum(c * c for c in v)) if by_values else 1.0
        importance.append(logit + math.log(norm) if norm > 0 else -math.inf)
    return np.array(importance)
