"""Budgets as people state them: tokens, a share of what is read, or bytes of the whole cache."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch

from momentkv.cache.layer import LayerCache

__all__ = ["BudgetRule", "Share", "TotalBytes", "parse_budget"]

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*")


class BudgetRule:
    """A budget that is not known in tokens before something is read."""


@dataclasses.dataclass(frozen=True)
class Share(BudgetRule):
    """A share of the tokens read, counted at every prefill and every chunk of one.

    Parameters
    ----------
    share : float
        In (0, 1].
    """

    share: float

    def tokens(self, seen: int, least: int) -> int:
        """Tokens retained a KV head once so many have been read; never fewer than the least possible.

        Examples
        --------
        >>> Share(0.25).tokens(1000, 34), Share(0.25).tokens(100, 34)
        (250, 34)
        """
        return max(least, round(self.share * seen))


@dataclasses.dataclass(frozen=True)
class TotalBytes(BudgetRule):
    """Bytes of the whole cache, everything counted.

    Parameters
    ----------
    total : int
    text : str
        As it was given.
    """

    total: int
    text: str

    def tokens(self, one: LayerCache, layers: int, k: torch.Tensor, v: torch.Tensor, windows: Sequence[int]) -> int:
        """Tokens that each KV head may retain on average, so that the total is not exceeded while decoding either.

        Parameters
        ----------
        one : LayerCache
            One of those that share the total, for its settings.
        layers : int
            Full-attention layers.
        k, v : tensor, shape (batch, kv_head, n, d) and (batch, kv_head, n, dv)
            Of one full-attention layer; all layers must be alike.
        windows : sequence of int
            Tokens that each sliding-window layer stores at most.

        Raises
        ------
        ValueError
            If the total has no room for the least budget.

        Notes
        -----
        A head stores up to ``budget + block`` tokens within a step. Beside keys and values each takes a position and,
        if the policy observes attention, a score.
        """
        batch, kv_heads = k.shape[0], k.shape[1]
        pair = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
        sums = 8 if torch.float64 in (k.dtype, v.dtype) else 4
        token = pair + torch.int32.itemsize + (sums if one.policy.observes != 0 else 0)
        state = one.correction.empty(k[:1, :1, :0], v[:1, :1, :0]).nbytes
        if one.remembers_queries:
            state += 2 * k.shape[-1] * sums
        heads = layers * batch * kv_heads
        sliding = sum(windows) * batch * kv_heads * pair
        budget = (self.total - sliding - heads * state) // (heads * token) - one.block
        least = one.sinks + one.window + 1
        if budget < least:
            needed = sliding + heads * (state + token * (least + one.block))
            raise ValueError(
                f"budget is {self.text!r}, too little for {batch} rows: sinks, window, a block and what stands for "
                f"evicted tokens take {needed} bytes; use {-(-needed // 1024)}KiB or more, or fewer rows"
            )
        return int(budget)


def parse_budget(budget: object) -> int | list[int] | BudgetRule:
    """Tokens, a list of them (one for each layer), or the rule that will tell.

    Parameters
    ----------
    budget : int, float, str or sequence of int
        Tokens a KV head, a share in (0, 1] of the tokens read, or bytes of the whole cache, like ``"64MiB"``.

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> parse_budget(512), parse_budget(0.25), parse_budget("1.5KiB")
    (512, Share(share=0.25), TotalBytes(total=1536, text='1.5KiB'))
    """
    if isinstance(budget, str):
        found = SIZE.fullmatch(budget)
        if not found:
            raise ValueError(f"budget is {budget!r}; bytes are a number and a unit, like '64MiB' ({', '.join(UNITS)})")
        return TotalBytes(int(float(found[1]) * UNITS[found[2]]), budget)
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}; a share is in (0, 1], a number of tokens is an int")
        return Share(budget)
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    if isinstance(budget, Sequence) and all(isinstance(each, int) for each in budget):
        return list(budget)
    raise ValueError(
        f"budget is {budget!r}; use tokens (512), a share of the tokens read (0.25), bytes of the cache ('64MiB'), or "
        "a list of tokens for each layer"
    )
