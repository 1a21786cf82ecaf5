"""Arguments of the theorems that cannot be what they stand for: each is refused by name, with the remedy."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from momentkv.bounds import Interval, theorems

ONE, VECTOR = np.ones(3), np.ones((3, 2))
LOGITS = Interval(-ONE, ONE)
MASS = Interval(0.1 * ONE, 0.5 * ONE)
# By the name of an argument, what fits; and of numbers and intervals, what is out of range.
FITS: dict[str, Any] = {
    **dict.fromkeys(("slope", "offset", "retained", "output", "value_mean"), VECTOR),
    **dict.fromkeys(("radius", "tail", "length", "deviation", "ratio", "trace", "difference"), ONE),
    **dict.fromkeys(("retained_lse", "base", "error", "step", "logit", "value"), ONE),
    "logits": LOGITS,
    "mass": MASS,
    "share": MASS,
}
UNSIGNED = {"radius", "tail", "length", "deviation", "ratio", "trace", "error", "step", "logit", "value"}
NAMES = [name for name in theorems.__all__ if name != "Interval"]
PAIRS = [(name, argument) for name in NAMES for argument in inspect.signature(getattr(theorems, name)).parameters]


def fitting(name: str) -> dict[str, Any]:
    """Arguments that fit a theorem."""
    given = {x: FITS.get(x, ONE) for x in inspect.signature(getattr(theorems, name)).parameters}
    if name == "output_from_value":
        given["centre"] = VECTOR
    if name in ("mass_from_variance", "value_from_residual"):
        given["deviation"] = MASS
    return given


def refused(name: str, message: str, **wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        getattr(theorems, name)(**fitting(name) | wrong)


@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_what_no_theorem_takes_is_named(name: str, argument: str):
    given = fitting(name)
    getattr(theorems, name)(**given)
    right = given[argument]
    if isinstance(right, Interval):
        refused(name, f"{argument} is a tuple; use Interval", **{argument: tuple(right)})
        refused(name, f"{argument}.high is a list; pass an array", **{argument: Interval(right.low, [1.0])})
        refused(name, f"{argument} has ends in the other order", **{argument: Interval(right.high, right.low)})
        what = "lies on one side of 0" if argument == "logits" else "is -0.1 somewhere; use 0 or more"
        low = 0.1 * ONE if argument == "logits" else -0.1 * ONE
        refused(name, f"{argument} {what}", **{argument: Interval(low, right.high)})
        wrong = Interval(right.low, right.high[:2])
    else:
        refused(name, f"{argument} is a list; pass an array of NumPy", **{argument: [1.0]})
        if len(given) > 1:
            refused(name, "all arrays of a call must be of one library", **{argument: torch.ones(3)})
        refused(name, f"{argument} is int64 of shape", **{argument: right.astype(int)})
        if argument in UNSIGNED:
            refused(name, f"{argument} is -2 somewhere; use", **{argument: -2 * right})
        if len(given) == 1:
            return
        wrong = right[:2]
    with pytest.raises(ValueError, match=r"has shape \(.*, but .* has \(.*; both must be of the same") as caught:
        getattr(theorems, name)(**{x: y for x, y in given.items() if x != argument}, **{argument: wrong})
    assert argument in str(caught.value)


@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_no_bound_of_nan_is_a_finite_number(name: str, argument: str):
    given = fitting(name)
    right = given[argument]
    nan = Interval(right.low * math.nan, right.high * math.nan) if isinstance(right, Interval) else right * math.nan
    with np.errstate(invalid="ignore"):
        bound = getattr(theorems, name)(**given | {argument: nan})
    upper = bound.high if isinstance(bound, Interval) else bound
    assert not np.isfinite(upper).any()


def test_vectors_of_values_are_as_long():
    refused("value_from_range", "offset has shape (); it must have a last axis", offset=np.asarray(1.0))
    with pytest.raises(ValueError, match=r"offset has shape \(3, 1\), but slope has \(3, 2\); their last axes"):
        theorems.value_from_representation(VECTOR, VECTOR[:, :1], MASS, ONE, ONE)


def test_intervals_meet_intervals_alone():
    with pytest.raises(TypeError, match="other is a tuple; use Interval"):
        MASS.intersect((ONE, ONE))
