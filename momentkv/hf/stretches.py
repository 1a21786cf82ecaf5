"""Which tokens of a text are said again, in passes of bounded size: all of them, or the most novel stretches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from momentkv.cache.eviction import importance_of
from momentkv.cache.layer import LayerCache
from momentkv.policies.novelty import Novelty
from momentkv.policies.turns import ranks

__all__ = ["LEAD", "STRETCH", "begins_of", "most_novel", "novelty_of", "parts", "passes_of"]

# Tokens before a part of the text that are repeated with it, so that it is clear where it begins.
LEAD = 8
# Tokens of a stretch, where only some are said again.
STRETCH = 64


def parts(n: int, most: int) -> Iterator[tuple[int, int]]:
    """About equal parts of at most so many tokens.

    Examples
    --------
    >>> list(parts(10, 4))
    [(0, 4), (4, 7), (7, 10)]
    """
    count = math.ceil(n / most)
    small, larger = divmod(n, count)
    start = 0
    for index in range(count):
        stop = start + small + (index < larger)
        yield start, stop
        start = stop


def begins_of(n: int, stretch: int) -> tuple[list[int], int]:
    """Where the stretches of a text begin, each with the tokens before it, and how long all of them are.

    Examples
    --------
    >>> begins_of(200, 64), begins_of(50, 64)
    (([0, 56, 120, 128], 72), ([0], 50))
    """
    size = min(n, LEAD + stretch)
    return sorted({min(max(0, start - LEAD), n - size) for start in range(0, n, stretch)}), size


def novelty_of(cores: Sequence[LayerCache], n: int) -> torch.Tensor:
    """How novel the newest tokens of each row are, (batch, n): their place in the ranking of `Novelty`, mean of heads.

    Larger is more novel. Padding is the least novel.
    """
    total = None
    for core in cores:
        config = dataclasses.replace(core.config, policy=Novelty())
        view, state = core.view(), core.stored_state
        importance = importance_of(config, view, config.correction.known(state.evicted), core.attention_scale, state)
        places = -ranks(importance, view.positions >= 0)[..., -n:].mean(dim=1)
        total = places if total is None else total + places.to(total.device)
    if total is None:
        raise ValueError("cores has no layer; novelty is that of the tokens of at least one")
    return total


def most_novel(novelty: torch.Tensor, share: float, stretch: int) -> torch.Tensor:
    """For each row, the most novel stretches that make a share of it, in order: indices (batch, number, size).

    Examples
    --------
    >>> novelty = torch.zeros(1, 40)
    >>> novelty[0, 25] = 1.0
    >>> most_novel(novelty, 0.2, 10)[0, :, [0, -1]].tolist()
    [[12, 29]]
    """
    begins, size = begins_of(novelty.shape[1], stretch)
    means = torch.stack([novelty[:, begin : begin + size].mean(dim=1) for begin in begins], dim=1)
    number = max(1, round(share * len(begins)))
    chosen = means.argsort(dim=1, descending=True, stable=True)[:, :number].sort(dim=1).values
    starts = torch.tensor(begins, device=novelty.device)[chosen]
    return starts[..., None] + torch.arange(size, device=novelty.device)


def passes_of(
    cores: Sequence[LayerCache], rows: int, n: int, share: float, chunk: int, apart: int = 0
) -> Iterator[torch.Tensor]:
    """Which of the newest ``n`` tokens each pass of a second reading says, (batch, m): at most a chunk and its lead.

    Parameters
    ----------
    cores : sequence of LayerCache
        That hold the tokens.
    rows : int
        Of the batch.
    n : int
    share : float
        Of the text, above 0. With 1 all of it, in about equal parts.
    chunk : int
        Most tokens of a pass beside its lead.
    apart : int
        So many tokens at the end are said in passes of their own, the last ones. Only where all are said.
    """
    device = cores[0].stored_state.recent_keys.device
    if share == 1:
        last = [(n - apart + start, n - apart + stop) for start, stop in parts(apart, chunk)] if apart else []
        for start, stop in [*parts(n - apart, chunk), *last]:
            yield torch.arange(max(0, start - LEAD), stop, device=device).expand(rows, -1)
        return
    chosen = most_novel(novelty_of(cores, n), share, min(STRETCH, chunk))
    at_once = max(1, (chunk + LEAD) // chosen.shape[-1])
    for several in torch.split(chosen, at_once, dim=1):
        yield several.flatten(1)
