"""The layer cache with summaries: what it remembers of queries, rows that do not feel each other, long runs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library
from test_cache import Run, advance, runs, stored

from momentkv import LayerCache, Moments
from momentkv.cache.accounting import state_bytes, token_equivalents
from momentkv.diagnostics import eviction_error
from momentkv.statistics.corrections import AnchoredSummaries
from momentkv.statistics.summaries import Summaries
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, assert_within, unit

FEW = AnchoredSummaries(summaries=3, rank=2)


def cache_of(run: Run) -> LayerCache:
    return run.cache(correction=FEW)


@given(run=runs())
def test_each_token_is_stored_or_counted_exactly_once(backend: Library, run: Run):
    cache = cache_of(run)
    for part in run.steps():
        out = backend.numpy(advance(backend, run, cache, part))
        assert np.isfinite(out).all()
        assert all(n < budget + run.block for n, budget in zip(cache.stored_by_head, run.budgets, strict=True))
        if run.order is None:
            assert not any(name.startswith("evicted") for name in cache.arrays())
            count = backend.numpy(cache.moments.weight)
        else:
            assert isinstance(cache.moments, Summaries)
            assert cache.moments.rank == (2 if run.order else 0)
            count = backend.numpy(cache.moments.count)
        for head, held in stored(backend, cache).items():
            real = part.stop - run.padding * head[0]
            assert count[head] == (real - len(held) if run.order is not None else 0)


@given(run=runs(room=60))
def test_nothing_evicted_is_plain_eviction_to_the_last_bit(backend: Library, run: Run):
    cache, plain = cache_of(run), dataclasses.replace(run, order=None).cache()
    for part in run.steps():
        assert_same(*(backend.numpy(advance(backend, run, x, part)) for x in (cache, plain)))


def remembered(run: Run, row: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of recent queries, one KV head: 16 at once replace, one fades by 1/16."""
    q = run.arrays()[0].astype(np.float64)[row, head * run.group : (head + 1) * run.group] / math.sqrt(4)
    mean = square = None
    for part in run.steps():
        start = max(part.start, part.stop - 32, run.padding * row)
        recent = q[:, start : part.stop]
        count = recent.shape[1] if start < part.stop else 0
        if count == 0:
            continue
        share = 1.0 if mean is None else min(count / 16, 1.0)
        new = recent.mean(axis=(0, 1)), (recent**2).mean(axis=(0, 1))
        mean, square = (
            new if mean is None else tuple(a + share * (b - a) for a, b in zip((mean, square), new, strict=True))
        )
    return (np.zeros(4), np.zeros(4)) if mean is None else (mean, square)


@given(run=runs(), first=st.sampled_from([None, 20, 45]))
def test_recent_queries_are_remembered_and_padding_is_not(backend: Library, run: Run, first: int | None):
    """Also where a whole chunk is padding, after which the first real queries are all there is to know."""
    if first is not None:
        run = dataclasses.replace(run, lengths=(5, first, *run.lengths), padding=min(run.padding + 5, 24))
    cache = cache_of(run)
    for part in run.steps():
        advance(backend, run, cache, part)
    if run.order is None and not cache.config.policy.needs_queries:
        assert cache.state.query_mean is cache.state.query_square is None
        return
    largest = np.abs(run.arrays()[0].astype(np.float64)).max()
    error = unit(run.dtype) * (run.group * 32 + 8 * len(run.lengths))
    for row, head in np.ndindex(2, run.kv_heads):
        mean, square = remembered(run, row, head)
        assert_within(backend.numpy(cache.state.query_mean)[row, head], mean, error * largest)
        assert_within(backend.numpy(cache.state.query_square)[row, head], square, 2 * error * largest**2)


def structured(rows: int, n: int, heads: int = 2, group: int = 2, d: int = 8) -> tuple[np.ndarray, ...]:
    """Queries near a mean far from zero, and values that follow the keys."""
    rng = np.random.default_rng(rows * 1000 + n)
    mean = 3 * rng.standard_normal((1, heads, 1, 1, d))
    q = (mean + 0.5 * rng.standard_normal((rows, heads, group, n, d))).reshape(rows, heads * group, n, d)
    topic = 2 * rng.standard_normal((1, heads, 6, d))
    k = topic[:, :, rng.integers(0, 6, n)] + 0.5 * rng.standard_normal((rows, heads, n, d))
    v = k @ rng.standard_normal((1, heads, d, d)) + 0.3 * rng.standard_normal((rows, heads, n, d))
    return q, k, v


CUT = {"window": 4, "sinks": 1, "block": 3}


@pytest.mark.parametrize("policy", ["snapkv", "momentkv", "streaming", "expected-attention", "balanced"])
@pytest.mark.parametrize(
    ("lengths", "padding"),
    [
        ([90, *[1] * 12], [0, 13]),  # both evict in the prefill, and are fitted to its queries
        ([90, *[1] * 12], [0, 61]),  # newest queries of the second row are partly padding
        ([24, *[1] * 14], [0, 12]),  # they first evict at different steps
        ([40, 45, 1, 1, 1, 40, 1], [0, 38]),  # the second row is first fitted in a later chunk
        ([20, *[1] * 20], [0, 20]),  # all of the first chunk is padding
    ],
)
def test_a_padded_row_equals_the_row_alone(policy: str, lengths: list[int], padding: list[int]):
    arrays, budget = structured(2, sum(lengths)), 12
    together, alone = (LayerCache(budget, policy=policy, correction=FEW, **CUT) for _ in range(2))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        valid = np.arange(part.start, part.stop) >= np.array(padding)[:, None, None]
        out = together.step(*(x[:, :, part] for x in arrays), valid=valid)
        real = valid[1, 0]
        if real.any():
            own = alone.step(*(x[1:, :, part][:, :, real] for x in arrays))
            # Float64, states of order 10 to 100, a fold a step: far above rounding, far below any other anchor.
            np.testing.assert_allclose(out[1:, :, real], own, atol=1e-8)
    assert (alone.moments.count > 0).all()
    for name, x in alone.moments.arrays().items():
        if not name.startswith("slope"):  # directions have no sign
            np.testing.assert_allclose(together.moments.arrays()[name][1:], x, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(together.moments.slope[1:], alone.moments.slope, atol=1e-7)


def test_snapshot_map_and_bytes_hold_the_whole_state(backend: Library):
    q, k, v = (backend.asarray(x) for x in structured(2, 60))
    cache, alone = (LayerCache(12, correction=FEW, **CUT) for _ in range(2))
    cache.step(*(x[:, :, :50, :] for x in (q, k, v)))
    alone.step(*(x[1:, :, :50, :] for x in (q, k, v)))
    before, arrays = cache.snapshot(), {name: backend.numpy(x) for name, x in cache.arrays().items()}
    assert {"query_mean", "query_square", "evicted.anchor", "evicted.cap"} <= arrays.keys()
    whole = ("positions", "recent_positions", "counts", "recent_count")  # int32 numbers beside float64 ones
    sizes = {name: backend.numpy(x).size * (4 if name in whole else 8) for name, x in cache.arrays().items()}
    assert cache.nbytes == sum(sizes.values())
    heads = 2 * 2
    kept = ("evicted", "query")
    state = sum(size for name, size in sizes.items() if name.startswith(kept))
    assert state == heads * 2 * state_bytes(FEW, order=1, d=8)  # float64, twice float32
    cache.step(*(x[:, :, 50:, :] for x in (q, k, v)))
    assert (backend.numpy(cache.state.query_mean) != arrays["query_mean"]).all()
    cache.restore(before)
    for name, x in arrays.items():
        assert_same(backend.numpy(cache.arrays()[name]), x)
    cache.map(lambda x: x[1:2, ...])
    for _ in range(10):
        steps = [x[1:, :, cache.seen : cache.seen + 1, :] for x in (q, k, v)]
        a, b = (backend.numpy(x.step(*steps)) for x in (cache, alone))
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_hundred_steps_stay_finite(dtype: str):
    torch = LIBRARIES["torch"]
    q, k, v = (torch.asarray(x, dtype) for x in structured(1, 560))
    cache = LayerCache(32, correction="summaries", window=8, block=8)
    assert np.isfinite(torch.numpy(cache.step(*(x[:, :, :60] for x in (q, k, v))))).all()
    largest = np.abs(torch.numpy(v)).max()
    for t in range(60, 560):
        out = torch.numpy(cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))))
        # Not only finite: an output is a mean of values and a linear term that stays of their size.
        assert np.abs(out).max() < 3 * largest
    for name, x in cache.arrays().items():
        assert np.isfinite(torch.numpy(x)).all(), name
    assert (torch.numpy(cache.moments.count) == 560 - cache.keys.shape[2]).all()


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "momentkv"])
def test_outputs_err_less_than_plain_eviction_s_and_the_paper_s(policy: str):
    q, k, v = structured(1, 600)
    errors = {}
    for kind in ("moments", "summaries"):
        cache = LayerCache(48, policy=policy, correction=kind, window=16)
        cache.step(q, k, v)
        retained = np.zeros((1, 2, 600), dtype=bool)
        np.put_along_axis(retained, cache.positions, True, axis=-1)
        new = structured(1, 601)[0][:, :, :200]
        new = q[:, :, -200:] + 0.1 * new / np.linalg.norm(new, axis=-1, keepdims=True)
        errors[kind] = eviction_error(new, k, v, retained, moments=cache.moments)
    summaries = errors["summaries"]
    for head in range(4):
        assert summaries.corrected[0, head].mean() < 0.5 * summaries.plain[0, head].mean()
        assert summaries.corrected[0, head].mean() < 0.5 * errors["moments"].corrected[0, head].mean()


@pytest.mark.parametrize("correction", ["moments", "summaries"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("bits", [None, 16])
def test_bytes_of_a_state_are_those_that_a_cache_holds(correction: str, order: int, bits: int | None):
    q, k, v = (x.astype(np.float32) for x in structured(1, 60, d=16))
    cache = LayerCache(12, policy="streaming", order=order, correction=correction, statistics_bits=bits, **CUT)
    cache.step(q, k, v)
    held = {name: x.nbytes for name, x in cache.arrays().items() if name.startswith(("evicted", "query"))}
    assert sum(held.values()) == 2 * state_bytes(correction, order=order, d=16, statistics_bits=bits)
    # A budget of tokens and a block, with a position each; two counts a head.
    assert cache.nbytes == sum(held.values()) + 2 * ((12 + 3) * (2 * 16 * 4 + 4) + 2 * 4)
    assert isinstance(cache.moments, Moments if correction == "moments" else Summaries)


def test_token_equivalents_are_bytes_over_those_of_a_token():
    # Summaries by hand: m weights, m key and value means, anchor, variance, window of two; rank 2 slopes; 3 scalars.
    for d, dv in ((64, 64), (128, 128), (16, 24)):
        numbers = 12 * (1 + d + dv) + 4 * d + 2 * (d + dv) + 3
        assert state_bytes("summaries", d=d, dv=dv) == 4 * numbers
        assert token_equivalents("summaries", d=d, dv=dv, itemsize=2) == 2 * numbers / (d + dv)
        assert state_bytes("moments", d=d, dv=dv) == 4 * (1 + d + dv + d * dv)
        assert state_bytes("moments", order=0, d=d, dv=dv) == 4 * (1 + d + dv)
        assert state_bytes("summaries", order=0, d=d, dv=dv) == 4 * (numbers - 2 * (d + dv))
    assert token_equivalents("summaries", d=64) <= 17
    assert token_equivalents("summaries", d=128) < token_equivalents("summaries", d=64)
    assert state_bytes("summaries", order=None, d=64) == token_equivalents("moments", order=None, d=64) == 0


def test_estimate_is_used_for_single_queries_and_for_chunks():
    """One chunk equals its tokens one by one while no eviction comes between them."""
    q, k, v = structured(1, 64)
    whole, single = (LayerCache(12, correction=FEW, window=4, block=30) for _ in range(2))
    for cache in (whole, single):
        cache.step(*(x[:, :, :50] for x in (q, k, v)))
    out = whole.step(*(x[:, :, 50:] for x in (q, k, v)))
    ones = [single.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(50, 64)]
    np.testing.assert_allclose(np.concatenate(ones, axis=2), out, atol=1e-10)
    plain = oracle.attend(q[:, :, 63:], whole.keys, whole.values).out
    assert np.abs(out[:, :, -1:] - plain).max() > 0.01


class Watched(AnchoredSummaries):
    """Notes the windows that it folds with."""

    def fold(self, state, k, v, *, mask, window):
        self.windows.append(window)
        return super().fold(state, k, v, mask=mask, window=window)


def test_summaries_are_anchored_at_mean_and_variance_of_the_newest_queries():
    correction = Watched(summaries=3, rank=2)
    object.__setattr__(correction, "windows", [])
    q, k, v = structured(1, 60)
    LayerCache(12, policy="streaming", correction=correction, **CUT).step(q, k, v)
    newest = q[0, :, -32:].reshape(2, 2 * 32, 8) / math.sqrt(8)
    (window,) = correction.windows
    assert_within(window.mean[0], newest.mean(axis=1), 128 * unit() * np.abs(newest).max())
    # The mean square minus the squared mean, each rounded.
    assert_within(window.variance[0], newest.var(axis=1), 512 * unit() * np.abs(newest).max() ** 2)


def test_strength_is_fitted_at_the_first_eviction_and_stays():
    q, k, v = structured(1, 120)
    fitted, given = (
        LayerCache(12, correction=dataclasses.replace(FEW, calibrated=calibrated), **CUT)
        for calibrated in (True, False)
    )
    strengths = []
    for part in (slice(0, 60), slice(60, 120)):
        for cache in (fitted, given):
            cache.step(*(x[:, :, part] for x in (q, k, v)))
        strengths.append(fitted.moments.strength)
        assert (given.moments.strength == 0.75).all()
    assert (strengths[0] != 0.75).all()
    assert_same(strengths[1], strengths[0])


@pytest.mark.parametrize("bits", [None, 4])
def test_queries_may_have_more_bits_than_keys_and_values(backend: Library, bits: int | None):
    """Statistics stay as wide as keys make them; outputs are those of queries of as many bits, to rounding."""
    rng = np.random.default_rng(0)
    settings = {"correction": "summaries", "policy": "snapkv", "window": 8, "block": 4, "bits": bits}
    wide, narrow = (LayerCache(40, **settings) for _ in range(2))
    for n in (100, 1, 1, 1, 1, 5):
        q, k, v = (rng.standard_normal((1, heads, n, 16)).astype(np.float32) for heads in (4, 2, 2))
        found = wide.step(*(backend.asarray(x) for x in (q.astype(np.float64), k, v)))
        expected = narrow.step(*(backend.asarray(x) for x in (q, k, v)))
        np.testing.assert_allclose(backend.numpy(found), backend.numpy(expected), rtol=1e-3, atol=1e-3)
    found, expected = (
        {name: x.dtype for name, x in cache.arrays().items() if name.startswith("evicted")} for cache in (wide, narrow)
    )
    assert len(found) > 5
    assert found == expected
