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
from momentkv.backends.autocast import without_autocast
from momentkv.cache.holdings import NUMBERED
from momentkv.cache.joining import flush_together, flushed_together
from momentkv.cache.layer import LayerCache
from momentkv.cache.state import LayerState, hidden, overwritten
from momentkv.cache.step import arrived

__all__ = ["static_step"]

# Decompositions of matrices wait for the device, which a CUDA graph cannot hold: the compiler leaves this operator out
# of its graphs where PyTorch has a tag for it.
TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters:
    TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


def static_step(
    core: LayerCache, q: torch.Tensor, k: Any, v: Any, valid: torch.Tensor | None, flushing: Sequence[LayerCache]
) -> torch.Tensor:
    """Read one token of every row, and evict from layers that are due.

    Parameters
    ----------
    core : LayerCache
        Whose steps are static now.
    q : tensor, shape (batch, q_head, 1, d)
    k, v : tensor, shape (batch, kv_head, 1, d) and (batch, kv_head, 1, dv)
    valid : bool tensor, shape (batch, 1, 1), or None
        False for a row whose token is padding.
    flushing : sequence of LayerCache
        All layers in a flushing step of the last layer; otherwise none.

    Returns
    -------
    tensor, shape (batch, q_head, 1, dv)
    """
    if not torch.compiler.is_compiling():
        state = core.stored_state
        out = step_in_place(core, state, q, k, v, valid)
        if flushing:
            with without_autocast():
                flush_together(flushing)
        return out
    result: torch.Tensor = step_operator(q, k, v, valid, arrays_of(core), number_of(core))
    if flushing:
        flush_operator([x for each in flushing for x in arrays_of(each)], [number_of(each) for each in flushing])
    return result


def arrays_of(core: LayerCache) -> list[torch.Tensor]:
    """Every array of a layer's state."""
    return list(core.stored_state.arrays().values())


def number_of(core: LayerCache) -> Any:
    """The number by which operators know a layer; see `momentkv.hf.clock.open_to_lengths`."""
    return core.number if core.handle is None else core.handle.shape[0]


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
def flush_operator(arrays: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
    """`flushed_together` on layers known by their numbers, the arrays of one after those of the other, in place."""
    cores: list[Any] = [NUMBERED[number] for number in numbers]
    given, states = iter(arrays), []
    for core in cores:
        state = core.stored_state
        states.append(state.with_arrays([next(given) for _ in state.arrays()]))
    with without_autocast():
        overwritten(states, flushed_together(cores, states), get_backend(arrays[0]).overwrite_all)


@flush_operator.register_fake
def flush_shapes(arrays: Any, numbers: Any) -> None:
    return None
