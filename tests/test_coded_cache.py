"""A layer's cache whose retained tokens are records of few bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, Library

from momentkv import LayerCache, correct
from momentkv.attention import attend
from momentkv.codes import BITS, SPLIT, row_bytes
from momentkv.testing.rounding import assert_same

D, DV, KV_HEADS, GROUP, ROWS = 16, 8, 2, 2, 2
SETTINGS: dict[str, Any] = {"sinks": 1, "window": 3, "exact_window": 1, "block": 4}
# The second remembers queries, by which channels of keys are graded; the first does not.
POLICIES = pytest.mark.parametrize("policy", ["momentkv", "expected-attention"])
LENGTHS = {"prefill": [40, *[1] * 12], "decode": [1] * 40, "chunks": [3, 20, 1, 1, 9, *[1] * 9]}


def tokens(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With channels of very different means and deviations, as keys of models have."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(ROWS, heads, n, d)) for heads, d in ((4, D), (2, D), (2, DV)))
    k = k * np.exp(rng.normal(size=(KV_HEADS, 1, D))) + 3 * rng.normal(size=(KV_HEADS, 1, D))
    return q / 4, k, v * np.exp(rng.normal(size=(KV_HEADS, 1, DV)))


def parts(lengths: list[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def valid_of(padded: bool, n: int) -> np.ndarray:
    """Row 1 begins with padding, if any does."""
    return np.arange(n) >= np.asarray([[0], [5 if padded else 0]])


def records(cache: LayerCache) -> dict[tuple[int, int, int], bytes]:
    """Of every retained token, by row, head and position."""
    state = cache.state
    assert state is not None
    found = {}
    keys, values, positions = (np.asarray(x) for x in (state.keys, state.values, state.positions))
    steps = np.stack([np.asarray(state.key_step), np.asarray(state.value_step)], axis=-1)
    for head, (start, width) in enumerate(zip(state.layout.starts, state.layout.widths, strict=True)):
        for row in range(ROWS):
            for slot in range(start, start + width):
                if positions[row, slot] >= 0:
                    content = (keys[row, slot], values[row, slot], steps[row, slot])
                    found[row, head, int(positions[row, slot])] = b"".join(x.tobytes() for x in content)
    return found


@POLICIES
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("budget", [10, (8, 15)], ids=["equal", "ragged"])
def test_steps_attend_to_the_tokens_that_the_cache_shows(
    backend: Library, lengths: str, padded: bool, budget: Any, policy: str
):
    if backend.compiles and lengths != "prefill":
        pytest.skip("compiles every shape anew: the others are other shapes alone")
    q, k, v = tokens(sum(LENGTHS[lengths]))
    valid = valid_of(padded, k.shape[-2])
    cache = LayerCache(budget, bits=(5, 4), policy=policy, **SETTINGS)
    for part in parts(LENGTHS[lengths]):
        given = [backend.asarray(x[..., part, :]) for x in (q, k, v)]
        held = [] if cache.state is None else [backend.numpy(x) for x in (cache.keys, cache.values, cache.positions)]
        moments, went = cache.moments, cache.has_evicted
        out = backend.numpy(cache.step(*given, valid=backend.asarray(valid[:, None, part])))
        if part.stop - part.start > 1:
            continue
        keys, values, seen = k[..., part, :], v[..., part, :], np.broadcast_to(valid[:, None, part], (ROWS, 2, 1))
        if held:
            keys, values = (np.concatenate(both, axis=-2) for both in ((held[0], keys), (held[1], values)))
            seen = np.concatenate([held[2] >= 0, seen], axis=-1)
        mask = seen[..., None, None, :]
        state = attend(q[..., part, :], keys, values, mask=mask)
        exact = state.out
        if went:
            exact = correct(state, q[..., part, :], moments.map(lambda x: np.asarray(backend.numpy(x)))).out
        real = valid[:, part.start]
        np.testing.assert_allclose(out[real], exact[real], rtol=0, atol=1e-11 * np.abs(values).max())


@POLICIES
@pytest.mark.parametrize("budget", [10, (8, 15)], ids=["equal", "ragged"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_tokens_that_stay_retained_keep_their_codes_bit_for_bit(budget: Any, padded: bool, lengths: str, policy: str):
    q, k, v = tokens(sum(LENGTHS[lengths]))
    valid = valid_of(padded, k.shape[-2])
    cache, before, stayed = LayerCache(budget, bits=4, policy=policy, **SETTINGS), {}, 0
    for part in parts(LENGTHS[lengths]):
        early = np.full((ROWS, KV_HEADS), not cache.has_evicted)
        if cache.state is not None and cache.state.early is not None:
            early = cache.state.early
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :], valid=valid[:, None, part])
        now = records(cache)
        both = [(row, head, place) for row, head, place in now.keys() & before.keys() if not early[row, head]]
        assert all(now[one] == before[one] for one in both)
        stayed += len(both)
        before = now
    assert stayed


@POLICIES
@pytest.mark.parametrize("shorter", [1, 3, 7, 10, 12])
@pytest.mark.parametrize(("static", "budget"), [(False, 12), (True, 12), (True, (8, 15))])
def test_a_row_is_coded_as_it_would_be_alone(budget: Any, shorter: int, static: bool, policy: str):
    """Beside one that evicts long before it: by what its own tokens are like, when its own recent ones run full."""
    q, k, v = tokens(70)
    caches = [LayerCache(budget, bits=3, static=static, policy=policy, **SETTINGS) for _ in range(2)]
    first, valid = 20, np.ones((2, 1, 20), dtype=bool)
    valid[1, :, : first - shorter] = False
    caches[0].step(q[..., :first, :], k[..., :first, :], v[..., :first, :], valid=valid)
    caches[1].step(*(x[1:, :, first - shorter : first] for x in (q, k, v)))
    for place in range(first, 70):
        both = caches[0].step(*(x[:, :, place : place + 1] for x in (q, k, v)))
        alone = caches[1].step(*(x[1:, :, place : place + 1] for x in (q, k, v)))
        np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-9 * np.abs(v).max())


@pytest.mark.parametrize(("exact_window", "exact"), [(0, 0), (1, 1), (2, 2), (3, 3), (8, 3)])
@pytest.mark.parametrize("budget", [12, (8, 15)], ids=["equal", "ragged"])
def test_the_window_stays_and_its_newest_tokens_are_exact(budget: Any, exact_window: int, exact: int):
    q, k, v = tokens(60)
    cache, rounded = LayerCache(budget, bits=3, **SETTINGS | {"exact_window": exact_window}), 0
    for part in parts([40, *[1] * 20]):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
        stop, places = part.stop, cache.positions
        for head in range(KV_HEADS):
            own = places[0, head] >= 0
            assert places[0, head][own][-3:].tolist() == [stop - 3, stop - 2, stop - 1]
            keys, values = cache.keys[:, head][:, own], cache.values[:, head][:, own]
            assert_same(keys[:, len(keys[0]) - exact :], k[:, head, stop - exact : stop])
            assert_same(values[:, :1], v[:, head, :1])
            rounded += int((keys[:, -3] != k[:, head, stop - 3]).any())
    # Of the window's oldest token, which is exact only until it leaves the block.
    assert (rounded > 0) == (exact < 3)


def test_all_of_the_window_is_exact_where_tokens_stay_as_they_come():
    q, k, v = tokens(60)
    caches = [LayerCache(12, **SETTINGS | {"exact_window": exact}) for exact in (0, 3)]
    for part in parts([40, *[1] * 20]):
        outs = [cache.step(q[..., part, :], k[..., part, :], v[..., part, :]) for cache in caches]
        assert_same(*outs)
    assert caches[0].state.layout == caches[1].state.layout


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)])
def test_an_exact_window_that_is_none_is_refused_by_name(value: Any, error: type[Exception]):
    with pytest.raises(error, match=f"exact_window is {value}"):
        LayerCache(12, bits=3, **SETTINGS | {"exact_window": value})


@POLICIES
@pytest.mark.parametrize("bits", BITS)
def test_retained_tokens_are_within_half_a_step(bits: int, policy: str):
    q, k, v = tokens(50)
    cache = LayerCache(30, bits=(bits, bits), policy=policy, **SETTINGS)
    cache.step(q, k, v)
    state = cache.state
    assert state is not None
    for shown, given, step, deviation in (
        (cache.keys, k, state.key_step, state.key_deviation),
        (cache.values, v, state.value_step, state.value_deviation),
    ):
        off = np.abs(shown - np.take_along_axis(given, cache.positions[..., None], axis=-2))
        widest = step.astype(float).reshape(ROWS, KV_HEADS, -1).max(-1)[..., None, None]
        assert (off <= widest * deviation[..., None, :] / 2 * (1 + 1e-9)).all()
        assert off.max() > 0


def test_more_bits_are_nearer_and_sixteen_as_good_as_exact():
    q, k, v = tokens(80)
    whole = LayerCache(24, **SETTINGS)
    given = [whole.step(q[..., part, :], k[..., part, :], v[..., part, :]) for part in parts([60, *[1] * 20])]
    errors = []
    for bits in SPLIT:
        cache = LayerCache(24, bits=bits, **SETTINGS)
        out = [cache.step(q[..., part, :], k[..., part, :], v[..., part, :]) for part in parts([60, *[1] * 20])]
        errors.append(max(float(np.abs(x - y).max()) for x, y in zip(out, given, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_are_those_of_codes_steps_and_standards(bits: int, dtype: Any):
    q, k, v = (x.astype(dtype) for x in tokens(80))
    cache = LayerCache(24, bits=(bits, 3), order=None, policy="knorm", **SETTINGS)
    cache.step(q, k, v)
    state = cache.state
    assert state is not None
    size, slots = np.dtype(dtype).itemsize, 24 - 2
    records = slots * (row_bytes(D, bits) + row_bytes(DV, 3) + 2 * 2 + 4)
    recent = state.layout.recent * ((D + DV) * size + 4) + 2 * 4
    assert cache.nbytes == ROWS * KV_HEADS * (records + recent + (2 * D + DV) * size)


@POLICIES
def test_rows_may_be_selected_and_copies_go_on_alike(policy: str):
    q, k, v = tokens(60)
    one = LayerCache(12, bits=4, policy=policy, **SETTINGS)
    one.step(q[..., :40, :], k[..., :40, :], v[..., :40, :])
    other, swapped, kept = copy.deepcopy(one), copy.deepcopy(one), one.snapshot()
    swapped.map(lambda x: x[::-1])
    for at in range(40, 60):
        now = [x[..., at : at + 1, :] for x in (q, k, v)]
        out = one.step(*now)
        assert_same(other.step(*now), out)
        assert_same(swapped.step(*(x[::-1] for x in now))[::-1], out)
    one.restore(kept)
    again = [one.step(*(x[..., at : at + 1, :] for x in (q, k, v))) for at in range(40, 60)]
    assert_same(again[-1], out)


@POLICIES
def test_tokens_taken_back_leave_records_alone(policy: str):
    q, k, v = tokens(60)
    cache = LayerCache(12, bits=4, policy=policy, **SETTINGS)
    cache.step(q[..., :40, :], k[..., :40, :], v[..., :40, :])
    before = records(cache)
    cache.step(q[..., 40:43, :], k[..., 40:43, :], v[..., 40:43, :])
    cache.drop(3)
    assert records(cache) == before
    assert cache.seen == 40


@POLICIES
def test_when_a_layer_first_evicts_all_its_tokens_say_what_they_are_like(policy: str):
    """A standard of the first few tokens would be one of few."""
    q, k, v = tokens(60)
    cache = LayerCache(40, bits=4, policy=policy, **SETTINGS)
    for part in parts([10, *[1] * 50]):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
        if not cache.has_evicted:
            early = cache.state.key_mean
    assert (cache.state.key_mean != early).any()
    np.testing.assert_allclose(cache.state.key_mean, k[..., :44, :].mean(-2), atol=0.2 * k.std(-2).max())


@POLICIES
@pytest.mark.parametrize("library", ["torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_holds_the_standard_in_its_own_dtype(library: str, dtype: str, policy: str):
    lib = LIBRARIES[library]
    q, k, v = (lib.asarray(x, dtype) for x in tokens(60))
    cache = LayerCache(12, bits=4, policy=policy, **SETTINGS)
    for part in parts([40, *[1] * 20]):
        out = cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
    held = cache.arrays()
    assert lib.dtype(out) == lib.dtype(held["key_mean"]) == lib.dtype(held["value_deviation"]) == dtype
    assert lib.dtype(held["key_step"]) == "float16"
    assert lib.dtype(held["keys"]) == "uint8"


def test_not_a_number_stays_in_its_row_and_head():
    q, k, v = tokens(60)
    k[1, 0, 20] = np.nan
    cache, clean = LayerCache(12, bits=4, **SETTINGS), LayerCache(12, bits=4, **SETTINGS)
    for part in parts([40, *[1] * 20]):
        out = cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
        same = clean.step(q[..., part, :], np.nan_to_num(k[..., part, :]), v[..., part, :])
    assert_same(out[0], same[0])
    assert_same(out[1, 2:], same[1, 2:])
    assert np.isnan(out[1, :2]).all()


@pytest.mark.parametrize("bits", [2, 7, 32, "four", 4.0])
def test_other_bits_are_refused_by_name(bits: Any):
    with pytest.raises(ValueError, match=r"bits is .*; use 3, 4, 5, 6, 8 or 16"):
        LayerCache(64, bits=bits)
