"""Laws of the layer cache at every step, whatever the policy: nothing lost, nothing doubled, nothing out of budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import POLICIES, LayerCache, Moments, get_policy
from momentkv.testing import oracle
from momentkv.testing.rounding import (
    UNIT_BFLOAT16,
    assert_same,
    assert_within,
    attention_error,
    corrected_error,
    moments_error,
    unit,
)
from momentkv.testing.strategies import numbers, shape

names = st.sampled_from(sorted(POLICIES))


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps of a cache: two rows, left padding in the second, settings, and the length of each step.

    With ``more``, the last of two heads has a larger budget than the first.
    """

    policy: str
    order: int | None
    budget: int
    more: int  # that the last head may retain
    sinks: int
    window: int
    block: int
    lengths: tuple[int, ...]
    padding: int
    kv_heads: int
    group: int
    law: str
    dtype: str
    seed: int

    @property
    def n(self) -> int:
        return sum(self.lengths)

    @property
    def heads(self) -> int:
        """KV heads of both rows."""
        return 2 * self.kv_heads

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        heads = (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        q, k, v = (numbers(rng, (2, h, self.n, d), self.law) for h, d in zip(heads, (4, 4, 3), strict=True))
        # Far-off or huge queries beside such keys would make all attention one-hot.
        q = q / {"offset": 1e3, "huge keys": 1e4}.get(self.law, 1.0)
        return q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype)

    def valid(self) -> np.ndarray:
        """Shape (2, 1, n)."""
        return np.arange(self.n) >= np.array([0, self.padding])[:, None, None]

    @property
    def budgets(self) -> list[int]:
        return [self.budget, self.budget + self.more][-self.kv_heads :]

    def cache(self, **options: object) -> LayerCache:
        settings = {name: getattr(self, name) for name in ("policy", "order", "sinks", "window", "block")}
        return LayerCache(self.budgets if self.more else self.budget, **settings, **options)

    def steps(self) -> list[slice]:
        ends = np.cumsum(self.lengths).tolist()
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


@st.composite
def runs(draw: st.DrawFn, *, orders: tuple[int | None, ...] = (0, 1, None), room: int = 0) -> Run:
    """Prefill, then decoding or chunks; ``room`` makes the budget so large that nothing is evicted."""
    sinks, window = draw(shape(st.integers(0, 2), 1)), draw(shape(st.integers(0, 3), 2))
    prefill = draw(shape(st.sampled_from([1, 2, 7, 25]), 12))
    later = draw(shape(st.sampled_from([(1,) * 9, (1, 1, 4, 1, 1, 1), (6, 6), ()]), (1, 1, 1, 4, 1)))
    policy, kv_heads = draw(names), draw(shape(st.integers(1, 2), 2))
    ragged = kv_heads == 2 and not get_policy(policy).couples_heads
    return Run(
        policy=policy,
        order=draw(st.sampled_from(orders)),
        budget=room + sinks + window + draw(shape(st.integers(1, 5), 5)),
        more=draw(shape(st.sampled_from([0, 1, 4]), 1)) if ragged else 0,
        sinks=sinks,
        window=window,
        block=draw(shape(st.integers(1, 4), 2)),
        lengths=(prefill, *later),
        padding=draw(st.sampled_from([0, prefill // 2, prefill - 1])),
        kv_heads=kv_heads,
        group=draw(shape(st.integers(1, 3), 2)),
        law=draw(st.sampled_from(["gaussian", "ties", "offset", "huge keys"])),
        dtype=draw(st.sampled_from(["float64", "float32"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def advance(backend: Library, run: Run, cache: LayerCache, part: slice) -> object:
    q, k, v = (backend.asarray(x[:, :, part]) for x in run.arrays())
    valid = run.valid()[:, :, part]
    return cache.step(q, k, v, valid=None if run.padding == 0 else backend.asarray(valid))


def stored(backend: Library, cache: LayerCache) -> dict[tuple[int, int], list[int]]:
    """Positions that each head of each row holds."""
    positions = backend.numpy(cache.positions)
    return {head: [int(p) for p in positions[head] if p >= 0] for head in np.ndindex(positions.shape[:-1])}


@given(run=runs())
def test_stored_tokens_never_exceed_the_budget_and_a_block(backend: Library, run: Run):
    cache = run.cache()
    for part in run.steps():
        advance(backend, run, cache, part)
        assert cache.stored == cache.keys.shape[-2]
        assert all(n < budget + run.block for n, budget in zip(cache.stored_by_head, run.budgets, strict=True))
        assert cache.keys.shape[-2] == cache.values.shape[-2] == cache.positions.shape[-1]
        assert cache.seen == part.stop


@given(run=runs())
def test_eviction_leaves_exactly_the_budget(backend: Library, run: Run):
    cache, before = run.cache(), dict.fromkeys(np.ndindex(2, run.kv_heads), 0)
    for part in run.steps():
        advance(backend, run, cache, part)
        for head, held in stored(backend, cache).items():
            arrived = before[head] + run.valid()[head[0], 0, part].sum()
            budget = run.budgets[head[1]]
            assert len(held) == (budget if arrived >= budget + run.block else arrived)
            before[head] = len(held)


@given(run=runs())
def test_sinks_and_window_are_always_retained(backend: Library, run: Run):
    cache = run.cache()
    for part in run.steps():
        advance(backend, run, cache, part)
        for (row, _), held in stored(backend, cache).items():
            real = [p for p in range(part.stop) if p >= run.padding * row]
            protected = set(real[: run.sinks]) | {p for p in real if p >= part.stop - run.window}
            assert protected <= set(held)


@given(run=runs())
def test_each_token_is_retained_or_folded_exactly_once(backend: Library, run: Run):
    _, k, v = run.arrays()
    cache, gone = run.cache(), dict.fromkeys(np.ndindex(2, run.kv_heads), frozenset())
    for part in run.steps():
        advance(backend, run, cache, part)
        keys, values, weight = (backend.numpy(x) for x in (cache.keys, cache.values, cache.moments.weight))
        slots = backend.numpy(cache.positions)
        for head, held in stored(backend, cache).items():
            real = set(range(run.padding * head[0], part.stop))
            assert held == sorted(set(held))
            assert set(held) <= real
            assert not gone[head] & set(held)  # none comes back
            gone[head] = frozenset(real - set(held))
            if run.order is not None:
                assert weight[head] == len(gone[head])
            filled = slots[head] >= 0
            assert_same(keys[head][filled], k[head][held].astype(np.float64))
            assert_same(values[head][filled], v[head][held].astype(np.float64))


@given(run=runs(orders=(0, 1)))
def test_moments_are_those_of_the_evicted_tokens(backend: Library, run: Run):
    _, k, v = run.arrays()
    cache = run.cache()
    for part in run.steps():
        advance(backend, run, cache, part)
    for head, held in stored(backend, cache).items():
        gone = [p for p in range(run.padding * head[0], run.n) if p not in held]
        exact = oracle.moments(k[head][gone], v[head][gone])
        # At most one merge a round, and as many rounds a step as the policy makes.
        merges = len(run.lengths) * cache.config.policy.rounds
        error = moments_error(k[head], v[head], unit(run.dtype), merges=merges)
        for name, x in cache.moments.arrays().items():
            assert_within(backend.numpy(x)[head], getattr(exact, name), getattr(error, name))
    assert cache.moments.order == run.order


@given(run=runs(orders=(None,)))
def test_plain_eviction_keeps_no_moments(backend: Library, run: Run):
    cache = run.cache()
    for part in run.steps():
        advance(backend, run, cache, part)
    for x in cache.moments.arrays().values():
        assert (backend.numpy(x) == 0).all()
    queries = run.heads * 2 * 4 if cache.config.policy.needs_queries else 0
    assert cache.nbytes == bytes_of_tiers(run, cache) + np.dtype(run.dtype).itemsize * queries


def bytes_of_tiers(run: Run, cache: LayerCache) -> int:
    """By hand: recent slots that are always there, those of retained tokens, and two counts a row and head.

    A slot has a key, a value, a position of 4 bytes and, where attention is observed, what was made of it.
    """
    number = np.dtype(run.dtype).itemsize
    slot = (4 + 3 + (cache.config.policy.observes != 0)) * number + 4
    recent = run.sinks + run.window + run.block
    widths = cache.state.layout.widths
    assert all(width <= budget - run.sinks - run.window for width, budget in zip(widths, run.budgets, strict=True))
    return 2 * sum(slot * (recent + width) + 2 * 4 for width in widths)


@given(run=runs())
def test_every_output_is_attention_to_the_retained_corrected_by_the_evicted(backend: Library, run: Run):
    """Given the cache's own choice of tokens: order None attends to the retained alone."""
    q, k, v = (x.astype(np.float64) for x in run.arrays())
    cache, held = run.cache(), {head: [] for head in np.ndindex(2, run.kv_heads)}
    for index, part in enumerate(run.steps()):
        out = advance(backend, run, cache, part)
        assert backend.dtype(out) == run.dtype
        for (row, head), kept in held.items():
            queries = q[row, head * run.group : (head + 1) * run.group, part]
            new = [p for p in range(part.start, part.stop) if p >= run.padding * row]
            gone = [p for p in range(run.padding * row, part.start) if p not in kept]
            there = kept + new
            mask = np.array(there)[None, :] <= np.arange(part.start, part.stop)[:, None]
            keys, values = k[row, head], v[row, head]
            retained = oracle.attend(queries, keys[None, there], values[None, there], mask=mask)
            sums = oracle.moments(keys[None, gone], values[None, gone])
            if run.order is None:
                sums = oracle.Sums(*(0 * x for x in sums))
            evicted = oracle.estimate(queries, sums, run.order or 0)
            exact = oracle.merge(retained, evicted).out
            error = corrected_error(queries, keys[None], values[None], unit(run.dtype), merges=4 * index)
            # Padding queries see nothing and are nobody's.
            real = np.arange(part.start, part.stop) >= run.padding * row
            got = backend.numpy(out)[row, head * run.group : (head + 1) * run.group]
            assert_within(got[:, real], exact[:, real], error[:, real])
        held = stored(backend, cache)


@given(run=runs(room=60))
def test_without_eviction_output_is_exact_causal_attention(backend: Library, run: Run):
    """In chunks of any length, so a prefill equals the same tokens one by one."""
    q, k, v = run.arrays()
    cache = run.cache()
    outs = [backend.numpy(advance(backend, run, cache, part)) for part in run.steps()]
    mask = np.tril(np.ones((run.n, run.n), dtype=bool)) & run.valid()[:, :, None, None, :]
    exact = oracle.attend(q, k, v, mask=mask)
    real = np.broadcast_to(run.valid()[:, :, :, None], exact.out.shape)
    error = attention_error(q, k, v, exact.lse, unit(run.dtype)).out
    got = np.concatenate(outs, axis=2)
    assert_within(np.where(real, got, 0), np.where(real, exact.out, 0), error)
    assert (backend.numpy(cache.moments.weight) == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("order", [None, 1])
def test_output_has_the_dtype_of_the_query(dtype: str, order: int | None):
    torch = LIBRARIES["torch"]
    q, k, v = (torch.asarray(np.random.default_rng(0).standard_normal((1, 2, 20, 4)), dtype) for _ in range(3))
    cache = LayerCache(6, window=2, block=2, order=order)
    for part in (slice(0, 12), slice(12, 13), slice(13, 17), *(slice(t, t + 1) for t in range(17, 20))):
        out = cache.step(q[:, :, part], k[:, :, part], v[:, :, part])
        assert torch.dtype(out) == torch.dtype(cache.keys) == dtype
    assert torch.dtype(cache.moments.weight) == ("float64" if dtype == "float64" else "float32")


def test_bfloat16_decoding_differs_from_float32_by_rounding_the_output_alone():
    """Attention, moments and merge of a decode step run in float32 whatever the input dtype."""
    torch = LIBRARIES["torch"]
    rng = np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.standard_normal((1, 2, 40, 4)), "bfloat16") for _ in range(3))
    low, high = (LayerCache(6, window=2, block=2, policy="streaming") for _ in range(2))
    for t in range(40):
        step = [x[:, :, t : t + 1] for x in (q, k, v)]
        a, b = low.step(*step), high.step(*(x.float() for x in step))
        assert_within(torch.numpy(a), torch.numpy(b), 2 * UNIT_BFLOAT16 * np.abs(torch.numpy(b)))
    for name, x in low.moments.arrays().items():
        assert_same(torch.numpy(x), torch.numpy(high.moments.arrays()[name]))


def test_map_selects_rows_and_reset_forgets_them(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((2, 2, 14, 4))) for _ in range(3))
    cache, alone = (LayerCache(6, window=2, block=2) for _ in range(2))
    cache.step(q, k, v)
    cache.map(lambda x: x[1:2, ...])
    alone.step(*(x[1:2, ...] for x in (q, k, v)))
    assert cache.arrays().keys() == alone.arrays().keys()
    for name, x in alone.arrays().items():
        assert_same(backend.numpy(cache.arrays()[name]), backend.numpy(x))
    cache.reset()
    assert (cache.arrays(), cache.seen, cache.nbytes) == ({}, 0, 0)
    cache.step(*(x[1:2, ...] for x in (q, k, v)))
    for name, x in alone.arrays().items():
        assert_same(backend.numpy(cache.arrays()[name]), backend.numpy(x))


def test_restore_goes_back_to_a_snapshot(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((1, 2, 12, 4))) for _ in range(3))
    cache = LayerCache(6, window=2, block=2)
    cache.step(q, k, v)
    before, arrays = cache.snapshot(), {name: backend.numpy(x) for name, x in cache.arrays().items()}
    cache.step(q, k, v)
    assert cache.seen == 24
    cache.restore(before)
    assert cache.seen == 12
    for name, x in arrays.items():
        assert_same(backend.numpy(cache.arrays()[name]), x)


def test_moments_can_be_rebuilt_from_what_was_evicted(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 30, 4)) for _ in range(3))
    cache = LayerCache(8, window=2, block=2)
    cache.step(*(backend.asarray(x) for x in (q, k, v)))
    held = stored(backend, cache)
    mask = np.array([[[p not in held[0, head] for p in range(30)] for head in range(2)]])
    rebuilt = Moments.from_tokens(*(backend.asarray(x) for x in (k, v)), mask=backend.asarray(mask))
    error = moments_error(k, v, 2 * unit(), merges=4)
    for name, x in rebuilt.arrays().items():
        assert_within(backend.numpy(cache.moments.arrays()[name]), backend.numpy(x), getattr(error, name))


@pytest.mark.parametrize("policy", ["momentkv", "snapkv"])
@pytest.mark.parametrize("budgets", [14, [14, 11]], ids=str)
def test_static_steps_evict_when_a_block_is_full_as_others_do(backend: Library, policy: str, budgets: Any):
    rng = np.random.default_rng(3)
    settings: dict[str, Any] = {"policy": policy, "sinks": 1, "window": 8, "block": 4}
    known, cache = LayerCache(budgets, **settings), LayerCache(budgets, static=True, **settings)
    valid = np.ones((2, 1, 20), dtype=bool)
    valid[0, :, :7] = False
    for m in (20, *(1,) * 13, 5, *(1,) * 9):
        q, k, v = (backend.asarray(rng.standard_normal((2, heads, m, 4))) for heads in (4, 2, 2))
        given = backend.asarray(valid) if m == 20 else None
        out, expected = cache.step(q, k, v, valid=given), known.step(q, k, v, valid=given)
        np.testing.assert_allclose(backend.numpy(out), backend.numpy(expected), rtol=1e-9, atol=1e-11)
        assert stored(backend, cache) == stored(backend, known)
