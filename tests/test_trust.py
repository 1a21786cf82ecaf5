"""Trust in what a cache gives: 16 bits, tokens that were dropped, padding that has no say."""

from __future__ import annotations

import pytest
import torch
from passes import SIZES, passes

from momentkv import LayerCache
from momentkv.attention import attend
from momentkv.trust import trust


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_a_certificate_counts_what_short_dtypes_lose(dtype: torch.dtype, seed: int):
    """Nothing is evicted, so that rounding is all there is; the truth is attention over the same numbers in float64."""
    cache = LayerCache(200, certify=2, **SIZES)
    for q, k, v in passes((40, 1, 3, 1), seed, dtype):
        out = cache.step(q, k, v)
    exact = attend(q.double(), cache.keys.double(), cache.values.double()).out[..., -1:, :]
    error = (out[..., -1:, :].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    certified = trust(cache, q[..., -1:, :]).certified
    assert (error <= certified).all()
    assert (certified <= 20 * max(torch.finfo(dtype).eps, 1e-4)).all()


def test_a_cache_all_of_whose_tokens_were_dropped_errs_nowhere():
    cache = LayerCache(40, certify=2, **SIZES)
    q, k, v = passes((20,))[0]
    cache.step(q, k, v)
    cache.drop(20)
    assert trust(cache, q).certified.tolist() == trust(cache, q).estimated.tolist() == torch.zeros(1, 4, 20).tolist()


@pytest.mark.parametrize("loud", [1.0, 1e3])
def test_queries_of_padding_judge_no_eviction(loud: float):
    """Of a row padded at the left, and at a token while it decodes."""
    cache, alone = (LayerCache(12, certify=2, tolerance=0.5, **SIZES) for _ in range(2))
    (q, k, v), *steps = passes((40, *[1] * 12))
    q, k, v = 0.1 * q, 0.1 * k, v
    valid = torch.arange(40) >= 15
    q[..., :15, :] = loud
    cache.step(q, k, v, valid=valid)
    alone.step(*(x[..., 15:, :] for x in (q, k, v)))
    for number, (q, k, v) in enumerate(steps):
        if number == 3:
            cache.step(torch.full_like(q, loud), k, v, valid=torch.zeros(1, dtype=torch.bool))
            continue
        cache.step(0.1 * q, 0.1 * k, v)
        alone.step(0.1 * q, 0.1 * k, v)
    assert cache.budgets == alone.budgets
    assert cache.refused == alone.refused
