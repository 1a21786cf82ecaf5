"""Rows of a batch that have ended: the pads that ``generate`` feeds them are no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from momentkv.hf.layer import MomentLayer

__all__ = ["FinishedRows"]


class FinishedRows(StoppingCriteria):
    """Tells a cache which rows have ended, so that what ``generate`` feeds them afterwards is padding.

    A row that has reached its end token goes through ``generate`` until all have, fed pads that the attention mask
    calls real. A cache cannot tell them from tokens; this can. It never stops anything.

    Parameters
    ----------
    cache : MomentCache
    eos_token_id : int or sequence of int
        What ends a row. The end token itself is still read.

    Raises
    ------
    ValueError
        If the cache is static.

    Notes
    -----
    For greedy and sampled generation (beam search drops ended rows itself); needed only where the cache is used
    again afterwards. Then pass a mask with zeros at the pads in the next turn.

    Examples
    --------
    >>> model.generate(                                                                  # doctest: +SKIP
    ...     **inputs, past_key_values=cache, stopping_criteria=[FinishedRows(cache, tokenizer.eos_token_id)])
    """

    def __init__(self, cache: Any, eos_token_id: int | Sequence[int]) -> None:
        if cache.static is not None:
            raise ValueError(
                "FinishedRows needs a cache with static=False: which rows have ended is decided on the host; or mask "
                "the pads of ended rows in a loop of your own"
            )
        self.cache = cache
        self.ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
        self.length = self.start = -1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called by ``generate`` with all tokens so far, before the newest have been read."""
        length = input_ids.shape[1]
        if length != self.length + 1:  # another call of generate
            self.start = length - 1
        self.length = length
        ended = torch.isin(input_ids[:, self.start : -1], self.ends.to(input_ids.device)).any(1)
        for layer in self.cache.layers:
            if isinstance(layer, MomentLayer):
                layer.ended = (length, ended) if bool(ended.any()) else None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
