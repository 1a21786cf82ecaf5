"""What a decode step and a flush are made of, under `jax.jit`; and JAX as it is by default, with 32 bits."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from momentkv import POLICIES, LayerCache, Moments, Tokens, attend, bounds, correct, estimate, get_policy, merge
from momentkv._array import array_namespace, concrete, floating
from momentkv.attention import AttentionState
from momentkv.backends import get_backend
from momentkv.backends.layout import Tiers
from momentkv.cache.pure import PureLayer
from momentkv.cache.queries import remember
from momentkv.cache.state import LayerState
from momentkv.codes import Coded, Standard, attend_codes, encode
from momentkv.diagnostics import eviction_error
from momentkv.policies import Balanced, CriticalKV, retain
from momentkv.policies.select import protected, ranking
from momentkv.statistics.clustering import cluster, low_rank
from momentkv.statistics.corrections import get_correction
from momentkv.statistics.expansion import estimate_expansion
from momentkv.statistics.summaries import QueryWindow, Summaries
from momentkv.testing import check_backend, check_library
from momentkv.testing.rounding import assert_within, corrected_error, unit

SCALE = 0.4
# Places in a ranking: averages over the same neighbours tie, but for rounding.
UNPOOLED = {"balanced": Balanced(kernel=1), "criticalkv": CriticalKV(kernel=1)}
D, DV, N = 4, 3, 12


class Given(NamedTuple):
    """Arguments of what is traced: two rows, two KV heads, groups of two, and statistics of other tokens."""

    q: Any
    k: Any
    v: Any
    weights: Any
    mask: Any
    positions: Any
    score: Any
    index: Any
    new: Any
    rotation: Any
    budgets: Any
    moments: Moments
    reach: Moments
    summaries: Summaries
    others: Summaries
    window: QueryWindow
    anchored: Moments

    @property
    def one(self) -> Any:
        """The newest query."""
        return self.q[..., -1:, :]

    @property
    def state(self) -> AttentionState:
        return attend(self.q, self.k, self.v, scale=SCALE)


def given(seed: int = 0) -> Given:
    rng = np.random.default_rng(seed)
    q, k, v, other_k, other_v = (
        rng.standard_normal((2, heads, n, d))
        for heads, n, d in ((4, 3, D), (2, N, D), (2, N, DV), (2, 20, D), (2, 20, DV))
    )
    places = np.sort(rng.permuted(np.broadcast_to(np.arange(2 * N), (2, 2, 2 * N)), axis=-1)[..., :N], axis=-1)
    positions = np.where(rng.random(places.shape) < 0.2, -1, places).astype("int32")
    window = QueryWindow.from_queries(q, 2, scale=SCALE)
    empty = Summaries.empty(k, v, summaries=3, rank=1)
    return Given(
        q=q,
        k=k,
        v=v,
        weights=rng.uniform(0.5, 2, (2, 2, N)),
        mask=rng.random((2, 2, N)) < 0.7,
        positions=positions,
        score=rng.random((2, 2, N)),
        index=np.stack([rng.permutation(N)[:3] for _ in range(4)]).reshape(2, 2, 3).astype("int32") - 1,
        new=rng.standard_normal((2, 2, 3, D)),
        rotation=np.linalg.qr(rng.standard_normal((D, D)))[0],
        budgets=rng.integers(4, 8, (2, 2)),
        moments=Moments.from_tokens(other_k, other_v),
        reach=Moments.from_tokens(other_k, other_v, order=2, extent=True),
        summaries=empty.update(other_k, other_v, window),
        others=empty.update(other_k[..., :7, :], other_v[..., :7, :], window),
        window=window,
        anchored=Moments.from_tokens(other_k, other_v, anchor=window.mean, extent=True),
    )


def importance(name: str) -> Callable[[Given], Any]:
    """Ranking by a policy, with what it is shown."""

    def function(x: Given) -> Any:
        xp = array_namespace(x.k)
        tokens = Tokens(x.k, x.v, x.positions, x.score, x.moments, SCALE, *x.window)
        policy = UNPOOLED.get(name, get_policy(name))
        weights = get_backend(x.q).attend(x.q, x.k, x.v, scale=SCALE)[1]
        # What an empty slot is given is nobody's.
        ranking = xp.where(x.positions >= 0, policy.importance(tokens), xp.zeros_like(x.score))
        return ranking, policy.observe(x.score, weights)

    return function


def selection(x: Given, budget: Any) -> Any:
    return retain(x.score, x.positions, budget=budget, sinks=1, window=2)


FUNCTIONS: dict[str, Callable[[Given], Any]] = {
    "attend": lambda x: attend(x.q, x.k, x.v, scale=SCALE, mask=x.mask[..., None, None, :]),
    "merge": lambda x: merge(x.state, x.state),
    "backend: attend": lambda x: get_backend(x.q).attend(x.q, x.k, x.v, scale=SCALE),
    "backend: attend_causal": lambda x: get_backend(x.q).attend_causal(x.q, x.k, x.v, scale=SCALE, valid=x.mask),
    "backend: prefill": lambda x: get_backend(x.q).prefill(x.q, x.k, x.v, scale=SCALE),
    "backend: correct": lambda x: get_backend(x.q).correct(x.state, x.q, x.summaries.expansion(), scale=SCALE),
    "backend: decode": lambda x: get_backend(x.q).decode(
        x.one, Tiers.of(x.k, x.v, x.mask), x.moments.expansion(), scale=SCALE, weights=True
    ),
    "backend: write": lambda x: get_backend(x.q).write(x.k, x.index, x.new, axis=-2),
    "array-api backend: write": lambda x: get_backend("array-api").write(x.k, x.index, x.new, axis=-2),
    "backend: write numbers": lambda x: get_backend(x.q).write(x.score, x.index, x.new[..., 0], axis=-1),
    "estimate": lambda x: estimate(x.q, x.moments, scale=SCALE),
    "estimate of order 2": lambda x: estimate(x.q, x.reach, order=2, scale=SCALE),
    "estimate, anchored": lambda x: estimate(x.q, x.anchored, scale=SCALE),
    "estimate_expansion of summaries": lambda x: estimate_expansion(x.q, x.summaries.expansion(), scale=SCALE),
    "correct": lambda x: correct(x.state, x.q, x.moments, scale=SCALE),
    "correct, certified": lambda x: correct(x.state, x.q, x.reach, scale=SCALE, certify=True),
    "moments: from_tokens": lambda x: Moments.from_tokens(x.k, x.v, mask=x.mask, weights=x.weights),
    "moments: update": lambda x: x.moments.update(x.k, x.v, mask=x.mask),
    "moments: update of order 2 with extent": lambda x: x.reach.update(x.k, x.v, mask=x.mask, weights=x.weights),
    "moments: downdate": lambda x: x.reach.update(x.k, x.v).downdate(x.k, x.v),
    "moments: rotate": lambda x: x.reach.rotate(x.rotation),
    "moments: decay": lambda x: x.reach.decay(x.score[..., 0]),
    "anchored moments: update": lambda x: x.anchored.update(x.k, x.v, mask=x.mask),
    # Its extent counts a rounding more where factors are not known to be one.
    "anchored moments: merge": lambda x: dataclasses.replace(x.anchored.merge(x.anchored.decay(0.5)), extent=None),
    "no statistics: estimate": lambda x: estimate(x.q, get_correction("none").empty(x.k, x.v), scale=SCALE),
    "summaries: update": lambda x: x.summaries.update(x.k, x.v, x.window, mask=x.mask),
    "summaries: first update": lambda x: Summaries.empty(x.k, x.v, summaries=3, rank=1).update(x.k, x.v, x.window),
    "summaries: merge": lambda x: x.summaries.merge(x.others.reanchor(x.summaries.anchor), x.window),
    "summaries: reanchor": lambda x: x.summaries.reanchor(x.window.mean + 0.1),
    "summaries: calibrate": lambda x: x.summaries.calibrate(x.q, x.k, scale=SCALE, mask=x.mask),
    "summaries: pooled": lambda x: x.summaries.pooled(),
    "query window": lambda x: QueryWindow.from_queries(x.q, 2, scale=SCALE),
    "memory of queries": lambda x: remember(x.q, None, 2, SCALE, *x.window),
    "cluster": lambda x: cluster(x.k, x.weights, 3),
    # Singular vectors are known but for their signs; their product is not.
    "low_rank": lambda x: array_namespace(x.k).matmul(*low_rank(x.k[..., :DV, :], x.window.variance, 2)),
    "ranking": lambda x: ranking(x.score, x.positions, sinks=1, window=2),
    "protected": lambda x: protected(x.positions, sinks=1, window=2),
    "retain": lambda x: selection(x, 5),
    "bounds: lse_interval": lambda x: bounds.lse_interval(x.q, x.reach, scale=SCALE),
    "bounds: value_error": lambda x: bounds.value_error(
        x.q, x.reach, estimate(x.q, x.reach, scale=SCALE).out, scale=SCALE
    ),
    "bounds: output_error": lambda x: bounds.output_error(x.state, x.q, x.reach, x.state.out, scale=SCALE),
    "eviction_error": lambda x: eviction_error(x.q, x.k, x.v, x.mask, scale=SCALE),
    **{f"policy: {name}": importance(name) for name in POLICIES},
}


def as_float32(x: Any) -> Any:
    return jnp.asarray(x, dtype="float32" if x.dtype == "float64" else "int32" if x.dtype == "int64" else None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_once_it_gives_what_numpy_gives(name: str):
    """Arithmetic is float64, and what is compared is known to float32: 29 bits are left for whatever loses some."""
    traces = 0

    def function(x: Given) -> Any:
        nonlocal traces
        traces += 1
        return FUNCTIONS[name](x)

    traced = jax.jit(function)
    for seed in (0, 1):
        arguments = given(seed)
        expected = jax.tree.leaves(FUNCTIONS[name](arguments))
        with jax.enable_x64(True):
            got = [np.asarray(x) for x in jax.tree.leaves(traced(jax.tree.map(jnp.asarray, arguments)))]
        for one, other in zip(got, expected, strict=True):
            assert one.dtype.kind == other.dtype.kind
            assert_within(one, other, 2.0**-24 * (1 + np.abs(np.where(np.isfinite(other), other, 0.0))))
    assert traces == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_by_default_it_stays_within_32_bits(name: str):
    """Asking JAX for 64 bits that it has not got warns, which is an error in these tests."""
    arguments = jax.tree.map(as_float32, given())
    traced = jax.tree.leaves(jax.eval_shape(FUNCTIONS[name], arguments))
    assert traced
    assert {str(x.dtype) for x in traced} <= {"float32", "int32", "bool"}


def test_traced_selection_by_budgets_of_heads_is_that_of_numpy():
    """Its width cannot follow the budgets; what is filled does."""
    arguments = given()
    known = selection(arguments, arguments.budgets)
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arguments)
        traced = jax.jit(lambda x: selection(x, x.budgets))(arrays)
    width = known.indices.shape[-1]
    filled = np.asarray(traced.filled)
    assert filled.shape[-1] == N
    assert (filled[..., :width] == known.filled).all()
    assert not filled[..., width:].any()
    assert (np.asarray(traced.indices)[..., :width][known.filled] == known.indices[known.filled]).all()
    assert (np.asarray(traced.evicted) == known.evicted).all()


def test_values_can_be_looked_at_unless_they_are_traced():
    seen = []
    jax.jit(lambda x: seen.append(concrete(x)))(jnp.zeros(3))
    jax.vmap(lambda x: seen.append(concrete(np.zeros(2), x)))(jnp.zeros(3))
    assert seen == [False, False]
    assert concrete(jnp.zeros(3), np.zeros(3))


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 2.0**-24), (16, 2.0**-13)])
def test_a_layers_step_and_flush_are_compiled_once_and_equal_the_layer_cache(bits: int | None, tolerance: float):
    """Prompts of two lengths, decoded by one loop that is compiled, against an eager cache of NumPy arrays.

    Statistics of 16 bits may be rounded to either side where numbers differ in their last place.
    """
    settings = {"policy": "momentkv", "sinks": 1, "window": 2, "block": 3, "scale": SCALE, "statistics_bits": bits}
    traces = 0

    @partial(jax.jit, static_argnums=0)
    def decode(layer: PureLayer, state: LayerState, tokens: Any) -> Any:
        def one(state: LayerState, token: Any) -> Any:
            nonlocal traces
            traces += 1
            out, state = layer.step(state, *token)
            return jax.lax.cond(layer.is_due(state), layer.flush, lambda state: state, state), out

        return jax.lax.scan(one, state, tokens)

    for prompt in (20, 26):
        rng = np.random.default_rng(prompt)
        q, k, v = (rng.standard_normal((2, heads, prompt + 14, d)) for heads, d in ((4, D), (2, D), (2, DV)))
        known, cache = LayerCache([8, 6], **settings), LayerCache([8, 6], static=True, **settings)
        for each in (known, cache):
            each.step(*(x[:, :, :prompt] for x in (q, k, v)))
        with jax.enable_x64(True):
            cache.map(jnp.asarray)
            after = [jnp.moveaxis(x[:, :, prompt:, None], 2, 0) for x in (q, k, v)]
            state, outs = decode(*PureLayer.of(cache), after)
            cache.take(state)
            for t in range(14):
                expected = known.step(*(x[:, :, prompt + t : prompt + t + 1] for x in (q, k, v)))
                assert_within(np.asarray(outs[t]), expected, tolerance * (1 + np.abs(expected)))
            assert cache.seen == known.seen == prompt + 14
            for row in np.ndindex(2, 2):
                one, other = (np.asarray(x.positions)[row] for x in (cache, known))
                assert one[one >= 0].tolist() == other[other >= 0].tolist()
            for name, x in known.moments.arrays().items():
                assert_within(np.asarray(getattr(cache.moments, name)), x, tolerance * (1 + np.max(np.abs(x))))
    assert traces == 1


# What an eviction asks the host, and what heads of their own budget, codes and narrow statistics ask beside.
WITHIN: dict[str, dict[str, Any]] = {
    "newest queries": {"policy": "expected-attention", "budget": [6, 8]},
    "few bits": {"policy": "balanced", "correction": "summaries", "statistics_bits": 16, "bits": 4, "exact_window": 1},
}


def some_tokens(n: int) -> list[Any]:
    rng = np.random.default_rng(n)
    return [rng.standard_normal((1, heads, n, d)).astype("float32") for heads, d in ((4, D), (2, D), (2, DV))]


@pytest.mark.parametrize("way", WITHIN)
def test_a_cache_of_a_traced_function_evicts_in_it(way: str):
    """Nothing is compiled: what JAX would compile is what NumPy does, as long as nobody asks for numbers."""
    settings = {"budget": 6, "sinks": 1, "window": 2, "block": 2, **WITHIN[way]}

    def function(*parts: Any) -> Any:
        cache = LayerCache(**settings)
        return [cache.step(*part) for part in parts], cache.arrays()

    parts = [some_tokens(n) for n in (33, 1, 1)]
    expected, traced = function(*parts), jax.eval_shape(function, *parts)
    shapes = [[(x.shape, str(x.dtype)) for x in jax.tree.leaves(each)] for each in (expected, traced)]
    assert shapes[0] == shapes[1]


def test_no_gradient_flows_through_a_cache():
    """As with PyTorch: with respect to queries, and not to keys and values, which are stored without."""
    q, k, v = map(jnp.asarray, some_tokens(9))

    def loss(q: Any, k: Any, v: Any) -> Any:
        cache = LayerCache(6, sinks=1, window=2, block=2)
        cache.step(q[:, :, :8], k[:, :, :8], v[:, :, :8])
        return cache.step(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:]).sum()

    # Compiled as a whole: operator by operator that takes five times as long.
    of_queries, of_keys, of_values = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert bool(jnp.any(of_queries[:, :, 8:] != 0))
    assert not bool(jnp.any(of_queries[:, :, :8] != 0))
    assert not bool(jnp.any(of_keys != 0))
    assert not bool(jnp.any(of_values != 0))


def test_a_cache_from_outside_of_a_traced_function_is_refused_in_it():
    """It would change once, while that is traced; compiled, every call would give the output of the first."""
    cache, made, (q, k, v) = LayerCache(6, sinks=1, window=2), [], some_tokens(5)

    def loss(q: Any, cache: LayerCache) -> Any:
        return cache.step(q, *map(jnp.asarray, (k, v))).sum()

    def escape(q: Any) -> Any:
        made.append(LayerCache(6, sinks=1, window=2))
        return jax.eval_shape(lambda q: loss(q, made[0]), q)

    for function in (jax.jit(cache.step), jax.vmap(cache.step)):
        with pytest.raises(RuntimeError, match=r"made outside of the function that JAX traces.* a copy.deepcopy"):
            jax.eval_shape(function, *(x[None] for x in (q, k, v)))
    for function in (jax.grad(lambda q: loss(q, cache)), escape):
        with pytest.raises(RuntimeError, match=r"made outside of the function that JAX traces"):
            jax.eval_shape(function, q)
    assert cache.state is None
    assert jax.eval_shape(jax.grad(lambda q: loss(q, copy.deepcopy(cache))), q).shape == q.shape
    with pytest.raises(RuntimeError, match=r"made in a function that JAX has traced, and holds no numbers"):
        made[0].step(*map(jnp.asarray, (q, k, v)))


@pytest.mark.parametrize(
    ("settings", "valid", "named"),
    [
        ({"static": True}, False, "static is True"),
        ({"certify": 1, "tolerance": 0.5}, False, "tolerance is 0.5"),
        ({}, True, "valid is given while JAX traces"),
    ],
)
def test_what_a_cache_cannot_be_asked_while_it_is_traced_is_named(settings: dict[str, Any], valid: bool, named: str):
    def function(q: Any, k: Any, v: Any) -> Any:
        mask = jnp.ones(k.shape[:-1], dtype=bool) if valid else None
        return LayerCache(6, sinks=1, window=2, **settings).step(q, k, v, valid=mask)

    with pytest.raises(RuntimeError, match=named):
        jax.eval_shape(function, *some_tokens(5))


def test_records_are_arguments_of_a_traced_function_for_their_bits():
    k = given().k
    standard = Standard.of(k)
    coded = Coded((4, 4), *(encode(k, standard, 4)[i] for i in (0, 0, 1, 1)), standard, standard)
    traced = jax.eval_shape(lambda q, x: (attend_codes(q, x, scale=SCALE)[0].out, x), as_float32(k), coded)
    assert traced[0].shape == k.shape
    assert traced[1].bits == (4, 4)


MASKED: dict[str, Callable[[Any, Any, Any, Any], object]] = {
    "mask": lambda q, k, v, mask: attend(q, k, v, mask=mask[..., None, None, :]),
    "mask of moments": lambda q, k, v, mask: Moments.from_tokens(k, v, mask=mask),
    "retained": lambda q, k, v, mask: eviction_error(q, k, v, mask),
    "mask of codes": lambda q, k, v, mask: Standard.of(k, mask),
    "valid": lambda q, k, v, mask: LayerCache(40).step(q, k, v, valid=mask),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_numpy_beside_arrays_of_jax_is_named(name: str):
    """The two libraries have one dtype of bools."""
    arrays = [jnp.asarray(x) for x in some_tokens(5)]
    with pytest.raises(TypeError, match=f"{name.split()[0]} is an array of numpy, tokens one of jax; convert one"):
        MASKED[name](*arrays, np.ones((1, 2, 5), dtype=bool))


def test_what_is_to_be_done_at_a_librarys_first_array_is_done_once(monkeypatch: pytest.MonkeyPatch):
    done, library = [], types.ModuleType("library")
    library.isdtype = np.isdtype  # type: ignore[attr-defined]
    monkeypatch.setattr("momentkv._array.AT_FIRST", {"library": lambda: done.append(True)})
    assert floating(library, np.dtype("float32"))
    assert floating(library, np.dtype("float64"))
    assert done == [True]


def test_by_default_backend_and_library_conform():
    assert check_backend("jax", asarray=as_float32, dtypes=("float32",), batches=1) == 40
    assert check_library(as_float32, np.asarray, dtypes=("float32",), batches=1) == 40


def test_by_default_a_cache_retains_what_it_retains_on_numpy():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 10, d)).astype("float32") for heads, d in ((4, D), (2, D), (2, DV)))
    known, cache = (LayerCache(6, policy="random", sinks=1, window=2, block=3) for _ in range(2))
    error = corrected_error(q, k, v, unit("float32"), merges=1)
    for part in (slice(0, 9), slice(9, 10)):
        tokens = [x[:, :, part] for x in (q, k, v)]
        out, expected = cache.step(*map(jnp.asarray, tokens)), known.step(*tokens)
        assert out.dtype == "float32"
        assert_within(np.asarray(out), expected, 2 * error[:, :, part])
        assert (np.asarray(cache.positions) == known.positions).all()
