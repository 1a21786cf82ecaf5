"""What a cache holds is its own: no array of its caller's, no former state's, and no gradient."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, Library

from momentkv import LayerCache
from momentkv.statistics.corrections import AnchoredSummaries

SIZES: dict[str, Any] = {"sinks": 1, "window": 4, "block": 3}
FEW = AnchoredSummaries(summaries=2, rank=1)
SETTINGS: dict[str, dict[str, Any]] = {
    "momentkv": {"budget": 14, "policy": "momentkv"},
    "heads": {"budget": [9, 14], "policy": "balanced", "correction": FEW, "keep_queries": True},
    "certified": {"budget": [9, 14], "policy": "h2o", "certify": 2, "tolerance": 1e9},
    "plain": {"budget": 40, "policy": "snapkv", "order": None},
}
LENGTHS = (30, *[1] * 7, 5, 1)


def cache_of(name: str) -> LayerCache:
    return LayerCache(**(SIZES | SETTINGS[name]))


def parts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.standard_normal((2, heads, n, 4)) for heads in (4, 2, 2)) for n in lengths]


def numbers(library: Library, cache: LayerCache) -> dict[str, np.ndarray]:
    """Of all slots that hold a token, copied."""
    held = {name: x for name, x in cache.arrays().items() if not name.startswith("recent_") or "count" in name}
    held |= {f"view.{name}": x for name, x in cache.view()._asdict().items() if x is not None}
    copies = {name: library.numpy(x).copy() for name, x in held.items()}
    used = copies["view.positions"] >= 0
    return {
        name: np.where(used if x.ndim == used.ndim else used[..., None], x, 0) if name.startswith("view.") else x
        for name, x in copies.items()
    }


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert np.array_equal(x, other[name]), name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", SETTINGS)
def test_arrays_that_were_given_may_be_used_for_something_else(name: str, library: str, padded: bool):
    """Of a prefill, of single tokens and of a chunk: one buffer for each, as programs have, overwritten at once."""
    lib = LIBRARIES[library]
    cache, other = cache_of(name), cache_of(name)
    for q, k, v in parts():
        valid = np.ones((2, 1, k.shape[2]), dtype=bool)
        if padded:
            valid[1, :, : min(7, k.shape[2] - 1)] = False
        buffers = [lib.asarray(x) for x in (q, k, v, valid)]
        out = cache.step(*buffers[:3], valid=buffers[3] if padded else None)
        before, result = numbers(lib, cache), lib.numpy(out).copy()
        for buffer in buffers:
            buffer[...] = 1
        assert_equal(before, numbers(lib, cache))
        assert np.array_equal(lib.numpy(out), result)
        other.step(*(lib.asarray(x) for x in (q, k, v)), valid=lib.asarray(valid) if padded else None)
        assert_equal(before, numbers(lib, other))


@pytest.mark.parametrize("name", SETTINGS)
def test_arrays_that_were_given_are_not_written_to(backend: Library, name: str):
    cache = cache_of(name)
    for part in parts():
        arrays = [backend.asarray(x) for x in part]
        cache.step(*arrays)
        for x, given in zip(arrays, part, strict=True):
            assert np.array_equal(backend.numpy(x), given)


@pytest.mark.parametrize("name", SETTINGS)
def test_snapshots_are_independent_of_what_follows_and_of_each_other(backend: Library, name: str):
    """Back to an older one, on, forward to a newer one, and again: each time the same, to the last bit."""
    cache = cache_of(name)
    steps = [tuple(backend.asarray(x) for x in part) for part in parts()]
    other_way = [tuple(backend.asarray(x) for x in part) for part in parts(seed=1)]

    def run(part: list[Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        outs = [backend.numpy(cache.step(*x)).copy() for x in part]
        return outs, numbers(backend, cache)

    run(steps[:2])
    older = cache.snapshot()
    at_older = numbers(backend, cache)
    middle = run(steps[2:6])
    newer = cache.snapshot()
    end = run(steps[6:])
    for _ in range(2):
        cache.restore(older)
        assert_equal(numbers(backend, cache), at_older)
        assert cache.seen == 31
        run(other_way[2:])  # something else is read, and written where the tokens lay
        cache.restore(newer)
        assert_equal(numbers(backend, cache), middle[1])
        outs, held = run(steps[6:])
        assert_equal(held, end[1])
        assert all(np.array_equal(x, y) for x, y in zip(outs, end[0], strict=True))
        cache.restore(older)
        outs, held = run(steps[2:6])
        assert_equal(held, middle[1])
        assert all(np.array_equal(x, y) for x, y in zip(outs, middle[0], strict=True))
        cache.restore(newer)


def test_a_snapshot_taken_with_tokens_that_wait_is_whole(backend: Library):
    cache, plain = cache_of("momentkv"), cache_of("momentkv")
    steps = [tuple(backend.asarray(x) for x in part) for part in parts()]
    for each in (cache, plain):
        each.step(*steps[0])
    cache.append(*steps[8][1:])
    waiting = cache.snapshot()
    cache.attend(steps[8][0])
    cache.evict()
    cache.step(*steps[1])
    cache.restore(waiting)
    out = cache.attend(steps[8][0])
    cache.evict()
    assert np.array_equal(backend.numpy(out), backend.numpy(plain.step(*steps[8])))
    assert_equal(numbers(backend, cache), numbers(backend, plain))


def storages() -> set[int]:
    """Memory that tensors hold now."""
    gc.collect()
    found = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
    return {x.untyped_storage().data_ptr() for x in found if x.untyped_storage().nbytes()}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_leave_nothing_behind(name: str):
    """With queries, keys and values of a model that is trained: what is stored has no history, and memory stays."""
    cache = cache_of(name)
    torch.manual_seed(0)
    project = torch.nn.Linear(4, 4)
    counts = []
    for step in range(90):
        n = 30 if step == 0 else 1
        q, k, v = (project(torch.randn(2, heads, n, 4)) for heads in (4, 2, 2))
        out = cache.step(q, k, v)
        assert out.requires_grad
        if step % 10 == 0:
            out.sum().backward()  # the output can be differentiated, by its own queries at least
            assert project.weight.grad is not None
        stored = [*cache.arrays().values(), cache.newest_queries, *(cache.new or ())]
        assert not any(x.requires_grad for x in stored if isinstance(x, torch.Tensor))
        del q, k, v, out, stored
        if step in (29, 59, 89):
            counts.append(len(storages()))
    # At the same place of a block, as many as before.
    assert counts[1:] == counts[:1] * 2


@pytest.mark.parametrize("name", SETTINGS)
def test_an_output_of_queries_with_gradients_is_that_without(name: str):
    cache, other = cache_of(name), cache_of(name)
    for q, k, v in parts():
        arrays = [torch.from_numpy(x) for x in (q, k, v)]
        with torch.no_grad():
            expected = other.step(*arrays)
        out = cache.step(*(x.clone().requires_grad_() for x in arrays))
        # Another kernel may add up in another order; float64.
        torch.testing.assert_close(out.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"policy": "h2o"}, {"bits": (5, 3), "policy": "h2o"}], ids=str)
def test_nothing_of_a_cache_that_is_gone_stays(settings: dict[str, Any]):
    """What was computed for its layout neither: every text has another, and memory would fill with them."""
    cache = LayerCache((20, 30), sinks=1, window=4, block=4, **settings)
    known = weakref.WeakSet()
    for n in (60, 1, 1, 1, 1, 1):
        cache.step(*(torch.randn(1, heads, n, 8) for heads in (4, 2, 2)))
        known.add(cache.stored_state.layout)
    assert known
    del cache
    gc.collect()
    assert not known
