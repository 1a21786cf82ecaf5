"""Gradients of a step's output with respect to its queries, against exact attention and finite differences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from momentkv import AttentionState, LayerCache
from momentkv.distributed import merge_states

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "observed": {"policy": "snapkv", "correction": "none"},
    "paper": {"policy": "momentkv", "correction": "moments"},
    "few bits": {"bits": 4, "exact_window": 2},
    "not corrected": {"policy": "streaming", "correction": "none"},
}


def tokens(n: int, heads: int = 2, d: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(1, h, n, d, dtype=torch.float64, generator=generator) for h in (2 * heads, heads, heads)]


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_evicted_a_gradient_is_that_of_exact_attention(way: str, m: int):
    """PyTorch's fused attention for CPUs gives an lse without a gradient; parts were joined by it."""
    (q, k, v), n = tokens(60), 60 - m
    settings = {name: value for name, value in WAYS[way].items() if name not in ("bits", "exact_window")}
    cache = LayerCache(90, **settings)
    cache.step(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    ours, exact = (q[:, :, n:].clone().requires_grad_() for _ in range(2))
    mask = torch.ones(m, 60, dtype=torch.bool).tril(n)
    cache.step(ours, k[:, :, n:], v[:, :, n:])[..., 0].sum().backward()
    scaled_dot_product_attention(exact, k, v, attn_mask=mask, enable_gqa=True)[..., 0].sum().backward()
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("budget", [24, (20, 30)])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_is_that_of_what_the_step_gives(way: str, m: int, budget: int | tuple[int, int]):
    cache = LayerCache(budget, window=8, block=4, **WAYS[way])
    cache.step(*tokens(50, d=4))
    for _ in range(2):
        cache.step(*tokens(1, d=4))
    q, k, v = tokens(m, d=4)  # a step for each number of the queries, twice
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(cache).step(x, k, v), q.requires_grad_(), atol=1e-6)


def test_static_layers_refuse_gradients_and_go_on():
    cache = LayerCache(20, window=8, block=4, static=True)
    cache.step(*tokens(40))
    twin, (q, k, v) = copy.deepcopy(cache), tokens(1)
    with pytest.raises(RuntimeError, match=r"a static cache changes its buffers in place; run it under torch.no_grad"):
        cache.step(q.clone().requires_grad_(), k, v)
    assert torch.equal(cache.step(q, k, v), twin.step(q, k, v))
    with torch.no_grad():
        cache.step(q.clone().requires_grad_(), k, v)


def test_ranks_merge_no_state_that_needs_a_gradient():
    out = torch.ones(1, 1, 1, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"state requires a gradient.*detach\(\) it"):
        merge_states(AttentionState(out, out[..., 0]))
