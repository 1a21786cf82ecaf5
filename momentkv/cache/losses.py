r"""What codes may have lost of a layer's tokens, channel by channel, where certificates must know it.

A token at hand is as far from the one that came as half its step, and what it had lost before it was coded as it is
now: that of *stored* tokens. One that was evicted has lost as much as it had by then: that of *evicted* tokens. Both
are one number for each channel of each head, the most of any token, and no token is kept.
"""

from __future__ import annotations

from typing import Any

from momentkv._array import Array, accumulation_dtype, array_namespace, device
from momentkv.bounds.rounding import code_error
from momentkv.cache.state import LayerState
from momentkv.trust import Losses

__all__ = ["EVICTED", "STORED", "choose_lost", "losses_of", "with_lost"]

# Places in `LayerState.key_loss` and `LayerState.value_loss`.
EVICTED, STORED = 0, 1


def steps_of(state: LayerState, n: int) -> tuple[Array, Array]:
    """Steps of keys and of values of the ``n`` slots of a view, (..., kv_head, n); 0 for tokens that are no records."""
    like, coding = state.recent_keys, state.coding()
    xp = array_namespace(like)
    dtype = accumulation_dtype(xp, like.dtype)
    lead, first, width = like.shape[:-2], min(state.layout.sinks, state.filled), state.layout.width
    if coding is None or width == 0:
        none = xp.zeros((*lead, n), dtype=dtype, device=device(like))
        return none, none

    def beside(step: Array) -> Array:
        own = xp.astype(state.layout.rectangle(step, vectors=False, fill=0.0), dtype)
        before, behind = (xp.zeros((*lead, m), dtype=dtype, device=device(like)) for m in (first, n - first - width))
        return xp.concat([before, own, behind], axis=-1)

    return beside(coding.key_step), beside(coding.value_step)


def lost_of(state: LayerState, mask: Array) -> tuple[Array, Array]:
    """The most that tokens of a view have lost, those where ``mask`` (..., kv_head, n) is True: of keys, of values.

    Arrays (..., kv_head, d) and (..., kv_head, dv).
    """
    xp, coding = array_namespace(mask), state.coding()
    some = xp.any(mask, axis=-1)[..., None]
    found = []
    for place, step in enumerate(steps_of(state, mask.shape[-1])):
        like = (state.recent_keys, state.recent_values)[place]
        loss = (state.key_loss, state.value_loss)[place]
        lost = xp.zeros((*mask.shape[:-1], like.shape[-1]), dtype=step.dtype, device=device(step))
        if loss is not None:
            lost = xp.where(some, loss[..., STORED, :], lost)
        if coding is not None:
            standard = (coding.key_standard, coding.value_standard)[place]
            most = xp.max(xp.where(mask, step, xp.zeros_like(step)), axis=-1)
            lost = lost + code_error(most, standard, coding.bits[place], stored=like.dtype)
        found.append(lost)
    return found[0], found[1]


def with_lost(state: LayerState, place: int, mask: Array) -> dict[str, Any]:
    """Fields of a state in which the tokens of a mask have become evicted ones, or stored ones that are no records."""
    fields = {}
    for name, lost in zip(("key_loss", "value_loss"), lost_of(state, mask), strict=True):
        xp, held = array_namespace(lost), getattr(state, name)
        both = [xp.zeros_like(lost)] * 2 if held is None else [held[..., EVICTED, :], held[..., STORED, :]]
        both[place] = xp.maximum(both[place], lost)
        fields[name] = xp.stack(both, axis=-2)
    return fields


def losses_of(state: LayerState, positions: Array) -> Losses | None:
    """What a certificate and an estimate need to know of a state's codes; None where it never had any.

    ``positions`` (..., kv_head, n) are those of a view of it, new tokens included.
    """
    coding = state.coding()
    if coding is None and state.key_loss is None:
        return None
    xp = array_namespace(positions)
    errors = []
    for lost, loss in zip(lost_of(state, positions >= 0), (state.key_loss, state.value_loss), strict=True):
        errors.append(lost if loss is None else xp.maximum(lost, loss[..., EVICTED, :]))
    steps = steps_of(state, positions.shape[-1])
    spreads = [xp.ones_like(error) for error in errors]
    if coding is not None:
        of_keys, of_values = coding.key_standard.deviation, coding.value_standard.deviation
        spreads = [xp.astype(x, step.dtype) for x, step in zip((of_keys, of_values), steps, strict=True)]
    return Losses(errors[0], errors[1], steps[0], steps[1], spreads[0], spreads[1])


def choose_lost(heads: Array, old: LayerState, new: LayerState) -> LayerState:
    """The new state with some heads' losses (..., kv_head) of the old one."""
    if new.key_loss is None:
        return new
    xp, fields = array_namespace(heads), {}
    for name in ("key_loss", "value_loss"):
        x, y = getattr(old, name), getattr(new, name)
        before = xp.zeros_like(y) if x is None else x
        fields[name] = xp.where(xp.reshape(heads, (*heads.shape, 1, 1)), before, y)
    return new.changed(**fields)
