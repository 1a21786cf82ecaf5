"""Peak memory of a layer's prefill with the default, beyond what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.cache.layer import LayerCache
from momentkv.testing.gpu.parts import Row

__all__ = ["peaks"]


def peaks(rehearse: bool) -> Iterator[Row]:
    """For each context: bytes of queries, keys and values, and the most that was allocated besides."""
    kv_heads, group, d = (2, 2, 16) if rehearse else (8, 4, 128)
    dtype, device = (torch.float32, "cpu") if rehearse else (torch.bfloat16, "cuda")
    for n in (64, 128) if rehearse else (8192, 32768, 131072):
        q, k, v = (torch.randn(1, h, n, d, device=device).to(dtype) for h in (kv_heads * group, kv_heads, kv_heads))
        settings: dict[str, Any] = {"budget": 40, "window": 8} if rehearse else {"budget": 512}
        cache = LayerCache(**settings, **MODEL_DEFAULTS)
        row: Row = {"context": n, "given": q.nbytes + k.nbytes + v.nbytes, "output": q.nbytes, "peak": None}
        with torch.no_grad():
            if not rehearse:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            cache.step(q, k, v)
            if not rehearse:
                torch.cuda.synchronize()
                row["peak"] = torch.cuda.max_memory_allocated() - before
        yield row | {"kept": cache.nbytes}
        del q, k, v, cache
