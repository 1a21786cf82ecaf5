"""What each KV head of a layer's cache holds, as if it were a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from momentkv._array import array_namespace
from momentkv.cache.layer import LayerCache

__all__ = ["heads_of"]


def heads_of(core: LayerCache) -> Iterator[SimpleNamespace]:
    """Budget, block, stored, positions, keys, values, moments, seen, has_evicted, order of each KV head.

    Arrays keep the head's axis, of length 1, and only slots in which some row holds a token.
    """
    view = core.view()
    xp = array_namespace(view.keys)
    batch_axes = len(view.positions.shape) - 2
    for head, (budget, stored) in enumerate(zip(core.budgets or [], core.stored_by_head, strict=True)):

        def of_head(x: Any, head: int = head) -> Any:
            return x[(slice(None),) * batch_axes + (slice(head, head + 1),)]

        positions = of_head(view.positions)
        used = xp.nonzero(xp.any(xp.reshape(positions >= 0, (-1, positions.shape[-1])), axis=0))[0]
        yield SimpleNamespace(
            budget=budget,
            block=core.config.block,
            stored=stored,
            positions=xp.take(positions, used, axis=-1),
            keys=xp.take(of_head(view.keys), used, axis=-2),
            values=xp.take(of_head(view.values), used, axis=-2),
            moments=core.moments.map(of_head),
            seen=core.seen,
            has_evicted=core.has_evicted,
            order=core.config.order,
        )
