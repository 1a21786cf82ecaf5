"""Times of one layer beside the copy bandwidth of the same device; needs PyTorch alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from momentkv.backends import get_backend
from momentkv.backends.layout import Tiers
from momentkv.backends.operators import decode
from momentkv.backends.recording import record_cuda
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.cache.layer import LayerCache
from momentkv.statistics.expansion import Expandable, Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

__all__ = ["CPU", "CUDA", "Call", "Row", "Shape", "Sizes", "measure", "of_device", "of_layer"]

Row = dict[str, Any]
Call = Callable[[int], Any]


class Shape(NamedTuple):
    """One layer: batch, KV heads, group, head dimension, retained tokens, full context."""

    batch: int
    kv_heads: int
    group: int
    d: int
    budget: int
    context: int


class Sizes(NamedTuple):
    """What is measured on a kind of device."""

    shapes: list[Shape]
    copy_bytes: int
    rotate_bytes: int  # at least this much is read before the same bytes are read again
    repeats: int
    seconds: float  # for one measurement, once it has five repeats
    dtype: torch.dtype
    prefill: int
    block: int
    model: dict[str, int]
    model_context: int
    model_budget: int
    graphed: int = 0  # calls that one CUDA graph holds, so that no Python is timed; 0 to launch each


CPU = Sizes(
    shapes=[Shape(1, 3, 3, 64, 512, 8192), Shape(1, 3, 3, 64, 2048, 8192), Shape(1, 8, 4, 128, 512, 8192)],
    copy_bytes=2**28,
    rotate_bytes=2**27,
    repeats=50,
    seconds=0.5,
    dtype=torch.float32,
    prefill=1024,
    block=32,
    model={
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
    model_context=2048,
    model_budget=256,
)
# Llama-3.1-8B, SmolLM2-like and Gemma-like heads; contexts of 8k, 32k and 128k where they fit beside their copies.
CUDA = Sizes(
    shapes=[
        *(
            Shape(batch, 8, 4, 128, budget, context)
            for budget in (512, 1024, 2048)
            for batch, context in ((1, 131072), (16, 32768), (64, 8192))
        ),
        Shape(16, 3, 3, 64, 512, 32768),
        Shape(16, 4, 2, 256, 512, 32768),
    ],
    copy_bytes=2**30,
    rotate_bytes=2**28,
    repeats=100,
    seconds=2.0,
    dtype=torch.bfloat16,
    prefill=8192,
    block=32,
    model={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    model_context=32768,
    model_budget=512,
    graphed=16,
)


def of_device(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The copy, and the smallest call there is."""
    yield of_copy(sizes, device)
    one = torch.zeros(1, device=device)
    yield measure("device", "smallest call", lambda _: one.add_(1), sizes, device)


def of_copy(sizes: Sizes, device: torch.device) -> Row:
    """Reading a buffer that no cache of the device holds, and writing another, by a kernel.

    A copy in a CUDA graph need not be a kernel. On an H200 it reached less than two thirds of this there.
    """
    source = torch.empty(sizes.copy_bytes // 4, dtype=torch.int32, device=device).fill_(1)
    target = torch.empty_like(source)
    return measure(
        "device", "copy", lambda _: torch.neg(source, out=target), sizes, device, nbytes=2 * sizes.copy_bytes
    )


def of_layer(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Decode, flush and prefill of one layer."""
    batch, kv_heads, group, d, budget, context = shape
    scale = 1 / math.sqrt(d)

    def normal(*lead: int) -> torch.Tensor:
        return torch.randn(*lead, d, device=device, dtype=torch.float32).to(sizes.dtype)

    def caches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        size = 2 * batch * kv_heads * n * d * sizes.dtype.itemsize
        number = max(2, min(64, -(-sizes.rotate_bytes // size)))
        return [(normal(batch, kv_heads, n), normal(batch, kv_heads, n)) for _ in range(number)]

    def row(what: str, name: str, call: Call, nbytes: int = 0) -> Row:
        return measure(what, name, call, sizes, device, nbytes=nbytes) | {"shape": shape._asdict()}

    q = normal(batch, kv_heads * group, 1)
    backend = get_backend("torch")
    stored = 2 * batch * kv_heads * budget * d * sizes.dtype.itemsize
    held = caches(budget)

    def sdpa(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> Call:
        # The group as queries of one head: SDPA reads the cache once for all of it.
        folded = q.reshape(batch, kv_heads, group, d)
        return lambda i: scaled_dot_product_attention(folded, *kept[i % len(kept)], scale=scale)

    def corrected(expansion: Expansion | None) -> Call:
        if device.type == "cuda":
            return lambda i: decode(q, *held[i % len(held)], expansion, scale=scale)
        prepared = None if expansion is None else backend.prepare(expansion)
        return lambda i: backend.decode(q, Tiers.of(*held[i % len(held)]), prepared, scale=scale)

    yield row("decode", "SDPA", sdpa(held), stored)
    full = caches(context)
    yield row("decode", f"SDPA, context {context}", sdpa(full), stored * context // budget)
    del full
    gone = normal(batch, kv_heads, 512).float(), normal(batch, kv_heads, 512).float()
    recent = QueryWindow.from_queries(normal(batch, kv_heads * group, 32), kv_heads, scale=scale)
    moments = Moments.from_tokens(*gone)
    kinds: dict[str, Expandable | None] = {
        "retained only": None,
        "moments of order 1": moments,
        "12 summaries": Summaries.empty(*gone).update(*gone, recent),
    }
    for name, kind in kinds.items():
        expansion = None if kind is None else kind.expansion()
        if expansion is not None and expansion.slope is not None:  # the copy that a cache would keep
            expansion = expansion._replace(slope=expansion.slope.contiguous().to(sizes.dtype))
        read = stored + sum(0 if x is None else x.nbytes for x in expansion or ())
        yield row("decode", name, corrected(expansion), read)
    yield row(
        "decode",
        "order 1, with weights",
        lambda i: backend.decode(q, Tiers.of(*held[i % len(held)]), moments.expansion(), scale=scale, weights=True),
        stored + sum(x.nbytes for x in moments.arrays().values()),
    )
    yield from of_flush(shape, sizes, device)
    n = sizes.prefill
    wide, k, v = normal(1, kv_heads * group, n), normal(1, kv_heads, n), normal(1, kv_heads, n)
    yield row("prefill", f"{n} tokens", lambda _: backend.prefill(wide, k, v, scale=scale))


def of_flush(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Eviction of a block from a layer whose block is full: ranking, fold, and moving what stays."""
    batch, kv_heads, group, d, budget, _ = shape
    kinds: dict[str, dict[str, Any]] = {
        "order 1": {"policy": "momentkv", "correction": "moments"},
        "default": MODEL_DEFAULTS,
    }

    def tokens(count: int) -> list[torch.Tensor]:
        heads = (kv_heads * group, kv_heads, kv_heads)
        return [torch.randn(batch, h, count, d, device=device).to(sizes.dtype) for h in heads]

    for name, settings in kinds.items():
        cache = LayerCache(budget, block=sizes.block, static=True, **settings)
        cache.step(*tokens(budget + 2 * sizes.block))
        for _ in range(sizes.block):
            cache.step(*tokens(1))
        full = cache.stored_state
        read = sum(x.nbytes for x in full.arrays().values())
        call: Call = lambda _, cache=cache, full=full: cache.flushed(full)  # type: ignore[misc] # noqa: E731
        # A flush is long enough to be timed alone.
        ways = {"": min(sizes.graphed, 1)} | ({", launched": 0} if sizes.graphed else {})
        for way, graphed in ways.items():
            alone = sizes._replace(graphed=graphed)
            of = measure("evict", f"flush {sizes.block}, {name}{way}", call, alone, device, nbytes=read)
            yield of | {"shape": shape._asdict()}


def measure(what: str, name: str, call: Call, sizes: Sizes, device: torch.device, *, nbytes: int = 0) -> Row:
    """Time a call again and again; the median, and the spread between the quartiles."""
    for i in range(3):
        call(i)
    many = sizes.graphed if device.type == "cuda" else 0
    if many:
        replay = record_cuda(lambda: [call(i) for i in range(many)])
        timed: Call = lambda _: replay()  # noqa: E731
    else:
        timed = call
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < sizes.repeats and (len(times) < 5 or time.perf_counter() - begun < sizes.seconds):
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            start, stop = event(enable_timing=True), event(enable_timing=True)
            start.record()
            timed(len(times))
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / max(many, 1))
        else:
            before = time.perf_counter()
            timed(len(times))
            times.append(time.perf_counter() - before)
    ordered = sorted(times)
    quartiles = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    seconds = {
        "median": median(times),
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[1],
        "min": ordered[0],
        "repeats": len(times),
        "graphed": many,
    }
    return {"what": what, "name": name, "bytes": nbytes, "seconds": seconds}
