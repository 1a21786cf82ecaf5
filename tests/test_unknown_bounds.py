"""Where nothing is known of one part, a bound is infinite or that of another theorem, and never NaN."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
from test_bad_bounds import NAMES, fitting

from momentkv import Moments
from momentkv.attention import AttentionState
from momentkv.bounds import Interval, output_error, theorems, value_error

# Of these a bound may be infinite: sums of squares beyond the dtype have such.
UNKNOWN = ("radius", "tail", "trace", "error")
PARTS = [(name, x) for name in NAMES for x in inspect.signature(getattr(theorems, name)).parameters if x in UNKNOWN]
# e^-kappa at the ends of these in float32: one, and zero.
MASSES = {"none": Interval(0.0, 0.0), "much": Interval(200.0, 200.0), "either": Interval(0.0, 200.0)}


def single(x: Any) -> Any:
    """Arrays in float32."""
    return Interval(*map(single, x)) if isinstance(x, Interval) else np.asarray(x, dtype=np.float32)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize(("name", "part"), PARTS, ids=lambda x: x)
def test_an_unknown_part_makes_a_bound_infinite(name: str, part: str, mass: str):
    given = {x: single(y) for x, y in fitting(name).items()}
    given[part] = np.full_like(given[part], math.inf)
    if "mass" in given:
        given["mass"] = Interval(*(np.full(3, x, dtype=np.float32) for x in MASSES[mass]))
    if "share" in given:
        given["share"] = Interval(*(np.full(3, x, dtype=np.float32) for x in (0.0, 0.0)))
    if "logits" in given and mass == "none":
        given["logits"] = Interval(*(np.zeros(3, dtype=np.float32),) * 2)
    found = getattr(theorems, name)(**given)
    for x in found if isinstance(found, Interval) else (found,):
        assert not np.isnan(x).any()
    # What is unknown is said to be so: zero times it is no statement that there is nothing.
    assert np.isinf(found.high if isinstance(found, Interval) else found).all()


def rounded_often(order: int, size: float) -> tuple[Any, Any, Any, Moments]:
    """Queries, tokens, and their moments, of sums so long that rounding may have lost all of them."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, n, 2)).astype(np.float32) * np.float32(x) for n, x in ((3, size), (9, 1), (9, 1)))
    moments = Moments.from_tokens(k, v, order=order, extent=True)
    # Of many decays and downdates, each of which may multiply the number of roundings.
    counts = {"terms": 1e12, "merges": 1e11, "mixing": 1e10}
    extent = dataclasses.replace(moments.extent, **{x: np.full(1, y, dtype=np.float32) for x, y in counts.items()})
    return q, k, v, dataclasses.replace(moments, extent=extent)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("size", [1.0, 200.0])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_errors_of_moments_that_rounding_may_have_lost_are_bounded(order: int, size: float):
    q, k, v, moments = rounded_often(order, size)
    logits = np.einsum("bqd,bnd->bqn", q.astype(float), k.astype(float))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    output = (weights / weights.sum(-1, keepdims=True)) @ v.astype(float)
    estimate = np.zeros((1, 3, 2), dtype=np.float32)
    nothing = AttentionState(estimate, np.zeros((1, 3), dtype=np.float32))
    truth = np.linalg.norm(output - estimate, axis=-1)
    assert (value_error(q, moments, estimate, scale=1.0) >= truth).all()
    # The state of zeros has a mass of one: the merged output is no farther from zero than that of the set.
    merged = output_error(nothing, q, moments, estimate, scale=1.0)
    assert np.isfinite(merged).all()
    share = 1 / (1 + np.exp(-logits.max(-1)) / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    assert (merged >= share * truth).all()
