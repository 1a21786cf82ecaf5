"""`eviction_error` against its definitions in float64 NumPy, and the identity that ties its parts together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from libraries import Library

from momentkv import Moments
from momentkv.diagnostics import EvictionError, eviction_error
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, assert_within

# Numbers are of order one and sums of at most 40 of them: under 4500 roundings of float64.
TOLERANCE = 1e-12
N = 40


def arrays(
    group: int = 2, q_len: int = 3, heads: int = 2, batch: tuple[int, ...] = (2,)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((*batch, heads * group, q_len, 6)),
        rng.standard_normal((*batch, heads, N, 6)),
        rng.standard_normal((*batch, heads, N, 5)) + 0.5,
    )


def chosen(seed: int = 1, share: float = 0.3) -> np.ndarray:
    """Retained tokens, others in each head; the first and the last always."""
    mask = np.random.default_rng(seed).random((2, 2, N)) < share
    mask[..., 0] = mask[..., -1] = True
    return mask


def lengths(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum(-1))


def by_definition(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    retained: np.ndarray,
    sums: oracle.Sums | None = None,
    order: int = 1,
    scale: float | None = None,
    mask: np.ndarray | None = None,
) -> EvictionError:
    """One softmax over all tokens, cut in two."""
    q_heads, kv_heads = q.shape[-3], k.shape[-3]
    weights, _ = oracle.softmax(oracle.logits(q, k, scale, mask))
    values = oracle.to_query_heads(v, q_heads, -3)
    kept = oracle.to_query_heads(np.broadcast_to(retained, k.shape[:-1]), q_heads, -2)[..., None, :]
    exact = np.einsum("...ij,...jd->...id", weights, values)
    mass, parts = {}, {}
    for name, there in (("retained", kept), ("evicted", ~kept)):
        part = np.where(there, weights, 0.0)
        mass[name] = part.sum(-1)
        share = part / np.where(mass[name] > 0, mass[name], 1.0)[..., None]
        parts[name] = np.einsum("...ij,...jd->...id", share, values)
    inner = (parts["retained"] * parts["evicted"]).sum(-1)
    product = lengths(parts["retained"]) * lengths(parts["evicted"])
    seen = retained[..., None, None, :] & (np.ones((1, 1, N), dtype=bool) if mask is None else mask)
    seen = np.broadcast_to(seen, (*k.shape[:-2], q_heads // kv_heads, q.shape[-2], N))
    sums = oracle.moments(k, v, ~np.broadcast_to(retained, k.shape[:-1])) if sums is None else sums
    corrected = oracle.merge(oracle.attend(q, k, v, scale, seen), oracle.estimate(q, sums, order, scale)).out
    return EvictionError(
        mass["evicted"],
        np.where(product > 0, inner / np.where(product > 0, product, 1.0), 0.0),
        lengths(parts["retained"] - exact) / lengths(exact),
        lengths(corrected - exact) / lengths(exact),
    )


def measured(backend: Library, *tensors: np.ndarray, mask: np.ndarray | None = None, **settings: object):
    error = eviction_error(*(backend.asarray(x) for x in tensors), mask=backend.asarray(mask), **settings)
    return EvictionError(*(backend.numpy(x) for x in error))


def assert_equal(actual: EvictionError, expected: EvictionError) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert_within(a, b, TOLERANCE)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_every_part_is_as_defined(backend: Library, group: int, order: int, scale: float | None):
    tensors = (*arrays(group), chosen())
    actual = measured(backend, *tensors, order=order, scale=scale)
    expected = by_definition(*tensors, order=order, scale=scale)
    assert actual.evicted_mass.shape == (2, 2 * group, 3)
    assert_equal(actual, expected)
    # Not all the same by accident.
    assert (abs(expected.corrected - expected.plain) > 1e-3).all()


def test_queries_see_only_what_the_mask_shows(backend: Library):
    """A causal mask: neither part may use what comes after a query."""
    q, k, v = arrays()
    retained = chosen()
    mask = np.tril(np.ones((3, N), dtype=bool), N - 10)
    sums = oracle.moments(k, v, ~retained)
    actual = measured(backend, q, k, v, retained, mask=mask)
    assert_equal(actual, by_definition(q, k, v, retained, sums, mask=mask))
    k[..., N - 7 :, :] += 100.0  # hidden from all three, and in no moments below
    v[..., N - 7 :, :] -= 100.0
    given = Moments(*(backend.asarray(x) for x in sums))
    assert_equal(measured(backend, q, k, v, retained, mask=mask, moments=given), actual)


def test_one_mask_of_tokens_serves_every_head(backend: Library):
    q, k, v = arrays()
    alike = np.broadcast_to(chosen()[:1, :1], (2, 2, N))
    assert_equal(measured(backend, q, k, v, alike[0, 0]), by_definition(q, k, v, alike))


def test_given_moments_are_those_that_correct(backend: Library):
    q, k, v = arrays()
    retained = chosen()
    others = oracle.moments(k + 1.0, 2 * v, ~retained)
    given = Moments(*(backend.asarray(x) for x in others))
    expected = by_definition(q, k, v, retained, others)
    actual = measured(backend, q, k, v, retained, moments=given)
    assert_equal(actual, expected)
    assert (abs(actual.corrected - by_definition(q, k, v, retained).corrected) > 1e-6).any()


def test_nothing_evicted_has_no_mass_and_no_error(backend: Library):
    error = measured(backend, *arrays(), np.ones(N, dtype=bool))
    for x in error:
        assert_same(x, np.zeros((2, 4, 3)))


@pytest.mark.parametrize("order", [0, 1])
def test_everything_but_one_token_evicted(backend: Library, order: int):
    retained = np.arange(N) == 7
    tensors = (*arrays(), np.broadcast_to(retained, (2, 2, N)))
    error = measured(backend, *tensors, order=order)
    assert_equal(error, by_definition(*tensors, order=order))
    assert (error.evicted_mass > 0.5).all()


def test_one_token_evicted_is_corrected_exactly(backend: Library):
    """Moments of one token are the token."""
    error = measured(backend, *arrays(), np.arange(N) != 7)
    assert (error.plain > 1e-6).all()
    assert_within(error.corrected, np.zeros_like(error.corrected), TOLERANCE)


def test_all_evicted_is_all_of_the_mass_and_has_no_direction(backend: Library):
    error = measured(backend, *arrays(), np.zeros(N, dtype=bool))
    assert_within(error.evicted_mass, np.ones((2, 4, 3)), TOLERANCE)
    assert_same(error.cosine, np.zeros((2, 4, 3)))
    assert_same(error.plain, np.ones((2, 4, 3)))
    assert (error.corrected < 1).all()


def test_plain_error_is_the_mass_times_the_distance_between_the_parts(backend: Library):
    """``o_R - o = w_E (o_R - o_E)`` (docs/derivations/correction.md)."""
    q, k, v = arrays()
    retained = chosen()
    error = measured(backend, q, k, v, retained)
    kept = retained[:, :, None, None, :]
    o_r, o_e = (oracle.attend(q, k, v, mask=mask).out for mask in (kept, ~kept))
    exact = oracle.attend(q, k, v).out
    assert_within(error.plain, error.evicted_mass * lengths(o_r - o_e) / lengths(exact), TOLERANCE)


def test_cosine_is_that_of_known_directions(backend: Library):
    """Values of the retained along one axis, of the evicted at 120 degrees to it."""
    q, k, v = arrays(heads=1, batch=())
    retained = np.arange(N) < 10
    v[...] = 0.0
    v[..., retained, 0] = 2.0
    v[..., ~retained, 0], v[..., ~retained, 1] = -0.5, math.sqrt(0.75)
    error = measured(backend, q, k, v, retained)
    assert_within(error.cosine, np.full((2, 3), -0.5), TOLERANCE)


def test_values_of_zero_have_no_error(backend: Library):
    q, k, v = arrays()
    error = measured(backend, q, k, 0 * v, chosen())
    for x in (error.cosine, error.plain, error.corrected):
        assert_same(x, np.zeros((2, 4, 3)))


def test_an_error_beside_an_output_of_zero_is_infinite(backend: Library):
    """Keys all alike and values that cancel."""
    q, k, _ = arrays(heads=1, batch=())
    v = np.where(np.arange(N) % 2 == 0, 1.0, -1.0)[None, :, None]
    error = measured(backend, q, 0 * k, v, np.arange(N) % 2 == 0)
    assert_same(error.plain, np.full((2, 3), np.inf))


BAD = {
    "retained": ({"retained": np.ones(N - 1, dtype=bool)}, ["retained has shape (39,)", "(2, 2, 40)"]),
    "heads of retained": ({"retained": np.ones((3, N), dtype=bool)}, ["retained has shape (3, 40)"]),
    "order": ({"order": 2}, ["order is 2"]),
    "head groups": ({"q": np.zeros((2, 3, 3, 6))}, ["q has 3 ", "2 KV heads"]),
    "dimension": ({"q": np.zeros((2, 4, 3, 5))}, ["q has head dimension 5", "6"]),
    "values": ({"v": np.zeros((2, 2, N - 1, 5))}, ["v has (2, 2, 39, 5)"]),
    "order of the moments": (
        {"moments": Moments.from_tokens(*arrays()[1:], order=0), "order": 1},
        ["order is 1", "order 0"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str):
    changes, parts = BAD[name]
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r".") as caught:
        eviction_error(**({"q": q, "k": k, "v": v, "retained": chosen()} | changes))
    for part in parts:
        assert part in str(caught.value)
