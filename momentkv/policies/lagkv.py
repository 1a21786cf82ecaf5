"""Keep the tokens that stand out against those that follow."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace, device
from momentkv._numbers import whole_number
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.turns import ranks
from momentkv.statistics.weights import positive

__all__ = ["LagKV"]


@dataclasses.dataclass(frozen=True)
class LagKV(Policy):
    r"""How unevenly a token's channels lie in the ranges that the next tokens span, keys and values alike.

    Tokens are divided into runs of ``lag``. In each run, with minimum and maximum of each channel taken over the run
    that follows it,

    $$ \bar x_j = \frac{x_j - \min}{\max - \min}, \qquad
       s_j = \mathrm{softmax}_j\,\mathrm{std}(\bar k_j) + \mathrm{softmax}_j\,\mathrm{std}(\bar v_j) $$

    with the standard deviation over channels and the softmax over the run. All runs are treated alike: importance is
    ``(1/2 - place) / length``, place 1 being the largest ``s_j`` of the run. The last run has no next run to compare
    with, so it is ranked above all others, later tokens higher. Needs keys and values, and no attention.

    Parameters
    ----------
    lag : int
        Length of a run, at least 2. The last ``lag`` tokens go last, so it should be well below the budget; the
        default is that of the cache's window.

    Notes
    -----
    Source: LagKV (arXiv 2504.04704). There a run keeps its best tokens when it is compressed, sinks are set apart
    first, and runs are counted from there, so that the last run and a remainder stay whole; lags are 128 and more.
    Here runs are counted from the end over the tokens at hand, whatever was evicted between them; only the first may
    be shorter. Sinks and window are the cache's. A channel that the next run holds constant counts as 0.
    """

    name: ClassVar[str] = "lagkv"
    lag: int = 32

    def __post_init__(self) -> None:
        if whole_number("lag", self.lag) < 2:
            raise ValueError(f"lag is {self.lag}; use runs of at least 2 tokens")

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys, tokens.values)
        arrays = accumulate(xp, tokens.keys, tokens.values)
        real = tokens.positions >= 0
        # Real slots to the end, in order, and runs counted from there.
        order = xp.argsort(xp.astype(real, xp.int32), axis=-1, stable=True)
        n = order.shape[-1]
        held = runs(xp.take_along_axis(real, order, axis=-1)[..., None], self.lag)[..., 0]
        scores = []
        for x in arrays:
            x = xp.where(real[..., None], x, xp.zeros_like(x))
            x = xp.take_along_axis(x, order[..., None], axis=-2)
            scores.append(against_next(runs(x, self.lag), held))
        score = scores[0] + scores[1]
        count = xp.astype(held, score.dtype)
        length = positive(xp, xp.sum(count[..., :-1, :], axis=-1, keepdims=True))
        places = (ranks(score, held[..., :-1, :]) - 0.5) / length
        importance = xp.concat([-places, xp.cumulative_sum(count[..., -1:, :], axis=-1)], axis=-2)
        importance = xp.reshape(importance, (*importance.shape[:-2], -(-n // self.lag) * self.lag))
        return xp.take_along_axis(importance[..., -n % self.lag :], xp.argsort(order, axis=-1, stable=True), axis=-1)


def runs(x: Array, lag: int) -> Array:
    """Part (..., n, c) into runs of ``lag`` counted from the end: (..., runs, lag, c), the first filled with zeros.

    Examples
    --------
    >>> import numpy as np
    >>> runs(np.array([[1.0], [2.0], [3.0]]), 2)[..., 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    xp = array_namespace(x)
    *lead, n, c = x.shape
    fill = xp.zeros((*lead, -n % lag, c), dtype=x.dtype, device=device(x))
    return xp.reshape(xp.concat([fill, x], axis=-2), (*lead, -(-n // lag), lag, c))


def against_next(x: Array, held: Array) -> Array:
    """Score of the tokens of all runs but the last, shape (..., runs - 1, lag): softmax of their channels' spread."""
    xp = array_namespace(x)
    low = xp.min(x[..., 1:, :, :], axis=-2, keepdims=True)
    span = xp.max(x[..., 1:, :, :], axis=-2, keepdims=True) - low
    own, held = x[..., :-1, :, :], held[..., :-1, :]
    scaled = xp.where(span > 0, (own - low) / positive(xp, span), xp.zeros_like(own))
    off = scaled - xp.mean(scaled, axis=-1, keepdims=True)
    spread = xp.sqrt(xp.mean(off * off, axis=-1))
    spread = xp.where(held, spread, xp.zeros_like(spread))
    power = xp.exp(spread - xp.max(spread, axis=-1, keepdims=True)) * xp.astype(held, spread.dtype)
    return power / positive(xp, xp.sum(power, axis=-1, keepdims=True))
