"""Padding in a step: whatever its arrays hold, and whatever rows lie beside, a row's own tokens are as without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES

from momentkv import LayerCache
from momentkv.cache.allocation import minimise_error
from momentkv.cache.competition import finite_rows
from momentkv.cache.shared_budget import SharedBudget

LENGTH, PADDED = 60, 45
STEPS = {"one by one": [40] + [1] * 20, "chunks": [40, 10, 10], "a chunk with its window": [20, 40]}


def outputs(padding: float, steps: list[int], library: str, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of the real tokens, and positions at the end; one token is padding, of such a query, key and value."""
    xp, rng = LIBRARIES[library], np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, heads, LENGTH, 8)) for heads in (4, 2, 2))
    for x in (q, k, v):
        x[:, :, PADDED] = padding
    valid = np.ones((1, 1, LENGTH), bool)
    valid[..., PADDED] = False
    cache, outs, start = LayerCache(20, window=8, block=4, **settings), [], 0
    for length in steps:
        part = slice(start, start + length)
        start += length
        arrays = (xp.asarray(x[:, :, part]) for x in (q, k, v))
        outs.append(xp.numpy(cache.step(*arrays, valid=xp.asarray(valid[:, :, part]))))
    return np.concatenate(outs, axis=2)[:, :, valid[0, 0]], xp.numpy(cache.positions)


@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("correction", ["summaries", "moments", "none"])
@pytest.mark.parametrize("policy", ["balanced", "snapkv"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_padding_holds_changes_nothing(library: str, steps: str, policy: str, correction: str, padding: float):
    """NaN of a padding's query stayed in what is remembered of queries, and other tokens were evicted."""
    settings = {"policy": policy, "correction": correction}
    with np.errstate(all="ignore"):
        expected, kept = outputs(0.0, STEPS[steps], library, settings)
        out, positions = outputs(padding, STEPS[steps], library, settings)
    np.testing.assert_array_equal(positions, kept)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)


def test_what_a_query_of_padding_holds_changes_no_budget():
    """Rows vote whose newest queries are finite; one with NaN in a query of padding had no say."""
    shared = []
    for padding in (0.0, np.nan):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, heads, 200, 8, generator=generator) for heads in (4, 2, 2))
        k[:, 0] *= 3
        valid = torch.ones(2, 1, 200, dtype=torch.bool)
        valid[1, :, 180:190] = False
        q[1, :, 180:190] = padding
        cache = LayerCache(60, keep_queries=True, policy="balanced")  # which keeps more queries than there are
        cache.append(k, v)
        cache.attend(q, valid=valid)
        assert finite_rows(cache).all()
        SharedBudget([cache], minimise_error, by_head=True).evict(cache)
        shared.append(cache.budgets)
    assert shared[0] == shared[1]
    assert shared[0][0] != shared[0][1]


@pytest.mark.parametrize("way", ["padding within", "appended twice"])
def test_under_autocast_arrays_of_another_dtype_are_joined(way: str):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 8, generator=generator).half() for heads in (4, 2, 2))
    outs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cache = LayerCache(20, window=8, block=4)
            if way == "appended twice":
                cache.append(k[:, :, :30], v[:, :, :30])
                cache.append(k[:, :, 30:], v[:, :, 30:])
                cache.observe(q)
                cache.evict()
            else:
                valid = torch.ones(1, 1, 40, dtype=torch.bool)
                valid[..., 20] = False
                cache.step(q, k, v, valid=valid)
        outs.append((cache.positions, cache.moments.weight))
    assert all(torch.equal(x, y) for x, y in zip(*outs, strict=True))


@pytest.mark.parametrize("bits", [None, 3])
def test_static_rows_with_padding_are_as_alone(bits: int | None):
    """A flush that another row set off rounded tokens which the row alone still held as they came."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 50, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    valid = torch.ones(2, 1, 50, dtype=torch.bool)
    valid[0, :, 31] = False
    settings: dict[str, Any] = {"policy": "streaming", "correction": "none", "static": True}
    if bits is not None:
        settings |= {"bits": bits, "exact_window": 2}
    outs = []
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        cache, out = LayerCache(30, window=4, block=4, **settings), []
        for start, stop in [(0, 25), *((t, t + 1) for t in range(25, 50))]:
            part = (rows, slice(None), slice(start, stop))
            out.append(cache.step(q[part], k[part], v[part], valid=valid[part]))
        outs.append(torch.cat(out, dim=2))
    both, alone = outs[0], torch.cat(outs[1:])
    real = valid[..., None]
    torch.testing.assert_close(both.where(real, 0.0), alone.where(real, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["balanced", "expected-attention", "snapkv"])
def test_a_row_with_padding_behind_it_is_ranked_by_its_own_newest_queries(policy: str):
    """More padding than the queries that rank: none of the newest slots would have one of the row's."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 500, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    q[..., :200, :] *= 4  # older queries would rank otherwise
    valid = torch.ones(2, 1, 500, dtype=torch.bool)
    valid[1, :, 210:] = False
    options: dict[str, Any] = {"policy": policy, "correction": "summaries", "window": 8, "block": 4}
    both, alone = LayerCache(40, **options), LayerCache(40, **options)
    both.step(q, k, v, valid=valid)
    alone.step(*(x[1:, :, :210] for x in (q, k, v)))
    own = both.positions[1:]
    for head in range(2):
        assert torch.equal(own[0, head][own[0, head] >= 0], alone.positions[0, head])
