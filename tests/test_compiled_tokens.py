"""Records read as tokens by the kernel that Numba compiles: to the last bit as plain operators read them."""

from __future__ import annotations

import pytest
import torch
from test_compiled_decode import CODES, WIDTHS, asked, stored
from torch.utils.flop_counter import FlopCounterMode

from momentkv import LayerCache
from momentkv.backends import torch as torch_backend
from momentkv.backends.base import ArrayBackend
from momentkv.backends.numba import decode as launch
from momentkv.backends.numba.tokens import compiles_tokens, tokens_compiled
from momentkv.cache.packing import view_of


def of_keys(tiers):
    return tiers.keys, tiers.coding.key_step, tiers.coding.key_standard, tiers.coding.bits[0]


def of_values(tiers):
    return tiers.values, tiers.coding.value_step, tiers.coding.value_standard, tiers.coding.bits[1]


def plainly(layout, *records):
    return ArrayBackend.tokens(torch_backend.TorchBackend(), layout, *records)


@pytest.mark.parametrize(("bits", "d", "dv", "graded"), CODES)
def test_is_what_plain_operators_read(bits, d, dv, graded):
    tiers, k, v = stored(bits, d, dv, graded=graded)
    for records, exact in ((of_keys(tiers), k), (of_values(tiers), v)):
        assert compiles_tokens(*records[:3])
        got = tokens_compiled(tiers.layout, *records)
        assert got.dtype == torch.float32
        assert torch.equal(got, plainly(tiers.layout, *records))
        for head, width in enumerate(WIDTHS):
            assert torch.allclose(got[:, head, :width].double(), exact[:, head, :width], rtol=1e-5, atol=1e-5)
            assert (got[:, head, width:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_standards_of_16_bits(dtype):
    tiers, *_ = stored()
    codes, step, standard, bits = of_keys(tiers)
    standard = standard.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    assert compiles_tokens(codes, step, standard)
    got = tokens_compiled(tiers.layout, codes, step, standard, bits)
    assert torch.equal(got, plainly(tiers.layout, codes, step, standard, bits))


def test_a_token_that_is_not_finite_is_alone():
    tiers, *_ = stored()
    codes, step, standard, bits = of_keys(tiers)
    step = step.clone()
    step[1, WIDTHS[0] + 3] = torch.nan  # a token of the last head
    got = tokens_compiled(tiers.layout, codes, step, standard, bits)
    broken = torch.zeros(got.shape[:-1], dtype=torch.bool)
    broken[1, 2, 3] = True
    assert got[broken].isnan().all()
    assert torch.equal(got[~broken], plainly(tiers.layout, *of_keys(tiers))[~broken])


def test_records_that_are_part_of_larger_ones():
    tiers, *_ = stored()
    codes, *others = of_keys(tiers)
    wide = torch.full((*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1] + 5), 255, dtype=torch.uint8)
    wide[:, ::2, : codes.shape[-1]] = codes
    part = wide[:, ::2, : codes.shape[-1]]
    got = tokens_compiled(tiers.layout, part, *others)
    assert torch.equal(got, tokens_compiled(tiers.layout, codes, *others))


def test_threads_share_heads_and_change_nothing(monkeypatch):
    tiers, *_ = stored()
    alone = tokens_compiled(tiers.layout, *of_keys(tiers))
    real, asked_for = launch.pool, []
    monkeypatch.setattr(launch, "pool", lambda workers: asked_for.append(workers) or real(workers))
    monkeypatch.setattr(launch, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(tokens_compiled(tiers.layout, *of_keys(tiers)), alone)
    assert asked_for == [3] * 3


def test_other_records_are_read_plainly():
    tiers, *_ = stored()
    codes, step, standard, _ = of_keys(tiers)
    assert compiles_tokens(codes, step, standard)
    assert not compiles_tokens(codes[0], step[0], standard.map(lambda x: x[0]))
    assert not compiles_tokens(codes, step.float(), standard)
    assert not compiles_tokens(codes, step, standard.map(lambda x: x.double() if x.is_floating_point() else x))
    assert not compiles_tokens(codes, step, standard.map(lambda x: x[..., :24]))
    assert not compiles_tokens(codes, step, standard._replace(deviation=standard.deviation.clone().requires_grad_()))
    assert not compiles_tokens(codes.to("meta"), step.to("meta"), standard.map(lambda x: x.to("meta")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [40, [30, 40, 60]], ids=["even", "by head"])
def test_a_cache_ranks_by_them(monkeypatch, budget, dtype):
    make = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 240, 64, generator=make).to(dtype) for heads in (6, 3, 3))
    calls, caches = [], []
    for compiles in (lambda *records: calls.append(1) or compiles_tokens(*records), lambda *records: False):
        monkeypatch.setattr(torch_backend, "compiles_tokens", compiles)
        cache = LayerCache(budget, policy="balanced", correction="summaries", bits=4, window=8, block=8)
        cache.step(q[:, :, :200], k[:, :, :200], v[:, :, :200])
        for t in range(200, 240):
            cache.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        caches.append(cache)
    assert len(calls) >= 2 * 5  # keys and values, once in a block
    one, other = (cache.view() for cache in caches)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


def test_a_view_of_records_is_zero_where_no_token_is():
    make = torch.Generator().manual_seed(6)
    k, v = (torch.randn(2, 3, 200, 64, generator=make) for _ in range(2))
    cache = LayerCache([30, 40, 60], policy="balanced", correction="summaries", bits=4, window=8, block=8)
    cache.step(torch.randn(2, 6, 200, 64, generator=make), k, v)
    view = view_of(cache.stored_state)
    assert torch.equal(view.both, torch.stack([view.keys, view.values]))
    assert (view.both[:, view.positions < 0] == 0).all()
    assert (view.both[:, view.positions >= 0] != 0).any(-1).all()


def test_padded_rows_are_ranked_whatever_lies_in_slots_without_a_token():
    make = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, heads, 120, 64, generator=make) for heads in (6, 3, 3))
    valid = torch.ones(2, 1, 120, dtype=torch.bool)
    valid[1, :, :80] = False  # fewer tokens than the budget
    cache = LayerCache(60, policy="balanced", correction="summaries", bits=4, window=8, block=8)
    cache.step(q, k, v, valid=valid)
    before, state = cache.importance(), cache.stored_state
    empty = torch.cat([~state.retained_valid()[:, head, :width] for head, width in enumerate(state.layout.widths)], 1)
    assert empty[1].any()
    steps = {name: getattr(state, name).masked_fill(empty, torch.nan) for name in ("key_step", "value_step")}
    cache.take(state.changed(**steps))
    real = cache.view().positions >= 0
    assert torch.equal(cache.importance()[real], before[real])


def test_what_is_counted_or_transformed_are_operators(monkeypatch):
    tiers, *_ = stored()
    q, records = asked(tiers), of_keys(tiers)[:3]

    def compiled(_=None):
        return launch.compiles(q, tiers), compiles_tokens(*records)

    assert compiled() == (True, True)
    with FlopCounterMode(display=False):
        assert compiled() == (False, False)
    told = []
    torch.func.vmap(lambda x: told.append(compiled()) or x)(torch.zeros(2))
    assert told == [(False, False)]
    monkeypatch.setattr(launch, "has_numba", lambda: False)
    assert compiled() == (False, False)
