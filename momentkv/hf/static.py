"""The static layers of a cache: when they are in buffers, and which step flushes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from momentkv.cache.layer import LayerCache
from momentkv.cache.ragged import RaggedCache
from momentkv.hf.static_state import StaticState, check_static

__all__ = ["Beat", "StaticLayers", "check_step", "ring"]


class Beat:
    """One step of a ring of ``block`` steps: whether it flushes, and the step after it.

    A number that counts steps would make `torch.compile` write a graph for each of its values. Of a ring, a graph
    depends on ``flushes`` alone, so that there are two: step, and step with flush.
    """

    def __init__(self, flushes: bool) -> None:
        self.flushes = flushes
        self.next: Beat = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Beat:
        return self  # never changed once the ring is closed


def ring(block: int, flushes: Sequence[int]) -> Beat:
    """The beat before the first step of a ring in which the given steps (from 1 to ``block``) flush.

    Examples
    --------
    >>> beat = ring(3, [2])
    >>> beat.next.flushes, beat.next.next.flushes, beat.flushes, beat.next.next.next is beat
    (False, True, False, True)
    """
    beats = [Beat(step in flushes) for step in range(1, block + 1)]
    for one, other in zip(beats, beats[1:] + beats[:1], strict=True):
        one.next = other
    return beats[-1]


class StaticLayers:
    """Moves the layers of a cache into static buffers after each pass that is not a step, and out before the next.

    Parameters
    ----------
    cores : sequence of LayerCache or RaggedCache
        Of all layers, in their order.

    Attributes
    ----------
    frozen : bool
        Whether the state is in ``states``, and not in ``cores``.
    beat : Beat
        The step that was done last.
    states : list of StaticState
    """

    def __init__(self, cores: Sequence[LayerCache | RaggedCache]) -> None:
        for core in cores:
            check_static(core)
        self.cores = list(cores)
        self.states = [StaticState(core) for core in cores]
        self.frozen = False
        self.beat = ring(1, [])

    def freeze(self) -> None:
        """Move all layers into their buffers."""
        flushes: set[int] = set()
        for core, state in zip(self.cores, self.states, strict=True):
            flushes.update(state.freeze(core))
        self.beat = ring(self.cores[0].parts[0].block, sorted(flushes))
        self.frozen = True

    def thaw(self) -> None:
        """Move all layers out of their buffers, which stay for the next `freeze`."""
        if not self.frozen:
            return
        for core, state in zip(self.cores, self.states, strict=True):
            state.thaw(core)
        self.frozen = False

    def core(self, index: int) -> LayerCache | RaggedCache:
        """The cache of one layer; of a frozen one a copy, to look at."""
        core = self.cores[index]
        if not self.frozen:
            return core
        one = copy.copy(core)
        if isinstance(one, RaggedCache):
            one.parts, one._joined = tuple(copy.copy(part) for part in one.parts), None
        self.states[index].thaw(one)
        return one

    def select_rows(self, index: torch.Tensor) -> None:
        """Rows by index, in the buffers."""
        for state in self.states:
            state.select_rows(index)

    def release(self) -> None:
        """Let go of the buffers, which must be thawed."""
        for state in self.states:
            state.buffers = {}


def check_step(query: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which rows' new tokens are no padding, bool (batch, 1, 1), or None; raise where a static step would be wrong."""
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(
            "a gradient is asked for, but a static cache changes its buffers in place; run the model under "
            "torch.no_grad(), or make the cache with static=False"
        )
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (query.shape[0], 1, 1, 1) or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}; a step of a static "
            "cache supports causal attention with padding, given as a mask of shape (batch, tokens seen)"
        )
    return attention_mask[:, 0]
