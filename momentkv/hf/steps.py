"""Static steps and flushes of a layer, as operators that a compiled graph holds as one node each.

Outside of a graph they are called as plain functions. In a graph, ``torch.ops.momentkv.step`` and ``flush`` change the
layer's arrays in place; what is no array, they know by number.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from momentkv.backends import get_backend
from momentkv.cache.holdings import NUMBERED
from momentkv.cache.layer import LayerCache
from momentkv.cache.state import LayerState, hidden
from momentkv.cache.step import arrived

__all__ = ["static_step"]

# Decompositions of matrices wait for the device, which a CUDA graph cannot hold: the compiler leaves this operator out
# of its graphs where PyTorch has a tag for it.
TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters:
    TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


def static_step(
    core: LayerCache, q: torch.Tensor, k: Any, v: Any, valid: torch.Tensor | None, flushes: bool
) -> torch.Tensor:
    """Read one token of every row, and evict if it is time to.

    Parameters
    ----------
    core : LayerCache
        Whose steps are static now.
    q : tensor, shape (batch, q_head, 1, d)
    k, v : tensor, shape (batch, kv_head, 1, d) and (batch, kv_head, 1, dv)
    valid : bool tensor, shape (batch, 1, 1), or None
        False for a row whose token is padding.
    flushes : bool

    Returns
    -------
    tensor, shape (batch, q_head, 1, dv)
    """
    if not torch.compiler.is_compiling():
        state = core.stored_state
        out = step_in_place(core, state, q, k, v, valid)
        if flushes:
            core.flush()
        return out
    arrays = list(core.stored_state.arrays().values())
    number = core.number if core.handle is None else core.handle.shape[0]
    result: torch.Tensor = step_operator(q, k, v, valid, arrays, number)
    if flushes:
        flush_operator(arrays, number)
    return result


def step_in_place(
    core: LayerCache, state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """A step whose outcome is written into the state's own arrays."""
    new = arrived(core.config, state, k, v)
    if valid is not None:
        new = hidden(new, valid, 1, ask=False)
    out, after = core.decoded(state, new, q)
    state.overwritten(after, get_backend(q).overwrite)
    return out.to(q.dtype)


@torch.library.custom_op("momentkv::step", mutates_args=("arrays",))
def step_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    arrays: Sequence[torch.Tensor],
    number: int,
) -> torch.Tensor:
    """`step_in_place` on a layer known by its number."""
    core: Any = NUMBERED[number]
    return step_in_place(core, core.stored_state.with_arrays(arrays), q, k, v, valid)


@step_operator.register_fake
def step_shapes(q: Any, k: Any, v: Any, valid: Any, arrays: Any, number: int) -> torch.Tensor:
    shape: torch.Tensor = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return shape


@torch.library.custom_op("momentkv::flush", mutates_args=("arrays",), **TAGS)
def flush_operator(arrays: Sequence[torch.Tensor], number: int) -> None:
    """`LayerCache.flushed` on a layer known by its number, in place."""
    core: Any = NUMBERED[number]
    state = core.stored_state.with_arrays(arrays)
    state.overwritten(core.flushed(state), get_backend(arrays[0]).overwrite)


@flush_operator.register_fake
def flush_shapes(arrays: Any, number: int) -> None:
    return None
