"""What a layer keeps of the readings of a text: the newest queries of the first, the scores of the second."""

from __future__ import annotations

import torch

from momentkv.cache.config import wanted_queries
from momentkv.cache.layer import LayerCache
from momentkv.cache.rereading import reread, take_scores

__all__ = ["LayerReader", "suffix_with"]


class LayerReader:
    """For one compressed layer while a text is read: the newest queries of the first reading, then the scores of the
    second.

    Attributes
    ----------
    again : bool
        Whether passes are of the second reading, which is not stored.
    tries : bool
        Whether passes are of a trial, of which nothing is kept here.
    queries : tensor, shape (batch, q_head, m, d), or None
    real : bool tensor, shape (batch, m), or None
        Which of the queries are no padding; None for all.
    scores : tensor, shape (batch, kv_head, n), or None
    stored : tensor, shape (batch, kv_head, n), or None
        Scores before this second reading.
    """

    def __init__(self, core: LayerCache) -> None:
        self.core = core
        self.again = self.tries = False
        self.queries: torch.Tensor | None = None
        self.real: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.stored: torch.Tensor | None = None
        self.keep = wanted_queries([self.core.config.policy])

    def read(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Keep the newest queries of the first reading, as many as policy and correction need.

        Parameters
        ----------
        query : tensor, shape (batch, q_head, n, d)
        valid : bool tensor, shape (batch, 1, n), or None
            False for padding.
        """
        if self.tries:
            return
        query, before = query.detach(), self.queries
        queries = query if before is None else torch.cat([before, query], dim=2)
        if valid is not None or self.real is not None:
            old = () if before is None else (self.real_of(before, self.real),)
            self.real = torch.cat([*old, self.real_of(query, None if valid is None else valid[:, 0])], dim=1)
        if self.keep is not None:
            last = self.keep if self.real is None else suffix_with(self.real, self.keep)
            queries = queries[:, :, -last:].clone()
            self.real = None if self.real is None else self.real[:, -last:]
        self.queries = queries

    @staticmethod
    def real_of(queries: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Which queries are no padding, all of them if nothing is known."""
        rows, _, n, _ = queries.shape
        return torch.ones(rows, n, dtype=torch.bool, device=queries.device) if real is None else real.bool()

    def end_first(self) -> None:
        """Show the first reading to the layer's policy and correction."""
        if self.queries is None:
            raise RuntimeError("the layer has attended to nothing yet; let the model read the text first")
        self.stored = self.core.attention
        self.show(self.queries)
        self.queries = self.real = None

    def show(self, queries: torch.Tensor) -> None:
        """Show queries to the layer's policy and correction; the next eviction is theirs."""
        self.core.recording = False
        self.core.observe(queries)

    def reread(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Output of a pass of the second reading, whose scores are kept."""
        out, scores = reread(self.core, query, keys, values, valid=valid)
        self.scores = scores if self.scores is None else torch.maximum(self.scores, scores)
        return out

    def end_second(self) -> None:
        """Give the layer the scores of the second reading, in place of what its policy saw of the first."""
        if self.scores is not None and self.stored is not None:
            # What was stored before has scores from its own second reading.
            take_scores(self.core, torch.maximum(self.scores, self.stored))


def suffix_with(real: torch.Tensor, keep: int) -> int:
    """How many of the last places hold so many that are True, or all of them, in every row of ``real`` (batch, n).

    Examples
    --------
    >>> suffix_with(torch.tensor([[1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]]).bool(), 2)
    4
    """
    counts = real.flip(-1).cumsum(-1)
    enough = counts[:, -1:].clamp(max=keep)
    return int((counts < enough).sum(-1).max()) + 1
