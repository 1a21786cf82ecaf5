"""Chunks on a CPU: by PyTorch's flash kernel, which holds no number for each query and token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from momentkv import LayerCache
from momentkv import codes as few
from momentkv.backends import flash as flash_module
from momentkv.backends import get_backend, records
from momentkv.backends import torch as torch_backend
from momentkv.backends.flash import flash, flash_causal, flash_codes
from momentkv.backends.layout import Tiers
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_within, attention_error, unit

BACKEND = get_backend("torch")
DTYPES = {torch.float32: "float32", torch.float64: "float64"}
# Two ways to add up a hundred products in float32, of outputs of about 1: some dozens of roundings of 6e-8.
CLOSE: Any = {"rtol": 1e-5, "atol": 4e-6}


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(x.numel() for x in made)])
        return out


def of_heads(*heads: int, n: int, d: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, d, generator=generator, dtype=dtype) for h in heads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 100, 700])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_causal_attention_is_exact_to_rounding(dtype: torch.dtype, n: int, q_heads: int, kv_heads: int):
    q, k, v = of_heads(q_heads, kv_heads, kv_heads, n=n, dtype=dtype)
    # As models give them: heads behind tokens in memory.
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    state = flash_causal(q, k, v, scale=0.4)
    numbers = [x.double().numpy() for x in (q, k, v)]
    exact = oracle.attend(*numbers, 0.4, np.tril(np.ones((n, n), dtype=bool)))
    error = attention_error(*numbers, exact.lse, unit(DTYPES[dtype]), 0.4)
    assert_within(state.out.numpy(), exact.out, error.out)
    assert_within(state.lse.numpy(), exact.lse, error.lse)
    assert state.out.dtype == state.lse.dtype == dtype


@pytest.mark.parametrize("n", [3, 15, 16, 40])
def test_what_is_no_number_stays_where_it_is(n: int):
    """A query of NaN has an output that is none, a key of NaN spoils the queries that see it, and no others."""
    q, k, v = of_heads(4, 2, 2, n=n)
    exact = flash_causal(q, k, v, scale=0.4)
    for x, spoiled in ((q, slice(1, 2)), (k, slice(1, None))):
        before = x[0, 0, 1, 3].clone()
        x[0, 0, 1, 3] = math.nan
        found = flash_causal(q, k, v, scale=0.4)
        x[0, 0, 1, 3] = before
        heads = 1 if x is q else 2
        bad = torch.zeros(2, 4, n, dtype=torch.bool)
        bad[0, :heads, spoiled] = True
        for one, other in zip(found, exact, strict=True):
            nameless = one.isnan() if one.ndim == 3 else one.isnan().all(-1)
            assert torch.equal(nameless, bad)
            assert torch.equal(one[~bad], other[~bad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_chunk_attends_to_itself_without_logits(dtype: torch.dtype):
    q, k, v = of_heads(4, 2, 2, n=300, dtype=dtype)
    with Largest() as largest:
        state = BACKEND.attend_causal(q[:, :, 100:], k, v, scale=0.4)
    assert largest.numbers == 2 * 4 * 200 * 16
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state.out.dtype == state.lse.dtype == wide
    mask = (torch.arange(300) <= torch.arange(100, 300)[:, None]).expand(2, 2, 2, 200, 300)
    exact = BACKEND.attend(q[:, :, 100:], k, v, scale=0.4, mask=mask)[0]
    torch.testing.assert_close(state.out, exact.out, **CLOSE)
    torch.testing.assert_close(state.lse, exact.lse, **CLOSE)


def test_a_chunk_that_asks_for_a_gradient_gets_one():
    """The kernel gives none of its log-sum-exp, and nothing says so."""
    q, k, v = (x.requires_grad_() for x in of_heads(4, 2, 2, n=20))
    state = BACKEND.attend_causal(q, k, v, scale=0.4)
    state.lse.sum().backward()
    assert bool((q.grad != 0).any())
    assert bool((k.grad != 0).any())


def test_a_chunk_that_asks_for_a_gradient_through_codes_gets_that_of_plain_operators(monkeypatch: pytest.MonkeyPatch):
    tiers, (q,) = coded_tiers([60, 24], False, 4, torch.float32), of_heads(4, n=90)
    gradients = []
    for kernel in (flash_module.FLASH, None):
        monkeypatch.setattr(flash_module, "FLASH", kernel)
        own = q.clone().requires_grad_()
        BACKEND.attend_retained(own, tiers, scale=0.3, weights=False)[0].lse.sum().backward()
        gradients.append(own.grad)
    assert torch.equal(*gradients)


def coded_tiers(budgets: list[int], padded: bool, bits: Any, dtype: torch.dtype) -> Tiers:
    """What a cache stores in few bits; nothing may be read of slots that hold no token."""
    cache = LayerCache(budgets, policy="snapkv", bits=bits, window=8, block=8, statistics_bits=None)
    q, k, v = of_heads(4, 2, 2, n=150, dtype=dtype)
    valid = torch.ones(2, 1, 150, dtype=torch.bool)
    valid[0, :, :110] = not padded  # fewer tokens than the wider head has room for
    cache.step(q, 3 + k, v, valid=valid if padded else None)
    tiers: Tiers = cache.state.tiers()
    assert tiers.coding is not None
    assert (tiers.valid is not None) == padded
    if tiers.valid is not None:
        packed = tiers.layout.pack(~tiers.valid)
        nothing = {x: getattr(tiers.coding, x).masked_fill(packed, torch.nan) for x in ("key_step", "value_step")}
        tiers = tiers._replace(coding=tiers.coding._replace(**nothing))
    return tiers


@pytest.mark.parametrize("how", [records.attend_packed, flash_codes])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [4, (5, 3), 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("budgets", [[60, 24], [60, 10], [40, 40]], ids=str)
def test_codes_are_attended_to_as_by_the_reference(how, padded: bool, bits, dtype: torch.dtype, budgets: list[int]):
    tiers = coded_tiers(budgets, padded, bits, dtype)
    coding, (q,) = tiers.coding, of_heads(4, n=90, dtype=dtype)
    found = how(q, tiers, coding, scale=0.3)
    state, weights = (found, None) if how is flash_codes else found
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state.out.dtype == state.lse.dtype == wide
    near = {"rtol": 1e-12, "atol": 1e-12} if wide == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for head, width in enumerate(tiers.layout.widths):
        own = slice(2 * head, 2 * head + 2)
        one = tiers.records(coding, head)
        mask = None if tiers.valid is None else tiers.valid[:, head, None, None, None, :width]
        steps = {x: getattr(one, x).nan_to_num(0.0) for x in ("key_step", "value_step")}
        one = one._replace(**steps)
        exact, shares = few.attend_codes(q[:, own].double(), one, scale=0.3, mask=mask)
        pairs = [(state.out[:, own], exact.out), (state.lse[:, own], exact.lse)]
        if weights is not None:
            pairs.append((weights[:, head, ..., :width], shares[:, 0]))
        for x, y in pairs:
            torch.testing.assert_close(x.double(), y, **near)


def test_a_head_without_retained_tokens_has_an_empty_state():
    tiers, (q,) = coded_tiers([60, 24], False, 4, torch.float32), of_heads(4, n=90)
    coding, width = tiers.coding, tiers.layout.widths[0]
    steps = {x: getattr(coding, x)[:, :width] for x in ("key_step", "value_step")}
    first = tiers._replace(
        keys=tiers.keys[:, :width],
        values=tiers.values[:, :width],
        layout=dataclasses.replace(tiers.layout, widths=(width, 0)),
        coding=coding._replace(**steps),
    )
    whole, state = (flash_codes(q, x, x.coding, scale=0.3) for x in (tiers, first))
    assert torch.equal(state.out[:, :2], whole.out[:, :2])
    assert bool((state.lse[:, 2:] == -torch.inf).all())
    assert bool((state.out[:, 2:] == 0).all())


@pytest.mark.parametrize("budgets", [[90, 40], [70, 70]], ids=str)
def test_a_chunk_unpacks_a_head_at_a_time(budgets: list[int]):
    tiers, (q,) = coded_tiers(budgets, False, 4, torch.float32), of_heads(4, n=500)
    with Largest() as largest:
        state, weights = BACKEND.attend_stored(q, tiers, scale=0.25)
    assert weights is None
    assert largest.numbers == 2 * 4 * 500 * 16  # outputs of all queries are there in any case
    exact = BACKEND.attend_stored(q, tiers, scale=0.25, weights=True)[0]
    torch.testing.assert_close(state.out, exact.out, **CLOSE)
    torch.testing.assert_close(state.lse, exact.lse, **CLOSE)


@pytest.mark.parametrize("budgets", [[90, 40], [70, 70]], ids=str)
def test_without_that_kernel_a_chunk_attends_to_codes_a_block_of_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch, budgets: list[int]
):
    tiers, (q,) = coded_tiers(budgets, False, 4, torch.float32), of_heads(4, n=500)
    exact = BACKEND.attend_stored(q, tiers, scale=0.25)[0]
    monkeypatch.setattr(torch_backend, "flash_fits_codes", lambda *_: False)
    width = max(tiers.layout.widths)
    for size, most in ((64, 2 * 4 * 64 * width), (10**6, 2 * 4 * 500 * width)):
        monkeypatch.setattr(torch_backend, "QUERIES", size)
        with Largest() as largest:
            state, weights = BACKEND.attend_stored(q, tiers, scale=0.25)
        assert weights is None
        assert largest.numbers == max(most, 2 * 4 * 500 * 16)
        torch.testing.assert_close(state.out, exact.out, **CLOSE)
        torch.testing.assert_close(state.lse, exact.lse, **CLOSE)


def test_few_tokens_hide_no_query_of_nan_in_codes():
    """Of fewer tokens than a register has numbers the kernel gives zeros to a query of NaN."""
    tiers, (q,) = coded_tiers([20, 14], False, 4, torch.float32), of_heads(4, n=80)
    assert max(tiers.layout.widths) < 16
    q[0, 0, 5, 2] = math.nan
    state = BACKEND.attend_stored(q, tiers, scale=0.25)[0]
    assert torch.equal(state.lse.isnan().nonzero(), torch.tensor([[0, 0, 5]]))
    assert bool(state.out[0, 0, 5].isnan().all())
    dense = flash(q, *of_heads(2, 2, n=4), scale=0.25)
    assert bool(dense.lse[0, 0, 5].isnan())
