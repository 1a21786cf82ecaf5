"""When static layers flush: a clock on the host, which never asks the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from momentkv.backends.autocast import without_autocast
from momentkv.cache.config import NO_GRADIENT, CacheConfig
from momentkv.cache.layer import LayerCache
from momentkv.cache.state import PACKED
from momentkv.hf.checks import OWN_MASK

__all__ = ["Beat", "Clock", "check_static", "check_step", "ring"]


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


def ring(block: int, flushes: Sequence[int], first: Sequence[bool] = ()) -> Beat:
    """The beat before the first step of a ring in which the given steps (from 1 to ``block``) flush.

    Before the ring come as many steps as ``first`` has entries, each of which says whether it flushes.

    Examples
    --------
    >>> beat = ring(3, [2])
    >>> beat.next.flushes, beat.next.next.flushes, beat.flushes, beat.next.next.next is beat
    (False, True, False, True)
    >>> beat = ring(1, [], [True]).next
    >>> beat.flushes, beat.next.flushes, beat.next.next is beat.next
    (True, False, True)
    """
    beats = [Beat(step in flushes) for step in range(1, block + 1)]
    before = [Beat(False), *map(Beat, first)]
    line = [*before, *beats, beats[0]] if first else [*beats, beats[0]]
    for one, other in itertools.pairwise(line):
        one.next = other
    return before[0] if first else beats[-1]


def flush_steps(config: CacheConfig, ticks: int, retained: int, budget: int) -> list[int]:
    """Steps from now on after which a head's recent tier is full, up to the first at which it evicts.

    From then on it evicts once in ``block`` steps. It holds ``ticks`` tokens, of which ``retained`` are not recent.

    Examples
    --------
    >>> config = LayerCache(14, sinks=1, window=6, block=4).config
    >>> flush_steps(config, 14, 7, 14), flush_steps(config, 9, 2, 14), flush_steps(config, 5, 0, 14)
    ([4], [4, 8, 9], [6, 10, 13])
    """
    step, steps = 0, list[int]()
    while ticks < budget + config.block:
        step += config.recent - (ticks - retained)
        ticks = retained + config.recent
        retained = min(ticks - config.exact, budget - config.exact)
        steps.append(step)
    return steps


class Clock:
    """Knows which steps of static layers flush.

    Parameters
    ----------
    cores : sequence of LayerCache
        Of all layers, in their order, made with ``static=True``.

    Attributes
    ----------
    beat : Beat
        The step that was done last.
    """

    def __init__(self, cores: Sequence[LayerCache]) -> None:
        for core in cores:
            check_static(core)
        self.cores = list(cores)
        self.beat = self.before = ring(1, [])
        # Whether steps are static now: a first pass has been read.
        self.runs = False
        # Whether a step has changed some layers in place and not all of them.
        self.open = False
        # How often `set` has written over a state, which cannot be gone back to.
        self.writes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the ring itself, each beat of which holds all that follow: pickle would go down all of them."""
        line, places, beat = list[bool](), dict[int, int](), self.before
        while id(beat) not in places:
            places[id(beat)] = len(line)
            line.append(beat.flushes)
            beat = beat.next
        return vars(self) | {"before": (line, places[id(beat)]), "beat": places[id(self.beat)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        line, again = state["before"]
        beats = [Beat(flushes) for flushes in line]
        for one, other in itertools.pairwise([*beats, beats[again]]):
            one.next = other
        vars(self).update(state | {"before": beats[0], "beat": beats[state["beat"]]})

    def held(self) -> dict[str, Any]:
        """What `set` changes, beside the layers."""
        return self.__getstate__()

    def go_back(self, held: dict[str, Any]) -> None:
        """Undo all since `held`, with the layers; where they have been written over, refuse until a reset."""
        writes = self.writes
        self.__setstate__(held)
        self.open, self.writes = self.open or writes != held["writes"], writes

    def tick(self) -> None:
        """Begin a step."""
        self.check()
        self.before, self.beat = self.beat, self.beat.next
        self.open = True

    def undo(self) -> None:
        """Take back a step that has changed nothing yet."""
        self.beat, self.open = self.before, False

    def check(self) -> None:
        """Raise if the last step failed after some layers were changed in place."""
        if self.open:
            raise RuntimeError(
                "the last step failed half-way, and a static cache changes its layers in place: some have read its "
                "token, others have not; call cache.reset() and read the tokens again"
            )

    def reset(self) -> None:
        """Back to before the first pass."""
        self.beat = self.before = ring(1, [])
        self.runs = self.open = False

    def set(self) -> None:
        """From here on steps are static: in place, and flushed when rows and heads have filled their blocks.

        Asks the device once. If it fails, for want of memory say, layers can go back to the state they had, unless that
        has been written over.
        """
        # Arrays that stay must be ones that may be written in any mode.
        with torch.inference_mode(False), without_autocast():
            for core in self.cores:
                if self.runs and writes_over(core):
                    self.open = True
                    self.writes += 1
                core.fix()
                open_to_lengths(core)
        config, heads = self.cores[0].config, set[tuple[int, ...]]()
        for core in self.cores:
            ticks: Any = core.stored_state.ticks
            budgets = torch.tensor(core.budgets, dtype=ticks.dtype, device=ticks.device).expand_as(ticks)
            held = torch.stack([ticks, core.stored_state.counts, budgets], dim=-1).flatten(0, -2)
            heads.update(map(tuple, held.tolist()))
        due = [flush_steps(config, *head) for head in heads]
        block, steps = config.block, {step for own in due for step in own}
        rounds = {(own[-1] - 1) % block + 1 for own in due}
        # A whole number of blocks, so that rounds go on through it.
        length = block * -(-max(own[-1] for own in due) // block)
        first = [
            step in steps or any(step > own[-1] and (step - own[-1]) % block == 0 for own in due)
            for step in range(1, length + 1)
        ]
        self.beat = self.before = ring(block, sorted(rounds), first)
        self.runs, self.open = True, False


def writes_over(core: LayerCache) -> bool:
    """Whether `LayerCache.fix` writes over the arrays of an earlier state, and needs none of its own."""
    old, new = core.fixed, core.state
    return old is not None and new is not None and new is not old and old.shapes() == new.shapes()


def open_to_lengths(core: LayerCache) -> None:
    """Make one graph serve every prompt and every cache: tell the compiler what differs among them.

    After another prompt, heads retain other numbers of tokens. A graph takes a number for a constant, unless it is the
    length of a tensor that is marked as changing. So the cache's own number is such a length, of a tensor without
    elements.
    """
    may_change: Any = torch._dynamo.maybe_mark_dynamic
    core.handle = torch.empty((core.number, 0))
    may_change(core.handle, 0)
    for name, x in core.stored_state.own().items():
        if name in PACKED:
            may_change(x, 1)


def check_static(core: LayerCache) -> None:
    """Raise unless a cache's steps can be done in place."""
    config = core.config
    if config.certify is not None:
        raise ValueError(
            f"static=True with certify={config.certify}: certificates decide on the host; use static=False for them"
        )
    if config.backend is not None and config.backend.name != "torch":
        raise ValueError(f"static=True with the backend {config.backend.name!r}; use 'torch', or static=False")


def check_step(query: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which rows' new tokens are no padding, bool (batch, 1, 1), or None; raise where a static step would be wrong."""
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(NO_GRADIENT)
    if attention_mask is None:
        return None
    if attention_mask.numel() == 0:  # a sliding one: see `momentkv.hf.momentkv_mask`
        raise ValueError(OWN_MASK)
    if tuple(attention_mask.shape) != (query.shape[0], 1, 1, 1) or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}; a step of a static "
            "cache supports causal attention with padding, given as a mask of shape (batch, tokens seen)"
        )
    return attention_mask[:, 0]
