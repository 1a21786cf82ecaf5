"""Rolling tokens back: passes whose eviction waits until it is known which of their tokens stay.

Assisted and prompt-lookup decoding read guessed tokens and take back those that were wrong. What has been folded into
moments cannot be taken out, so the tokens of a recorded pass wait beside the cache, with its queries, and no policy
observes them yet. `crop` says which stay; these are then read as if the others had never come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from momentkv._numbers import whole_number
from momentkv.cache.config import wanted_queries
from momentkv.cache.layer import LayerCache

__all__ = ["Pass", "Recorded", "check_crop", "crop", "queries_to_keep", "settle", "waiting_tokens"]


class Pass(NamedTuple):
    """A forward pass that may be undone.

    Attributes
    ----------
    tokens : int
    queries : tensor, shape (batch, q_head, m, d)
        The newest queries of the pass, as many as are needed to read a part of it again.
    valid : bool tensor, shape (batch, 1, tokens), or None
    """

    tokens: int
    queries: torch.Tensor
    valid: torch.Tensor | None


class Recorded(Protocol):
    """A cache layer that can record passes."""

    core: LayerCache
    passes: list[Pass]
    rollback: int
    record_past: bool

    def evict(self) -> None:
        """Evict down to the budget."""


def waiting_tokens(tokens_to_remove: int) -> int:
    """Number of tokens that ``crop`` of transformers asks to remove."""
    if whole_number("tokens_to_remove", tokens_to_remove) > 0:
        raise ValueError(
            f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number, as transformers does"
        )
    return -int(tokens_to_remove)  # plain, though it may be a difference of lengths


def queries_to_keep(core: LayerCache, q_len: int, rollback: int) -> int:
    """Newest queries of a pass that reading it again without its last ``rollback`` tokens takes."""
    wanted = wanted_queries([core.config.policy])
    return q_len if wanted is None else min(q_len, rollback + wanted)


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
        if left and not core.holds_newest(left, before=tokens - left):
            raise RuntimeError(
                f"crop(-{tokens}): some of these tokens have been evicted, or are padding, and cannot be taken back; "
                f"{advice(layer, tokens)}"
            )


def advice(layer: Recorded, tokens: int) -> str:
    """What to do where so many tokens could not be taken back."""
    # Half of what is recorded is settled where there is more than the cache was made for.
    enough = max(2 * tokens, layer.rollback)
    again = "or read what stays again with a new cache"
    if layer.record_past:
        return (
            f"the cache records for rollback={layer.rollback} tokens, and settles the older half of more; make it with "
            f"rollback={enough} or more, {again}"
        )
    more = "" if enough == layer.rollback else f"make the cache with rollback={enough} or more and "
    return (
        f"crop no more than the window ({layer.core.config.window}), {more}call activate_past_recording() before "
        f"reading tokens that may have to go, {again}"
    )


def crop(layers: Sequence[Recorded], tokens: int) -> None:
    """Take the last tokens back, and evict what was put off for those that stay (see `check_crop`); all or nothing."""
    stays = [one.tokens for one in layers[0].passes]
    left = tokens
    while stays and left >= stays[-1]:
        left -= stays.pop()
    if stays and left:
        stays[-1] -= left
        left = 0
    before = [(layer, layer.passes, layer.core.held()) for layer in layers]
    try:
        read_again(layers, stays, len(stays))
        if left:
            for layer in layers:
                layer.core.drop(left)
    except BaseException:
        for layer, passes, held in before:
            layer.passes = passes
            layer.core.go_back(held)
        raise


def settle(layers: Sequence[Recorded], limit: int) -> None:
    """Let the oldest recorded passes stay for good, until those left have at most ``limit`` tokens."""
    stays = [one.tokens for one in layers[0].passes]
    settled = 0
    while sum(stays[settled:]) > limit:
        settled += 1
    if settled:
        read_again(layers, stays, settled)


def read_again(layers: Sequence[Recorded], stays: Sequence[int], settled: int) -> None:
    """Read the first tokens of each recorded pass for good; passes after the first ``settled`` go on waiting."""
    recorded: list[tuple[list[Pass], Any]] = []
    for layer in layers:
        recorded.append((layer.passes, layer.core.new))
        layer.core.recording, layer.core.new, layer.passes = False, None, []
    # One pass of all layers, then the next, as when they were read: layers that share a budget evict together.
    start = 0
    for index, count in enumerate(stays[:settled]):
        for layer, (passes, new) in zip(layers, recorded, strict=True):
            one = passes[index]
            layer.core.append(*(x[..., start : start + count, :] for x in (new.keys, new.values)))
            queries = one.queries[:, :, : one.queries.shape[2] - (one.tokens - count)]
            valid = None if one.valid is None else one.valid[..., :count]
            if count == 1:
                layer.core.attend(queries, valid=valid)  # a single query is observed on the way
            else:
                layer.core.observe(queries, valid=valid)
            layer.evict()
        start += recorded[0][0][index].tokens
    for layer, (passes, new) in zip(layers, recorded, strict=True):
        layer.passes = passes[settled : len(stays)]
        if layer.passes:
            layer.core.recording = True
            parts = (None if x is None else x[..., start:] for x in (new.positions, new.attention))
            layer.core.new = new._replace(
                keys=new.keys[..., start:, :],
                values=new.values[..., start:, :],
                **dict(zip(("positions", "attention"), parts, strict=True)),
            )
