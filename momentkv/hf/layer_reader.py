"""What a layer keeps of the readings of a text: the newest queries of the first, the scores of the second."""

from __future__ import annotations

import torch

from momentkv.cache.config import wanted_queries
from momentkv.cache.layer import LayerCache
from momentkv.cache.rereading import reread, take_scores

__all__ = ["LayerReader"]


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
    scores : tensor, shape (batch, kv_head, n), or None
    stored : tensor, shape (batch, kv_head, n), or None
        Scores before this second reading.
    """

    def __init__(self, core: LayerCache) -> None:
        self.core = core
        self.again = self.tries = self.padded = False
        self.queries: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.stored: torch.Tensor | None = None
        self.keep = wanted_queries([self.core.config.policy])

    def read(self, query: torch.Tensor, *, padded: bool) -> None:
        """Keep the newest queries of the first reading, as many as policy and correction need."""
        if self.tries:
            return
        self.padded = self.padded or padded
        both = [x for x in (self.queries, query.detach()) if x is not None]
        queries = torch.cat(both, dim=2) if len(both) > 1 else both[0]
        # Of padded rows, the newest tokens may lie anywhere.
        self.queries = queries if self.padded or self.keep is None else queries[:, :, -self.keep :].clone()

    def end_first(self) -> None:
        """Show the first reading to the layer's policy and correction."""
        if self.queries is None:
            raise RuntimeError("the layer has attended to nothing yet; let the model read the text first")
        self.stored = self.core.attention
        self.show(self.queries)
        self.queries = None

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
