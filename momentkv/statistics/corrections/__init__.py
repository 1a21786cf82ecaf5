"""What stands for evicted tokens in a cache: corrections, and the names they are chosen by."""

from __future__ import annotations

from typing import Literal

from momentkv._numbers import is_one_of
from momentkv.statistics.corrections.base import Correction
from momentkv.statistics.corrections.moments import PaperMoments
from momentkv.statistics.corrections.narrow import NarrowCorrection
from momentkv.statistics.corrections.none import NoCorrection, NoStatistics
from momentkv.statistics.corrections.summaries import AnchoredSummaries

__all__ = [
    "CORRECTIONS",
    "AnchoredSummaries",
    "Correction",
    "CorrectionName",
    "NarrowCorrection",
    "NoCorrection",
    "NoStatistics",
    "PaperMoments",
    "get_correction",
]

CorrectionName = Literal["none", "order-0", "order-1", "summaries", "moments"]

# Every name that chooses a correction: in a cache, in files and on the command line. All else is derived from here.
CORRECTIONS: dict[str, Correction] = {
    "none": NoCorrection(),
    "order-0": PaperMoments(order=0),
    "order-1": PaperMoments(),
    "summaries": AnchoredSummaries(),
    "moments": PaperMoments(),
}


def get_correction(correction: str | Correction, *, order: int | None = 1, bits: int | None = None) -> Correction:
    """A correction by its name, or the given one, of at most the given order.

    Parameters
    ----------
    correction : str or Correction
        A name of `CORRECTIONS`, or an object.
    order : {1, 0, None}
        The highest order that is used. None is ``"none"``, whatever the correction.
    bits : {None, 16}
        Of the numbers of its state: see `momentkv.statistics.narrow`. None for full precision.

    Raises
    ------
    ValueError
        If no correction has that name, it has no such order, or ``bits`` is another number.

    Examples
    --------
    >>> get_correction("summaries")
    AnchoredSummaries(summaries=12, rank=2, strength=0.75, calibrated=True)
    >>> get_correction("moments", order=0), get_correction("moments", order=None)
    (PaperMoments(order=0), NoCorrection())
    """
    if order is not None and not is_one_of((0, 1), order):
        raise ValueError(f"order is {order!r}; use None (plain eviction), 0 or 1")
    if not isinstance(correction, Correction):
        if not isinstance(correction, str) or correction not in CORRECTIONS:
            raise ValueError(
                f"correction is {correction!r}; use one of {', '.join(CORRECTIONS)}, or a Correction object"
            )
        correction = CORRECTIONS[correction]
    if bits is not None and not is_one_of((16,), bits):
        raise ValueError(f"statistics_bits is {bits!r}; use 16, or None for full precision")
    chosen = NoCorrection() if order is None else correction.of_order(order)
    return chosen if bits is None or not chosen.exact.vectors else NarrowCorrection(chosen.exact)
