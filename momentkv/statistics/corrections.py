"""What stands for evicted tokens in a cache: the choice between kinds of moments, by name."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

from momentkv._array import Array
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

__all__ = ["CORRECTIONS", "AnchoredSummaries", "Correction", "PaperMoments", "get_correction"]


class Correction(abc.ABC):
    """How a cache folds evicted tokens; the state it makes knows its own arrays, bytes and estimate.

    Attributes
    ----------
    name : str
        The name it is chosen by.
    anchored : bool
        Whether it needs to know recent queries.
    calibration : float
        Median true error over median uncalibrated estimate (`momentkv.trust.estimated_error`), 1 where nobody measured
        it; those here are of SmolLM2-135M on the text "compound" (2,048 tokens, budget 256), see docs/certificates.md.
    """

    name: ClassVar[str] = ""
    anchored: ClassVar[bool] = False
    calibration: ClassVar[float] = 1.0

    @abc.abstractmethod
    def empty(self, k: Array, v: Array, *, order: int) -> Any:
        """State of the empty set."""

    @abc.abstractmethod
    def fold(self, state: Any, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> Any:
        """State with the masked tokens added."""

    def calibrate(self, state: Any, q: Array, k: Array, *, scale: float, mask: Array) -> Any:
        """State fitted to queries while the tokens that it stands for are still at hand; unchanged by default."""
        return state

    def expansion(self, state: Any, *, order: int | None = None) -> Expansion:
        """The estimate that attention is corrected by, of the order of the cache; by default the state's own."""
        return state.expansion()

    def known(self, state: Any) -> Moments:
        """What policies are shown of the state: weight and means of all tokens, by default itself."""
        known: Moments = state
        return known

    def stand_in(self) -> Correction:
        """A cheap correction that ranks budgets as this one does, to measure errors with before the first eviction."""
        return self


@dataclasses.dataclass(frozen=True)
class PaperMoments(Correction):
    """The paper's: count, means and value-key co-moment, expanded around the zero query.

    Source: MomentKV (arXiv 2606.01563). See `momentkv.statistics.moments.Moments`.
    """

    name: ClassVar[str] = "moments"
    calibration: ClassVar[float] = 0.21

    def empty(self, k: Array, v: Array, *, order: int) -> Moments:
        return Moments.empty(k, v, order=order)

    def fold(self, state: Moments, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> Moments:
        return state.update(k, v, mask=mask)

    def expansion(self, state: Moments, *, order: int | None = None) -> Expansion:
        return state.expansion(order=state.order if order is None else order)


@dataclasses.dataclass(frozen=True)
class AnchoredSummaries(Correction):
    """Several anchored summaries with a shared variance and slope: see `momentkv.statistics.summaries.Summaries`.

    Parameters
    ----------
    summaries : int
    rank : int
        Of the slope; a cache of order 0 has none.
    strength : float
        Of the variance gain, before calibration.
    calibrated : bool
        Whether the strength is fitted at the first eviction, where a prefill's queries are at hand.
    """

    name: ClassVar[str] = "summaries"
    anchored: ClassVar[bool] = True
    calibration: ClassVar[float] = 0.084
    summaries: int = 12
    rank: int = 2
    strength: float = 0.75
    calibrated: bool = True

    def empty(self, k: Array, v: Array, *, order: int) -> Summaries:
        rank = self.rank if order else 0
        return Summaries.empty(k, v, summaries=self.summaries, rank=rank, strength=self.strength)

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


CORRECTIONS: dict[str, type[Correction]] = {kind.name: kind for kind in (PaperMoments, AnchoredSummaries)}


def get_correction(correction: str | Correction) -> Correction:
    """A correction by its name, or the given one.

    Raises
    ------
    ValueError
        If no correction has that name.

    Examples
    --------
    >>> get_correction("summaries")
    AnchoredSummaries(summaries=12, rank=2, strength=0.75, calibrated=True)
    """
    if isinstance(correction, Correction):
        return correction
    if correction not in CORRECTIONS:
        names = ", ".join(sorted(CORRECTIONS))
        raise ValueError(
            f"correction is {correction!r}; use one of {names}, or a Correction object (order=None is plain eviction)"
        )
    return CORRECTIONS[correction]()
