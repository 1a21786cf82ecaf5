"""Moments and their algebra: any way to gather the same tokens gives the same state."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import Moments
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, assert_within, moments_error, unit
from momentkv.testing.strategies import MASKS, Case, cases, some_tokens

FIELDS = ("weight", "key_mean", "value_mean", "value_key")


def gathered(backend: Library, k: np.ndarray, v: np.ndarray, **kwargs: object) -> Moments:
    return Moments.from_tokens(backend.asarray(k), backend.asarray(v), **kwargs)


def assert_moments(backend: Library, moments: Moments, exact: oracle.Sums, error: oracle.Sums) -> None:
    for name, x in moments.arrays().items():
        assert_within(backend.numpy(x), getattr(exact, name), getattr(error, name))


def assert_identical(backend: Library, a: Moments, b: Moments) -> None:
    assert a.arrays().keys() == b.arrays().keys()
    for name, x in a.arrays().items():
        assert_same(backend.numpy(x), backend.numpy(b.arrays()[name]))


def pieces(case: Case, count: int) -> list[slice]:
    """Random cuts of ``0..n`` into ``count`` slices, some of them empty."""
    cuts = [0, *sorted(case.rng(8).integers(0, case.n + 1, count - 1).tolist()), case.n]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


@given(case=cases(), weighted=st.booleans(), order=st.sampled_from([0, 1]))
def test_from_tokens_equals_the_definition(backend: Library, case: Case, weighted: bool, order: int):
    k, v = case.tokens()
    w = case.weights() if weighted else None
    moments = gathered(backend, k, v, weights=backend.asarray(w), order=order)
    assert_moments(backend, moments, oracle.moments(k, v, w), moments_error(k, v, unit(case.dtype), w))
    assert moments.order == order
    assert list(moments.arrays()) == list(FIELDS[: 3 + order])
    assert {backend.dtype(x) for x in moments.arrays().values()} == {case.dtype}


@given(case=cases(masks=MASKS[1:]), poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_masking_tokens_equals_removing_them(backend: Library, case: Case, poison: float):
    k, v = case.tokens()
    mask = case.token_mask()
    bad_k, bad_v = (np.where(mask[..., None], x, np.asarray(poison, dtype=x.dtype)) for x in (k, v))
    moments = gathered(backend, bad_k, bad_v, mask=backend.asarray(mask))
    for head in np.ndindex(case.lead):
        kept = k[head][mask[head]], v[head][mask[head]]
        exact, error = oracle.moments(*kept), moments_error(k[head], v[head], unit(case.dtype), mask[head])
        assert_moments(backend, moments.map(lambda x, head=head: x[(*head, ...)]), exact, error)


@given(case=cases(n=some_tokens))
def test_each_head_may_fold_another_number_of_tokens(backend: Library, case: Case):
    k, v = case.tokens()
    counts = case.rng(9).integers(0, case.n + 1, case.lead)
    mask = np.arange(case.n) < counts[..., None]
    moments = gathered(backend, k, v, mask=backend.asarray(mask))
    assert_same(backend.numpy(moments.weight), counts.astype(np.float64))
    error = moments_error(k, v, unit(case.dtype), mask)
    assert_moments(backend, moments, oracle.moments(k, v, mask), error)


@given(case=cases(n=st.integers(0, 6)))
def test_integer_weights_equal_repeated_tokens(backend: Library, case: Case):
    k, v = case.tokens()
    times = case.rng(5).integers(0, 4, case.n)
    moments = gathered(backend, k, v, weights=backend.asarray(times))
    repeated = oracle.moments(np.repeat(k, times, axis=-2), np.repeat(v, times, axis=-2))
    assert_moments(backend, moments, repeated, moments_error(k, v, unit(case.dtype), times))


@given(case=cases(n=some_tokens))
def test_order_of_tokens_does_not_matter_to_moments(backend: Library, case: Case):
    k, v = case.tokens()
    order = case.rng(7).permutation(case.n)
    moments = gathered(backend, k[..., order, :], v[..., order, :])
    assert_moments(backend, moments, oracle.moments(k, v), moments_error(k, v, unit(case.dtype)))


@given(case=cases(), weighted=st.booleans())
def test_update_equals_merge_with_the_batch(backend: Library, case: Case, weighted: bool):
    k, v = case.tokens()
    w = case.weights() if weighted else np.ones(k.shape[:-1], k.dtype)
    first, second = pieces(case, 2)
    old, new = (
        gathered(backend, k[..., part, :], v[..., part, :], weights=backend.asarray(w[..., part]))
        for part in (first, second)
    )
    tokens = backend.asarray(k[..., second, :]), backend.asarray(v[..., second, :])
    updated = old.update(*tokens, weights=backend.asarray(w[..., second]))
    assert_identical(backend, updated, old.merge(new))
    assert_moments(backend, updated, oracle.moments(k, v, w), moments_error(k, v, unit(case.dtype), w, merges=1))


@given(case=cases(), parts=st.integers(2, 5))
def test_any_split_gives_the_same_moments(backend: Library, case: Case, parts: int):
    """From the left, from the right, and as a tree."""
    k, v = case.tokens()
    states = [gathered(backend, k[..., part, :], v[..., part, :]) for part in pieces(case, parts)]
    left = states[0]
    for state in states[1:]:
        left = left.merge(state)
    right = states[-1]
    for state in states[-2::-1]:
        right = state.merge(right)
    tree = states
    while len(tree) > 1:
        tree = [a[0].merge(a[1]) if len(a) == 2 else a[0] for a in (tree[i : i + 2] for i in range(0, len(tree), 2))]
    exact, error = oracle.moments(k, v), moments_error(k, v, unit(case.dtype), merges=parts - 1)
    for moments in (left, right, tree[0]):
        assert_moments(backend, moments, exact, error)


@given(case=cases(n=some_tokens))
def test_merge_is_commutative(backend: Library, case: Case):
    k, v = case.tokens()
    a, b = (gathered(backend, k[..., part, :], v[..., part, :]) for part in pieces(case, 2))
    exact, error = oracle.moments(k, v), moments_error(k, v, unit(case.dtype), merges=1)
    for moments in (a.merge(b), b.merge(a)):
        assert_moments(backend, moments, exact, error)


@given(case=cases(), order=st.sampled_from([0, 1]))
def test_empty_is_the_identity_of_merge_to_the_last_bit(backend: Library, case: Case, order: int):
    k, v = (backend.asarray(x) for x in case.tokens())
    moments = Moments.from_tokens(k, v, order=order)
    empty = Moments.empty(k, v, order=order)
    for x in empty.arrays().values():
        assert (backend.numpy(x) == 0).all()
    assert_identical(backend, empty.merge(moments), moments)
    assert_identical(backend, moments.merge(empty), moments)


@given(case=cases(n=st.integers(2, 12)))
def test_downdate_undoes_update(backend: Library, case: Case):
    k, v = case.tokens()
    half = case.n // 2
    keep, part = (k[..., half:, :], v[..., half:, :]), (k[..., :half, :], v[..., :half, :])
    back = (
        gathered(backend, *keep)
        .update(*(backend.asarray(x) for x in part))
        .downdate(*(backend.asarray(x) for x in part))
    )
    # At most half is removed, so a mean errs by e + (e + e) and the distance of the two means by twice what it does in
    # a merge; the sums of both sets enter once.
    error = moments_error(k, v, unit(case.dtype), merges=2)
    error = oracle.Sums(*(4 * x for x in error))
    assert_moments(backend, back, oracle.moments(*keep), error)


@given(case=cases(), weighted=st.booleans())
def test_downdate_of_everything_is_exactly_empty(backend: Library, case: Case, weighted: bool):
    k, v = case.tokens()
    w = case.weights() if weighted else np.ones(k.shape[:-1], k.dtype)
    order = case.rng(7).permutation(case.n)
    moments = gathered(backend, k, v, weights=backend.asarray(w))
    removed = (backend.asarray(x) for x in (k[..., order, :], v[..., order, :]))
    left = moments.downdate(*removed, weights=backend.asarray(w[..., order]))
    assert_identical(backend, left, Moments.empty(backend.asarray(k), backend.asarray(v)))


@given(case=cases(n=some_tokens))
def test_downdate_of_more_raises(backend: Library, case: Case):
    k, v = (backend.asarray(x) for x in case.tokens())
    moments = Moments.from_tokens(k, v)
    with pytest.raises(ValueError, match=f"least weight that would be left is -{case.n}"):
        moments.downdate(k, v, weights=backend.asarray(np.full(case.n, 2)))


@given(case=cases(), gamma=st.sampled_from([0.0, 0.25, 1.0]), per_head=st.booleans())
def test_decay_scales_weight_and_leaves_means(backend: Library, case: Case, gamma: float, per_head: bool):
    moments = gathered(backend, *case.tokens())
    factor = backend.asarray(np.full(case.lead, gamma, case.dtype)) if per_head else gamma
    decayed = moments.decay(factor)
    # Powers of two round nothing.
    for name, share in zip(FIELDS, (gamma, 1.0, 1.0, gamma), strict=True):
        assert_same(backend.numpy(getattr(decayed, name)), share * backend.numpy(getattr(moments, name)))


@given(case=cases(n=some_tokens))
def test_decay_equals_smaller_weights(backend: Library, case: Case):
    k, v = case.tokens()
    decayed = gathered(backend, k, v).decay(0.5).update(backend.asarray(k), backend.asarray(v))
    both = np.concatenate([k, k], axis=-2), np.concatenate([v, v], axis=-2)
    w = np.broadcast_to(np.repeat([0.5, 1.0], case.n), both[0].shape[:-1])
    assert_moments(backend, decayed, oracle.moments(*both, w), moments_error(*both, unit(case.dtype), w, merges=1))


def test_rotate_equals_moments_of_rotated_keys(backend: Library):
    rng = np.random.default_rng(0)
    k, v, turn = (rng.standard_normal(shape) for shape in ((2, 3, 9, 4), (2, 3, 9, 5), (4, 4)))
    rotated = gathered(backend, k, v).rotate(backend.asarray(turn))
    exact = oracle.moments(k @ turn.T, v)
    # Rounded before or after the product with a d x d matrix: d roundings, and magnitudes up to ||turn|| larger.
    error = moments_error(k, v, 4 * unit("float64"))
    size = 1 + np.abs(turn).sum(axis=1).max()
    assert_moments(backend, rotated, exact, oracle.Sums(*(size * x for x in error)))


@given(case=cases(dtypes=("float32",)), halves=st.sampled_from(["bfloat16", "float16"]))
def test_half_precision_inputs_are_accumulated_in_float32(case: Case, halves: str):
    torch = LIBRARIES["torch"]
    k, v = (torch.asarray(np.clip(x, -1e3, 1e3), halves) for x in case.tokens())
    moments = Moments.from_tokens(k, v)
    assert {torch.dtype(x) for x in moments.arrays().values()} == {"float32"}
    assert_identical(torch, moments, Moments.from_tokens(k.float(), v.float()))
    assert_identical(torch, moments.update(k, v), moments.update(k.float(), v.float()))


def test_tokens_folded_one_by_one_do_not_stagnate():
    """In bfloat16 the count alone stops at 256, and the mean with it."""
    torch, n = LIBRARIES["torch"], 1500
    rng = np.random.default_rng(0)
    k, v = (torch.asarray(1 + rng.standard_normal((1, n, 2)), "bfloat16") for _ in range(2))
    moments = Moments.empty(k, v)
    for j in range(n):
        moments = moments.update(k[:, j : j + 1], v[:, j : j + 1])
    k, v = torch.numpy(k), torch.numpy(v)
    assert_moments(torch, moments, oracle.moments(k, v), moments_error(k, v, unit("bfloat16"), merges=n))
    assert moments.weight.item() == n


def test_centred_sums_keep_their_digits_far_from_zero(backend: Library):
    """Raw second moments at |mean| / sd = 1000 err by u n |mean|^2, here 2.4, which is most of the co-moment."""
    rng = np.random.default_rng(0)
    k, v = ((1000 + rng.standard_normal((1, 40, 3))).astype(np.float32) for _ in range(2))
    exact, error = oracle.moments(k, v), moments_error(k, v, unit("float32"))
    assert error.value_key.max() < 0.01
    assert_moments(backend, gathered(backend, k, v), exact, error)


def test_moments_are_immutable_and_count_their_bytes(backend: Library):
    k, v = (backend.asarray(np.ones((2, 5, 4), np.float32)) for _ in range(2))
    moments = Moments.from_tokens(k, v)
    assert moments.nbytes == 4 * 2 * (1 + 4 + 4 + 16)
    before = {name: backend.numpy(x) for name, x in moments.arrays().items()}
    moments.update(k, v)
    moments.decay(0.5)
    moments.downdate(k[:, :2, :], v[:, :2, :])
    for name, x in moments.arrays().items():
        assert_same(backend.numpy(x), before[name])
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments.weight = None


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_factors_of_decay_have_the_dtype_of_the_weights(kind: type, backend: Library):
    k = backend.asarray(np.ones((2, 6, 4), dtype=np.float32))
    moments = Moments.from_tokens(k, k).decay(backend.asarray(np.array([0.9, 0.5], dtype=kind)))
    assert {backend.dtype(x) for x in moments.arrays().values()} == {"float32"}
    assert moments.update(k, k).weight.shape == (2,)


@pytest.mark.parametrize("gamma", [2, -0.5, np.int64(2), np.float32(2), np.array([0.5, 3.0]), float("nan")], ids=str)
def test_factors_of_decay_lie_between_0_and_1(gamma: object):
    with pytest.raises(ValueError, match="gamma"):
        Moments.from_tokens(np.ones((2, 6, 4)), np.ones((2, 6, 4))).decay(gamma)


def test_one_of_many_tokens_is_left_exactly(backend: Library):
    """Counts are whole numbers: what is left of two million is no rounding."""
    zeros, one = (backend.asarray(x((1, n, 1), dtype=np.float32)) for x, n in ((np.zeros, 2_000_000), (np.ones, 1)))
    left = Moments.from_tokens(zeros, zeros, order=0).update(one, one).downdate(zeros, zeros)
    assert backend.numpy(left.weight).tolist() == [1.0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mean_of_many_tokens_keeps_its_digits(library: str):
    """Sums of a hundred thousand numbers one after the other lose them, far from zero the most."""
    backend: Library = LIBRARIES[library]
    rng = np.random.default_rng(0)
    k, v = (101 + 0.5 * rng.standard_normal((1, 200_000, 3)) for _ in range(2))
    moments = Moments.from_tokens(*(backend.asarray(x.astype(np.float32)) for x in (k, v)), order=2)
    whole = Moments.from_tokens(
        k.astype(np.float32).astype(np.float64), v.astype(np.float32).astype(np.float64), order=2
    )
    for name, limit in (("key_mean", 1e-6), ("value_mean", 1e-6), ("key_key", 1e-3)):
        exact = getattr(whole, name)
        assert np.abs(backend.numpy(getattr(moments, name)) - exact).max() <= limit * np.abs(exact).max(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_that_has_faded_is_empty_before_its_weight_loses_digits(dtype: type):
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 2, 30, 4)).astype(dtype) for _ in range(2))
    limits = np.finfo(dtype)
    moments = Moments.from_tokens(k, v, order=2, extent=True)
    weights = [moments.weight]
    for _ in range(12_000):
        moments = moments.decay(np.asarray([0.9, 1.0], dtype=dtype))
        weights.append(moments.weight)
        if not moments.weight[0, 0]:
            break
    fading = np.stack(weights)[:, 0, 0]
    least = limits.smallest_normal / limits.eps
    assert fading[-1] == 0 < least <= fading[-2] < 2 * least
    for before, after in itertools.pairwise(fading[:-1]):
        assert abs(after - before * dtype(0.9)) <= limits.eps * after
    assert moments.weight[0, 1] == 30
    assert moments.expansion().log_weight[0, 0, 0] == -math.inf


def test_factors_and_weights_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 2, 6, 4)).astype(np.float32) for _ in range(2))
    moments = Moments.from_tokens(k, v)
    for gamma in (np.ones((5, 1, 2)), np.ones((3, 2)), np.ones(3)):
        with pytest.raises(ValueError, match=r"gamma has shape .* broadcast to \(1, 2\)"):
            moments.decay(gamma.astype(np.float32))
    with pytest.raises(ValueError, match="weights has a sum that is no number of float32"):
        Moments.from_tokens(k, v, weights=np.full(6, 3e38, dtype=np.float32))


@pytest.mark.parametrize("small", [1e-15, 1e-17])
def test_downdate_refuses_what_bounds_would_have_to_cover(backend: Library, small: float):
    """Of a weight that rounding hides beside the whole, a token may still have all of the attention."""
    k = backend.asarray(np.asarray([[[0.0], [50.0]]]))
    weights = backend.asarray(np.asarray([[1.0, small]]))
    for extent in (False, True):
        whole = Moments.from_tokens(k, k, weights=weights, extent=extent)
        first = {"k": k[:, :1, :], "v": k[:, :1, :], "weights": weights[:, :1]}
        if extent:
            with pytest.raises(ValueError, match=r"with an extent to a weight of .* gather the moments"):
                whole.downdate(**first)
        else:
            assert float(whole.downdate(**first).weight[0]) == 0
        # Counts are exact, and so is what is left of them.
        counted = Moments.from_tokens(k, k, extent=extent)
        assert float(counted.downdate(k, k).weight[0]) == 0
        assert float(counted.downdate(k[:, :1, :], k[:, :1, :]).weight[0]) == 1


def test_weights_whose_sum_is_no_number_are_refused_one_by_one(backend: Library):
    k = backend.asarray(np.zeros((1, 1, 2), np.float32))
    large = backend.asarray(np.full((1, 1), 2e38, np.float32))
    one = Moments.from_tokens(k, k, weights=large)
    with pytest.raises(ValueError, match=r"weights has a sum that, with the weight that is there, .*divide all"):
        one.update(k, k, weights=large)
