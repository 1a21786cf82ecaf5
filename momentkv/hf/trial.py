"""Trying ways to compress a text on its own last tokens, before it is compressed in the one that did best.

What is before the last tokens is compressed in several ways, and the model predicts the last tokens from each. The
change of its predictions, against those from all that was read, is measured where it counts, on tokens that had no
part in the choice of what to keep.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from momentkv.cache.coded_budget import CODES
from momentkv.cache.rereading import take_scores
from momentkv.cache.second_reading import RereadBudget
from momentkv.codes import USUAL

if TYPE_CHECKING:
    from momentkv.hf.reading import Reading

__all__ = ["SHARES", "Trial", "Tried", "changes_of", "climb"]

# Shares of the budget for what a second reading looks for.
SHARES = (0.3, 0.6, 0.9)
# Positions whose predictions are compared at once.
POSITIONS = 32

T = TypeVar("T")


class Tried(NamedTuple):
    """A way to compress that was tried.

    Attributes
    ----------
    bits : pair of int, or None
        Of keys and values of retained tokens; None for those of the model.
    share : float or None
        Of the budget, for what a second reading looks for; None where there was none.
    kl : float
        KL(all that was read || compressed) of the predictions, in nats, mean over the tokens that were held back.
    """

    bits: tuple[int, int] | None
    share: float | None
    kl: float


class Trial:
    """Finds the bits, if they are to be chosen, and the share of a second reading that a text's last tokens favour.

    Parameters
    ----------
    reading : Reading
        Of a piece that a cache reads first.
    tokens : int
        Held back at its end.
    """

    def __init__(self, reading: Reading, tokens: int) -> None:
        # Of which this is a part: in a circle, a cache that is dropped would stay in memory.
        self.reading: Any = weakref.proxy(reading)
        self.tokens = tokens
        self.passes = reading.cache.passes
        self.before: list[Any] = []
        self.queries: list[Any] = []
        self.scores: list[Any] = [None] * len(reading.readers)
        self.expected = torch.empty(0)

    def begin(self, predict: Callable[[], torch.Tensor]) -> None:
        """Note what is stored before the tokens that are held back, and what the model predicts of them from it."""
        self.before = self.passes.held()
        self.queries = [reader.queries for reader in self.reading.readers]
        self.expected = predict()

    def note_scores(self) -> None:
        """Note the scores of a second reading of what is before the tokens that are held back."""
        self.scores = [
            None if reader.scores is None else reader.scores[..., : -self.tokens].clone()
            for reader in self.reading.readers
        ]

    def choose(self, bar: Any = None) -> None:
        """Try ways to compress, and leave the layers set to the best: all that was read is still stored then."""
        shared = self.reading.cache.shared_budgets
        chooses_bits = self.reading.cache.chooses_bits
        whole = self.passes.held()
        tried: dict[tuple[Any, Any], torch.Tensor] = {}

        def changes(bits: tuple[int, int] | None, share: float | None) -> torch.Tensor:
            if (bits, share) not in tried:
                tried[bits, share] = self.changes(bits, share)
                if bar is not None:
                    bar.total += self.tokens
                    bar.update(self.tokens)
            return tried[bits, share]

        try:
            share = next((each.share for each in shared if isinstance(each, RereadBudget)), None)
            if all(scores is None for scores in self.scores):
                share = None  # there was no second reading
            bits = self.reading.readers[0].core.config.bits
            if self.evicts():
                if chooses_bits:
                    bits = climb(CODES, USUAL, lambda bits: changes(bits, share))
                if share is not None:
                    offered = sorted({*SHARES, share})
                    share = climb(offered, share, lambda share: changes(bits, share))
        finally:
            self.passes.go_back(whole)
        self.reading.cache.tried = [Tried(*way, float(kl.mean())) for way, kl in tried.items()]
        if tried:
            self.set(bits, share)

    def evicts(self) -> bool:
        """Whether anything before the tokens that are held back has to go."""
        self.passes.go_back(self.before)
        return any(layer.core.is_due for layer in self.reading.layers)

    def changes(self, bits: tuple[int, int] | None, share: float | None) -> torch.Tensor:
        """What a way to compress changes of each prediction."""
        self.passes.go_back(self.before)
        reading = self.reading
        for reader, queries, scores in zip(reading.readers, self.queries, self.scores, strict=True):
            reader.show(queries)
            if scores is not None:
                take_scores(reader.core, scores)
        self.set(bits, share)
        for layer in reading.layers:
            layer.evict()
        for reader in reading.readers:
            reader.again, reader.tries = False, True
        n = reading.piece.ids.shape[1]
        return changes_of(self.expected, reading.pass_over(n - self.tokens, n, logits=True))

    def set(self, bits: tuple[int, int] | None, share: float | None) -> None:
        """Make all layers compress so from now on."""
        for each in self.reading.cache.shared_budgets:
            if isinstance(each, RereadBudget) and share is not None:
                each.take_share(share)
        for layer in self.reading.layers:
            if bits is not None:
                layer.core.code(bits)


def changes_of(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of each prediction in nats, (batch * n), of logits (batch, n, vocabulary).

    Examples
    --------
    >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    >>> changes_of(logits, logits)
    tensor([0., 0.])
    """
    parts = []
    for one, other in zip(*(torch.split(x, POSITIONS, dim=1) for x in (expected, found)), strict=True):
        log_p, log_q = (torch.log_softmax(x.float(), dim=-1) for x in (one, other))
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts, dim=1).flatten()


def climb(offered: Sequence[T], start: T, costs: Callable[[T], torch.Tensor]) -> T:
    """The least costly of what is offered, as far as it goes downhill from one of them.

    A step is downhill if the mean cost falls by more than the standard error of its fall: what differs by less is not
    told apart, and then what is usual stays.

    Parameters
    ----------
    offered : sequence
        In an order in which costs rise on both sides of the best.
    start
        One of them.
    costs : callable
        From one of them to its costs in many cases, the same for all, a tensor (cases,).

    Notes
    -----
    The standard error takes cases for independent. Source of the rule: Breiman et al., Classification and Regression
    Trees (1984), section 3.4.3.

    Examples
    --------
    >>> climb([1, 2, 3, 4, 5], 3, lambda x: torch.tensor([(x - 4.2) ** 2] * 2))
    4
    >>> climb([1, 2], 1, lambda x: torch.tensor([1.0, 3.0]) if x == 1 else torch.tensor([2.5, 1.0]))
    1
    """
    best = offered.index(start)
    for step in (1, -1):
        begun = best
        while 0 <= best + step < len(offered):
            fall = costs(offered[best]) - costs(offered[best + step])
            if not fall.mean() > fall.std(correction=0) / len(fall) ** 0.5:
                break
            best += step
        if best != begun:
            break
    return offered[best]
