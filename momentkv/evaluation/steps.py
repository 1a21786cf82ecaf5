"""What a cache holds and has evicted, and how long typical steps of a decode take."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, median
from typing import Any, NamedTuple

from momentkv.cache.layer import LayerCache
from momentkv.hf import MomentCache

__all__ = ["Step", "Typical", "evicted_tokens", "held_tokens", "typical"]


class Step(NamedTuple):
    """One decode step.

    Attributes
    ----------
    seconds : float
    flushed : bool
        Whether it evicted a block.
    """

    seconds: float
    flushed: bool


class Typical(NamedTuple):
    """Median seconds of a step.

    Attributes
    ----------
    seconds : float
        Of steps that evict nothing.
    flush : float or None
        Of steps that evict a block; None where there were none.
    """

    seconds: float
    flush: float | None


def evicted_tokens(cache: Any) -> float:
    """Tokens for each KV head that a cache has evicted, over all compressed layers; 0 for a cache that evicts none."""
    if not isinstance(cache, MomentCache):
        return 0.0
    return sum(evicted_by(core) for core in cache.moment_layers.values() if core.seen)


def evicted_by(core: LayerCache) -> float:
    """Of one layer that has read some; who times steps asks after each, so that no token is looked at for it."""
    state = core.stored_state
    if core.config.corrects:
        return float(state.evicted.weight.float().mean())
    if state.clock is None:
        return core.seen - mean(core.stored_by_head)
    return core.seen - float((core.positions >= 0).sum(-1).float().mean())  # which places are taken is on the device


def held_tokens(cache: Any) -> int:
    """Tokens that a cache holds for each KV head on average, of the layers that are not limited to a window."""
    if isinstance(cache, MomentCache):
        return round(mean(stored for core in cache.moment_layers.values() for stored in core.stored_by_head))
    return max(layer.keys.shape[2] for layer in cache.layers)


def typical(steps: Iterable[Step]) -> Typical:
    """Medians, which a delay of one step does not move.

    Examples
    --------
    >>> typical([Step(1, False), Step(1, False), Step(60, False), Step(9, True)])
    Typical(seconds=1, flush=9)
    """
    steps = list(steps)
    flushes = [step.seconds for step in steps if step.flushed]
    between = [step.seconds for step in steps if not step.flushed] or flushes
    return Typical(median(between), median(flushes) if flushes else None)
