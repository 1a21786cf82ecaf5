"""All that decides how a layer's cache goes on, whatever lies in slots that hold no token."""

from __future__ import annotations

from typing import Any

import torch

from momentkv.cache.layer import LayerCache

__all__ = ["assert_same", "contents"]

# What of a state are tokens, slot by slot; all else is compared as it is.
TOKENS = ("keys", "values", "positions", "attention")


def contents(core: LayerCache) -> dict[str, Any]:
    """Tokens in order of position, statistics, and what the host knows."""
    held: dict[str, Any] = {"budgets": core.budgets, "refused": core.refused, "seen": core.seen}
    held |= {"stored": core.stored_by_head, "recording": core.recording}
    if core.state is None:
        return held
    state, view = core.state, core.view()
    real = view.positions >= 0
    held |= {"positions": view.positions, "attention": view.attention}
    held |= {name: x.masked_fill(~real[..., None], 0.0) for name, x in (("keys", view.keys), ("values", view.values))}
    arrays = state.arrays()
    held |= {name: x for name, x in arrays.items() if name.removeprefix("recent_") not in TOKENS}
    held |= {name: getattr(state, name) for name in ("layout", "filled", "padded", "has_evicted")}
    return held


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """To the last bit."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        if isinstance(x, torch.Tensor):
            assert x.dtype == b[name].dtype, name
            assert torch.equal(x, b[name]), name
        else:
            assert x == b[name], name
