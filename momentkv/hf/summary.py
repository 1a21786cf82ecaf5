"""What a cache holds, layer by layer, for people to read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from momentkv.codes import bits_as_text
from momentkv.trust import trust as estimate_trust

__all__ = ["CacheSummary", "LayerSummary"]


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer of a cache.

    Attributes
    ----------
    index : int
    kind : str
        "moment" for a compressed layer, "sliding" for a stock one.
    budget, retained, evicted : float
        Tokens for each KV head, means over heads and rows. A sliding-window layer has no budget and evicts for good.
    nbytes : int
    trust : float or None
        Estimated relative error of the output at the mean of recent queries if the cache was made with ``certify``, or
        the result of the caller's own measure; None without either.
    bits : tuple of int, or None
        Of keys and values of retained tokens; None where they have the model's dtype.
    """

    index: int
    kind: str
    budget: float
    retained: float
    evicted: float
    nbytes: int
    trust: float | None = None
    bits: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class CacheSummary:
    """All layers of a cache; as a string, a table.

    Attributes
    ----------
    layers : tuple of LayerSummary
    seen : int
        Tokens read, padding included.
    full_bytes : int
        Keys and values of transformers' own cache: all tokens, of a sliding-window layer those within the window.
    """

    layers: tuple[LayerSummary, ...]
    seen: int
    full_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def __str__(self) -> str:
        trusted = any(layer.trust is not None for layer in self.layers)
        coded = any(layer.bits is not None for layer in self.layers)
        head = ["layer", "kind", "budget", "retained", "evicted", "KiB"] + ["bits"] * coded + ["trust"] * trusted
        rows = [
            [
                str(layer.index),
                layer.kind,
                f"{layer.budget:.0f}" if layer.kind == "moment" else "",
                f"{layer.retained:.0f}",
                f"{layer.evicted:.0f}",
                f"{layer.nbytes / 1024:.1f}",
            ]
            + (["" if layer.bits is None else bits_as_text(layer.bits)] if coded else [])
            + (["" if layer.trust is None else f"{layer.trust:.3g}"] if trusted else [])
            for layer in self.layers
        ]
        total = f"{self.seen} tokens read, {self.nbytes / 2**20:.2f} MiB of {self.full_bytes / 2**20:.2f} MiB"
        return "\n".join([*table([head, *rows]), total])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns.

    Examples
    --------
    >>> table([["a", "bb"], ["10", "2"]])
    [' a  bb', '10   2']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def summarise(cache: Any, trust: Callable[[Any], float] | None = None) -> CacheSummary:
    """Summary of a `MomentCache`; see its method."""
    layers, full = [], 0
    cores = cache.moment_layers
    for index, layer in enumerate(cache.layers):
        if index in cores:
            core = cores[index]
            budgets = core.budgets or [core.budget]
            empty = not core.seen
            retained = evicted = 0.0
            if not empty:
                view = core.view()
                k, v = view.keys, view.values
                held = (view.positions >= 0).sum(-1).float().mean()
                # Without statistics nobody has counted evicted tokens, and padding is counted with them.
                gone = core.stored_state.evicted.weight.float().mean() if core.config.corrects else core.seen - held
                retained, evicted = float(held), float(gone)
                pair = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
                full += core.seen * math.prod(k.shape[:-2]) * pair
            layers.append(
                LayerSummary(
                    index,
                    "moment",
                    sum(budgets) / len(budgets),
                    retained,
                    evicted,
                    layer.nbytes,
                    None if empty else measured(core, trust),
                    core.config.bits,
                )
            )
        else:
            started = layer.is_initialized and layer.keys is not None
            stored = int(layer.keys.shape[-2]) if started else 0
            seen = int(layer.get_seq_length()) if started else 0
            size = layer.keys.nbytes + layer.values.nbytes if started else 0
            full += min(seen, layer.sliding_window - 1) * size // max(stored, 1)  # a layer that records holds more
            layers.append(LayerSummary(index, "sliding", 0.0, stored, seen - stored, size))
    return CacheSummary(tuple(layers), int(cache.get_seq_length()) + 0, full)  # of its own, without the cache


def measured(core: Any, trust: Callable[[Any], float] | None) -> float | None:
    """The caller's measure of a layer, or else its estimated error, or None where nothing is known."""
    if trust is not None:
        measure = trust(core)
        try:
            return float(measure)
        except (TypeError, ValueError):
            raise ValueError(f"trust gave {measure!r} for a layer; it must give a number") from None
    state = core.stored_state
    if core.config.certify is None or state.query_mean is None:
        return None
    queries = state.query_mean[..., None, :] / core.attention_scale
    return float(estimate_trust(core, queries.to(state.recent_keys.dtype)).estimated.mean())
