"""The recommended correction."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array
from momentkv.statistics.corrections.base import Correction
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import Summaries
from momentkv.statistics.window import QueryWindow

__all__ = ["AnchoredSummaries"]


@dataclasses.dataclass(frozen=True)
class AnchoredSummaries(Correction):
    """Several anchored summaries with a shared variance and slope: see `momentkv.statistics.summaries.Summaries`.

    Parameters
    ----------
    summaries : int
    rank : int
        Of the slope; 0 for none, which is order 0.
    strength : float
        Of the variance gain, before calibration.
    calibrated : bool
        Whether the strength is fitted at the first eviction, where a prefill's queries are at hand.
    """

    name: ClassVar[str] = "summaries"
    anchored: ClassVar[bool] = True
    calibration: ClassVar[float] = 0.084
    couples_heads: ClassVar[bool] = False
    # In this order, arrays that a backend reads together lie together.
    vectors: ClassVar[tuple[str, ...]] = (
        "key_mean", "slope_right", "value_mean", "slope_left", "anchor", "key_variance",
    )  # fmt: skip
    summaries: int = 12
    rank: int = 2
    strength: float = 0.75
    calibrated: bool = True

    @property
    def order(self) -> int:
        return 1 if self.rank else 0

    def of_order(self, order: int) -> AnchoredSummaries:
        return self if order >= self.order else dataclasses.replace(self, rank=0)

    def empty(self, k: Array, v: Array) -> Summaries:
        return Summaries.empty(k, v, summaries=self.summaries, rank=self.rank, strength=self.strength)

    def fold(self, state: Summaries, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> Summaries:
        if window is None:
            raise ValueError("window is None, but summaries are anchored at recent queries; pass a QueryWindow")
        return state.update(k, v, window, mask=mask)

    def calibrate(self, state: Summaries, q: Array, k: Array, *, scale: float, mask: Array) -> Summaries:
        return state.calibrate(q, k, scale=scale, mask=mask) if self.calibrated else state

    def known(self, state: Summaries) -> Moments:
        return state.pooled()

    def stand_in(self) -> AnchoredSummaries:
        # One summary needs no grouping.
        return AnchoredSummaries(summaries=1, rank=0, calibrated=False)
