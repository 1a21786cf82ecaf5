"""Checks of moments, whose errors name the argument."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from momentkv._array import Array, array_namespace, check_arrays, check_broadcast, concrete
from momentkv._numbers import check_kind, is_one_of, real_number
from momentkv.statistics.extent import Extent

if TYPE_CHECKING:
    from momentkv.statistics.moments import Moments

__all__ = [
    "check_anchor",
    "check_content",
    "check_estimate",
    "check_fits",
    "check_rotation",
    "checked_decay",
    "equal_anchors",
]


def equal_anchors(one: Array, other: Array) -> bool:
    """Whether two anchors of one shape are equal; taken for granted while JAX traces."""
    return not concrete(one, other) or bool(array_namespace(one, other).all(one == other))


def check_order(order: int) -> None:
    """Raise unless ``order`` is 0, 1 or 2."""
    if not is_one_of((0, 1, 2), order):
        raise ValueError(
            f"order is {order!r}; use 0 (means only), 1 (means and value-key co-moment) or 2 (the keys' co-moment too)"
        )


def check_estimate(order: int, strength: float, most: int) -> None:
    """Raise unless moments of order ``most`` give an estimate of this order and strength."""
    check_order(order)
    if not 0 <= real_number("strength", strength) <= 1:
        raise ValueError(f"strength is {strength}; use 0 (no gain) to 1 (that of Gaussian logits)")
    if order > most:
        raise ValueError(
            f"order is {order} but the moments are of order {most}; "
            f"build them with Moments.from_tokens(..., order={order}), or estimate with order={most}"
        )


def check_content(order: int, extent: Any) -> None:
    """Raise unless this says what moments are to keep. None or a word as ``extent`` would pass for True."""
    check_order(order)
    if not isinstance(extent, (bool, Extent)):
        raise TypeError(
            f"extent is {reprlib.repr(extent)}, a {type(extent).__name__}; use True, False, or an Extent whose anchors "
            "to measure from"
        )


def check_rotation(rotation: Array, key_mean: Array) -> None:
    """Raise unless a matrix (..., d, d) of floating point turns the keys of every head."""
    check_arrays(moments=key_mean, rotation=rotation)
    *lead, d = key_mean.shape
    if tuple(rotation.shape[-2:]) != (d, d):
        raise ValueError(
            f"rotation has shape {tuple(rotation.shape)}; its last two axes must be ({d}, {d}), the key dimension"
        )
    check_broadcast("rotation", rotation, (*lead, d, d))


def check_anchor(anchor: Array, own: Array) -> None:
    """Raise unless an anchor is one of the same make as that of a state: another shape might broadcast."""
    if tuple(anchor.shape) != tuple(own.shape):
        raise ValueError(f"anchor has shape {tuple(anchor.shape)}; give one for each KV head, shape {tuple(own.shape)}")


def check_fits(fields: Iterable[str], one: Moments, other: Moments) -> None:
    """Raise unless two sets of moments can be combined: of the same fields, shapes, dtypes and anchor."""
    check_kind(type(one), other=other)
    check_arrays(**{"the one's weight": one.weight, "the other's": other.weight})
    if (one.anchor is None) != (other.anchor is None):
        raise ValueError("cannot combine moments with and without anchor; build both with the same anchor=")
    if (one.extent is None) != (other.extent is None):
        raise ValueError(
            "cannot combine moments with and without extent; build both with the same extent= in from_tokens"
        )
    for name in fields:
        mine, theirs = getattr(one, name), getattr(other, name)
        if (mine is None) != (theirs is None):
            raise ValueError(
                f"cannot combine moments of order {one.order} with moments of order {other.order}; "
                "build both with the same order="
            )
        if mine is not None and tuple(mine.shape) != tuple(theirs.shape):
            raise ValueError(
                f"cannot combine moments: {name} has shape {tuple(mine.shape)} here and "
                f"{tuple(theirs.shape)} there; batch, KV heads and dimensions must be equal"
            )
        if mine is not None and mine.dtype != theirs.dtype:
            remedy = "cast one with map()" if one.extent is None else "build both from tokens of one dtype"
            raise ValueError(f"cannot combine moments: {name} is {mine.dtype} here and {theirs.dtype} there; {remedy}")
    if one.anchor is not None and not equal_anchors(one.anchor, other.anchor):
        raise ValueError("cannot combine moments with other anchors; gather both around the same one")


def checked_decay(gamma: float | Array, weight: Array) -> Array:
    """Factors of decay from 0 to 1, in the dtype of the weights; 0 where a weight would lose its digits."""
    if isinstance(gamma, numbers.Real):
        gamma = float(gamma)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma:g}; a decay factor lies between 0 and 1")
        xp = array_namespace(weight)
        return above_subnormal(xp.full_like(weight, gamma), weight)
    xp = check_arrays(moments=weight, gamma=gamma)
    check_broadcast("gamma", gamma, weight.shape)
    if concrete(gamma) and not bool(xp.all((gamma >= 0) & (gamma <= 1))):
        raise ValueError("gamma has a factor that is not between 0 and 1, where a decay factor lies")
    return above_subnormal(xp.astype(gamma, weight.dtype, copy=False), weight)


def above_subnormal(gamma: Array, weight: Array) -> Array:
    """The factors, 0 where they would leave less weight than has all digits beside the unit roundoff; 1 stays 1."""
    xp = array_namespace(weight)
    limits = xp.finfo(weight.dtype)
    return xp.where((gamma < 1) & (weight * gamma < limits.smallest_normal / limits.eps), xp.zeros_like(weight), gamma)
