"""Newest tokens that are taken out: attention is as if they had not come; what is gone cannot be taken out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from libraries import Library

from momentkv import LayerCache, attend, correct
from momentkv.testing.rounding import assert_same

READ, BUDGET = 30, 10


def arrays(heads: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, READ + 5, 4)) for h in (heads, 2, 2))
    return q, k, v


def filled(backend: Library, **settings: Any) -> LayerCache:
    """A cache that has read 30 tokens and stores the last ten."""
    cache = LayerCache(BUDGET, policy="streaming", sinks=0, window=9, block=4, **settings)
    cache.step(*(backend.asarray(x[..., :READ, :]) for x in arrays()))
    return cache


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("tokens", [0, 3, BUDGET])
def test_attention_is_as_if_they_had_not_come(tokens: int, m: int, backend: Library):
    """Also where none is left but what stands for evicted tokens."""
    cache = filled(backend)
    cache.drop(tokens)
    assert cache.seen == READ - tokens
    q, k, v = (x[..., READ : READ + m, :] for x in arrays())
    out = backend.numpy(cache.step(*(backend.asarray(x) for x in (q, k, v))))
    left = slice(READ - BUDGET, READ - tokens)
    keys, values = (
        np.concatenate([x[..., left, :], new], axis=-2) for x, new in zip(arrays()[1:], (k, v), strict=True)
    )
    mask = np.arange(keys.shape[-2]) <= BUDGET - tokens + np.arange(m)[:, None]
    moments = filled(backend).moments.map(backend.numpy)
    expected = correct(attend(q, keys, values, mask=mask), q, moments).out
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (-1, ValueError, "tokens is -1, of 30 that were read"),
        (31, ValueError, "tokens is 31, of 30 that were read"),
        (11, ValueError, "tokens is 11, but some of the newest 11 are padding or have been evicted"),
        (1.5, TypeError, "tokens is 1.5, a float; use a whole number"),
        (True, TypeError, "tokens is True"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(tokens: Any, error: type[Exception], message: str, backend: Library):
    cache = filled(backend)
    before = {name: backend.numpy(x) for name, x in cache.arrays().items()}
    with pytest.raises(error, match=message):
        cache.drop(tokens)
    assert cache.seen == READ
    for name, x in before.items():
        assert_same(backend.numpy(cache.arrays()[name]), x)


def test_nothing_is_taken_out_in_the_middle_of_a_step(backend: Library):
    cache = filled(backend)
    q, k, v = (backend.asarray(x[..., READ:, :]) for x in arrays())
    cache.append(k, v)
    with pytest.raises(ValueError, match="drop was called between append and evict"):
        cache.drop(1)
    cache.attend(q)
    cache.evict()
    cache.drop(5)
    assert cache.seen == READ
