"""Rolling tokens back: passes whose eviction waits until it is known which of their tokens stay.

Assisted and prompt-lookup decoding read guessed tokens and take back those that were wrong. What has been folded into
moments cannot be taken out, so a layer that records keeps each pass's queries and puts its eviction off until `crop`.
Then the state before the pass is restored and the tokens that stay are read again: afterwards the layer is what it
would be if the others had never come, scores and query statistics included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from momentkv.cache.layer import RECENT_QUERIES, LayerCache
from momentkv.cache.ragged import RaggedCache

__all__ = ["Pass", "Recorded", "check_crop", "crop", "queries_to_keep", "settle"]

# What a pass only adds to at its end; it need not be kept twice.
GROWING = ("keys", "values", "positions")


class Pass(NamedTuple):
    """A forward pass that may be undone.

    Attributes
    ----------
    tokens : int
    queries : tensor, shape (batch, q_head, m, d)
        The newest queries of the pass, as many as reading a part of it again takes.
    valid : bool tensor, shape (batch, 1, tokens), or None
    """

    tokens: int
    queries: torch.Tensor
    valid: torch.Tensor | None


class Recorded(Protocol):
    """A cache layer that can record passes."""

    core: LayerCache | RaggedCache
    passes: list[Pass]
    base: list[dict[str, Any]] | None

    def evict(self) -> None:
        """Evict down to the budget."""


def queries_to_keep(core: LayerCache | RaggedCache, q_len: int, rollback: int) -> int:
    """Newest queries of a pass that reading it again without its last ``rollback`` tokens takes."""
    observes = core.parts[0].policy.observes
    return q_len if observes is None else min(q_len, rollback + max(observes, RECENT_QUERIES))


def base_of(before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the state before a pass must be kept to go back to it; stored tokens are still in the cache."""
    return [
        {name: value for name, value in state.items() if name not in GROWING}
        | {"stored": 0 if state["keys"] is None else int(state["keys"].shape[-2])}
        for state in before
    ]


def check_crop(layers: Sequence[Recorded], tokens: int) -> None:
    """Raise unless the last tokens can be taken back from every layer."""
    for layer in layers:
        core = layer.core
        if tokens > core.seen:
            raise ValueError(f"crop(-{tokens}): the cache has read {core.seen} tokens only; crop at most those")
        left = tokens
        for one in reversed(layer.passes):
            if left < one.tokens:
                stays = one.tokens - left
                if left and queries_to_keep(core, stays, 0) > one.queries.shape[2] - left:
                    raise RuntimeError(
                        f"crop(-{tokens}): {left} of the {one.tokens} tokens of one pass are to be taken back, more "
                        f"than its queries were kept for; make the cache with rollback={left} or more"
                    )
                left = 0
                break
            left -= one.tokens
        if left:
            seen = core.seen - (tokens - left)
            for part in core.parts:
                gone = part.has_evicted and not bool(((newest(part, seen, left)).sum(-1) == left).all())
                if gone or (part.has_evicted and left >= seen):
                    raise RuntimeError(
                        f"crop(-{tokens}): some of these tokens have been evicted and cannot be taken back; crop no "
                        f"more than the window ({part.window}), call activate_past_recording() before reading tokens "
                        "that may have to go, or read the conversation again with a new cache"
                    )


def crop(layers: Sequence[Recorded], tokens: int) -> None:
    """Take the last tokens back, and evict what was put off for those that stay (see `check_crop`)."""
    recorded = layers[0].passes
    stays = [one.tokens for one in recorded]
    left = tokens
    while stays and left >= stays[-1]:
        left -= stays.pop()
    if stays and left:
        stays[-1] -= left
        left = 0
    if len(recorded) > 0 and stays != [recorded[0].tokens]:
        read_again(layers, stays, len(stays))
    elif recorded:
        for layer in layers:
            layer.passes, layer.base = [], None
            layer.evict()
    if left:
        for layer in layers:
            for part in layer.core.parts:
                drop(part, left)


def settle(layers: Sequence[Recorded], limit: int) -> None:
    """Let the oldest recorded passes stay for good, until those left have at most ``limit`` tokens."""
    stays = [one.tokens for one in layers[0].passes]
    settled = 0
    while sum(stays[settled:]) > limit:
        settled += 1
    if settled == len(stays) == 1:
        crop(layers, 0)
    elif settled:
        read_again(layers, stays, settled)


def read_again(layers: Sequence[Recorded], stays: Sequence[int], settled: int) -> None:
    """Go back before the recorded passes and read the first tokens of each again; the first passes are settled."""
    stored: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    passes: list[list[Pass]] = []
    places: list[list[int]] = []
    for layer in layers:
        base = layer.base
        if base is None:
            raise RuntimeError("a layer has recorded passes but not the state before them; call cache.reset()")
        stored.append([(part.keys, part.values) for part in layer.core.parts])
        places.append([state["stored"] for state in base])
        passes.append(layer.passes)
        for part, state in zip(layer.core.parts, base, strict=True):
            n = state["stored"]
            old: dict[str, Any] = dict.fromkeys(GROWING)
            if n:
                old["keys"], old["values"] = part.keys[..., :n, :], part.values[..., :n, :]
                old["positions"] = part.positions[..., :n]
            part.restore({name: value for name, value in state.items() if name != "stored"} | old)
        layer.passes, layer.base = [], None
    # One pass of all layers, then the next, as when they were read: layers that share a budget evict together.
    for index, count in enumerate(stays):
        for layer, tokens, place, recorded in zip(layers, stored, places, passes, strict=True):
            core, one = layer.core, recorded[index]
            start = sum(each.tokens for each in recorded[:index])
            keys, values = (
                torch.cat(
                    [x[which][..., n + start : n + start + count, :] for x, n in zip(tokens, place, strict=True)], 1
                )
                for which in (0, 1)
            )
            before = [part.snapshot() for part in core.parts]
            core.append(keys, values)
            queries = one.queries[:, :, : one.queries.shape[2] - (one.tokens - count)]
            valid = None if one.valid is None else one.valid[..., :count]
            if count == 1:
                core.attend(queries, valid=valid)  # a single query is observed on the way
            else:
                core.observe(queries, valid=valid)
            if index < settled:
                layer.evict()
            else:
                layer.base = layer.base or base_of(before)
                layer.passes.append(Pass(count, queries, valid))


def newest(part: LayerCache, seen: int, tokens: int) -> torch.Tensor:
    """Which stored tokens are among the last of the first ``seen``."""
    return (part.positions >= seen - tokens) & (part.positions < seen)


def drop(part: LayerCache, tokens: int) -> None:
    """Take the newest tokens out of what is stored; evicted ones are older (see `check_crop`)."""
    gone = newest(part, part.seen, tokens)
    positions = part.positions.masked_fill(gone, -1)
    real = (positions >= 0).flatten(0, -2).any(0).nonzero()
    width = int(real[-1]) + 1 if len(real) else 0
    part.keys, part.values = part.keys[..., :width, :], part.values[..., :width, :]
    part.positions = positions[..., :width]
    if part.score is not None:
        part.score = part.score[..., :width]
    part.padded = bool((part.positions < 0).any())
    part.seen -= tokens
