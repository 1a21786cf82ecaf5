"""A decoding step of a model of 8B parameters' width with random weights, in plain PyTorch, as one CUDA graph.

Norms, projections, attention and MLP of all layers and the head of the vocabulary; no rotary embedding, no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from momentkv.backends.recording import record_cuda, record_traced
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.evaluation.layer_times import CPU, CUDA, measure
from momentkv.testing.gpu.parts import Row
from momentkv.testing.gpu.steps import one_step, static_layer

__all__ = ["Width", "times"]


class Width(NamedTuple):
    """Sizes of a model."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    d: int
    vocabulary: int


# Llama 3.1, https://arxiv.org/abs/2407.21783, table 3.
EIGHT = Width(32, 4096, 14336, 32, 8, 128, 128256)
SMALL = Width(2, 32, 64, 4, 2, 16, 64)
BUDGETS = (512, 2048)
CONTEXTS = (8192, 32768, 131072)

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Stack:
    """Weights of all layers; calling it does one step for one row, whose attention is given."""

    def __init__(self, width: Width, dtype: torch.dtype, device: str) -> None:
        self.width = width
        rng = torch.Generator(device).manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            made = torch.empty(rows, columns, dtype=dtype, device=device)
            return made.normal_(std=columns**-0.5, generator=rng)

        wide = (width.heads + 2 * width.kv_heads) * width.d
        self.layers = [
            (
                matrix(wide, width.hidden),
                matrix(width.hidden, width.heads * width.d),
                matrix(2 * width.inner, width.hidden),
                matrix(width.hidden, width.inner),
            )
            for _ in range(width.layers)
        ]
        self.head = matrix(width.vocabulary, width.hidden)
        self.input = matrix(1, width.hidden)

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return self.head.nbytes + sum(x.nbytes for layer in self.layers for x in layer)

    def __call__(self, attend: Attend) -> torch.Tensor:
        """Logits (1, vocabulary)."""
        heads, kv_heads, d = self.width.heads, self.width.kv_heads, self.width.d
        x = self.input
        for index, (into, out, up, down) in enumerate(self.layers):
            both = (rms_norm(x, x.shape[-1:]) @ into.mT).reshape(1, heads + 2 * kv_heads, 1, d)
            q, k, v = both[:, :heads], both[:, heads : heads + kv_heads], both[:, heads + kv_heads :]
            x = x + attend(index, q, k, v).reshape(1, -1) @ out.mT
            gate, value = (rms_norm(x, x.shape[-1:]) @ up.mT).chunk(2, dim=-1)
            x = x + (silu(gate) * value) @ down.mT
        return rms_norm(x, x.shape[-1:]) @ self.head.mT


def times(rehearse: bool) -> Iterator[Row]:
    """A step with budgets, and with the full cache of several contexts by SDPA."""
    device, dtype = ("cpu", torch.float32) if rehearse else ("cuda", torch.bfloat16)
    sizes = CPU._replace(repeats=5, seconds=0.01) if rehearse else CUDA._replace(seconds=1.0, graphed=0)
    width = SMALL if rehearse else EIGHT
    budgets, contexts = ((24,), (64, 128)) if rehearse else (BUDGETS, CONTEXTS)
    record = record_traced if rehearse else record_cuda
    with torch.no_grad():
        model = Stack(width, dtype, device)
        for name, nbytes, attend in ways(width, budgets, contexts, dtype, device, 2 * sizes.repeats, small=rehearse):
            replay = record(partial(model, attend))
            row = measure("model", name, lambda _, f=replay: f(), sizes, torch.device(device))  # type: ignore[misc]
            yield row | {"weights": model.nbytes, "cache": nbytes, "right": bool(torch.isfinite(replay()).all())}


def ways(
    width: Width,
    budgets: tuple[int, ...],
    contexts: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    room: int,
    *,
    small: bool,
) -> Iterator[tuple[str, int, Attend]]:
    """Name, bytes of the cache, and attention."""
    shape = (1, width.kv_heads, width.heads // width.kv_heads, width.d)
    for budget in budgets:
        settings: dict[str, Any] = MODEL_DEFAULTS | {"block": room + 8}
        settings |= {"window": 8} if small else {}
        caches = [
            static_layer(shape, dtype, device, budget, settings, context=2 * budget + room)[0]
            for _ in range(width.layers)
        ]

        def attend(index: int, q: Any, k: Any, v: Any, caches: Any = caches) -> torch.Tensor:
            return one_step(caches[index], [q, k, v])

        yield f"budget {budget}", sum(cache.nbytes for cache in caches), attend
    for context in contexts:
        lead = (width.layers, 1, width.kv_heads, context, width.d)
        keys, values = (torch.empty(lead, dtype=dtype, device=device).normal_() for _ in range(2))

        def full(index: int, q: Any, k: Any, v: Any, keys: Any = keys, values: Any = values) -> torch.Tensor:
            keys[index, :, :, -1:] = k
            values[index, :, :, -1:] = v
            # The group as queries of one head: SDPA reads the cache once for all of it.
            folded = q.reshape(1, width.kv_heads, -1, width.d)
            return scaled_dot_product_attention(folded, keys[index], values[index])

        yield f"full cache of {context}", keys.nbytes + values.nbytes, full
        del keys, values, full
