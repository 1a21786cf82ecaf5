"""Steps and flushes of a static layer captured as graphs, against the same launched one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from momentkv.backends.recording import record_cuda, record_traced
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.cache.joining import flush_together
from momentkv.cache.layer import LayerCache
from momentkv.evaluation.layer_times import CPU, CUDA, measure
from momentkv.testing.gpu.parts import Row

__all__ = ["flushes", "graphs", "static_layer"]

KINDS: dict[str, dict[str, Any]] = {
    "default": MODEL_DEFAULTS,
    "the paper's": {"policy": "momentkv", "correction": "moments"},
    "observed": {"policy": "h2o", "correction": "moments"},
    "plain": {"policy": "snapkv", "order": None},
}


def graphs(rehearse: bool) -> Iterator[Row]:
    """For each kind of cache: the largest difference of outputs over steps and flushes, and the time of a step."""
    device = "cpu" if rehearse else "cuda"
    batch, kv_heads, group, d, budget, block = (2, 2, 2, 16, 24, 4) if rehearse else (2, 8, 4, 128, 512, 32)
    dtype = torch.float32 if rehearse else torch.bfloat16
    sizes = CPU._replace(repeats=5, seconds=0.01) if rehearse else CUDA._replace(seconds=0.5)
    with torch.no_grad():
        for name, settings in KINDS.items():
            settings = settings | {"block": block, "window": 8}
            shape = (batch, kv_heads, group, d)
            eager, of_eager = static_layer(shape, dtype, device, budget, settings, context=3 * budget)
            graph, of_graph = static_layer(shape, dtype, device, budget, settings, context=3 * budget)
            replay = captured(graph, partial(one_step, graph, of_graph), rehearse=rehearse)
            flush = captured(graph, graph.flush, rehearse=rehearse)
            off = largest = 0.0
            for step in range(3 * block):
                rng = torch.Generator(device).manual_seed(step)
                for mine, theirs in zip(of_eager, of_graph, strict=True):
                    mine.normal_(generator=rng)
                    theirs.copy_(mine)
                expected = one_step(eager, of_eager)
                out = replay()
                off = max(off, float((out - expected).abs().max()))
                largest = max(largest, float(expected.abs().max()))
                if eager.is_ticked:
                    eager.flush()
                    flush()
            row = {"kind": name, "steps": 3 * block, "difference": off, "largest": largest}
            yield row | {"right": off <= 2.0**-8 * largest and bool(torch.isfinite(out).all())}
            # Room for all the steps of a measurement, none of which evicts.
            roomy = settings | {"block": 2 * sizes.repeats}
            cache, buffers = static_layer(shape, dtype, device, budget, roomy, context=3 * budget)
            replay = captured(cache, partial(one_step, cache, buffers), rehearse=rehearse)
            calls: dict[str, Callable[[int], Any]] = {
                "captured": lambda _, replay=replay: replay(),  # type: ignore[misc]
                "launched": lambda _, cache=cache, buffers=buffers: one_step(cache, buffers),  # type: ignore[misc]
            }
            for way, call in calls.items():
                start = cache.stored_state.map(torch.clone)
                yield {"kind": name} | measure("step", way, call, sizes._replace(graphed=0), torch.device(device))
                for x, before in zip(cache.arrays().values(), start.arrays().values(), strict=True):
                    x.copy_(before)


def flushes(rehearse: bool) -> Iterator[Row]:
    """Time of the flush of one layer, and of those of a model at once: as one graph, and launched."""
    device = "cpu" if rehearse else "cuda"
    kv_heads, group, d, budget = (2, 2, 16, 24) if rehearse else (8, 4, 128, 512)
    dtype = torch.float32 if rehearse else torch.bfloat16
    sizes = CPU._replace(repeats=5, seconds=0.01) if rehearse else CUDA._replace(seconds=0.5)
    settings = MODEL_DEFAULTS | ({"window": 8, "block": 4} if rehearse else {})
    with torch.no_grad():
        for batch, layers in ((1, 1), (1, 2)) if rehearse else ((1, 1), (16, 1), (1, 32)):
            shape = (batch, kv_heads, group, d)
            caches = [
                static_layer(shape, dtype, device, budget, settings, context=2 * budget)[0] for _ in range(layers)
            ]
            flush = partial(flush_together, caches)
            replay = recorded(flush, rehearse=rehearse)
            calls = {"captured": replay, "launched": flush}
            for way, call in calls.items():
                timed = measure(
                    "flush",
                    way,
                    lambda _, call=call: call(),  # type: ignore[misc]
                    sizes._replace(graphed=0),
                    torch.device(device),
                )
                yield {"batch": batch, "layers": layers} | timed


def static_layer(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    budget: int,
    settings: dict[str, Any],
    *,
    context: int,
) -> tuple[LayerCache, list[torch.Tensor]]:
    """A layer that has read so many random tokens, and the buffers that its steps read query, key and value from."""
    batch, kv_heads, group, d = shape
    rng = torch.Generator(device).manual_seed(0)

    def normal(heads: int, n: int) -> torch.Tensor:
        return torch.randn(batch, heads, n, d, generator=rng, device=device).to(dtype)

    cache = LayerCache(budget, static=True, **settings)
    heads = (kv_heads * group, kv_heads, kv_heads)
    cache.step(*(normal(each, context) for each in heads))
    return cache, [normal(each, 1) for each in heads]


def one_step(cache: LayerCache, buffers: list[torch.Tensor]) -> torch.Tensor:
    """Read one token and write what became of the state into its own arrays; no eviction."""
    q, k, v = buffers
    cache.append(k, v)
    out: torch.Tensor = cache.attend(q)
    cache.fix()
    return out


def captured(cache: LayerCache, function: Callable[[], Any], *, rehearse: bool) -> Callable[[], Any]:
    """A step or a flush as a graph; the state is afterwards as before."""
    arrays = list(cache.stored_state.arrays().values())
    held = [x.clone() for x in arrays]
    replay = recorded(function, rehearse=rehearse)
    for x, before in zip(arrays, held, strict=True):
        x.copy_(before)
    return replay


def recorded(function: Callable[[], Any], *, rehearse: bool) -> Callable[[], Any]:
    """What replays the function without its Python."""
    record = record_traced if rehearse else record_cuda
    return record(lambda: function())  # a tracer wants to see that there are no arguments
