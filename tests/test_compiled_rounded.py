"""Tokens rounded by the kernel that Numba compiles: to the last bit as records of plain operators give them."""

from __future__ import annotations

import pytest
import torch

from momentkv import LayerCache
from momentkv.backends import torch as torch_backend
from momentkv.backends.base import ArrayBackend
from momentkv.backends.numba import decode as launch
from momentkv.backends.numba.rounded import compiles_rounded, rounded_compiled
from momentkv.cache.coded_budget import CODES
from momentkv.cache.curves import measured_errors
from momentkv.codes import Standard, decode, encode

KINDS = sorted({bits for pair in CODES for bits in pair})


def given(d=64, dtype=torch.float32, *, centred=True, graded=None, n=90):
    """Tokens (2, 3, n, d) of channels unlike each other, which of them are exact, and what they are coded by."""
    make = torch.Generator().manual_seed(d)
    x = torch.randn(2, 3, n, d, generator=make) * (5 * torch.rand(d, generator=make)) + torch.randn(d, generator=make)
    x[0, 1, 3], x[0, 0, 7] = 0.0, x[0, 0, 7] * 1e-4
    standard = Standard.of(x.to(dtype), centred=centred)
    if graded is not None:
        standard = standard.graded(graded, torch.rand(2, 3, d, generator=make))
        assert standard.order is not None
    return x.to(dtype), torch.rand(2, 3, n, generator=make) < 0.1, standard


def plainly(x, standard, bits, exact):
    return ArrayBackend.rounded(torch_backend.TorchBackend(), x, standard, bits, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize(("d", "centred"), [(32, False), (64, True), (96, True)])
def test_is_what_records_give(d, centred, bits, dtype):
    for graded in (None, bits) if centred and bits in (3, 4, 5) else (None,):
        x, exact, standard = given(d, dtype, centred=centred, graded=graded)
        assert compiles_rounded(x, standard)
        got = rounded_compiled(x, standard, bits, exact)
        assert got.dtype == dtype
        assert torch.equal(got, plainly(x, standard, bits, exact))
        assert torch.equal(got[exact], x[exact])
        read = decode(*encode(x, standard, bits), standard, bits).to(dtype)
        assert torch.equal(got[~exact], read[~exact])
        assert not torch.equal(got[~exact], x[~exact])


@pytest.mark.parametrize("graded", [None, 4])
def test_tokens_that_are_not_finite_or_very_large_or_small(graded):
    x, exact, standard = given(graded=graded)
    exact[:] = False
    for place, number in enumerate([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-30, -1e6]):
        x[1, 2, place, 5 * place] = number
    got, plain = rounded_compiled(x, standard, 4, exact), plainly(x, standard, 4, exact)
    assert got[1, 2, :3].isnan().all()
    assert torch.equal(got.nan_to_num(nan=-7.0), plain.nan_to_num(nan=-7.0))
    assert got.isnan().sum() == 3 * x.shape[-1]


def test_threads_share_heads_and_change_nothing(monkeypatch):
    x, exact, standard = given()
    alone = rounded_compiled(x, standard, 5, exact)
    real, asked_for = launch.pool, []
    monkeypatch.setattr(launch, "pool", lambda workers: asked_for.append(workers) or real(workers))
    monkeypatch.setattr(launch, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(rounded_compiled(x, standard, 5, exact), alone)
    assert asked_for == [3] * 3


def test_other_tokens_are_rounded_plainly():
    x, _, standard = given()
    assert compiles_rounded(x, standard)
    assert not compiles_rounded(x[0], standard.map(lambda each: each[0]))
    assert not compiles_rounded(x.double(), standard)
    assert not compiles_rounded(x, standard.map(lambda each: each[:1]))  # one for both rows
    assert not compiles_rounded(x[:, :2], standard)
    assert not compiles_rounded(x, standard.map(lambda each: each.double()))
    assert not compiles_rounded(x[..., :24], standard.map(lambda each: each[..., :24]))
    assert not compiles_rounded(x.clone().requires_grad_(), standard)
    assert not compiles_rounded(x.to("meta"), standard.map(lambda each: each.to("meta")))


@pytest.mark.parametrize("ragged", [False, True])
def test_a_cache_measures_with_them_what_it_measures_without(monkeypatch, ragged):
    make = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, heads, 400, 32, generator=make) for heads in (6, 3, 3))
    cache = LayerCache([80, 60, 100], policy="balanced", correction="summaries", block=8, keep_queries=True)
    if ragged:  # heads then have slots without a token
        cache.step(q[:, :, :100], k[:, :, :100], v[:, :, :100])
    cache.append(k[:, :, 100:], v[:, :, 100:])
    cache.attend(q[:, :, 100:])
    calls, found = [], []
    for compiles in (lambda *x: calls.append(1) or compiles_rounded(*x), lambda *_: False):
        monkeypatch.setattr(torch_backend, "compiles_rounded", compiles)
        found.append(measured_errors(cache, [60, 120, 200], codes=CODES, at=120))
    assert len(calls) == 2 * len(CODES)
    assert found[0] == found[1]
    of_codes = found[0][1]
    assert len(of_codes) == len(CODES)
    assert all(sum(few) > sum(many) for few, many in zip(of_codes[::2], of_codes[2::2], strict=False))


def test_slots_without_a_token_have_no_part_in_means_and_deviations():
    make = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, heads, 200, 32, generator=make) for heads in (6, 3, 3))
    k = k + 4
    found = []
    for budgets in ([60, 60, 60], [60, 60, 100]):  # of the second the first two heads have slots without a token
        cache = LayerCache(budgets, policy="balanced", correction="none", block=8, keep_queries=True)
        cache.step(q[:, :, :100], k[:, :, :100], v[:, :, :100])
        cache.append(k[:, :, 100:], v[:, :, 100:])
        cache.attend(q[:, :, 100:])
        found.append(measured_errors(cache, [60, 120], codes=CODES, at=120)[1])
    for head in (0, 1):  # as parts of what all heads say, which the third has changed
        few, many = (torch.tensor([error[head] for error in errors]) for errors in found)
        assert torch.allclose(few / few[0], many / many[0], rtol=1e-3)


def test_the_callers_default_dtype_and_device_do_not_matter():
    x, exact, standard = given()
    want, default = rounded_compiled(x, standard, 4, exact), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(rounded_compiled(x, standard, 4, exact), want)
        with torch.device("meta"):
            assert torch.equal(rounded_compiled(x, standard, 4, exact), want)
    finally:
        torch.set_default_dtype(default)
