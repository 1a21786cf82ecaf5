"""Intervals of 95 %, by SciPy, which is imported when the first one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["bootstrap", "spread", "wilson"]

DRAWS, SEED = 2000, 0


def wilson(found: int, of: int) -> tuple[float, float]:
    """Wilson's interval of a share.

    Examples
    --------
    >>> [round(x, 2) for x in wilson(10, 10)]
    [0.72, 1.0]
    """
    from scipy.stats import binomtest

    ends = binomtest(found, of).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)


def bootstrap(sums: Sequence[float], counts: Sequence[float] | None = None) -> tuple[float, float]:
    """Percentiles of the mean of groups, given as sum and count (by default 1), that are drawn with replacement.

    One group has no interval: its mean is given twice.

    Examples
    --------
    >>> [round(x, 2) for x in bootstrap([1, 0] * 20)]
    [0.35, 0.65]
    """
    from scipy.stats import bootstrap as drawn

    groups = np.asarray(sums, float), np.ones(len(sums)) if counts is None else np.asarray(counts, float)
    if len(sums) == 1:
        only = float(groups[0][0] / groups[1][0])
        return only, only

    def mean(sums: Any, counts: Any, axis: int = -1) -> Any:
        return sums.sum(axis) / counts.sum(axis)

    ends = drawn(
        groups,
        mean,
        paired=True,
        vectorized=True,
        n_resamples=DRAWS,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(ends.low), float(ends.high)


def spread(found: Sequence[float], of: Sequence[float]) -> tuple[float, float]:
    """Of the share of values found: a bootstrap over haystacks, or Wilson's interval where all questions agree.

    Parameters
    ----------
    found, of : sequence of float
        Values found, and questions, of each haystack.

    Notes
    -----
    Questions about one haystack are not independent, so haystacks are drawn, with all their questions. Where every
    question has the same result the bootstrap has no width and says too much; Wilson's interval then counts haystacks.
    """
    total = sum(found)
    if total in (0, sum(of)):
        return wilson(len(of) * bool(total), len(of))
    return bootstrap(found, of)
