"""Statistics in files, and files that momentkv 0.1.0 wrote: a list of heads' caches, each with its tokens in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from momentkv.backends.layout import Layout
from momentkv.cache.config import CacheConfig
from momentkv.cache.eviction import Totals, settle
from momentkv.cache.layer import LayerCache
from momentkv.cache.packing import View
from momentkv.cache.state import empty_state
from momentkv.statistics.moments import Moments

__all__ = ["FORMAT", "CacheFileError", "restore", "statistics"]

FORMAT = 1


class CacheFileError(ValueError):
    """A cache file that is damaged, of another version, or of another model."""


def statistics(
    config: CacheConfig, k: torch.Tensor, v: torch.Tensor, arrays: Mapping[str, torch.Tensor], prefix: str, path: Any
) -> tuple[Any, Moments | None]:
    """The statistics of evicted tokens and the evidence, from the arrays with those prefixes."""
    evicted = config.correction.empty(k, v)
    if config.corrects:  # version 0.1 also wrote moments to which nothing was ever added
        evicted = filled(evicted, prefix, arrays)
    if evicted is None:
        raise CacheFileError(
            f"{path} holds statistics of another make than its correction, {config.correction!r}; pass the correction "
            "it had"
        )
    if config.certify is None:
        return evicted, None
    evidence: Moments | None = filled(Moments.empty(k, v, order=config.certify, extent=True), "evidence.", arrays)
    if evidence is None:
        raise CacheFileError(f"{path} holds no evidence of order {config.certify}, which its cache was made to keep")
    return evicted, evidence


def filled(empty: Any, prefix: str, arrays: Mapping[str, torch.Tensor]) -> Any:
    """A state with the arrays of that prefix in place of its own, or None if they are not alike."""
    state = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    fits = {name: (x.shape, x.dtype) for name, x in empty.arrays().items()}
    if fits != {name: (x.shape, x.dtype) for name, x in state.items()}:
        return None
    given = iter([state[name] for name in fits])
    return empty.map(lambda _: next(given)) if fits else empty


def restore(core: LayerCache, parts: Sequence[Mapping[str, Any]], own: Mapping[str, torch.Tensor], path: Any) -> None:
    """Give a layer's cache what a file of the first format holds: one cache, or one for each KV head."""
    core.budgets = [part["budget"] for part in parts]
    core.scale, core.refused = parts[0]["scale"], sum(part.get("refused", 0) for part in parts)
    each = [
        {name.split(".", 1)[1]: x for name, x in own.items() if name.split(".", 1)[0] == str(n)}
        for n in range(len(parts))
    ]
    if not each[0]:
        core.budgets = None if isinstance(core.budget, int) else core.budgets
        return
    longest = max(arrays["keys"].shape[2] for arrays in each)
    arrays = {name: torch.cat([widened(name, one[name], longest) for one in each], dim=1) for name in each[0]}
    config, keys, values = core.config, arrays["keys"], arrays["values"]
    heads = keys.shape[1]
    core.budgets = core.budgets * heads if len(parts) == 1 else core.budgets
    evicted, evidence = statistics(config, keys, values, arrays, "moments.", path)
    state = empty_state(
        keys,
        values,
        evicted=evicted,
        evidence=evidence,
        layout=Layout(config.sinks, config.recent, (0,) * heads),
        observes=config.observes,
    )
    remembered = {name: arrays.get(name) for name in ("query_mean", "query_square", "recent_queries")}
    state = dataclasses.replace(
        state, **remembered, seen=parts[0]["seen"], has_evicted=any(part["has_evicted"] for part in parts)
    )
    kept = arrays["positions"] >= 0
    view = View(keys, values, arrays["positions"], arrays.get("score"))
    core.take(settle(config, state, view, kept, core.budgets, Totals.of_kept(kept)))


def widened(name: str, x: torch.Tensor, length: int) -> torch.Tensor:
    """An array of tokens with empty slots behind, so that all heads have as many; others as they are."""
    if name not in ("keys", "values", "positions", "score"):
        return x
    missing = length - x.shape[2]
    sides = (0, 0, 0, missing) if x.ndim == 4 else (0, missing)
    return torch.nn.functional.pad(x, sides, value=-1 if name == "positions" else 0)
