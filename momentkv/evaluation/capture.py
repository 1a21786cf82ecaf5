"""Reads a context once with the full cache, captures what attention used, and replays evictions from it.

Prefill attends exactly whatever the policy, so its keys, values and queries are the same for all of them: one pass
over the context serves every policy, budget and correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from momentkv.cache.config import wanted_queries
from momentkv.cache.rereading import take_scores
from momentkv.hf import MomentCache, read
from momentkv.hf.attention import link, stock_attention
from momentkv.hf.building import layer_kinds
from momentkv.hf.reading import CHUNK, Piece, Reading
from momentkv.hf.repeating import REQUEST, opens_turn, request_of

__all__ = ["Attended", "CaptureCache", "SecondReading", "capture_again", "read_anew", "replay", "replay_tried"]


class Attended(NamedTuple):
    """What one layer attended with: all keys and values, and the queries of the last tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    scaling: float | None


class SecondReading(NamedTuple):
    """Scores of all tokens, by layer; and those that a trial may see, in the layers' order, of what is before it."""

    scores: dict[int, torch.Tensor]
    early: list[torch.Tensor]


class CaptureLayer(DynamicLayer):
    """A full cache layer that keeps the queries of the last tokens of the last forward pass.

    Parameters
    ----------
    keep : int or None
        How many queries; None for all.
    """

    def __init__(self, keep: int | None) -> None:
        super().__init__()
        self.keep = keep
        self.queries: torch.Tensor | None = None
        self.scaling: float | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; the returned keys lead the attention function here."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return link(self, keys, values)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the queries and attend as without any compression."""
        kept = query if self.keep is None else query[:, :, -self.keep :]
        self.queries, self.scaling = kept.clone(), scaling
        return stock_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


class CaptureWindow(DynamicSlidingWindowLayer):
    """A layer with a sliding window that keeps what leaves it, too, so that a context can be stored anew."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; the model sees those within the window."""
        new = key_states, value_states
        keys, values = (
            new if self.every is None else [torch.cat(both, dim=2) for both in zip(self.every, new, strict=True)]
        )
        self.every = keys, values
        return super().update(key_states, value_states, *args, **kwargs)


class CaptureCache(Cache):
    """Full cache of a model with ``attn_implementation="momentkv"``; its full-attention layers keep queries.

    Parameters
    ----------
    model : PreTrainedModel
    keep : int or None
        Queries kept of the last forward pass; None for all.

    Raises
    ------
    ValueError
        If all layers have a sliding window.
    """

    def __init__(self, model: Any, keep: int | None = 32) -> None:
        config = model.config.get_text_config(decoder=True)
        super().__init__(
            layers=[
                CaptureLayer(keep) if kind == "full_attention" else CaptureWindow(**kwargs)
                for kind, kwargs in layer_kinds(config)
            ]
        )
        if not self.capture_layers:
            raise ValueError(
                "no layer of this model is compressed (all have a sliding window): there is nothing to measure"
            )
        self.read_again: dict[int, SecondReading] = {}  # by the tokens held back, see `capture_again`

    @property
    def capture_layers(self) -> dict[int, CaptureLayer]:
        """The full-attention layers, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, CaptureLayer)}

    def held(self) -> list[dict[str, Any]]:
        """What all layers hold, by reference: no tensor of theirs is changed in place."""
        return [dict(layer.__dict__) for layer in self.layers]

    def go_back(self, held: Sequence[dict[str, Any]]) -> None:
        """Make all layers what they were."""
        for layer, before in zip(self.layers, held, strict=True):
            layer.__dict__.update(before)

    def store_windows(self, cache: Cache, stop: int | None = None) -> None:
        """Store the first tokens in the layers of an empty cache that have a sliding window; all of them by default."""
        for layer, captured in zip(cache.layers, self.layers, strict=True):
            if isinstance(captured, CaptureWindow) and captured.every is not None:
                layer.update(*(x[:, :, :stop] for x in captured.every))

    def attended(self) -> dict[int, Attended]:
        """What the full-attention layers attended with in the last forward pass, by index."""
        return {
            index: Attended(layer.keys, layer.values, layer.queries, layer.scaling)
            for index, layer in self.capture_layers.items()
            if layer.queries is not None
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)


def capture_again(model: Any, captured: CaptureCache, ids: torch.Tensor, tokenizer: Any, trial: int = 0) -> None:
    """Let the model repeat a captured context, once, and add the scores of that second reading to what was captured.

    A reading whose end is held back has other scores than one of all, so that each has its own.

    Parameters
    ----------
    model : PreTrainedModel
    captured : CaptureCache
        After one forward pass over the context.
    ids : int tensor, shape (1, n)
        The context.
    tokenizer : PreTrainedTokenizer
        Reads the request.
    trial : int
        Tokens at the end that are to be held back, see `replay_tried`.
    """
    if trial in captured.read_again:
        return
    cache = MomentCache(model, policy="second-reading", correction="none", sharing="uniform")
    for index, core in cache.moment_layers.items():
        layer = captured.capture_layers[index]
        core.scale = layer.scaling
        core.append(layer.keys, layer.values)
    captured.store_windows(cache)
    with Reading(model, cache, Piece(ids, None, 0), CHUNK, trial) as reading:
        reading.read_again(request_of(tokenizer, REQUEST, opens_turn(tokenizer, ids[0].tolist())))
    early = () if reading.trial is None else reading.trial.scores
    captured.read_again[trial] = SecondReading(reading.scores, list(early))


def replay(captured: CaptureCache, cache: MomentCache) -> MomentCache:
    """Bring an empty cache to the state that prefilling the captured context would have left.

    Parameters
    ----------
    captured : CaptureCache
        After one forward pass over the context, with at least as many queries kept as the policy observes; after
        `capture_again`, a policy that looks at a second reading gets its scores.
    cache : MomentCache
        Empty, of the same model.

    Raises
    ------
    ValueError
        If queries are missing.
    """
    for index, core in cache.moment_layers.items():
        layer = captured.capture_layers[index]
        settings = core.config
        observes, length = settings.policy.observes, layer.keys.shape[2]
        if observes is not None and (settings.remembers_queries or settings.keep_queries):
            observes = wanted_queries([settings.policy])
        queries = layer.queries
        kept = 0 if queries is None else queries.shape[2]
        if queries is None or kept < min(length, length if observes is None else observes):
            raise ValueError(
                f"{kept} queries were captured, but policy {settings.policy.name!r} observes "
                f"{'all' if observes is None else observes}; capture with keep={observes}"
            )
        core.scale = layer.scaling
        core.append(layer.keys, layer.values)
        core.observe(queries)
        if settings.policy.rereads and 0 in captured.read_again:
            take_scores(core, captured.read_again[0].scores[index])
        cache.layers[index].evict()
    captured.store_windows(cache)
    return cache


@torch.no_grad()
def replay_tried(
    model: Any, captured: CaptureCache, cache: MomentCache, ids: torch.Tensor, expected: torch.Tensor
) -> MomentCache:
    """`replay`, with the trial of `momentkv.hf.read` on the last tokens of the context.

    Parameters
    ----------
    model : PreTrainedModel
    captured : CaptureCache
        After one forward pass over the context, with as many queries more than the policy wants as are held back.
    cache : MomentCache
        Empty.
    ids : int tensor, shape (1, n)
        The context.
    expected : tensor, shape (1, m, vocabulary)
        Logits of its last ``m`` tokens, which are held back.

    Raises
    ------
    ValueError
        If queries are missing.
    """
    n, held_back = ids.shape[1], expected.shape[1]
    layers = [captured.capture_layers[index] for index in cache.moment_layers]
    empty = cache.passes.held()
    with Reading(model, cache, Piece(ids, None, 0), CHUNK, held_back) as reading:
        trial: Any = reading.trial

        def store(stop: int) -> None:
            """As many tokens, and the queries of the newest of them."""
            cache.passes.go_back(empty)
            for reader, layer in zip(reading.readers, layers, strict=True):
                kept, last = 0 if layer.queries is None else layer.queries.shape[2], n - stop
                keep = n if reader.keep is None else reader.keep
                if layer.queries is None or kept < min(n, keep + last):
                    raise ValueError(f"{kept} queries were captured; capture with keep={keep + last}")
                reader.core.scale = layer.scaling
                reader.core.append(layer.keys[:, :, :stop], layer.values[:, :, :stop])
                reader.queries = layer.queries[:, :, max(0, kept - last - keep) : kept - last]
            captured.store_windows(cache, stop)

        store(n - held_back)
        trial.begin(lambda: expected)
        store(n)
        for reader in reading.readers:
            reader.end_first()
        if reading.readers[0].core.config.policy.rereads and held_back in captured.read_again:
            again = captured.read_again[held_back]
            trial.scores = list(again.early)
            for index, reader in zip(cache.moment_layers, reading.readers, strict=True):
                reader.scores = again.scores[index]
        trial.choose()
    reading.evict()
    return cache


def read_anew(
    model: Any, ids: torch.Tensor, cache: MomentCache, tokenizer: Any, *, segment: int | None = None, trial: int = 0
) -> MomentCache:
    """Let a model read a context into an empty cache, where nothing captured serves.

    In segments, later tokens see what was left of earlier ones. A policy that looks at a second reading gets one of
    each segment.

    Parameters
    ----------
    model : PreTrainedModel
    ids : int tensor, shape (1, n)
        The context.
    cache : MomentCache
    tokenizer : PreTrainedTokenizer
        Reads the request of a second reading.
    segment, trial : int
        As `momentkv.hf.read` takes them.
    """
    (policy,) = {core.config.policy for core in cache.moment_layers.values()}
    return read(
        model, ids, cache, twice=policy.rereads, tokenizer=tokenizer, segment=segment, trial=trial, progress=False
    )
