"""What summaries keep exactly: weight, means and covariance of all tokens together, and how rounding moves them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from libraries import Library

from momentkv.statistics.summaries import QueryWindow, Summaries
from momentkv.testing import oracle
from momentkv.testing.oracle import f64
from momentkv.testing.rounding import FUNCTION, StateError, assert_within, default_scale, largest
from momentkv.testing.strategies import Case


class Totals(NamedTuple):
    log_weight: np.ndarray
    key_mean: np.ndarray
    value_mean: np.ndarray
    key_variance: np.ndarray
    covariance: np.ndarray


class Points(NamedTuple):
    """Weighted points, (..., n, d), each with a covariance of its own (diagonal for keys) within."""

    log_weight: np.ndarray
    k: np.ndarray
    v: np.ndarray
    key_variance: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of_tokens(cls, anchor: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> Points:
        weights = np.einsum("...nd,...d->...n", f64(k), f64(anchor))
        weights = weights if mask is None else np.where(mask, weights, -np.inf)
        if mask is not None:
            k, v = (np.where(mask[..., None], x, 0) for x in (k, v))
        return cls(weights, f64(k), f64(v), np.zeros(k.shape), np.zeros((*v.shape, k.shape[-1])))

    @classmethod
    def of_summaries(cls, library: Library, x: Summaries) -> Points:
        a = {name: library.numpy(y) for name, y in x.arrays().items()}
        covariance = a["slope_left"] @ a["slope_right"]
        m = a["log_weight"].shape[-1]
        return cls(
            a["log_weight"],
            a["key_mean"],
            a["value_mean"],
            np.repeat(a["key_variance"][..., None, :], m, axis=-2),
            np.repeat(covariance[..., None, :, :], m, axis=-3),
        )

    def __add__(self, other: Points) -> Points:
        axes = (-1, -2, -2, -2, -3)
        return Points(*(np.concatenate(pair, axis=axis) for *pair, axis in zip(self, other, axes, strict=True)))

    def totals(self) -> Totals:
        share, lse = oracle.softmax(self.log_weight)
        mean_k, mean_v = (np.einsum("...n,...nd->...d", share, x) for x in (self.k, self.v))
        off_k, off_v = self.k - mean_k[..., None, :], self.v - mean_v[..., None, :]
        # A second pass removes the rounding of the first.
        step_k, step_v = (np.einsum("...n,...nd->...d", share, x) for x in (off_k, off_v))
        off_k, off_v = off_k - step_k[..., None, :], off_v - step_v[..., None, :]
        return Totals(
            lse,
            mean_k + step_k,
            mean_v + step_v,
            np.einsum("...n,...nd->...d", share, off_k**2 + self.key_variance),
            np.einsum("...n,...nv,...nd->...vd", share, off_v, off_k)
            + np.einsum("...n,...nvd->...vd", share, self.covariance),
        )

    def error(self, anchor: np.ndarray, u: float) -> Totals:
        """Rounding of totals that are summed in any grouping.

        Logits err by eta = u (d + 4) |a| |k|, or u of themselves where given; shares by rho = 2 (e^eta - 1) + u (2 n +
        4 functions) of themselves. A mean errs by rho times the spread and u (2 n + 8) times the largest point, e. A
        centred square errs by 4 D e + 2 e^2 and (rho + u (n + 8)) of itself, as in `moments_error`.
        """
        n, d = self.k.shape[-2:]
        eta = u * (d + 4) * np.einsum("...nd,...d->...n", np.abs(self.k), np.abs(f64(anchor))).max(-1, initial=0.0)
        finite = np.where(np.isfinite(self.log_weight), np.abs(self.log_weight), 0.0).max(axis=-1, initial=0.0)
        eta = eta + u * (2 * finite + 2)
        rho = 2 * np.expm1(np.minimum(eta, 1.0)) + u * (2 * n + 4 * FUNCTION)
        used = np.isfinite(self.log_weight)[..., None]
        spreads, means = [], []
        for x in (self.k, self.v):
            middle = np.where(used, x, 0).sum(axis=-2) / np.maximum(used.sum(axis=-2), 1)
            spread = 2 * largest(np.where(used, x - middle[..., None, :], 0.0))
            spreads.append(spread)
            means.append(2 * rho * spread + u * (2 * n + 8) * largest(np.where(used, x, 0.0)))
        (dk, dv), (ek, ev) = spreads, means
        own = [x.max(axis=tuple(range(x.ndim)[len(eta.shape) :]), initial=0.0) for x in map(np.abs, self[3:])]
        squares = (rho + u * (n + 8)) * (dk**2 + own[0]) + 4 * dk * ek + 2 * ek**2
        products = (rho + u * (n + 8 + 4 * d)) * (dk * dv + own[1]) + 2 * (dk * ev + dv * ek + ek * ev)
        return Totals(
            eta + u * (2 * n + 4 * FUNCTION + finite), ek[..., None], ev[..., None], squares[..., None],
            (d + 1) * products[..., None, None],
        )  # fmt: skip


def assert_totals(library: Library, x: Summaries, exact: Points, u: float, *, covariance: bool = False) -> None:
    """The state's totals are those of the points; of the covariance only where its rank is not cut."""
    error = exact.error(library.numpy(x.anchor), u)
    pairs = zip(Totals._fields, Points.of_summaries(library, x).totals(), exact.totals(), error, strict=True)
    for name, actual, expected, most in pairs:
        if name != "covariance" or covariance:
            assert_within(actual, expected, most)


def window_of(
    library: Library, case: Case, purpose: int = 20, *, still: bool = False
) -> tuple[QueryWindow, np.ndarray]:
    """Recent queries of a case whose variance has no zero (or is zero everywhere), and their mean."""
    rng = case.rng(purpose)
    mean = case.rounded(rng.standard_normal((*case.lead, case.d)) / (1e4 if case.law == "huge keys" else 1.0))
    variance = case.rounded((0.0 if still else 1.0) * rng.uniform(0.1, 2.0, (*case.lead, case.d)))
    return QueryWindow(library.asarray(mean), library.asarray(variance)), f64(mean)


def formula(library: Library, q: np.ndarray, x: Summaries, scale: float) -> oracle.State:
    """The estimate straight from the arrays of a state (docs/derivations/summaries.md)."""
    a = {name: oracle.to_query_heads(library.numpy(y), q.shape[-3], axis) for (name, y), axis in zip(
        x.arrays().items(), (-1, -2, -2, -3, -3, -2, -3, -3, -1, -1), strict=True)}  # fmt: skip
    off = scale * f64(q) - a["anchor"][..., None, :]
    products = a["log_weight"][..., None, :] + np.einsum("...id,...md->...im", off, a["key_mean"])
    shares, lse = oracle.softmax(products)
    gain = a["strength"][..., None] / 2 * np.einsum("...id,...d->...i", off**2, a["key_variance"])
    linear = np.einsum("...vr,...rd,...id->...iv", a["slope_left"], a["slope_right"], off)
    out = np.einsum("...im,...mv->...iv", shares, a["value_mean"]) + linear
    some = (a["count"] > 0)[..., None, None]
    return oracle.State(np.where(some, out, 0.0), lse + np.minimum(gain, a["cap"][..., None]))


def formula_error(
    library: Library, q: np.ndarray, x: Summaries, scale: float, u: float, *reach: np.ndarray
) -> StateError:
    """Rounding of the estimate: every product of d terms errs by u (d + 8) of its magnitude; `reach` are further
    anchors, whose way is walked too. Outputs move with the lse as in `attention_error`."""
    a = {name: np.abs(library.numpy(y)) for name, y in x.arrays().items()}
    d, m = a["anchor"].shape[-1], a["log_weight"].shape[-1]
    far = sum(np.abs(f64(b)) for b in (a["anchor"], *reach))
    length = default_scale(q, scale) * np.abs(f64(q)).reshape(*far.shape[:-1], -1, d).max(axis=-2) + far
    weight = np.where(np.isfinite(a["log_weight"]), a["log_weight"], 0.0).max(axis=-1)
    keys = (a["key_mean"] * length[..., None, :]).sum(axis=-1).max(axis=-1)
    gain = a["strength"] * (length**2 * a["key_variance"]).sum(axis=-1)
    eta = u * (d + 8) * (2 + len(reach)) * (weight + keys + 2 * gain) + u * (2 * m + 4 * FUNCTION)
    linear = np.einsum("...vr,...rd,...d->...v", a["slope_left"], a["slope_right"], length).max(axis=-1)
    size = np.linalg.norm(a["value_mean"], axis=-1).max(axis=-1) + linear * np.sqrt(a["value_mean"].shape[-1])
    out = 2 * size * (np.tanh(eta) + u * (2 * m + 2 * d + 4 * FUNCTION))
    out, eta = (oracle.to_query_heads(e, q.shape[-3], -1)[..., None] for e in (out, eta))
    return StateError(out[..., None], eta)
