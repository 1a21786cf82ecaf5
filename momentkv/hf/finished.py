"""Rows of a batch that have ended: the padding that ``generate`` then feeds them is not text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from momentkv.hf.cache import MomentCache
from momentkv.hf.layer import MomentLayer

__all__ = ["FinishedRows"]


class FinishedRows(StoppingCriteria):
    """Tells a cache which rows have ended, so that it treats what ``generate`` feeds them afterwards as padding.

    ``generate`` goes on until all rows have ended. Until then it feeds padding to the rows that have, and the attention
    mask calls that padding real, so a cache cannot know it. This object tells the cache. It stops the rows that its
    ``criteria`` stop, and no others.

    Parameters
    ----------
    cache : MomentCache
    eos_token_id : int or sequence of int, optional
        The token that ends a row. It is still read.
    criteria : sequence of StoppingCriteria
        Other criteria that end a row, such as transformers' `StopStringCriteria` instead of ``stop_strings``. Pass them
        here, and not to ``generate``.

    Raises
    ------
    ValueError
        If the cache is static, or neither an end token nor a criterion is given.

    Notes
    -----
    For greedy and sampled generation; beam search drops ended rows itself. Needed only if the cache is used again. Then
    pass a mask with zeros at that padding in the next turn. Before transformers 5.17, make one for each call of
    ``generate``.

    Examples
    --------
    >>> ended = FinishedRows(cache, tokenizer.eos_token_id, [StopStringCriteria(tokenizer, ["."])])  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache, stopping_criteria=[ended])                     # doctest: +SKIP
    """

    def __init__(
        self,
        cache: Any,
        eos_token_id: int | Sequence[int] | None = None,
        criteria: Sequence[StoppingCriteria] = (),
    ) -> None:
        if not isinstance(cache, MomentCache):
            raise TypeError(f"cache is a {type(cache).__name__}; FinishedRows is for a MomentCache")
        if cache.static is not None:
            raise ValueError(
                "FinishedRows needs a cache with static=False: which rows have ended is decided on the host; or mask "
                "the pads of ended rows in a loop of your own"
            )
        given = [] if eos_token_id is None else eos_token_id
        given = [given] if isinstance(given, int) else list(given)
        if not given and not criteria:
            raise ValueError(f"eos_token_id is {eos_token_id} and criteria is empty; say by either what ends a row")
        self.cache, self.criteria = cache, list(criteria)
        self.ends = torch.tensor(given, dtype=torch.int64)
        # Of the cache, when this was asked last: calls of ``generate``, and tokens that had been read.
        self.call, self.read = 0, -1
        # Rows that had ended before the newest token.
        self.ended = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called by ``generate`` with all tokens so far, before the newest have been read."""
        rows, call, read = len(input_ids), self.cache.calls, int(self.cache.get_seq_length())
        if (call, read) != (self.call, self.read + 1) or len(self.ended) != rows:  # another call of generate
            self.ended = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        self.call, self.read = call, read
        for layer in self.cache.layers:
            if isinstance(layer, MomentLayer):
                layer.ended = (read + 1, self.ended) if bool(self.ended.any()) else None
        stopped = torch.zeros_like(self.ended)
        for criterion in self.criteria:
            stopped = stopped | criterion(input_ids, scores, **kwargs)
        self.ended = self.ended | stopped | torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        return stopped
