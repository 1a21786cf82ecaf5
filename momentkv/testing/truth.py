"""Exact quantities of a batch in extended precision, and outcomes of checks against them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from momentkv.bounds.theorems import Interval
from momentkv.testing.adversaries import Batch

__all__ = ["LONG", "UNIT", "Floats", "Outcome", "Truth", "above", "norm"]

LONG = np.longdouble
UNIT = float(np.finfo(LONG).eps) / 2
Floats = NDArray[Any]


class Outcome(NamedTuple):
    """Result of one check of a batch.

    Attributes
    ----------
    violated : bool array, shape (heads,)
    tightness : array
        Bound over actual, where the actual is well above rounding.
    """

    violated: Floats
    tightness: Floats


@dataclasses.dataclass(frozen=True)
class Truth:
    """Exact quantities of a batch in extended precision, one query a head; names as in the theorems."""

    x: Floats
    share: Floats
    weight: Floats
    base: Floats
    kappa: Floats
    deviation: Floats
    slope: Floats
    key_mean: Floats
    value_mean: Floats
    value: Floats
    radius: Floats
    trace: Floats
    query: Floats
    eta: Floats
    value_error: Floats

    @property
    def lse(self) -> Floats:
        """Log of the softmax sum."""
        return self.base + self.kappa

    @classmethod
    def of(cls, batch: Batch) -> Truth:
        """Straight from the definitions."""
        q, k, v, w = (x.astype(LONG) for x in (batch.q[:, 0], batch.k, batch.v, batch.w))
        q = q * LONG(batch.scale)
        n, d = k.shape[-2:]
        weight = w.sum(axis=-1)
        share = w / weight[:, None]

        def mean_of(x: Floats) -> Floats:
            mean = (share[..., None] * x).sum(axis=-2)
            return mean + (share[..., None] * (x - mean[:, None])).sum(axis=-2)

        key_mean, value_mean = mean_of(k), mean_of(v)
        off_k, off_v = k - key_mean[:, None], v - value_mean[:, None]
        x = (off_k * q[:, None]).sum(axis=-1)
        top = x.max(axis=-1)
        powers = share * np.exp(x - top[:, None])
        total = powers.sum(axis=-1)
        size = (np.abs(q)[:, None] * np.abs(k)).sum(axis=-1).max(axis=-1)
        eta = UNIT * (4 * n + 2 * d + 16) * 2 * size
        largest = np.sqrt((v * v).sum(axis=-1)).max(axis=-1)
        tilted = powers / total[:, None]
        return cls(
            x=x,
            share=share,
            weight=weight,
            base=np.log(weight) + (q * key_mean).sum(axis=-1),
            kappa=np.maximum(np.log(total) + top, 0),
            deviation=np.sqrt((share * x * x).sum(axis=-1)),
            slope=(share[..., None] * x[..., None] * off_v).sum(axis=-2),
            key_mean=key_mean,
            value_mean=value_mean,
            value=value_mean + (tilted[..., None] * off_v).sum(axis=-2),
            radius=np.sqrt((off_v * off_v).sum(axis=-1)).max(axis=-1),
            trace=(share * (off_v * off_v).sum(axis=-1)).sum(axis=-1),
            query=q,
            eta=eta,
            value_error=UNIT * (8 * n + 32) * largest + 4 * largest * np.tanh(eta),
        )

    @property
    def logits(self) -> Interval:
        """True range, widened by the rounding of this check."""
        return Interval(np.minimum(self.x.min(axis=-1), 0) - self.eta, np.maximum(self.x.max(axis=-1), 0) + self.eta)

    @property
    def spread(self) -> Interval:
        """Of the standard deviation, widened likewise."""
        slack = self.eta + UNIT * (self.x.shape[-1] + 16) * self.deviation
        return Interval(np.maximum(self.deviation - slack, 0), self.deviation + slack)

    @property
    def tail(self) -> Floats:
        """Rounding of the slope."""
        n = self.x.shape[-1]
        largest = np.abs(self.x).max(axis=-1)
        return (2 * self.eta + UNIT * (n + 16) * largest) * self.radius + largest * self.value_error

    def mass_slack(self) -> Floats:
        """Rounding of the true mass and of its bounds."""
        n = self.x.shape[-1]
        return self.eta + 64 * UNIT * (n + np.abs(self.x).max(axis=-1) + self.kappa)


def norm(x: Floats) -> Floats:
    """Euclidean length along the last axis."""
    return np.sqrt((x * x).sum(axis=-1))


def above(actual: Floats, bound: Floats, slack: Floats | float) -> Outcome:
    """Outcome where ``actual <= bound + slack`` must hold."""
    slack = np.broadcast_to(np.asarray(slack), actual.shape)
    with np.errstate(invalid="ignore"):
        violated = ~(actual <= bound + slack)
    telling = (actual > 1e4 * slack) & (actual > 1e-300) & np.isfinite(bound)
    ratio = np.asarray(bound, dtype=LONG)[telling] / actual[telling]
    return Outcome(np.asarray(violated), ratio.astype(np.float64))
