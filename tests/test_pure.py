"""A layer's step and flush without effect: what the cache does, in states that are never changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from momentkv import LayerCache
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.cache.pure import PureLayer

SMALL = {"window": 8, "block": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "the default": MODEL_DEFAULTS,
    "few bits": MODEL_DEFAULTS | {"bits": 4},
    "the paper's, certified": {"certify": 1},
    "observed, plain": {"policy": "h2o", "order": None},
}


def tokens(n: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, heads, n, 16)) for heads in (4, 2, 2)]


def read(budget: Any = (20, 28), **settings: Any) -> LayerCache:
    cache = LayerCache(list(budget), **(SMALL | settings))
    cache.step(*tokens(60))
    return cache


@pytest.mark.parametrize("name", SETTINGS)
def test_it_gives_what_a_cache_gives_and_changes_nothing(name: str):
    known, cache = (read(static=static, **SETTINGS[name]) for static in (False, True))
    layer, state = PureLayer.of(cache)
    first, before = state, {key: x.copy() for key, x in state.arrays().items()}
    flushed = 0
    for seed in range(1, 10):
        out, state = layer.step(state, *tokens(1, seed))
        np.testing.assert_allclose(out, known.step(*tokens(1, seed)), rtol=1e-12, atol=1e-12)
        if layer.is_due(state):
            state, flushed = layer.flush(state), flushed + 1
    assert flushed == 2
    assert all(np.array_equal(x, before[key], equal_nan=True) for key, x in first.arrays().items())
    assert cache.seen == 60
    cache.take(state)
    assert cache.seen == known.seen == 69
    np.testing.assert_allclose(cache.step(*tokens(1, 10)), known.step(*tokens(1, 10)), rtol=1e-12, atol=1e-12)


def test_a_flush_that_is_not_due_evicts_nothing():
    layer, state = PureLayer.of(read(static=True, **MODEL_DEFAULTS))
    _, state = layer.step(state, *tokens(1, 1))
    assert not layer.is_due(state)
    flushed = layer.flush(state)
    for name, x in state.evicted.arrays().items():
        np.testing.assert_array_equal(flushed.evicted.arrays()[name], x, err_msg=name)
    same = [layer.step(each, *tokens(1, 2))[0] for each in (state, flushed)]
    np.testing.assert_allclose(*same, rtol=1e-12, atol=1e-12)


def test_nothing_is_asked_of_the_device():
    """Traced, whoever asks for a number fails."""
    jax = pytest.importorskip("jax")
    cache = read(static=True, **SETTINGS["few bits"])
    cache.map(lambda x: jax.numpy.asarray(x, dtype="float32" if x.dtype == "float64" else None))
    layer, state = PureLayer.of(cache)
    one = [jax.numpy.asarray(x, dtype="float32") for x in tokens(1, 1)]
    out, after = jax.eval_shape(layer.step, state, *one)
    assert out.shape == (2, 4, 1, 16)
    due, flushed = jax.eval_shape(lambda state: (layer.is_due(state), layer.flush(state)), after)
    assert due.shape == ()
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(each)] for each in (state, after, flushed)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert jax.tree.structure(state) == jax.tree.structure(after) == jax.tree.structure(flushed)


def test_what_has_no_such_functions_is_refused_by_name():
    with pytest.raises(ValueError, match="static=True"):
        PureLayer.of(read())
    with pytest.raises(ValueError, match="the cache is empty"):
        PureLayer.of(LayerCache(40, static=True))
    cache = read(static=True)
    cache.append(*tokens(3)[1:])
    with pytest.raises(ValueError, match="tokens that wait"):
        PureLayer.of(cache)
    layer, state = PureLayer.of(read(static=True))
    with pytest.raises(ValueError, match="takes one token a head"):
        layer.step(state, *tokens(2))
    q, k, v = tokens(1)
    with pytest.raises(ValueError, match="the cache holds float64"):
        layer.step(state, q, k.astype("float32"), v)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_cache_that_goes_on_changes_no_state_that_was_taken_of_it(library: str):
    cache = read(static=True, **MODEL_DEFAULTS)
    one = tokens(1, 1)
    if library == "torch":
        cache.map(torch.from_numpy)
        one = list(map(torch.from_numpy, one))
    layer, state = PureLayer.of(cache)
    before = {key: np.asarray(x).copy() for key, x in state.arrays().items()}
    for _ in range(6):
        cache.step(*one)
    for name, x in state.arrays().items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)
    out, _ = layer.step(state, *one)
    np.testing.assert_allclose(out, read(**MODEL_DEFAULTS).step(*tokens(1, 1)), rtol=1e-12, atol=1e-12)


def test_a_compiled_function_may_take_the_state_for_its_own():
    """Donated, as decode loops do: JAX deletes its arrays, and the cache goes on, and reads again."""
    jax = pytest.importorskip("jax")
    cache = read(static=True, **MODEL_DEFAULTS)
    cache.map(lambda x: jax.numpy.asarray(x, dtype="float32" if x.dtype == "float64" else None))
    _, state = PureLayer.of(cache)
    held = {name: np.asarray(x).copy() for name, x in cache.stored_state.arrays().items()}
    for x in jax.tree.leaves(state):
        x.delete()
    for name, x in cache.stored_state.arrays().items():
        np.testing.assert_array_equal(x, held[name], err_msg=name)


def test_pytorch_gets_no_gradient_and_leaves_no_graph():
    """Its fused attention has none for its lse, which joins the tiers."""
    cache = read(static=True, **MODEL_DEFAULTS)
    cache.map(torch.from_numpy)
    layer, state = PureLayer.of(cache)
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in tokens(1, 1))
    with pytest.raises(RuntimeError, match="step of PureLayer has none"):
        layer.step(state, q, k, v)
    _, state = layer.step(state, q.detach(), k, v)
    assert not any(x.requires_grad for x in state.arrays().values())
