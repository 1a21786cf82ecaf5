"""The paper's correction."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array
from momentkv._numbers import is_one_of
from momentkv.statistics.corrections.base import Correction
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.window import QueryWindow

__all__ = ["PaperMoments"]


@dataclasses.dataclass(frozen=True)
class PaperMoments(Correction):
    """Count, means and value-key co-moment, expanded around the zero query.

    Source: MomentKV (arXiv 2606.01563). See `momentkv.statistics.moments.Moments`.

    Parameters
    ----------
    order : {1, 0}
        0 keeps the means only.

    Raises
    ------
    ValueError
        If the order is another one.
    """

    name: ClassVar[str] = "moments"
    calibration: ClassVar[float] = 0.21
    vectors: ClassVar[tuple[str, ...]] = ("key_mean", "value_key", "value_mean")
    couples_heads: ClassVar[bool] = False
    order: int = 1

    def __post_init__(self) -> None:
        if not is_one_of((0, 1), self.order):
            raise ValueError(f"order is {self.order!r}; use 1 (the paper's) or 0 (means only)")

    def of_order(self, order: int) -> PaperMoments:
        return dataclasses.replace(self, order=min(order, self.order))

    def empty(self, k: Array, v: Array) -> Moments:
        return Moments.empty(k, v, order=self.order)

    def fold(self, state: Moments, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> Moments:
        return state.update(k, v, mask=mask)

    def expansion(self, state: Moments) -> Expansion:
        return state.expansion(order=self.order)
